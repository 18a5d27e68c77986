//! From a planned backup to an agent that sends: images, exports, the call.

use std::sync::{Arc, PoisonError};

use qcow2::{BackingFormat, CreateOptions};

use super::error::{Failure, FailureKind};
use super::receive::ReceivingDevice;
use super::running::{Running, RunningDisk};
use super::service::Backups;
use super::sna::Start;
use crate::block::BlockDevice;
use crate::catalog::{Backup, DiskBackup};
use crate::model::{BackupState, BackupType};
use crate::nbd::publisher::Publication;
use crate::repository::{DiskFiles, Root, sync_directory};

impl Backups {
    /// Makes images and exports of a backup in state `preparing`, and starts its agent. Where that
    /// fails the backup has failed, and nothing of it is left.
    pub(super) fn launch(&self, backup: &Backup) -> Result<(), Failure> {
        let turn = self.turn(&backup.id);
        let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.backup(&backup.id)?.state != BackupState::Preparing {
            return Err(Failure::new(FailureKind::Conflict, "the backup was cancelled", ""));
        }
        let launched = self.prepare(backup).and_then(|()| self.call_agent(backup));
        if let Err(failure) = &launched {
            // A call that failed may have reached the appliance.
            let started = failure.kind == FailureKind::Agent;
            self.end_in_turn(&backup.id, BackupState::Failed, &failure.to_string(), started);
        }
        launched
    }

    fn prepare(&self, backup: &Backup) -> Result<(), Failure> {
        let root = self.root_of(backup)?;
        for disk in &backup.disks {
            create_image(&root, backup, disk)?;
        }
        self.open_disks(backup, &root, |_| true)?;
        // The agent may ask back before its start is answered.
        self.catalog.set_state(&backup.id, &[BackupState::Preparing], BackupState::Receiving)?;
        Ok(())
    }

    /// Opens the images of those disks that `wanted` names, and makes them visible.
    pub(super) fn open_disks(
        &self,
        backup: &Backup,
        root: &Root,
        wanted: impl Fn(&DiskBackup) -> bool,
    ) -> Result<Arc<Running>, Failure> {
        let mut disks = Vec::new();
        let mut open = |disk: &DiskBackup| -> Result<(), Failure> {
            let files = root.files_at(&disk.path)?;
            let internal = |text: String| Failure::new(FailureKind::Internal, text, "");
            let skip = self.settings.skip_unchanged;
            let device = ReceivingDevice::open(files, skip)?;
            let device = Arc::new(device);
            let published = self.publisher.publish(Publication {
                name: disk.export_name.clone(),
                alias: Some(disk.export_alias.clone()),
                description: format!("disk {} of {}", disk.disk_id, backup.vm_name),
                device: Arc::clone(&device) as Arc<dyn BlockDevice>,
                max_connections: None,
            });
            let (export, port) = published.map_err(|text| {
                // It was never visible.
                let _ = device.close();
                internal(text)
            })?;
            disks.push(RunningDisk { disk_id: disk.disk_id, export, device });
            self.catalog.set_disk_port(&backup.id, disk.disk_id, port)?;
            Ok(())
        };
        let opened = backup.disks.iter().filter(|disk| wanted(disk)).try_for_each(&mut open);
        let running = Arc::new(Running::new(backup, disks));
        self.running().insert(backup.id.clone(), Arc::clone(&running));
        opened.map(|()| running)
    }

    fn call_agent(&self, backup: &Backup) -> Result<(), Failure> {
        if backup.agent != "sna" {
            return Ok(());
        }
        // With its ports.
        let backup = self.backup(&backup.id)?;
        let agent = |text: String| {
            let next = "enter the VM's credential again, then start the backup again";
            Failure::new(FailureKind::Unprocessable, text, next)
        };
        let vm = self
            .catalog
            .vm(&backup.vm_id)?
            .ok_or_else(|| Failure::not_found("VM", &backup.vm_name))?;
        let credential = self
            .catalog
            .credentials()?
            .into_iter()
            .find(|c| Some(&c.id) == vm.credential_id.as_ref())
            .ok_or_else(|| agent(format!("VM '{}' has no credential", vm.name)))?;
        let password = self
            .secrets
            .open_sealed(&credential.secret, &credential.name)
            .map_err(|e| agent(e.to_string()))?;
        let first = backup.disks.first().map_or("", |disk| disk.previous_change_id.as_str());
        self.sna.start(&Start {
            vm_name: &vm.name,
            vcenter_host: &credential.vcenter_host,
            vcenter_user: &credential.username,
            vcenter_password: &password,
            vm_path: &vm.vm_path,
            nbd_host: &self.settings.nbd_host,
            nbd_targets: &self.targets(&backup),
            job_id: &backup.id,
            backup_type: backup.kind.as_str(),
            previous_change_id: if backup.kind == BackupType::Incremental { first } else { "" },
        })?;
        if let Some(running) = self.find_running(&backup.id) {
            running.lives();
        }
        self.record("hub", "backup.started", &backup.id, "the agent was started");
        Ok(())
    }
}

fn create_image(root: &Root, backup: &Backup, disk: &DiskBackup) -> Result<(), Failure> {
    let files = root.files_at(&disk.path)?;
    let create = || -> std::io::Result<()> { std::fs::create_dir_all(&files.directory) };
    create().map_err(|source| crate::repository::RepositoryError::Io {
        what: "cannot make",
        path: files.directory.clone(),
        source,
    })?;
    // The directories' own names must last as long as what is in them.
    for directory in files.directory.ancestors().skip(1).take(2) {
        sync_directory(directory)?;
    }
    let mut options = CreateOptions::new(disk.capacity);
    if let Some(parent) = &disk.parent {
        let parent = root.files(&backup.vm_id, disk.disk_id, parent);
        options = options.backing(parent.image_name(), BackingFormat::Qcow2);
    }
    let path = DiskFiles::partial(&files.image());
    qcow2::create(&path, &options).map_err(crate::repository::RepositoryError::from)?;
    Ok(())
}
