//! The watchdog: no backup runs that nobody works on.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::running::Running;
use super::service::Backups;
use super::sna::Life;
use crate::catalog::BackupFilter;
use crate::model::{BackupState, DiskState};

/// Time between two looks.
const TICK: Duration = Duration::from_millis(500);
/// Time between two applications of policies.
const POLICIES: Duration = Duration::from_secs(3600);
/// Looks after which counters are written to the catalog, where they changed.
const PERSIST: u64 = 10;

/// Watches until `stop` is hung up.
pub fn watch(backups: &Backups, stop: &Receiver<()>) {
    let mut tick = 0;
    while stop.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        tick += 1;
        backups.look(tick % PERSIST == 0);
    }
}

/// Makes copies that are asked for, and does what policies say, until `stop` is hung up.
pub fn keep(backups: &Backups, stop: &Receiver<()>) {
    let mut applied: Option<Instant> = None;
    while stop.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        backups.make_copies();
        if applied.is_none_or(|at| at.elapsed() >= POLICIES) {
            applied = Some(Instant::now());
            if let Err(failure) = backups.apply_policies(false, "hub") {
                tracing::error!(%failure, "policies cannot be applied");
            }
        }
    }
}

/// Starts queued backups as there is room for them, until `stop` is hung up.
pub fn dispatch(backups: &Backups, stop: &Receiver<()>) {
    while stop.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        if let Err(failure) = backups.dispatch(None) {
            tracing::error!(%failure, "queued backups cannot be started");
        }
    }
}

impl Backups {
    /// Looks at every running backup once.
    pub fn look(&self, persist: bool) {
        let all: Vec<Arc<Running>> = self.running().values().cloned().collect();
        for running in all {
            if persist && let Some(counters) = running.changed_counters() {
                let told = running.last_telemetry();
                let told = told.as_ref().map(|(t, at)| (t.current_phase.as_str(), *at));
                if let Err(error) = self.catalog.note_progress(&running.id, &counters, told) {
                    tracing::error!(%error, "progress cannot be recorded");
                }
            }
            self.look_at(&running);
        }
        if persist {
            self.finish_what_was_begun();
        }
    }

    /// Tries again what only goes forward and could not, such as with a repository that was away.
    fn finish_what_was_begun(&self) {
        use BackupState::{Deleting, Sealing};
        let filter =
            BackupFilter { states: Some(vec![Deleting, Sealing]), ..BackupFilter::default() };
        let Ok(begun) = self.catalog.backups(&filter) else { return };
        for backup in begun.iter().filter(|backup| self.find_running(&backup.id).is_none()) {
            let finished = match backup.state {
                Deleting => self.delete_files(backup),
                _ => self.publish_sealed(backup),
            };
            if let Err(failure) = finished {
                tracing::warn!(backup = %backup.id, %failure, "not yet");
            }
        }
    }

    fn look_at(&self, running: &Running) {
        let still = running.observe();
        // Nobody is kept from completing a disk by an appliance that does not answer.
        let gone = running.agent == "sna"
            && running.poll_due(self.settings.agent_poll)
            && self.sna_life.life(&running.id) == Life::Gone;
        let turn = self.turn(&running.id);
        // Who has the turn is at work.
        let Ok(_held) = turn.try_lock() else { return };
        let Ok(backup) = self.backup(&running.id) else { return };
        if backup.state == BackupState::Sealing {
            // Its files could not all get their names, or the catalog failed: try again.
            if let Err(failure) = self.finish_if_sealed(running) {
                tracing::error!(backup = %running.id, %failure, "cannot be completed yet");
            }
            return;
        }
        if backup.state != BackupState::Receiving {
            return;
        }
        let receiving = backup.disks.iter().filter(|disk| disk.state == DiskState::Receiving);
        let unfinished: Vec<u32> = receiving.map(|disk| disk.disk_id).collect();
        if let Some(why) = self.is_dead(running, still, gone, &unfinished) {
            self.end_in_turn(&running.id, BackupState::Failed, &why, true);
        }
    }

    /// Why nobody works on it any more.
    fn is_dead(
        &self,
        running: &Running,
        still: Duration,
        gone: bool,
        unfinished: &[u32],
    ) -> Option<String> {
        let failure = || {
            let mut failures = running.disks.iter().rev().filter_map(|disk| disk.device.failure());
            failures.next().map_or(String::new(), |text| format!("; the last error was: {text}"))
        };
        if let Some(alone) = running.alone_for(unfinished)
            && alone >= self.settings.reconnect
        {
            return Some(format!(
                "the agent closed its connections in the middle of a disk, {} s ago, and did not \
                 come back{}",
                alone.as_secs(),
                failure()
            ));
        }
        if gone {
            // A process that is there and does nothing is not alive for that: only "gone" counts.
            return Some(format!("the capture appliance says that the agent is gone{}", failure()));
        }
        (still >= self.settings.stall).then(|| {
            format!(
                "nothing moved for {} s: no bytes, no telemetry, no question{}",
                still.as_secs(),
                failure()
            )
        })
    }
}
