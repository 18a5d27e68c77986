//! What a backup will do, computed before anything is done.

use std::collections::BTreeMap;

use qcow2::{Image, OpenOptions};

use super::error::{Failure, FailureKind};
use super::service::Backups;
use crate::catalog::{Backup, BackupFilter, DiskBackup, Repository, Vm, VmDisk};
use crate::model::{
    BackupState, BackupType, DiskState, Timestamp, backup_id, export_alias, export_name,
};
use crate::repository::{DiskFiles, Manifest, Root};

/// Most tags of a backup, and most bytes of one.
const TAGS: (usize, usize) = (32, 1024);
/// Growth that is expected of a full beside the last one, in percent.
const GROWTH: u64 = 10;

/// A wish for a backup.
#[derive(Debug, Clone)]
pub struct Request {
    /// The VM.
    pub vm_name: String,
    /// What is wanted.
    pub kind: BackupType,
    /// Where; the only repository where not given.
    pub repository: Option<String>,
    /// The policy that asks.
    pub policy_id: Option<String>,
    /// The operator's words about it.
    pub tags: BTreeMap<String, String>,
    /// Who sends: `sna` or `caller`.
    pub agent: String,
}

/// What a backup will do with one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// The disk.
    pub disk: VmDisk,
    /// The backup whose image it builds on.
    pub parent: Option<String>,
    /// From which change on; empty for a full.
    pub previous_change_id: String,
}

/// What a backup will do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The VM.
    pub vm: Vm,
    /// Where.
    pub repository: Repository,
    /// What it will hold.
    pub kind: BackupType,
    /// Why it is a full although an incremental is wanted.
    pub full_reason: Option<String>,
    /// The disks.
    pub disks: Vec<DiskPlan>,
    /// Bytes that it is expected to take, as far as earlier ones tell.
    pub expected_bytes: Option<u64>,
    /// Bytes that are free.
    pub free_bytes: u64,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

impl Backups {
    /// Computes what a backup would do.
    ///
    /// # Errors
    /// Why it would be refused.
    pub fn plan(&self, request: &Request) -> Result<Plan, Failure> {
        check_tags(&request.tags)?;
        let vm = self.catalog.vm_by_name(&request.vm_name)?.ok_or_else(|| {
            let mut failure = Failure::not_found("VM", &request.vm_name);
            failure.details = "enter it with its disks first: PUT /api/v1/vms/{name}".into();
            failure
        })?;
        if vm.disks.is_empty() {
            let message = format!("VM '{}' has no disks", vm.name);
            let next = "enter its disks with their keys and sizes: PUT /api/v1/vms/{name}";
            return Err(Failure::new(FailureKind::Unprocessable, message, next));
        }
        if request.agent == "sna" && vm.credential_id.is_none() {
            let message = format!("VM '{}' has no credential for its vCenter", vm.name);
            let next = "add one (POST /api/v1/credentials) and name it in the VM, or send the data \
                        yourself with \"agent\": \"caller\"";
            return Err(Failure::new(FailureKind::Unprocessable, message, next));
        }
        let repository = self.choose_repository(request.repository.as_deref())?;
        if let Some(policy) = &request.policy_id
            && !self.catalog.policies()?.iter().any(|p| p.id == *policy)
        {
            return Err(Failure::not_found("policy", policy));
        }
        let (root, _) = Root::open(repository.path.as_ref())?;
        let free_bytes = root.space()?.free;
        let mut plan = Plan {
            disks: vm.disks.iter().map(full_disk).collect(),
            vm,
            repository,
            kind: BackupType::Full,
            full_reason: None,
            expected_bytes: None,
            free_bytes,
            warnings: Vec::new(),
        };
        if request.kind == BackupType::Incremental {
            match self.find_parent(&plan, &root)? {
                Ok(disks) => (plan.kind, plan.disks) = (BackupType::Incremental, disks),
                Err(reason) => plan.full_reason = Some(reason),
            }
        }
        self.expect_space(&mut plan)?;
        Ok(plan)
    }

    pub(super) fn choose_repository(&self, key: Option<&str>) -> Result<Repository, Failure> {
        let found = match key.filter(|key| !key.is_empty()) {
            Some(key) => self
                .catalog
                .repository(key)?
                .ok_or_else(|| Failure::not_found("repository", key))?,
            None => match self.catalog.repositories()?.as_slice() {
                [only] => only.clone(),
                others => {
                    let message = format!("there are {} repositories: say which", others.len());
                    return Err(Failure::new(FailureKind::Invalid, message, "set repository_id"));
                }
            },
        };
        if !found.enabled {
            let message = format!("repository '{}' is disabled", found.name);
            return Err(Failure::new(FailureKind::Conflict, message, ""));
        }
        Ok(found)
    }

