//! Copies of restore points in other repositories.

use rusqlite::{Row, params};

use super::{Catalog, CatalogError, Result};
use crate::model::{BackupId, CopyState, Timestamp, new_id};

/// A copy of a restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Its id.
    pub id: String,
    /// The restore point.
    pub backup_id: BackupId,
    /// Where it goes.
    pub repository_id: String,
    /// Its state.
    pub state: CopyState,
    /// Why it failed.
    pub error: Option<String>,
    /// Bytes of the files that were copied for it.
    pub bytes_copied: u64,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it ended.
    pub completed_at: Option<Timestamp>,
}

const COLUMNS: &str = "id, backup_id, repository_id, state, error, bytes_copied, created_at, \
     completed_at";

fn copy(row: &Row<'_>) -> rusqlite::Result<Copy> {
    Ok(Copy {
        id: row.get(0)?,
        backup_id: row.get(1)?,
        repository_id: row.get(2)?,
        state: row.get(3)?,
        error: row.get(4)?,
        bytes_copied: row.get(5)?,
        created_at: row.get(6)?,
        completed_at: row.get(7)?,
    })
}

impl Catalog {
    /// Enters a wish for a copy; one that failed before is tried again under its id.
    ///
    /// # Errors
    /// `Conflict` where there is one, or one is under way; `Sqlite`.
    pub fn add_copy(&self, backup: &str, repository: &str) -> Result<Copy> {
        self.write(|t| {
            let changed = t.execute(
                "INSERT INTO backup_copies (id, backup_id, repository_id, state, created_at)
                 VALUES (?1, ?2, ?3, 'pending', ?4)
                 ON CONFLICT (backup_id, repository_id) DO UPDATE
                   SET state = 'pending', error = NULL, completed_at = NULL, bytes_copied = 0
                   WHERE state = 'failed'",
                params![new_id("copy"), backup, repository, Timestamp::now()],
            )?;
            if changed == 0 {
                let text = format!("backup {backup} is, or is being, copied there already");
                return Err(CatalogError::Conflict(text));
            }
            let sql = format!(
                "SELECT {COLUMNS} FROM backup_copies WHERE backup_id = ?1 AND repository_id = ?2"
            );
            Ok(t.query_row(&sql, [backup, repository], copy)?)
        })
    }

    /// The copies of a backup, or all; the oldest first.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn copies(&self, backup: Option<&str>) -> Result<Vec<Copy>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM backup_copies WHERE ?1 IS NULL OR backup_id = ?1
                 ORDER BY created_at, rowid"
            ))?;
            statement.query_map([backup], copy)?.collect()
        })
    }

    /// Notes how far a copy is, or how it ended.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn set_copy(
        &self,
        id: &str,
        state: CopyState,
        bytes: u64,
        error: Option<&str>,
    ) -> Result<()> {
        let ended = matches!(state, CopyState::Completed | CopyState::Failed);
        self.write(|t| {
            t.execute(
                "UPDATE backup_copies SET state = ?2, bytes_copied = ?3, error = ?4,
                   completed_at = ?5 WHERE id = ?1",
                params![
                    id,
                    state,
                    i64::try_from(bytes).unwrap_or(i64::MAX),
                    error,
                    ended.then(Timestamp::now)
                ],
            )?;
            Ok(())
        })
    }

    /// Notes that a restore point came along with a copy of one that builds on it.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn note_copied(&self, backup: &str, repository: &str) -> Result<()> {
        self.write(|t| {
            t.execute(
                "INSERT INTO backup_copies (id, backup_id, repository_id, state, created_at,
                   completed_at) VALUES (?1, ?2, ?3, 'completed', ?4, ?4)
                 ON CONFLICT (backup_id, repository_id) DO UPDATE
                   SET state = 'completed', error = NULL, completed_at = ?4",
                params![new_id("copy"), backup, repository, Timestamp::now()],
            )?;
            Ok(())
        })
    }
}
