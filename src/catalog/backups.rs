//! Backups and their disks: state changes that only go forward.

use rusqlite::{OptionalExtension, Transaction, params};

use super::backup_rows::{
    Backup, COLUMNS, DISK_COLUMNS, DiskBackup, backup_row, clamp, disk_row, insert,
};
use super::{Catalog, CatalogError, Result, conflict};
use crate::model::{BackupId, BackupState, BackupType, Timestamp, new_id};

/// Which backups to list.
#[derive(Debug, Clone, Default)]
pub struct BackupFilter {
    /// Of the VM of this name.
    pub vm_name: Option<String>,
    /// Of the VM of this id.
    pub vm_id: Option<String>,
    /// In this repository.
    pub repository_id: Option<String>,
    /// In one of these states.
    pub states: Option<Vec<BackupState>>,
    /// Of this type.
    pub kind: Option<BackupType>,
    /// With this id.
    pub id: Option<String>,
}

impl Catalog {
    /// Enters a backup with its disks. A VM has one running backup at a time.
    ///
    /// # Errors
    /// `Conflict` where the VM has a running backup, or a name is taken; `Sqlite`.
    pub fn add_backup(&self, backup: &Backup) -> Result<()> {
        self.write(|t| {
            let running: Option<String> = t
                .query_row(
                    "SELECT id FROM backups WHERE vm_id = ?1
                     AND state IN ('queued', 'preparing', 'receiving', 'sealing')",
                    [&backup.vm_id],
                    |row| row.get(0),
                )
                .optional()?;
            if let Some(running) = running.filter(|_| backup.state.is_running()) {
                return Err(CatalogError::Conflict(format!(
                    "VM '{}' has a running backup, {running}: wait for it, or cancel it",
                    backup.vm_name
                )));
            }
            for parent in backup.disks.iter().filter_map(|disk| disk.parent.as_ref()) {
                let state: Option<BackupState> = t
                    .query_row("SELECT state FROM backups WHERE id = ?1", [parent], |r| r.get(0))
                    .optional()?;
                if state != Some(BackupState::Completed) {
                    let text = format!("backup {parent} is going away: start the backup again");
                    return Err(CatalogError::Conflict(text));
                }
            }
            insert(t, backup)
        })
    }

    /// Marks a backup that has ended as going away, unless others need it.
    ///
    /// # Errors
    /// `Conflict` where others need it, or it has not ended; `Sqlite`.
    pub fn begin_delete(&self, id: &str) -> Result<()> {
        self.write(|t| {
            let needed = dependents(t, id)?;
            if !needed.is_empty() {
                return Err(CatalogError::Conflict(format!(
                    "backup {id} is needed by {}: delete those first, the newest first",
                    needed.join(", ")
                )));
            }
            let used: bool = t.query_row(
                "SELECT EXISTS (SELECT 1 FROM restore_mounts WHERE backup_id = ?1)",
                [id],
                |row| row.get(0),
            )?;
            if used {
                let text = format!("backup {id} is being restored from: end that first");
                return Err(CatalogError::Conflict(text));
            }
            let changed = t.execute(
                "UPDATE backups SET state = 'deleting' WHERE id = ?1
                 AND state IN ('completed', 'failed', 'cancelled', 'deleting')",
                [id],
            )?;
            if changed == 0 {
                return Err(CatalogError::Conflict(format!("backup {id} has not ended")));
            }
            Ok(())
        })
    }

