//! What agents tell and ask while a backup runs.

use std::sync::PoisonError;

use qcow2::Repair;
use serde::Deserialize;

use super::error::{Failure, FailureKind};
use super::running::{Running, RunningDisk};
use super::service::Backups;
use crate::catalog::{Backup, DiskBackup};
use crate::model::{BackupState, DiskState, Timestamp};
use crate::repository::{
    DiskFiles, DiskOf, ImageOf, Manifest, ParentOf, RepositoryError, VmOf, publish,
};

/// Longest change id that is taken, in bytes.
const CHANGE_ID: usize = 1024;

/// An agent's telemetry: a sign of life. Its numbers restart with each disk and may be anything;
/// only the phase is kept, for people.
#[derive(Debug, Clone, Default, Deserialize, utoipa::ToSchema)]
pub struct Telemetry {
    /// The agent's word for its state.
    #[serde(default)]
    pub status: String,
    /// The agent's word for what it does.
    #[serde(default)]
    pub current_phase: String,
    /// Its error, if it has one.
    #[serde(default)]
    pub error: Option<String>,
}

/// The answer to an agent's question what to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangeId {
    /// The backup that runs.
    pub backup_id: String,
    /// Send what changed since; everything where empty.
    pub change_id: String,
    /// Why, in words.
    pub message: String,
}

impl Backups {
    /// What the agent of the VM's running backup is to send of a disk. A full backup is always
    /// answered with nothing, so that no delta can land in an empty image.
    ///
    /// # Errors
    /// `NotFound` where the VM has no running backup, or no such disk.
    pub fn change_id(&self, vm_name: &str, disk: u32) -> Result<ChangeId, Failure> {
        let running = self.running().values().find(|r| r.vm_name == vm_name).cloned();
        let nothing = || {
            let message = format!("VM '{vm_name}' has no running backup");
            Failure::new(FailureKind::NotFound, message, "start one: POST /api/v1/backups")
        };
        let running = running.ok_or_else(nothing)?;
        running.lives();
        let backup = self.backup(&running.id)?;
        if backup.state != BackupState::Receiving {
            return Err(nothing());
        }
        let found = backup
            .disks
            .iter()
            .find(|d| d.disk_id == disk)
            .ok_or_else(|| Failure::not_found("disk in this backup:", &disk.to_string()))?;
        let change_id = found.previous_change_id.clone();
        let message = if change_id.is_empty() { "send everything" } else { "send the changes" };
        Ok(ChangeId { backup_id: backup.id, change_id, message: message.into() })
    }

    /// Takes an agent's telemetry.
    ///
    /// # Errors
    /// `NotFound` for a backup that never was.
    pub fn telemetry(&self, id: &str, telemetry: Telemetry) -> Result<(), Failure> {
        if let Some(running) = self.find_running(id) {
            if let Some(error) = &telemetry.error
                && !error.is_empty()
            {
                tracing::warn!(backup = id, error, "the agent tells of an error");
            }
            running.telemetry(telemetry);
            return Ok(());
        }
        self.backup(id).map(drop)
    }

    /// Completes a disk: its writes are waited for, its image is sealed and durable, and no more
    /// writes are taken. With the last disk the backup becomes a restore point. Repeating it is
    /// answered the same.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where the backup has ended otherwise; `NoSpace`, `Internal` where
    /// sealing failed, and with it the backup.
    pub fn complete(&self, id: &str, disk: u32, change_id: &str) -> Result<(), Failure> {
        if change_id.len() > CHANGE_ID {
            let message = format!("a change id has at most {CHANGE_ID} bytes");
            return Err(Failure::new(FailureKind::Invalid, message, ""));
        }
        let turn = self.turn(id);
        let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(running) = self.find_running(id) else {
            return self.completed_before(id, disk);
        };
        running.lives();
        let backup = self.backup(id)?;
        let row = backup.disks.iter().find(|d| d.disk_id == disk);
        let row =
            row.ok_or_else(|| Failure::not_found("disk in this backup:", &disk.to_string()))?;
        match (backup.state, row.state) {
            (BackupState::Receiving, DiskState::Receiving) => {
                let part = running
                    .disk(disk)
                    .ok_or_else(|| Failure::not_found("open image of disk", &disk.to_string()))?;
                if let Err(failure) = self.seal(&backup, row, part, change_id) {
                    let text = format!("disk {disk} could not be sealed: {failure}");
                    self.end_in_turn(id, BackupState::Failed, &text, true);
                    return Err(failure);
                }
                // Sealing may have taken long.
                running.lives();
            }
            (BackupState::Receiving | BackupState::Sealing, _) => {}
            _ => return self.completed_before(id, disk),
        }
        self.finish_if_sealed(&running)
    }

