//! What clients send and see.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::backup::{Backups, Plan};
use crate::catalog::{
    Backup, Chain, CopyRule, DiskBackup, Event, Policy, PortAllocation, Repository, Vm, VmDisk,
};
use crate::model::{BackupState, BackupType, Timestamp};

/// A wish for a backup of all disks of a VM.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StartBackup {
    /// The VM.
    pub(super) vm_name: String,
    /// What is wanted.
    pub(super) backup_type: BackupType,
    /// Id or name of the repository; may be left out where there is one.
    pub(super) repository_id: Option<String>,
    /// Id of the policy that asks.
    pub(super) policy_id: Option<String>,
    /// Words about the backup.
    #[serde(default)]
    pub(super) tags: BTreeMap<String, String>,
    /// Who sends: `sna` (the capture appliance is called) or `caller` (whoever asks).
    #[serde(default = "sna")]
    pub(super) agent: String,
}

fn sna() -> String {
    "sna".into()
}

/// Whether only the plan is wanted.
#[derive(Debug, Default, Deserialize, IntoParams)]
pub(super) struct StartQuery {
    /// Show what would be done, and do nothing.
    #[serde(default)]
    pub(super) dry_run: bool,
}

/// Which backups to list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ListBackups {
    /// Of this VM.
    pub(super) vm_name: Option<String>,
    /// Of the VM of this id.
    pub(super) vm_context_id: Option<String>,
    /// In this repository.
    pub(super) repository_id: Option<String>,
    /// In this status: pending, running, completed, failed, cancelled.
    pub(super) status: Option<String>,
    /// Of this type.
    pub(super) backup_type: Option<BackupType>,
}

/// One disk of a backup.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DiskResult {
    disk_id: u32,
    disk_key: u32,
    nbd_port: u16,
    nbd_export_name: String,
    nbd_export_alias: String,
    qcow2_path: String,
    status: String,
    capacity_bytes: u64,
    bytes_transferred: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stored_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_backup_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    change_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    root_hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
}

/// A backup of a VM.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BackupResponse {
    backup_id: String,
    vm_context_id: String,
    vm_name: String,
    disk_results: Vec<DiskResult>,
    nbd_targets_string: String,
    backup_type: BackupType,
    requested_type: BackupType,
    /// Why it is a full although an incremental was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    full_reason: Option<String>,
    repository_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy_id: Option<String>,
    /// pending, running, completed, failed, cancelled or deleting.
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_path: Option<String>,
    /// Bytes that came in, by the hub's own count.
    bytes_transferred: u64,
    /// Bytes that were not stored because the chain below has them.
    bytes_unchanged: u64,
    total_bytes: u64,
    /// Bytes of data that its images hold.
    stored_bytes: u64,
    disks_count: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    change_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
    /// queued, preparing, receiving, sealing, or how it ended.
    current_phase: BackupState,
    /// What the agent said last.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent_phase: Option<String>,
    /// Bytes per second.
    transfer_speed_bps: u64,
    progress_percent: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    last_telemetry_at: Option<Timestamp>,
    #[schema(value_type = String)]
    created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    started_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    completed_at: Option<Timestamp>,
    tags: BTreeMap<String, String>,
}

impl BackupResponse {
    pub(super) fn new(backups: &Backups, backup: &Backup) -> Self {
        let progress = backups.progress(backup);
        let port = backups.settings().nbd_port;
        let root = backups.repository_root(backup).ok();
        let path = |disk: &DiskBackup| match &root {
            Some(root) => root.directory().join(&disk.path).to_string_lossy().into_owned(),
            None => disk.path.clone(),
        };
        let disk = |disk: &DiskBackup| DiskResult {
            disk_id: disk.disk_id,
            disk_key: disk.disk_key,
            nbd_port: disk.port.unwrap_or(port),
            nbd_export_name: disk.export_name.clone(),
            nbd_export_alias: disk.export_alias.clone(),
            qcow2_path: path(disk),
            status: disk.state.to_string(),
            capacity_bytes: disk.capacity,
            bytes_transferred: disk.bytes_received,
            stored_bytes: disk.stored_bytes,
            parent_backup_id: disk.parent.clone(),
            change_id: disk.change_id.clone(),
            root_hash: disk.root_hash.clone(),
            error_message: disk.error.clone(),
        };
        let first = backup.disks.first();
        Self {
            backup_id: backup.id.clone(),
            vm_context_id: backup.vm_id.clone(),
            vm_name: backup.vm_name.clone(),
            disk_results: backup.disks.iter().map(disk).collect(),
            nbd_targets_string: backups.targets(backup),
            backup_type: backup.kind,
            requested_type: backup.requested,
            full_reason: backup.full_reason.clone(),
            repository_id: backup.repository_id.clone(),
            policy_id: backup.policy_id.clone(),
            status: backup.state.status().into(),
            file_path: first.map(path),
            bytes_transferred: progress.bytes_transferred,
            bytes_unchanged: progress.bytes_unchanged,
            total_bytes: progress.total_bytes,
            stored_bytes: backup.disks.iter().filter_map(|disk| disk.stored_bytes).sum(),
            disks_count: backup.disks.len(),
            change_id: first.and_then(|disk| disk.change_id.clone()),
            error_message: backup.error.clone(),
            current_phase: backup.state,
            agent_phase: progress.agent_phase,
            transfer_speed_bps: progress.rate,
            progress_percent: progress.percent,
            eta_seconds: progress.eta_seconds,
            last_telemetry_at: progress.last_telemetry_at,
            created_at: backup.created_at,
            started_at: backup.started_at,
            completed_at: backup.completed_at,
            tags: backup.tags.clone(),
        }
    }
}

