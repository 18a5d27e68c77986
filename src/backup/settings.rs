//! Every bound and choice of backups, with its default.

use std::time::Duration;

/// How backups are made; all can be configured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Host in the targets that the agent is told: as seen through its tunnel.
    pub nbd_host: String,
    /// The shared NBD port in those targets, unless the export has one of its own.
    pub nbd_port: u16,
    /// Base of the capture appliance's API.
    pub sna_url: String,
    /// Time for a call of the capture appliance.
    pub sna_timeout: Duration,
    /// Time between questions whether an agent lives.
    pub agent_poll: Duration,
    /// Do not store data that the chain below has already.
    pub skip_unchanged: bool,
    /// Backups that run at a time, in all.
    pub running: usize,
    /// Backups that run at a time in one repository.
    pub running_per_repository: usize,
    /// Time without any sign of life after which a backup fails.
    pub stall: Duration,
    /// Time without any connection, in the middle of a disk, after which a backup fails.
    pub reconnect: Duration,
    /// Bytes that a new backup must leave free in its repository.
    pub min_free: u64,
    /// Keep what a failed backup received, in the repository's `.quarantine`.
    pub quarantine: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            nbd_host: "127.0.0.1".into(),
            nbd_port: 10809,
            sna_url: "http://127.0.0.1:9081".into(),
            sna_timeout: Duration::from_secs(30),
            agent_poll: Duration::from_secs(30),
            skip_unchanged: true,
            running: 16,
            running_per_repository: 8,
            stall: Duration::from_secs(15 * 60),
            reconnect: Duration::from_secs(60),
            min_free: 1 << 30,
            quarantine: false,
        }
    }
}
