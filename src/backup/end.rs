//! Ends that are none: failed and cancelled backups, and what is taken away with them.

use std::fs;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::error::Failure;
use super::running::Running;
use super::service::Backups;
use crate::catalog::Backup;
use crate::model::BackupState;
use crate::repository::{DiskFiles, Root, remove_unfinished};

/// Where the files of failed backups are kept, inside a repository.
const QUARANTINE: &str = ".quarantine";

impl Backups {
    /// Cancels a backup. One that is being prepared is waited for.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where it has ended, or is about to be complete.
    pub fn cancel(&self, id: &str, actor: &str) -> Result<Backup, Failure> {
        let turn = self.turn(id);
        let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let why = format!("cancelled by {actor}");
        if !self.end_in_turn(id, BackupState::Cancelled, &why, true) {
            let backup = self.backup(id)?;
            return Err(Self::wrong_state(&backup, "it cannot be cancelled any more"));
        }
        self.backup(id)
    }

    /// Ends a backup without a restore point and takes away what it has; whether it did. One that
    /// has ended, or only goes forward, stays as it is. The caller holds its turn.
    pub(super) fn end_in_turn(
        &self,
        id: &str,
        state: BackupState,
        why: &str,
        tell_agent: bool,
    ) -> bool {
        use BackupState::{Preparing, Queued, Receiving};
        let Ok(backup) = self.backup(id) else { return false };
        if !matches!(backup.state, Queued | Preparing | Receiving) {
            return false;
        }
        let running = self.running().remove(id);
        for disk in running.iter().flat_map(|running| &running.disks) {
            disk.device.refuse_changes();
            let notice = self.publisher.server().limits.shutdown_notice;
            if let Err(error) = self.publisher.withdraw(&disk.export.name, notice) {
                // The image is going away anyway.
                tracing::debug!(export = %disk.export.name, %error, "closed with an error");
            }
            if let Some(error) = disk.device.failure()
                && let Err(error) = self.catalog.note_disk_error(id, disk.disk_id, &error)
            {
                tracing::error!(backup = id, %error, "an error cannot be recorded");
            }
        }
        let mut why = why.to_owned();
        if let Err(error) = self.remove_unfinished(&backup) {
            why = format!("{why}; its files could not be removed: {error}");
        }
        match self.catalog.fail_backup(id, state, &why) {
            Ok(_) => self.record("hub", &format!("backup.{state}"), id, &why),
            Err(error) => tracing::error!(backup = id, %error, "the end cannot be recorded"),
        }
        if tell_agent && backup.agent == "sna" && backup.state != Queued {
            // The appliance may be gone too; nobody waits for it.
            let sna = super::sna::Sna::new(&self.settings.sna_url, self.settings.sna_timeout);
            let id = id.to_owned();
            std::thread::spawn(move || sna.clean_up(&id));
        }
        true
    }

    /// Removes the files of a backup that is no restore point, or puts them aside.
    pub(super) fn remove_unfinished(&self, backup: &Backup) -> Result<(), Failure> {
        let root = self.root_of(backup)?;
        for disk in &backup.disks {
            let files = root.files_at(&disk.path)?;
            if self.settings.quarantine {
                put_aside(&root, &files, &backup.id, disk.disk_id);
            }
            remove_unfinished(&files)?;
        }
        Ok(())
    }

    /// Takes the exports of a completed backup away, without waiting for idle clients.
    pub(super) fn close_exports(&self, running: &Running) {
        for disk in &running.disks {
            let publisher = Arc::clone(&self.publisher);
            let name = disk.export.name.clone();
            let close = move || {
                if let Err(error) = publisher.withdraw(&name, Duration::from_secs(1)) {
                    tracing::debug!(export = %name, %error, "closed with an error");
                }
            };
            if std::thread::Builder::new().name("close".into()).spawn(close).is_err() {
                tracing::error!("no thread to close an export");
            }
        }
    }
}

fn put_aside(root: &Root, files: &DiskFiles, backup: &str, disk: u32) {
    let directory = root.directory().join(QUARANTINE).join(backup);
    let image = DiskFiles::partial(&files.image());
    if !image.exists() {
        return;
    }
    let put = || {
        fs::create_dir_all(&directory)?;
        fs::rename(&image, directory.join(format!("disk-{disk}.qcow2")))
    };
    if let Err(error) = put() {
        tracing::warn!(image = %image.display(), %error, "not kept in quarantine");
    }
}