    /// The newest restore point on which every disk can build; or why there is none.
    ///
    /// One question decides for the agent whether it sends all or changes, whatever the disk: so
    /// either all disks are incremental or none is.
    fn find_parent(
        &self,
        plan: &Plan,
        root: &Root,
    ) -> Result<Result<Vec<DiskPlan>, String>, Failure> {
        let earlier = self.catalog.backups(&BackupFilter {
            vm_id: Some(plan.vm.id.clone()),
            repository_id: Some(plan.repository.id.clone()),
            states: Some(vec![BackupState::Completed]),
            ..BackupFilter::default()
        })?;
        let mut first_reason = None;
        for backup in &earlier {
            let disks = match self.damaged_ancestor(backup)? {
                Some(damaged) => Err(format!("{damaged} was found to be damaged")),
                None => plan.vm.disks.iter().map(|disk| build_on(backup, disk, root)).collect(),
            };
            match disks {
                Ok(disks) => return Ok(Ok(disks)),
                Err(reason) => {
                    tracing::warn!(backup = %backup.id, %reason, "not fit as a parent");
                    first_reason.get_or_insert(format!("{}: {reason}", backup.id));
                }
            }
        }
        Ok(Err(first_reason
            .unwrap_or_else(|| "this VM has no completed backup in this repository yet".into())))
    }

    /// A backup, of those that this one is made of, that its last verification found damaged.
    fn damaged_ancestor(&self, backup: &Backup) -> Result<Option<String>, Failure> {
        for disk in &backup.disks {
            for id in self.catalog.lineage(&backup.id, disk.disk_id)? {
                if self.catalog.is_damaged(&id)? {
                    return Ok(Some(id));
                }
            }
        }
        Ok(None)
    }

    fn expect_space(&self, plan: &mut Plan) -> Result<(), Failure> {
        let earlier = self.catalog.backups(&BackupFilter {
            vm_id: Some(plan.vm.id.clone()),
            states: Some(vec![BackupState::Completed]),
            kind: Some(plan.kind),
            ..BackupFilter::default()
        })?;
        plan.expected_bytes = earlier.first().map(|last| {
            let stored: u64 = last.disks.iter().filter_map(|disk| disk.stored_bytes).sum();
            stored + stored / 100 * GROWTH
        });
        let needed = plan.expected_bytes.unwrap_or(0) + self.settings.min_free;
        if plan.free_bytes < needed {
            let message = format!(
                "repository '{}' has {} bytes free; this backup needs about {} and {} must stay \
                 free",
                plan.repository.name,
                plan.free_bytes,
                plan.expected_bytes.unwrap_or(0),
                self.settings.min_free
            );
            let next = "delete backups, enlarge the repository, or choose another one";
            return Err(Failure::new(FailureKind::NoSpace, message, next));
        }
        let capacity: u64 = plan.disks.iter().map(|disk| disk.disk.capacity).sum();
        if plan.expected_bytes.is_none() && capacity > plan.free_bytes {
            plan.warnings.push(format!(
                "the disks have {capacity} bytes, the repository {} free: the backup fails if they \
                 are fuller than that",
                plan.free_bytes
            ));
        }
        Ok(())
    }
}

fn full_disk(disk: &VmDisk) -> DiskPlan {
    DiskPlan { disk: disk.clone(), parent: None, previous_change_id: String::new() }
}

