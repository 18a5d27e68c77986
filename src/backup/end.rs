//! Ends that are none: failed and cancelled backups, and what is taken away with them.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use super::error::Failure;
use super::running::Running;
use super::service::Backups;
use crate::catalog::Backup;
use crate::model::BackupState;
use crate::repository::{DiskFiles, Root, remove};

/// Where the files of failed backups are kept, inside a repository.
const QUARANTINE: &str = ".quarantine";

impl Backups {
    /// Cancels a backup.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where it has ended.
    pub fn cancel(&self, id: &str, actor: &str) -> Result<Backup, Failure> {
        let backup = self.backup(id)?;
        if !backup.state.is_running() || backup.state == BackupState::Sealing {
            return Err(Self::wrong_state(&backup, "it cannot be cancelled any more"));
        }
        self.record(actor, "backup.cancelled", id, "cancelled");
        self.end_badly(id, BackupState::Cancelled, &format!("cancelled by {actor}"), true);
        self.backup(id)
    }

    /// Ends a backup without a restore point and takes away what it has. One that has ended stays as
    /// it is.
    pub(super) fn end_badly(&self, id: &str, state: BackupState, why: &str, agent: bool) {
        match self.find_running(id) {
            Some(running) => {
                let _turn = running.turn();
                self.end_in_turn(&running, state, why, agent);
            }
            None => self.clear_up(id, state, why, agent),
        }
    }

    /// The same for whoever holds the turn.
    pub(super) fn end_in_turn(
        &self,
        running: &Running,
        state: BackupState,
        why: &str,
        agent: bool,
    ) {
        let still = self
            .backup(&running.id)
            .is_ok_and(|b| b.state.is_running() && b.state != BackupState::Sealing);
        if !still {
            return;
        }
        self.running().remove(&running.id);
        for disk in &running.disks {
            disk.device.refuse_changes();
            if let Err(error) = self
                .publisher
                .withdraw(&disk.export.name, self.publisher.server().limits.shutdown_notice)
            {
                // The image is going away anyway.
                tracing::debug!(export = %disk.export.name, %error, "closed with an error");
            }
        }
        self.clear_up(&running.id, state, why, agent);
    }

    fn clear_up(&self, id: &str, state: BackupState, why: &str, agent: bool) {
        let Ok(backup) = self.backup(id) else { return };
        let mut why = why.to_owned();
        if let Err(error) = self.remove_unfinished(&backup) {
            why = format!("{why}; its files could not be removed: {error}");
        }
        match self.catalog.fail_backup(id, state, &why) {
            Ok(true) => self.record("hub", &format!("backup.{state}"), id, &why),
            Ok(false) => {}
            Err(error) => tracing::error!(backup = id, %error, "the end cannot be recorded"),
        }
        if agent && backup.agent == "sna" {
            // The appliance may be gone too; nobody waits for it.
            let sna = super::sna::Sna::new(&self.settings.sna_url, self.settings.sna_timeout);
            let id = id.to_owned();
            std::thread::spawn(move || sna.clean_up(&id));
        }
    }

    /// Removes the files of a backup that is no restore point, or puts them aside.
    pub(super) fn remove_unfinished(&self, backup: &Backup) -> Result<(), Failure> {
        let root = self.root_of(backup)?;
        for disk in &backup.disks {
            let files = root.files_at(&disk.path)?;
            if self.settings.quarantine {
                put_aside(&root, &files, &backup.id, disk.disk_id);
            }
            remove(&files)?;
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
    let put = || {
        fs::create_dir_all(&directory)?;
        fs::rename(&image, directory.join(format!("disk-{disk}.qcow2")))
    };
    match put() {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(image = %image.display(), %error, "not kept in quarantine");
        }
        _ => {}
    }
}
