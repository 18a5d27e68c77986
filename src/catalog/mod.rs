//! What the hub knows: VMs, backups, repositories, exports, events, tokens, in one SQLite file.
//!
//! The catalog is an index. Every restore point explains itself in its manifest, and the catalog
//! can be made again from those. Calls take well below a millisecond, but for commits, which wait
//! for the disk; none of them is made on an async thread.

mod access;
mod backup_rows;
mod backups;
mod chains;
mod copies;
mod exports;
mod leases;
mod repositories;
mod schema;
mod vms;

pub use access::{Credential, Event, Token};
pub use backup_rows::{Backup, DiskBackup};
pub use backups::BackupFilter;
pub use chains::Chain;
pub use copies::Copy;
pub use exports::{ExportRow, PortAllocation};
pub use repositories::{CopyMode, CopyRule, Policy, Repository};
pub use vms::{Vm, VmDisk};

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::model::{BackupState, BackupType, CopyState, DiskState, Role, Timestamp};

/// Time to wait for another process that has the file locked.
const BUSY: Duration = Duration::from_secs(5);

/// Why a catalog call failed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// What is to be stored collides with what is there.
    #[error("{0}")]
    Conflict(String),
    /// The file is of a newer program.
    #[error(
        "the catalog has version {found}, this program knows up to {known}: use the newer program, \
         or the copy that it made before it changed the catalog"
    )]
    Newer {
        /// Version of the file.
        found: usize,
        /// Newest version known here.
        known: usize,
    },
    /// SQLite failed.
    #[error("the catalog failed: {0}")]
    Sqlite(#[from] rusqlite::Error),
}

/// Result of a catalog call.
pub type Result<T> = std::result::Result<T, CatalogError>;

/// The open catalog.
#[derive(Debug)]
pub struct Catalog {
    connection: Mutex<Connection>,
}

impl Catalog {
    /// Opens the catalog at `path`, making or migrating it where needed.
    ///
    /// # Errors
    /// `Newer`, `Sqlite`.
    pub fn open(path: &Path) -> Result<Self> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        Self::prepare(&mut connection, Some(path))?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// A catalog that is gone with the process.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn in_memory() -> Result<Self> {
        let mut connection = Connection::open_in_memory()?;
        Self::prepare(&mut connection, None)?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn prepare(connection: &mut Connection, path: Option<&Path>) -> Result<()> {
        // A commit that was answered must survive a power cut.
        connection.pragma_update(None, "synchronous", "FULL")?;
        schema::migrate(connection, path)?;
        connection.pragma_update(None, "foreign_keys", true)?;
        Ok(())
    }

    fn read<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(query(&connection)?)
    }

    fn write<T>(&self, change: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let result = change(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }

    /// Whether the file is whole and no row refers to one that is not there; the findings.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn check(&self) -> Result<Vec<String>> {
        self.read(|c| {
            let mut findings = Vec::new();
            let mut statement = c.prepare("PRAGMA integrity_check")?;
            for line in statement.query_map([], |row| row.get::<_, String>(0))? {
                let line = line?;
                if line != "ok" {
                    findings.push(line);
                }
            }
            let mut statement = c.prepare("PRAGMA foreign_key_check")?;
            let broken = statement.query_map([], |row| {
                Ok(format!("a row of {} refers to nothing", row.get::<_, String>(0)?))
            })?;
            findings.extend(broken.collect::<rusqlite::Result<Vec<_>>>()?);
            Ok(findings)
        })
    }
}

/// Whether `error` says that a row like that is there already.
fn is_conflict(error: &rusqlite::Error) -> bool {
    matches!(error, rusqlite::Error::SqliteFailure(e, _)
        if e.code == rusqlite::ErrorCode::ConstraintViolation)
}

/// Turns a collision into a sentence.
fn conflict(error: rusqlite::Error, text: impl FnOnce() -> String) -> CatalogError {
    if is_conflict(&error) { CatalogError::Conflict(text()) } else { error.into() }
}

impl ToSql for Timestamp {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.to_string().into())
    }
}

impl FromSql for Timestamp {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Self::parse(value.as_str()?).map_err(|e| FromSqlError::Other(e.into()))
    }
}

macro_rules! word_columns {
    ($($name:ty),*) => {$(
        impl ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                Ok(self.as_str().into())
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                value.as_str()?.parse().map_err(|e: String| FromSqlError::Other(e.into()))
            }
        }
    )*};
}

word_columns!(BackupState, BackupType, CopyState, DiskState, Role);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalog_is_made_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.db");
        Catalog::open(&path).unwrap().event("test", "made", "catalog", "once").unwrap();
        let again = Catalog::open(&path).unwrap();
        assert_eq!(again.events(None, 10).unwrap().len(), 1);
        assert!(again.check().unwrap().is_empty());
    }

    #[test]
    fn a_catalog_of_a_newer_program_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.db");
        drop(Catalog::open(&path).unwrap());
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", schema::newest() + 1).unwrap();
        drop(connection);
        assert!(matches!(Catalog::open(&path), Err(CatalogError::Newer { .. })));
    }
}