/// Whether `disk` can build on its image in `backup`; the reason where not.
fn build_on(backup: &Backup, disk: &VmDisk, root: &Root) -> Result<DiskPlan, String> {
    let number = disk.disk_id;
    let found = backup
        .disks
        .iter()
        .find(|d| d.disk_id == number)
        .ok_or_else(|| format!("disk {number} is new"))?;
    if found.disk_key != disk.disk_key {
        return Err(format!(
            "disk {number} was replaced: its key was {} and is {}",
            found.disk_key, disk.disk_key
        ));
    }
    if found.capacity > disk.capacity {
        return Err(format!(
            "disk {number} has shrunk from {} to {} bytes",
            found.capacity, disk.capacity
        ));
    }
    let change_id = found
        .change_id
        .as_deref()
        .filter(|id| !id.is_empty())
        .ok_or_else(|| format!("disk {number} has no change id"))?;
    let files = root.files_at(&found.path).map_err(|e| e.to_string())?;
    let manifest = Manifest::read(&files.manifest()).map_err(|e| e.to_string())?;
    agree(&manifest, backup, found, change_id)?;
    let length = std::fs::metadata(files.image()).map_err(|e| format!("its image: {e}"))?.len();
    if length != manifest.image.file_bytes {
        let expected = manifest.image.file_bytes;
        return Err(format!("the image of disk {number} has {length} bytes, not {expected}"));
    }
    // The whole chain must open, and be the one that was meant.
    let image = Image::open(&files.image(), &OpenOptions::new().read_only())
        .map_err(|e| format!("the image of disk {number} cannot be opened: {e}"))?;
    if image.size() < found.capacity {
        return Err(format!("the image of disk {number} is smaller than its disk"));
    }
    if let Some(parent) = &manifest.parent {
        let below = files_beside(root, &found.path, &parent.backup_id)?;
        let below = Manifest::read(&below.manifest()).map_err(|e| e.to_string())?;
        if below.image.root_hash != parent.root_hash {
            let other = &parent.backup_id;
            return Err(format!("the image below disk {number} is not the one of {other} then"));
        }
    }
    Ok(DiskPlan {
        disk: disk.clone(),
        parent: Some(backup.id.clone()),
        previous_change_id: change_id.to_owned(),
    })
}

/// The files of `backup` in the directory of the image at `path`.
fn files_beside(root: &Root, path: &str, backup: &str) -> Result<DiskFiles, String> {
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    root.files_at(&format!("{directory}/{backup}.qcow2")).map_err(|e| e.to_string())
}

fn agree(
    manifest: &Manifest,
    backup: &Backup,
    disk: &DiskBackup,
    change_id: &str,
) -> Result<(), String> {
    let number = disk.disk_id;
    let same = [
        ("backup", manifest.backup_id == backup.id),
        ("VM", manifest.vm.id == backup.vm_id),
        ("disk", manifest.disk.id == number && manifest.disk.key == disk.disk_key),
        ("size", manifest.disk.capacity_bytes == disk.capacity),
        ("change id", manifest.change_id == change_id),
        ("checksum", Some(&manifest.image.root_hash) == disk.root_hash.as_ref()),
    ];
    match same.iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((what, _)) => {
            Err(format!("catalog and manifest of disk {number} disagree about the {what}"))
        }
    }
}

fn check_tags(tags: &BTreeMap<String, String>) -> Result<(), Failure> {
    let (count, length) = TAGS;
    if tags.len() > count || tags.iter().any(|(k, v)| k.len() > length || v.len() > length) {
        let message = format!("a backup has at most {count} tags of {length} bytes");
        return Err(Failure::new(FailureKind::Invalid, message, ""));
    }
    Ok(())
}

impl Plan {
    /// The rows of the backup that does this. `named` is the time in the catalogued names of its
    /// exports.
    pub(super) fn into_backup(self, request: &Request, named: Timestamp) -> Backup {
        let now = Timestamp::now();
        let id = backup_id(&self.vm.name, now);
        let disks = self.disks.iter().map(|plan| {
            let number = plan.disk.disk_id;
            DiskBackup {
                disk_id: number,
                disk_key: plan.disk.disk_key,
                capacity: plan.disk.capacity,
                state: DiskState::Receiving,
                parent: plan.parent.clone(),
                previous_change_id: plan.previous_change_id.clone(),
                change_id: None,
                path: DiskFiles::relative(&self.vm.id, number, &id),
                export_name: export_name(&id, number),
                export_alias: export_alias(&self.vm.id, number, self.kind, named),
                port: None,
                bytes_received: 0,
                bytes_unchanged: 0,
                stored_bytes: None,
                file_bytes: None,
                root_hash: None,
                error: None,
                sealed_at: None,
            }
        });
        Backup {
            disks: disks.collect(),
            vm_id: self.vm.id,
            vm_name: self.vm.name,
            repository_id: self.repository.id,
            policy_id: request.policy_id.clone(),
            kind: self.kind,
            requested: request.kind,
            full_reason: self.full_reason,
            agent: request.agent.clone(),
            state: BackupState::Queued,
            error: None,
            tags: request.tags.clone(),
            bytes_transferred: 0,
            agent_phase: None,
            last_telemetry_at: None,
            created_at: now,
            started_at: None,
            completed_at: None,
            id,
        }
    }
}
