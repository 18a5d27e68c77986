//! The service: what all parts of it share, and what others ask it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::error::{Failure, FailureKind};
use super::plan::{Plan, Request};
use super::running::{Progress, Running};
use super::settings::Settings;
use super::sna::Sna;
use crate::catalog::{Backup, BackupFilter, Catalog};
use crate::model::{BackupState, BackupType, DiskState, Timestamp, export_alias};
use crate::nbd::publisher::Publisher;
use crate::repository::Root;
use crate::secrets::Secrets;

/// Longest time for the question whether an agent lives.
const LIFE: Duration = Duration::from_secs(5);

/// Time between two looks at a backup that another thread has taken, and does not launch yet.
const CLAIMED: Duration = Duration::from_millis(2);

/// Backups of VMs. Calls block, some of them for as long as the disk takes.
pub struct Backups {
    pub(super) catalog: Arc<Catalog>,
    pub(super) publisher: Arc<Publisher>,
    pub(super) secrets: Arc<Secrets>,
    pub(super) settings: Settings,
    pub(super) sna: Sna,
    /// For the question whether an agent lives, which must not take long.
    pub(super) sna_life: Sna,
    pub(super) running: Mutex<BTreeMap<String, Arc<Running>>>,
    /// Who changes a backup: see [`Backups::turn`].
    pub(super) turns: Mutex<BTreeMap<String, Weak<Mutex<()>>>>,
    /// Held while it is decided which queued backup starts.
    pub(super) dispatch: Mutex<()>,
}

impl Backups {
    /// A service over these; [`recover`](Self::recover) comes before anything else.
    pub fn new(
        catalog: Arc<Catalog>,
        publisher: Arc<Publisher>,
        secrets: Arc<Secrets>,
        settings: Settings,
    ) -> Self {
        let sna = Sna::new(&settings.sna_url, settings.sna_timeout);
        let sna_life = Sna::new(&settings.sna_url, settings.sna_timeout.min(LIFE));
        let (running, turns, dispatch) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { catalog, publisher, secrets, settings, sna, sna_life, running, turns, dispatch }
    }

    /// The catalog.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// What serves the exports.
    pub fn publisher(&self) -> &Arc<Publisher> {
        &self.publisher
    }

    /// What encrypts credentials.
    pub fn secrets(&self) -> &Arc<Secrets> {
        &self.secrets
    }