    /// Changes the state, unless the backup has ended already: the change and whether it was made.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn set_state(&self, id: &str, from: &[BackupState], to: BackupState) -> Result<bool> {
        self.write(|t| {
            let now: BackupState =
                match t.query_row("SELECT state FROM backups WHERE id = ?1", [id], |r| r.get(0)) {
                    Err(rusqlite::Error::QueryReturnedNoRows) => return Ok(false),
                    other => other?,
                };
            if !from.contains(&now) {
                return Ok(false);
            }
            let time = Timestamp::now();
            t.execute("UPDATE backups SET state = ?2 WHERE id = ?1", params![id, to])?;
            if to == BackupState::Preparing {
                t.execute("UPDATE backups SET started_at = ?2 WHERE id = ?1", params![id, time])?;
            }
            Ok(true)
        })
    }

    /// Ends a backup without a restore point, unless it has ended; whether it did.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn fail_backup(&self, id: &str, to: BackupState, error: &str) -> Result<bool> {
        self.write(|t| {
            let changed = t.execute(
                "UPDATE backups SET state = ?2, error = ?3, completed_at = ?4 WHERE id = ?1
                 AND state IN ('queued', 'preparing', 'receiving')",
                params![id, to, error, Timestamp::now()],
            )?;
            if changed > 0 {
                t.execute(
                    "UPDATE disk_backups SET state = 'failed', port = NULL WHERE backup_id = ?1",
                    [id],
                )?;
            }
            Ok(changed > 0)
        })
    }

    /// Notes the hub's counters and the agent's signs of life.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn note_progress(
        &self,
        id: &str,
        disks: &[(u32, u64)],
        telemetry: Option<(&str, Timestamp)>,
    ) -> Result<()> {
        self.write(|t| {
            for (disk, bytes) in disks {
                t.execute(
                    "UPDATE disk_backups SET bytes_received = max(bytes_received, ?3)
                     WHERE backup_id = ?1 AND disk_id = ?2",
                    params![id, disk, clamp(*bytes)],
                )?;
            }
            t.execute(
                "UPDATE backups SET bytes_transferred =
                   (SELECT sum(bytes_received) FROM disk_backups WHERE backup_id = ?1)
                 WHERE id = ?1",
                [id],
            )?;
            if let Some((phase, at)) = telemetry {
                t.execute(
                    "UPDATE backups SET agent_phase = ?2, last_telemetry_at = ?3 WHERE id = ?1",
                    params![id, phase, at],
                )?;
            }
            Ok(())
        })
    }

    /// Notes the port of a disk's export.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn set_disk_port(&self, id: &str, disk: u32, port: Option<u16>) -> Result<()> {
        self.write(|t| {
            t.execute(
                "UPDATE disk_backups SET port = ?3 WHERE backup_id = ?1 AND disk_id = ?2",
                params![id, disk, port],
            )?;
            Ok(())
        })
    }

    /// Notes that a disk is on disk under its temporary names.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn seal_disk(&self, id: &str, disk: &DiskBackup) -> Result<()> {
        self.write(|t| {
            t.execute(
                "UPDATE disk_backups SET state = 'sealed', change_id = ?3, bytes_received = ?4,
                   stored_bytes = ?5, file_bytes = ?6, root_hash = ?7, sealed_at = ?8, port = NULL,
                   bytes_unchanged = ?9
                 WHERE backup_id = ?1 AND disk_id = ?2 AND state = 'receiving'",
                params![
                    id,
                    disk.disk_id,
                    disk.change_id,
                    clamp(disk.bytes_received),
                    disk.stored_bytes.map(clamp),
                    disk.file_bytes.map(clamp),
                    disk.root_hash,
                    disk.sealed_at,
                    clamp(disk.bytes_unchanged)
                ],
            )?;
            t.execute(
                "UPDATE backups SET bytes_transferred =
                   (SELECT sum(bytes_received) FROM disk_backups WHERE backup_id = ?1)
                 WHERE id = ?1",
                [id],
            )?;
            Ok(())
        })
    }

    /// Makes a backup a restore point, and the head of its chains, in one transaction. Repeating it
    /// changes nothing.
    ///
    /// # Errors
    /// `Conflict` where it is not being sealed; `Sqlite`.
    pub fn complete_backup(&self, id: &str) -> Result<()> {
        self.write(|t| {
            let now = Timestamp::now();
            let changed = t.execute(
                "UPDATE backups SET state = 'completed', completed_at = ?2, error = NULL
                 WHERE id = ?1 AND state = 'sealing'
                 AND NOT EXISTS (SELECT 1 FROM disk_backups
                                 WHERE backup_id = ?1 AND state != 'sealed')",
                params![id, now],
            )?;
            if changed == 0 {
                let text = format!("backup {id} is not being sealed, or a disk of it is not");
                return Err(CatalogError::Conflict(text));
            }
            t.execute("UPDATE disk_backups SET state = 'completed' WHERE backup_id = ?1", [id])?;
            move_heads(t, id, now)
        })
    }

    /// Enters a restore point that was found in a repository, with its chains; whether it did. One
    /// that is there already is left as it is, and one whose parent is not there is not entered.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn import_backup(&self, backup: &Backup) -> Result<bool> {
        let entered = self.write(|t| {
            insert(t, backup)?;
            move_heads(t, &backup.id, backup.completed_at.unwrap_or(backup.created_at))
        });
        match entered {
            Ok(()) => Ok(true),
            // Nothing of it was entered.
            Err(CatalogError::Conflict(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Notes what went wrong with a disk.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn note_disk_error(&self, id: &str, disk: u32, error: &str) -> Result<()> {
        self.write(|t| {
            t.execute(
                "UPDATE disk_backups SET error = ?3 WHERE backup_id = ?1 AND disk_id = ?2",
                params![id, disk, error],
            )?;
            Ok(())
        })
    }

    /// The backup of that id.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn backup(&self, id: &str) -> Result<Option<Backup>> {
        let filter = BackupFilter { id: Some(id.to_owned()), ..BackupFilter::default() };
        Ok(self.backups(&filter)?.pop())
    }

    /// The backups that `filter` lets pass, newest first.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn backups(&self, filter: &BackupFilter) -> Result<Vec<Backup>> {
        let states = filter.states.as_ref().map(|states| {
            states.iter().map(|state| format!("'{state}'")).collect::<Vec<_>>().join(",")
        });
        let in_states = states.map_or("1".to_owned(), |list| format!("b.state IN ({list})"));
        self.read(|c| {
            let mut statement = c.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM backups b JOIN vms v ON v.id = b.vm_id
                 WHERE (?1 IS NULL OR v.name = ?1) AND (?2 IS NULL OR b.vm_id = ?2)
                   AND (?3 IS NULL OR b.repository_id = ?3) AND (?4 IS NULL OR b.type = ?4)
                   AND (?5 IS NULL OR b.id = ?5) AND {in_states}
                 ORDER BY b.created_at DESC, b.rowid DESC"
            ))?;
            let arguments =
                params![filter.vm_name, filter.vm_id, filter.repository_id, filter.kind, filter.id];
            let rows = statement.query_map(arguments, backup_row)?;
            let mut backups: Vec<Backup> = rows.collect::<rusqlite::Result<_>>()?;
            let mut disks = c.prepare_cached(&format!(
                "SELECT {DISK_COLUMNS} FROM disk_backups WHERE backup_id = ?1 ORDER BY disk_id"
            ))?;
            for backup in &mut backups {
                let rows = disks.query_map([&backup.id], disk_row)?;
                backup.disks = rows.collect::<rusqlite::Result<_>>()?;
            }
            Ok(backups)
        })
    }

    /// Whether a backup's export has, or had, this catalogued name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn alias_is_known(&self, alias: &str) -> Result<bool> {
        self.read(|c| {
            let query = "SELECT EXISTS (SELECT 1 FROM disk_backups WHERE export_alias = ?1)";
            c.query_row(query, [alias], |row| row.get(0))
        })
    }

    /// Removes the row of a backup whose files are gone, and moves the heads of its chains back.
    ///
    /// # Errors
    /// `Conflict` where another backup needs it; `Sqlite`.
    pub fn remove_backup(&self, id: &str) -> Result<()> {
        self.write(|t| {
            t.execute("DELETE FROM chains WHERE full_backup_id = ?1", [id])?;
            t.execute(
                "UPDATE chains SET head_backup_id = coalesce(
                   (SELECT parent_backup_id FROM disk_backups d
                    WHERE d.backup_id = ?1 AND d.disk_id = chains.disk_id), full_backup_id)
                 WHERE head_backup_id = ?1",
                [id],
            )?;
            // Failed backups name their parents for the record only.
            t.execute(
                "UPDATE disk_backups SET parent_backup_id = NULL WHERE parent_backup_id = ?1
                 AND backup_id IN (SELECT id FROM backups WHERE state IN ('failed', 'cancelled'))",
                [id],
            )?;
            t.execute("DELETE FROM backups WHERE id = ?1", [id]).map_err(|e| {
                conflict(e, || format!("backup {id} is the parent of another backup"))
            })?;
            Ok(())
        })
    }
}

