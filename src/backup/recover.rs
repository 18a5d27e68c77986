//! The truth about every backup after a start.

use std::sync::Arc;

use super::error::Failure;
use super::service::Backups;
use super::sna::{Life, Sna};
use crate::catalog::{Backup, BackupFilter};
use crate::export;
use crate::model::{BackupState, DiskState, Format, Source};
use crate::nbd::publisher::Publication;
use crate::repository::Root;

/// Time for the question whether an agent lives, at a start.
const ASK: std::time::Duration = std::time::Duration::from_secs(2);

impl Backups {
    /// Brings every backup to a true state, and makes exports visible again. Called once, before
    /// anybody can connect.
    ///
    /// # Errors
    /// When the catalog cannot be read.
    pub fn recover(&self) -> Result<(), Failure> {
        let all = self.catalog.backups(&BackupFilter::default())?;
        let sna = Sna::new(&self.settings.sna_url, ASK);
        let mut reachable = true;
        for backup in all.iter().rev() {
            let outcome = match backup.state {
                BackupState::Completed | BackupState::Queued => Ok(()),
                BackupState::Failed | BackupState::Cancelled => self.sweep(backup),
                BackupState::Sealing => self.publish_sealed(backup),
                BackupState::Deleting => self.delete_files(backup),
                BackupState::Preparing => {
                    let why = "the hub ended while the backup was being prepared; start it again";
                    self.end_badly(&backup.id, BackupState::Failed, why, true);
                    Ok(())
                }
                BackupState::Receiving => {
                    self.resume(backup, &sna, &mut reachable);
                    Ok(())
                }
            };
            if let Err(failure) = outcome {
                tracing::error!(backup = %backup.id, %failure, "could not be recovered");
            }
        }
        self.reopen_exports();
        Ok(())
    }

    /// Removes what a failed backup may have left behind.
    fn sweep(&self, backup: &Backup) -> Result<(), Failure> {
        if backup.disks.iter().all(|disk| disk.sealed_at.is_none() && disk.bytes_received == 0)
            && !self.has_files(backup)
        {
            return Ok(());
        }
        self.remove_unfinished(backup)
    }

    fn has_files(&self, backup: &Backup) -> bool {
        let Ok(root) = self.root_of(backup) else { return false };
        backup
            .disks
            .iter()
            .any(|disk| root.files_at(&disk.path).is_ok_and(|files| files.directory.exists()))
    }

    fn resume(&self, backup: &Backup, sna: &Sna, reachable: &mut bool) {
        if let Err(why) = self.try_resume(backup, sna, reachable) {
            let text = format!("the hub was started again: {why}");
            self.end_badly(&backup.id, BackupState::Failed, &text, true);
        }
    }

    fn try_resume(&self, backup: &Backup, sna: &Sna, reachable: &mut bool) -> Result<(), String> {
        if backup.agent == "sna" {
            let life = if *reachable { sna.life(&backup.id) } else { Life::Unknown };
            *reachable = *reachable && life != Life::Unknown;
            if life != Life::Alive {
                return Err("its agent does not run any more; start the backup again".into());
            }
        }
        let root = self.root_of(backup).map_err(|e| e.to_string())?;
        if backup.disks.iter().all(|disk| disk.state == DiskState::Sealed) {
            return self.publish_sealed(backup).map_err(|e| e.to_string());
        }
        let receiving = |disk: &crate::catalog::DiskBackup| disk.state == DiskState::Receiving;
        let running = self.open_disks(backup, &root, receiving).map_err(|e| e.to_string())?;
        // The capture agent does not connect again: a disk of its that has begun is lost. One that
        // sends for itself does, and asks what is there.
        if backup.agent == "sna"
            && let Some(begun) = running.disks.iter().find(|disk| disk.device.has_begun())
        {
            return Err(format!(
                "disk {} was being received, and the agent does not connect again; start the \
                 backup again",
                begun.disk_id
            ));
        }
        self.record("hub", "backup.resumed", &backup.id, "goes on after a start of the hub");
        Ok(())
    }

    /// Makes the operator's exports visible again.
    fn reopen_exports(&self) {
        let rows = match self.catalog.exports() {
            Ok(rows) => rows,
            Err(error) => return tracing::error!(%error, "exports cannot be read"),
        };
        for row in rows {
            let most = row.max_connections.and_then(|most| usize::try_from(most).ok());
            if let Err(error) = self.open_export(&row.name, &row.path, row.read_only, most) {
                tracing::error!(export = %row.name, %error, "export not opened");
            }
        }
    }

    /// Makes an image visible as an export.
    ///
    /// # Errors
    /// A sentence where the image cannot be opened, or the name is taken.
    pub fn open_export(
        &self,
        name: &str,
        path: &str,
        read_only: bool,
        max_connections: Option<usize>,
    ) -> Result<(), String> {
        let source = Source { format: Format::Qcow2, path: path.into() };
        let device = export::open(&source, read_only).map_err(|e| e.to_string())?;
        let published = self.publisher.publish(Publication {
            name: name.to_owned(),
            alias: None,
            description: String::new(),
            device: Arc::clone(&device),
            max_connections,
        });
        if published.is_err() {
            let _ = device.close();
        }
        published.map(drop)
    }

    /// The directory of a backup's repository.
    ///
    /// # Errors
    /// `NotFound`, or what opening gives.
    pub fn repository_root(&self, backup: &Backup) -> Result<Root, Failure> {
        self.root_of(backup)
    }
}