/// A list of backups, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BackupList {
    pub(super) backups: Vec<BackupResponse>,
    pub(super) total: usize,
}

/// The disks of a backup.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DiskList {
    backup_id: String,
    disks: Vec<DiskResult>,
    total: usize,
}

impl From<BackupResponse> for DiskList {
    fn from(backup: BackupResponse) -> Self {
        let total = backup.disk_results.len();
        Self { backup_id: backup.backup_id, disks: backup.disk_results, total }
    }
}

/// What a backup would do.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PlanResponse {
    vm_name: String,
    repository_id: String,
    backup_type: BackupType,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_reason: Option<String>,
    disks: Vec<PlannedDisk>,
    /// Bytes that it is expected to take, as far as earlier ones tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_bytes: Option<u64>,
    free_bytes: u64,
    warnings: Vec<String>,
}

/// What a backup would do with a disk.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PlannedDisk {
    disk_id: u32,
    disk_key: u32,
    capacity_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_backup_id: Option<String>,
    previous_change_id: String,
}

impl From<Plan> for PlanResponse {
    fn from(plan: Plan) -> Self {
        let disks = plan.disks.into_iter().map(|disk| PlannedDisk {
            disk_id: disk.disk.disk_id,
            disk_key: disk.disk.disk_key,
            capacity_bytes: disk.disk.capacity,
            parent_backup_id: disk.parent,
            previous_change_id: disk.previous_change_id,
        });
        Self {
            disks: disks.collect(),
            vm_name: plan.vm.name,
            repository_id: plan.repository.id,
            backup_type: plan.kind,
            full_reason: plan.full_reason,
            expected_bytes: plan.expected_bytes,
            free_bytes: plan.free_bytes,
            warnings: plan.warnings,
        }
    }
}

/// Sums over backups.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BackupStats {
    pub(super) backup_count: usize,
    pub(super) total_size_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub(super) last_backup_at: Option<Timestamp>,
}

/// A full backup of a disk and what builds on it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChainResponse {
    chain_id: String,
    vm_context_id: String,
    vm_name: String,
    disk_id: u32,
    repository_id: String,
    full_backup_id: String,
    latest_backup_id: String,
    backups: Vec<BackupResponse>,
    total_size_bytes: u64,
    backup_count: usize,
}

impl ChainResponse {
    pub(super) fn new(vm: &Vm, chain: Chain, backups: Vec<(BackupResponse, u64)>) -> Self {
        Self {
            chain_id: chain.id,
            vm_context_id: vm.id.clone(),
            vm_name: vm.name.clone(),
            disk_id: chain.disk_id,
            repository_id: chain.repository_id,
            full_backup_id: chain.full_backup_id,
            latest_backup_id: chain.head_backup_id,
            total_size_bytes: backups.iter().map(|(_, bytes)| bytes).sum(),
            backup_count: backups.len(),
            backups: backups.into_iter().map(|(backup, _)| backup).collect(),
        }
    }
}

/// A disk of a VM.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DiskView {
    /// Number of the disk, from 0 on.
    pub(super) disk_id: u32,
    /// VMware's device key, such as 2000; 2000 and the number where it is not known.
    pub(super) disk_key: Option<u32>,
    /// Its place on the controller.
    pub(super) unit_number: Option<u32>,
    /// Its name.
    #[serde(default)]
    pub(super) label: String,
    /// Exact size in bytes.
    pub(super) capacity_bytes: u64,
}

