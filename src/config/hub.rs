//! The configuration of the hub: a TOML file, every key optional, unknown keys refused.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// What the file says. `docs/operations.md` has every key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HubConfig {
    /// Where the hub keeps what it needs; the command line comes first.
    pub data_dir: Option<PathBuf>,
    /// Serving disks.
    pub nbd: NbdConfig,
    /// Serving the API.
    pub api: ApiConfig,
    /// The capture appliance.
    pub agent: AgentConfig,
    /// Making backups.
    pub backups: BackupsConfig,
    /// Using restore points.
    pub restore: RestoreConfig,
}

/// `[nbd]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NbdConfig {
    /// Addresses that serve every export; the first one's port is told to agents.
    pub listen: Vec<SocketAddr>,
    /// Unix socket that serves every export.
    pub unix: Option<PathBuf>,
    /// Ports for single exports, `A-B`.
    pub pool: String,
    /// Give each export a port of the pool too.
    pub port_per_export: bool,
    /// Host that agents are told, as seen through their tunnel.
    pub advertised_host: String,
    /// Port that agents are told, where the tunnel changes it.
    pub advertised_port: Option<u16>,
    /// Memory for payloads in all.
    pub buffers: String,
}

impl Default for NbdConfig {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 10809))],
            unix: None,
            pool: "10100-10200".into(),
            port_per_export: false,
            advertised_host: "127.0.0.1".into(),
            advertised_port: None,
            buffers: "256M".into(),
        }
    }
}

/// `[api]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// The agents' door: callbacks need no token here.
    pub agent_listen: SocketAddr,
    /// The admins' door, where it is another one.
    pub admin_listen: Option<SocketAddr>,
    /// Certificate of the admins' door, PEM.
    pub tls_certificate: Option<PathBuf>,
    /// Its private key, PEM.
    pub tls_key: Option<PathBuf>,
    /// Listen on addresses that others can reach, without TLS.
    pub allow_insecure: bool,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            agent_listen: SocketAddr::from(([127, 0, 0, 1], 8082)),
            admin_listen: None,
            tls_certificate: None,
            tls_key: None,
            allow_insecure: false,
        }
    }
}

/// `[agent]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// Base of the capture appliance's API, as seen through its tunnel.
    pub url: String,
    /// Seconds for a call.
    pub timeout_seconds: u64,
    /// Seconds between questions whether an agent lives.
    pub poll_seconds: u64,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self { url: "http://127.0.0.1:9081".into(), timeout_seconds: 30, poll_seconds: 30 }
    }
}

/// `[backups]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupsConfig {
    /// Backups that run at a time.
    pub running: usize,
    /// The same in one repository.
    pub running_per_repository: usize,
    /// Seconds without any sign of life after which a backup fails.
    pub stall_seconds: u64,
    /// Seconds without a connection, in the middle of a disk, after which a backup fails.
    pub reconnect_seconds: u64,
    /// Room that a new backup must leave in its repository.
    pub min_free: String,
    /// Do not store data that the chain below has already.
    pub skip_unchanged: bool,
    /// Keep what failed backups received, in `.quarantine` of the repository.
    pub quarantine: bool,
}

impl Default for BackupsConfig {
    fn default() -> Self {
        Self {
            running: 16,
            running_per_repository: 8,
            stall_seconds: 900,
            reconnect_seconds: 60,
            min_free: "1G".into(),
            skip_unchanged: true,
            quarantine: false,
        }
    }
}

/// `[restore]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreConfig {
    /// Restore points that are exported at a time.
    pub exports: usize,
    /// Seconds without a connection after which such an export is taken away.
    pub idle_seconds: u64,
    /// Restore points whose files can be read at a time.
    pub mounts: usize,
    /// Seconds without a request after which such a mount ends.
    pub mount_idle_seconds: u64,
    /// Memory of the process that reads a mount's disks.
    pub worker_memory: String,
    /// Seconds that such a process has for an answer.
    pub request_seconds: u64,
    /// Directory below which mounts show their files, where that is asked for; by default one in the
    /// hub's data directory.
    pub mount_root: Option<PathBuf>,
}

