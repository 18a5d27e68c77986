//! Chains: a full backup of a disk and what builds on it.

use rusqlite::params;

use super::{Catalog, Result};
use crate::model::BackupId;

/// A chain of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its id.
    pub id: String,
    /// The disk's number.
    pub disk_id: u32,
    /// Where it is.
    pub repository_id: String,
    /// The backup it begins with.
    pub full_backup_id: BackupId,
    /// The newest completed backup that builds on it.
    pub head_backup_id: BackupId,
    /// Ids of the backups from the full to the head.
    pub backups: Vec<BackupId>,
}

impl Catalog {
    /// The chains of one disk of a VM, the one that was changed last first.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn chains(&self, vm_id: &str, disk: u32) -> Result<Vec<Chain>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, disk_id, repository_id, full_backup_id, head_backup_id FROM chains
                 WHERE vm_id = ?1 AND disk_id = ?2 ORDER BY updated_at DESC, id",
            )?;
            let rows = statement.query_map(params![vm_id, disk], |row| {
                Ok(Chain {
                    id: row.get(0)?,
                    disk_id: row.get(1)?,
                    repository_id: row.get(2)?,
                    full_backup_id: row.get(3)?,
                    head_backup_id: row.get(4)?,
                    backups: Vec::new(),
                })
            })?;
            let mut chains: Vec<Chain> = rows.collect::<rusqlite::Result<_>>()?;
            for chain in &mut chains {
                chain.backups = ancestors(c, &chain.head_backup_id, disk)?;
            }
            Ok(chains)
        })
    }

    /// Ids of the backups that the image of one disk of a backup is made of, from the full on.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn lineage(&self, backup: &str, disk: u32) -> Result<Vec<BackupId>> {
        self.read(|c| ancestors(c, backup, disk))
    }
}

fn ancestors(c: &rusqlite::Connection, backup: &str, disk: u32) -> rusqlite::Result<Vec<BackupId>> {
    let mut statement = c.prepare_cached(
        "WITH RECURSIVE up (id, depth) AS (
           SELECT ?1, 0 UNION SELECT d.parent_backup_id, up.depth + 1 FROM disk_backups d
             JOIN up ON d.backup_id = up.id AND d.disk_id = ?2
             WHERE d.parent_backup_id IS NOT NULL)
         SELECT id FROM up ORDER BY depth DESC",
    )?;
    statement.query_map(params![backup, disk], |row| row.get(0))?.collect()
}