    /// The answer for a backup that does not run any more.
    fn completed_before(&self, id: &str, disk: u32) -> Result<(), Failure> {
        let backup = self.backup(id)?;
        if backup.state != BackupState::Completed {
            return Err(Self::wrong_state(&backup, "nothing more is taken for it"));
        }
        match backup.disks.iter().any(|d| d.disk_id == disk) {
            true => Ok(()),
            false => Err(Failure::not_found("disk in this backup:", &disk.to_string())),
        }
    }

    fn seal(
        &self,
        backup: &Backup,
        row: &DiskBackup,
        part: &RunningDisk,
        change_id: &str,
    ) -> Result<(), Failure> {
        let root = self.root_of(backup)?;
        let files = root.files_at(&row.path)?;
        let sealed = part.device.seal()?;
        let image = part.device.path();
        let report = qcow2::check(&image, Repair::None).map_err(RepositoryError::from)?;
        if !report.is_clean() {
            let message = format!("the sealed image '{}' has errors: {report:?}", image.display());
            return Err(Failure::new(FailureKind::Internal, message, "please report this"));
        }
        let parent = match &row.parent {
            None => None,
            Some(parent) => {
                let below = root.files(&backup.vm_id, row.disk_id, parent);
                let below = Manifest::read(&below.manifest())?;
                let root_hash = below.image.root_hash;
                Some(ParentOf { backup_id: parent.clone(), root_hash })
            }
        };
        let vm = self.catalog.vm(&backup.vm_id)?;
        let disk = vm.iter().flat_map(|vm| &vm.disks).find(|d| d.disk_id == row.disk_id);
        let sealed_at = Timestamp::now();
        let manifest = Manifest {
            backup_id: backup.id.clone(),
            backup_type: backup.kind,
            disks: u32::try_from(backup.disks.len()).unwrap_or(u32::MAX),
            vm: VmOf {
                id: backup.vm_id.clone(),
                name: backup.vm_name.clone(),
                path: vm.as_ref().map(|vm| vm.vm_path.clone()).unwrap_or_default(),
            },
            disk: DiskOf {
                id: row.disk_id,
                key: row.disk_key,
                unit_number: disk.map_or(row.disk_id, |d| d.unit_number),
                label: disk.map(|d| d.label.clone()).unwrap_or_default(),
                capacity_bytes: row.capacity,
            },
            parent,
            change_id: change_id.to_owned(),
            previous_change_id: row.previous_change_id.clone(),
            image: ImageOf {
                file_bytes: sealed.file_bytes,
                stored_bytes: sealed.stored_bytes,
                cluster_size: sealed.cluster_size,
                root_hash: sealed.root_hash.clone(),
            },
            bytes_received: part.device.bytes_written().max(row.bytes_received),
            tags: backup.tags.clone(),
            created_at: backup.created_at,
            sealed_at,
            written_by: concat!("sendense-hub ", env!("CARGO_PKG_VERSION")).into(),
        };
        manifest.write(&DiskFiles::partial(&files.manifest()))?;
        self.catalog.seal_disk(
            &backup.id,
            &DiskBackup {
                change_id: Some(change_id.to_owned()),
                bytes_received: manifest.bytes_received,
                bytes_unchanged: part.device.bytes_unchanged(),
                stored_bytes: Some(sealed.stored_bytes),
                file_bytes: Some(sealed.file_bytes),
                root_hash: Some(sealed.root_hash),
                sealed_at: Some(sealed_at),
                ..row.clone()
            },
        )?;
        let text = format!("disk {} is sealed: {} bytes stored", row.disk_id, sealed.stored_bytes);
        self.record("agent", "disk.sealed", &backup.id, &text);
        if change_id.is_empty() {
            let text = format!("disk {} came without a change id: the next is a full", row.disk_id);
            self.record("hub", "disk.no_change_id", &backup.id, &text);
        }
        Ok(())
    }

    /// Makes a backup a restore point once all its disks are sealed. The caller holds its turn.
    pub(super) fn finish_if_sealed(&self, running: &Running) -> Result<(), Failure> {
        let backup = self.backup(&running.id)?;
        if backup.disks.iter().any(|disk| disk.state != DiskState::Sealed) {
            return Ok(());
        }
        self.publish_sealed(&backup)?;
        self.running().remove(&backup.id);
        self.close_exports(running);
        Ok(())
    }

    /// Gives the files of a sealed backup their names and the catalog its entry. From here on a
    /// backup only goes forward, also after a crash.
    pub(super) fn publish_sealed(&self, backup: &Backup) -> Result<(), Failure> {
        use BackupState::{Receiving, Sealing};
        self.catalog.set_state(&backup.id, &[Receiving, Sealing], Sealing)?;
        let root = self.root_of(backup)?;
        for disk in &backup.disks {
            publish(&root.files_at(&disk.path)?)?;
        }
        self.catalog.complete_backup(&backup.id)?;
        let text = format!("{} backup of '{}' is complete", backup.kind, backup.vm_name);
        self.record("hub", "backup.completed", &backup.id, &text);
        self.copy_by_policy(backup);
        Ok(())
    }
}