impl Default for RestoreConfig {
    fn default() -> Self {
        Self {
            exports: 32,
            idle_seconds: 3600,
            mounts: 32,
            mount_idle_seconds: 3600,
            worker_memory: "1G".into(),
            request_seconds: 30,
            mount_root: None,
        }
    }
}

impl HubConfig {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// A sentence with file, line and reason.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| format!("cannot read the configuration '{}': {e}", path.display()))?;
        Self::parse(&text).map_err(|e| format!("'{}': {e}", path.display()))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// A sentence with line and reason.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), String> {
        if self.nbd.listen.is_empty() && self.nbd.unix.is_none() {
            return Err("nbd.listen is empty and there is no nbd.unix: nobody could connect".into());
        }
        let numbers = [
            ("agent.timeout_seconds", self.agent.timeout_seconds),
            ("agent.poll_seconds", self.agent.poll_seconds),
            ("backups.stall_seconds", self.backups.stall_seconds),
            ("backups.reconnect_seconds", self.backups.reconnect_seconds),
            ("restore.exports", self.restore.exports as u64),
            ("restore.idle_seconds", self.restore.idle_seconds),
            ("restore.mounts", self.restore.mounts as u64),
            ("restore.mount_idle_seconds", self.restore.mount_idle_seconds),
            ("restore.request_seconds", self.restore.request_seconds),
            ("backups.running", self.backups.running as u64),
            ("backups.running_per_repository", self.backups.running_per_repository as u64),
        ];
        if let Some((key, _)) = numbers.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} must be 1 or more"));
        }
        if self.api.tls_certificate.is_some() != self.api.tls_key.is_some() {
            return Err("api.tls_certificate and api.tls_key belong together: give both".into());
        }
        let tls = self.api.tls_certificate.is_some();
        let reachable = |name: &str, address: SocketAddr, encrypted: bool| {
            if address.ip().is_loopback() || encrypted || self.api.allow_insecure {
                return Ok(());
            }
            Err(format!(
                "{name} = {address} could be reached by others without TLS: use a loopback address, \
                 configure TLS, or set api.allow_insecure = true"
            ))
        };
        reachable("api.agent_listen", self.api.agent_listen, false)?;
        if let Some(address) = self.api.admin_listen {
            reachable("api.admin_listen", address, tls)?;
        } else if tls {
            return Err(
                "api.tls_certificate needs api.admin_listen: the agents' door has no TLS".into()
            );
        }
        for address in &self.nbd.listen {
            reachable("nbd.listen", *address, false)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_configured_is_the_default_and_listens_on_loopback() {
        let config = HubConfig::parse("").unwrap();
        assert_eq!(config, HubConfig::default());
        assert!(config.api.agent_listen.ip().is_loopback());
    }

    #[test]
    fn unknown_keys_and_impossible_values_are_refused_with_their_names() {
        for (text, word) in [
            ("[backups]\nrunnning = 3", "runnning"),
            ("[backups]\nrunning = 0", "backups.running"),
            ("[restore]\nmounts = 0", "restore.mounts"),
            ("[nbd]\nlisten = []", "nbd.listen"),
            ("[api]\ntls_key = \"k\"", "tls_certificate"),
            ("[api]\nagent_listen = \"nowhere\"", "agent_listen"),
        ] {
            let error = HubConfig::parse(text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn addresses_that_others_reach_need_tls_or_a_word() {
        let open = "[api]\nadmin_listen = \"0.0.0.0:8443\"\n";
        assert!(HubConfig::parse(open).unwrap_err().contains("TLS"));
        let keys = "tls_certificate = \"c\"\ntls_key = \"k\"\n";
        assert!(HubConfig::parse(&format!("{open}{keys}")).is_ok());
        assert!(HubConfig::parse(&format!("{open}allow_insecure = true")).is_ok());
        assert!(HubConfig::parse("[nbd]\nlisten = [\"0.0.0.0:10809\"]").is_err());
        assert!(HubConfig::parse("[api]\nagent_listen = \"0.0.0.0:8082\"").is_err());
    }
}