/// A VM.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VmView {
    /// Its id; not to be sent.
    #[serde(default)]
    pub(super) vm_context_id: String,
    /// Its name; not to be sent, the address has it.
    #[serde(default)]
    pub(super) vm_name: String,
    /// Its inventory path in vCenter.
    #[serde(default)]
    pub(super) vm_path: String,
    /// Id or name of the credential for its vCenter.
    pub(super) credential_id: Option<String>,
    /// Its disks.
    pub(super) disks: Vec<DiskView>,
}

impl From<Vm> for VmView {
    fn from(vm: Vm) -> Self {
        let disk = |disk: VmDisk| DiskView {
            disk_id: disk.disk_id,
            disk_key: Some(disk.disk_key),
            unit_number: Some(disk.unit_number),
            label: disk.label,
            capacity_bytes: disk.capacity,
        };
        Self {
            vm_context_id: vm.id,
            vm_name: vm.name,
            vm_path: vm.vm_path,
            credential_id: vm.credential_id,
            disks: vm.disks.into_iter().map(disk).collect(),
        }
    }
}

/// A list of VMs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct VmList {
    pub(super) vms: Vec<VmView>,
    pub(super) total: usize,
}

/// Something that was done.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventView {
    id: i64,
    #[schema(value_type = String)]
    at: Timestamp,
    actor: String,
    action: String,
    subject: String,
    text: String,
}

impl From<Event> for EventView {
    fn from(event: Event) -> Self {
        let Event { id, at, actor, action, subject, text } = event;
        Self { id, at, actor, action, subject, text }
    }
}

/// A port that is set aside, or in use.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AllocationView {
    pub(super) port: u16,
    pub(super) job_id: String,
    pub(super) export_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub(super) allocated_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub(super) expires_at: Option<Timestamp>,
}

impl From<PortAllocation> for AllocationView {
    fn from(a: PortAllocation) -> Self {
        Self {
            port: a.port,
            job_id: a.job_id,
            export_name: a.export_name,
            allocated_at: Some(a.allocated_at),
            expires_at: Some(a.expires_at),
        }
    }
}

/// A repository.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RepositoryView {
    id: String,
    name: String,
    #[serde(rename = "type")]
    kind: String,
    enabled: bool,
    path: String,
    #[schema(value_type = Object)]
    config: serde_json::Value,
    is_immutable: bool,
    min_retention_days: u32,
    #[schema(value_type = String)]
    created_at: Timestamp,
    #[serde(flatten)]
    storage: StorageView,
}

/// Room in a repository.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct StorageView {
    pub(super) total_bytes: u64,
    pub(super) used_bytes: u64,
    pub(super) available_bytes: u64,
    pub(super) backup_count: usize,
    /// What is wrong with it; not there where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

impl RepositoryView {
    pub(super) fn new(repository: Repository, storage: StorageView) -> Self {
        Self {
            id: repository.id,
            name: repository.name,
            kind: repository.kind,
            enabled: repository.enabled,
            path: repository.path,
            config: repository.config,
            is_immutable: repository.is_immutable,
            min_retention_days: repository.min_retention_days,
            created_at: repository.created_at,
            storage,
        }
    }
}

/// A new repository.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewRepository {
    /// Its name.
    pub(super) name: String,
    /// `local`, or a mounted `nfs`, `cifs` or `smb`.
    #[serde(rename = "type", default = "local")]
    pub(super) kind: String,
    /// New backups may go there.
    #[serde(default = "yes")]
    pub(super) enabled: bool,
    /// `{"path": "/directory"}`
    #[schema(value_type = Object)]
    pub(super) config: serde_json::Value,
    /// Backups are not deleted before their time.
    #[serde(default)]
    pub(super) is_immutable: bool,
    /// Days for which a backup stays at least.
    #[serde(default)]
    pub(super) min_retention_days: u32,
}

fn local() -> String {
    "local".into()
}

fn yes() -> bool {
    true
}

/// A policy.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(super) struct PolicyView {
    /// Its id; not to be sent.
    #[serde(default)]
    pub(super) id: String,
    /// Its name.
    pub(super) name: String,
    /// It is followed.
    #[serde(default = "yes")]
    pub(super) enabled: bool,
    /// Where backups go.
    pub(super) primary_repository_id: String,
    /// Days for which backups are kept.
    pub(super) retention_days: u32,
    /// Where copies go.
    #[serde(default)]
    pub(super) copy_rules: Vec<CopyRule>,
}

impl From<Policy> for PolicyView {
    fn from(policy: Policy) -> Self {
        Self {
            id: policy.id,
            name: policy.name,
            enabled: policy.enabled,
            primary_repository_id: policy.primary_repository_id,
            retention_days: policy.retention_days,
            copy_rules: policy.copy_rules,
        }
    }
}

/// That something was done.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Done {
    pub(super) message: String,
}

impl Done {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}