/// Ids of the backups whose images have those of this one as backing files.
fn dependents(t: &Transaction<'_>, id: &str) -> rusqlite::Result<Vec<BackupId>> {
    let mut statement = t.prepare_cached(
        "SELECT DISTINCT d.backup_id FROM disk_backups d JOIN backups b ON b.id = d.backup_id
         WHERE d.parent_backup_id = ?1 AND b.state NOT IN ('failed', 'cancelled')
         ORDER BY b.created_at",
    )?;
    statement.query_map([id], |row| row.get(0))?.collect()
}

/// Makes a completed backup the head of the chain that each of its disks belongs to.
fn move_heads(t: &Transaction<'_>, id: &str, now: Timestamp) -> Result<()> {
    let mut disks = t.prepare(
        "SELECT d.disk_id, d.parent_backup_id, b.vm_id, b.repository_id FROM disk_backups d
         JOIN backups b ON b.id = d.backup_id WHERE d.backup_id = ?1",
    )?;
    let rows = disks.query_map([id], |row| {
        Ok((
            row.get::<_, u32>(0)?,
            row.get::<_, Option<String>>(1)?,
            row.get::<_, String>(2)?,
            row.get::<_, String>(3)?,
        ))
    })?;
    for row in rows {
        let (disk, parent, vm, repository) = row?;
        match parent {
            None => t.execute(
                "INSERT INTO chains VALUES (?1, ?2, ?3, ?4, ?5, ?5, ?6)
                 ON CONFLICT (full_backup_id, disk_id) DO NOTHING",
                params![new_id("chain"), vm, disk, repository, id, now],
            )?,
            Some(parent) => t.execute(
                "WITH RECURSIVE up (id) AS (
                   SELECT ?2 UNION SELECT d.parent_backup_id FROM disk_backups d JOIN up
                     ON d.backup_id = up.id AND d.disk_id = ?3 WHERE d.parent_backup_id IS NOT NULL)
                 UPDATE chains SET head_backup_id = ?1, updated_at = ?4
                 WHERE disk_id = ?3 AND full_backup_id IN (SELECT id FROM up)",
                params![id, parent, disk, now],
            )?,
        };
    }
    Ok(())
}