    /// How backups are made.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn running(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lock of a backup. Whoever changes its state, or that of a disk, holds it: from launch to
    /// agent, from sealing to restore point, from the decision that it has failed to the last file.
    pub(super) fn turn(&self, id: &str) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(id).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(Mutex::new(()));
        turns.insert(id.to_owned(), Arc::downgrade(&turn));
        turn
    }

    pub(super) fn find_running(&self, id: &str) -> Option<Arc<Running>> {
        self.running().get(id).cloned()
    }

    pub(super) fn record(&self, actor: &str, action: &str, subject: &str, text: &str) {
        tracing::info!(%actor, %action, %subject, "{text}");
        if let Err(error) = self.catalog.event(actor, action, subject, text) {
            tracing::error!(%error, "an event could not be recorded");
        }
    }

    /// The backup of that id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn backup(&self, id: &str) -> Result<Backup, Failure> {
        self.catalog.backup(id)?.ok_or_else(|| Failure::not_found("backup", id))
    }

    pub(super) fn root_of(&self, backup: &Backup) -> Result<Root, Failure> {
        let found = self.catalog.repository(&backup.repository_id)?;
        let found = found.ok_or_else(|| Failure::not_found("repository", &backup.repository_id))?;
        Ok(Root::open(found.path.as_ref())?.0)
    }

    /// Plans a backup and starts it, or lets it wait for its turn. On return the agent has been
    /// started, or the backup is queued.
    ///
    /// # Errors
    /// Why it was refused; nothing is left of it then but its row, where the agent failed.
    pub fn start(&self, request: &Request, actor: &str) -> Result<Backup, Failure> {
        let plan = self.plan(request)?;
        let backup = self.enter(plan, request)?;
        let kind = backup.kind;
        let text = match &backup.full_reason {
            None => format!("{kind} backup of VM '{}' asked for", backup.vm_name),
            Some(why) => {
                format!("full instead of incremental backup of '{}': {why}", backup.vm_name)
            }
        };
        self.record(actor, "backup.requested", &backup.id, &text);
        self.dispatch(Some(&backup.id))?;
        self.launched(&backup.id)
    }

    /// A backup once nobody launches it any more: the thread that looks for queued ones may have taken it
    /// before the one that asked for it.
    fn launched(&self, id: &str) -> Result<Backup, Failure> {
        loop {
            let turn = self.turn(id);
            drop(turn.lock().unwrap_or_else(PoisonError::into_inner));
            let backup = self.backup(id)?;
            if backup.state != BackupState::Preparing {
                return Ok(backup);
            }
            std::thread::sleep(CLAIMED);
        }
    }

    fn enter(&self, plan: Plan, request: &Request) -> Result<Backup, Failure> {
        // Catalogued names have a resolution of a second.
        let mut named = Timestamp::now();
        let taken = |named| -> Result<bool, Failure> {
            let (vm, first) = (&plan.vm.id, plan.disks.first().map_or(0, |d| d.disk.disk_id));
            Ok(self.catalog.alias_is_known(&export_alias(vm, first, plan.kind, named))?)
        };
        while taken(named)? {
            named = named.after(Duration::from_secs(1));
        }
        let backup = plan.into_backup(request, named);
        self.catalog.add_backup(&backup)?;
        Ok(backup)
    }

    /// Starts queued backups while there is room for them, the oldest first. Those that cannot be
    /// started have failed.
    ///
    /// # Errors
    /// Why `own` could not be started, or the catalog cannot be read.
    pub fn dispatch(&self, own: Option<&str>) -> Result<(), Failure> {
        let mut outcome = Ok(());
        while let Some(next) = self.claim_next()? {
            let launched = self.launch(&next);
            if own == Some(&next.id) {
                outcome = launched;
            } else if let Err(failure) = launched {
                tracing::error!(backup = %next.id, %failure, "a queued backup could not be started");
            }
        }
        outcome
    }

    /// The next backup that may start, now in state `preparing`.
    fn claim_next(&self) -> Result<Option<Backup>, Failure> {
        let _one = self.dispatch.lock().unwrap_or_else(PoisonError::into_inner);
        use BackupState::{Preparing, Queued, Receiving, Sealing};
        let states = Some(vec![Queued, Preparing, Receiving, Sealing]);
        let open = self.catalog.backups(&BackupFilter { states, ..BackupFilter::default() })?;
        let (queued, running): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|backup| backup.state == Queued);
        if running.len() >= self.settings.running {
            return Ok(None);
        }
        // They come newest first.
        for backup in queued.into_iter().rev() {
            let beside = running.iter().filter(|r| r.repository_id == backup.repository_id).count();
            if beside < self.settings.running_per_repository
                && self.catalog.set_state(&backup.id, &[Queued], Preparing)?
            {
                return Ok(Some(backup));
            }
        }
        Ok(None)
    }

    /// How far a backup is.
    pub fn progress(&self, backup: &Backup) -> Progress {
        let unchanged = backup.disks.iter().map(|disk| disk.bytes_unchanged).sum();
        let total_bytes = backup.disks.iter().map(|disk| disk.capacity).sum();
        match self.find_running(&backup.id) {
            Some(running) => {
                let full = backup.kind == BackupType::Full;
                // Disks whose device counts are not counted twice.
                let finished = backup.disks.iter().filter(|disk| {
                    let counted = full && running.disk(disk.disk_id).is_some();
                    disk.state != DiskState::Receiving && !counted
                });
                let before = finished.map(|disk| disk.capacity).sum();
                let mut progress = running.progress(full, (before, total_bytes));
                // Disks that were sealed before the hub was started again are not in its counters.
                progress.bytes_transferred =
                    progress.bytes_transferred.max(backup.bytes_transferred);
                progress.bytes_unchanged = progress.bytes_unchanged.max(unchanged);
                progress
            }
            None => Progress {
                bytes_transferred: backup.bytes_transferred,
                bytes_unchanged: unchanged,
                total_bytes,
                percent: if backup.state == BackupState::Completed { 100.0 } else { 0.0 },
                agent_phase: backup.agent_phase.clone(),
                last_telemetry_at: backup.last_telemetry_at,
                ..Progress::default()
            },
        }
    }

    /// Lets go of all backups, for a hub that ends. They go on when it is started
    /// again, as far as their agents do.
    pub fn stop(&self) {
        let all: Vec<_> = self.running().values().cloned().collect();
        for running in all {
            // A disk that is being sealed is waited for: half of it would be worth nothing.
            let turn = self.turn(&running.id);
            let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
            self.running().remove(&running.id);
            if let Some(counters) = running.changed_counters() {
                let _ = self.catalog.note_progress(&running.id, &counters, None);
            }
        }
    }

    /// The targets of a backup, as the agent is told: `KEY:nbd://HOST:PORT/EXPORT`, comma-separated.
    pub fn targets(&self, backup: &Backup) -> String {
        let Settings { nbd_host, nbd_port, .. } = &self.settings;
        let target = |disk: &crate::catalog::DiskBackup| {
            let port = disk.port.unwrap_or(*nbd_port);
            format!("{}:nbd://{nbd_host}:{port}/{}", disk.disk_key, disk.export_name)
        };
        backup.disks.iter().map(target).collect::<Vec<_>>().join(",")
    }

    /// A conflict that says in which state a backup is.
    pub(super) fn wrong_state(backup: &Backup, wanted: &str) -> Failure {
        let message = format!("backup {} is {}: {wanted}", backup.id, backup.state);
        Failure::new(FailureKind::Conflict, message, backup.error.clone().unwrap_or_default())
    }
}
