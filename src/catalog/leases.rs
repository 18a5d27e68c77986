//! Restore points that somebody uses: they are not deleted meanwhile.

use rusqlite::params;

use super::{Catalog, CatalogError, Result};
use crate::model::Timestamp;

impl Catalog {
    /// Notes that `id` uses a disk of a restore point.
    ///
    /// # Errors
    /// `Conflict` where it is no restore point any more; `Sqlite`.
    pub fn lease(&self, id: &str, backup: &str, disk: u32) -> Result<()> {
        self.write(|t| {
            let now = Timestamp::now();
            let entered = t.execute(
                "INSERT INTO restore_mounts
                 SELECT ?1, id, ?3, 'active', ?4, ?4 FROM backups
                 WHERE id = ?2 AND state = 'completed'",
                params![id, backup, disk, now],
            )?;
            if entered == 0 {
                return Err(CatalogError::Conflict(format!("backup {backup} is going away")));
            }
            Ok(())
        })
    }

    /// Notes that `id` uses it no more.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn release_lease(&self, id: &str) -> Result<()> {
        self.write(|t| {
            t.execute("DELETE FROM restore_mounts WHERE id = ?1", [id])?;
            Ok(())
        })
    }

    /// Notes that nobody uses anything: at a start.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn release_all_leases(&self) -> Result<()> {
        self.write(|t| {
            t.execute("DELETE FROM restore_mounts", [])?;
            Ok(())
        })
    }
}
