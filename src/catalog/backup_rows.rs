//! Backups and their disks as rows.

use std::collections::BTreeMap;

use rusqlite::{Row, Transaction, params};

use super::{CatalogError, Result, conflict, is_conflict};
use crate::model::{BackupId, BackupState, BackupType, DiskState, Timestamp, VmId};

/// A backup of a VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Backup {
    /// Its id; also that of its job.
    pub id: BackupId,
    /// The VM.
    pub vm_id: VmId,
    /// The VM's name.
    pub vm_name: String,
    /// Where it is.
    pub repository_id: String,
    /// The policy that asked for it.
    pub policy_id: Option<String>,
    /// What it holds.
    pub kind: BackupType,
    /// What was asked for.
    pub requested: BackupType,
    /// Why it is a full although an incremental was asked for.
    pub full_reason: Option<String>,
    /// Who sends: `sna` (the capture appliance is called) or `caller` (whoever asked sends).
    pub agent: String,
    /// Its state.
    pub state: BackupState,
    /// Why it failed, and what to do.
    pub error: Option<String>,
    /// The operator's words about it.
    pub tags: BTreeMap<String, String>,
    /// Bytes that came in, by the hub's count.
    pub bytes_transferred: u64,
    /// What the agent said last; a sign of life only.
    pub agent_phase: Option<String>,
    /// When the agent said something last.
    pub last_telemetry_at: Option<Timestamp>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it began.
    pub started_at: Option<Timestamp>,
    /// When it ended, one way or the other.
    pub completed_at: Option<Timestamp>,
    /// Its disks, by number.
    pub disks: Vec<DiskBackup>,
}

/// One disk of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskBackup {
    /// Number of the disk.
    pub disk_id: u32,
    /// VMware's device key.
    pub disk_key: u32,
    /// Bytes of the disk.
    pub capacity: u64,
    /// Its state.
    pub state: DiskState,
    /// The backup whose image is the backing file.
    pub parent: Option<BackupId>,
    /// The change id from which on changes are asked for; empty for a full.
    pub previous_change_id: String,
    /// The change id of this backup.
    pub change_id: Option<String>,
    /// Path of the image inside the repository.
    pub path: String,
    /// Name of its export.
    pub export_name: String,
    /// The catalogued name of its export.
    pub export_alias: String,
    /// Its own port, where it has one.
    pub port: Option<u16>,
    /// Bytes that came in.
    pub bytes_received: u64,
    /// Bytes that came in and were not stored, because the chain has them; once sealed.
    pub bytes_unchanged: u64,
    /// Bytes of data in the image, once sealed.
    pub stored_bytes: Option<u64>,
    /// Length of the image file, once sealed.
    pub file_bytes: Option<u64>,
    /// Hash over the checksums of the image, once sealed.
    pub root_hash: Option<String>,
    /// What went wrong with this disk.
    pub error: Option<String>,
    /// When it was sealed.
    pub sealed_at: Option<Timestamp>,
}

/// Columns of a backup, for [`backup_row`].
pub(super) const COLUMNS: &str = "b.id, b.vm_id, v.name, b.repository_id, b.policy_id, b.type, \
     b.requested_type, b.full_reason, b.agent, b.state, b.error, b.tags, b.bytes_transferred, \
     b.agent_phase, b.last_telemetry_at, b.created_at, b.started_at, b.completed_at";

/// Columns of a disk, for [`disk_row`].
pub(super) const DISK_COLUMNS: &str = "disk_id, disk_key, capacity_bytes, state, parent_backup_id, \
     previous_change_id, change_id, path, export_name, export_alias, port, bytes_received, \
     stored_bytes, file_bytes, root_hash, error, sealed_at, bytes_unchanged";

/// As SQLite has it.
pub(super) fn clamp(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Enters a backup with its disks.
pub(super) fn insert(t: &Transaction<'_>, backup: &Backup) -> Result<()> {
    let tags = serde_json::to_string(&backup.tags).unwrap_or_else(|_| "{}".into());
    t.execute(
        "INSERT INTO backups (id, vm_id, repository_id, policy_id, type, requested_type,
           full_reason, agent, state, error, tags, bytes_transferred, created_at, started_at,
           completed_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
        params![
            backup.id,
            backup.vm_id,
            backup.repository_id,
            backup.policy_id,
            backup.kind,
            backup.requested,
            backup.full_reason,
            backup.agent,
            backup.state,
            backup.error,
            tags,
            clamp(backup.bytes_transferred),
            backup.created_at,
            backup.started_at,
            backup.completed_at
        ],
    )
    .map_err(|e| conflict(e, || format!("backup {} is there already", backup.id)))?;
    for disk in &backup.disks {
        let inserted = t.execute(
            "INSERT INTO disk_backups (backup_id, disk_id, disk_key, capacity_bytes, state,
               parent_backup_id, previous_change_id, change_id, path, export_name, export_alias,
               port, bytes_received, stored_bytes, file_bytes, root_hash, sealed_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)",
            params![
                backup.id,
                disk.disk_id,
                disk.disk_key,
                clamp(disk.capacity),
                disk.state,
                disk.parent,
                disk.previous_change_id,
                disk.change_id,
                disk.path,
                disk.export_name,
                disk.export_alias,
                disk.port,
                clamp(disk.bytes_received),
                disk.stored_bytes.map(clamp),
                disk.file_bytes.map(clamp),
                disk.root_hash,
                disk.sealed_at
            ],
        );
        match inserted {
            Ok(_) => {}
            Err(e) if is_conflict(&e) => {
                let text = format!("disk {} of backup {}: {e}", disk.disk_id, backup.id);
                return Err(CatalogError::Conflict(text));
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// A backup, without its disks.
pub(super) fn backup_row(row: &Row<'_>) -> rusqlite::Result<Backup> {
    Ok(Backup {
        id: row.get(0)?,
        vm_id: row.get(1)?,
        vm_name: row.get(2)?,
        repository_id: row.get(3)?,
        policy_id: row.get(4)?,
        kind: row.get(5)?,
        requested: row.get(6)?,
        full_reason: row.get(7)?,
        agent: row.get(8)?,
        state: row.get(9)?,
        error: row.get(10)?,
        tags: serde_json::from_str(&row.get::<_, String>(11)?).unwrap_or_default(),
        bytes_transferred: row.get(12)?,
        agent_phase: row.get(13)?,
        last_telemetry_at: row.get(14)?,
        created_at: row.get(15)?,
        started_at: row.get(16)?,
        completed_at: row.get(17)?,
        disks: Vec::new(),
    })
}

/// A disk of a backup.
pub(super) fn disk_row(row: &Row<'_>) -> rusqlite::Result<DiskBackup> {
    Ok(DiskBackup {
        disk_id: row.get(0)?,
        disk_key: row.get(1)?,
        capacity: row.get(2)?,
        state: row.get(3)?,
        parent: row.get(4)?,
        previous_change_id: row.get(5)?,
        change_id: row.get(6)?,
        path: row.get(7)?,
        export_name: row.get(8)?,
        export_alias: row.get(9)?,
        port: row.get(10)?,
        bytes_received: row.get(11)?,
        stored_bytes: row.get(12)?,
        file_bytes: row.get(13)?,
        root_hash: row.get(14)?,
        error: row.get(15)?,
        sealed_at: row.get(16)?,
        bytes_unchanged: row.get(17)?,
    })
}
