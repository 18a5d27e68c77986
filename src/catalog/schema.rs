//! Versions of the schema, each a step from the one before.

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::{CatalogError, Result};

/// The steps, in order. Released ones are never changed.
const MIGRATIONS: &[&str] = &[include_str!("migrations/0001.sql")];

/// Version that this program reads and writes.
pub(super) fn newest() -> usize {
    MIGRATIONS.len()
}

/// Brings the catalog in `connection` to the newest version. The file at `path` is copied before a
/// step changes data that is there.
pub(super) fn migrate(connection: &mut Connection, path: Option<&Path>) -> Result<()> {
    let version: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version > newest() {
        return Err(CatalogError::Newer { found: version, known: newest() });
    }
    if version == newest() {
        return Ok(());
    }
    if let (Some(path), 1..) = (path, version) {
        let copy = copy_name(path, version);
        connection.backup("main", &copy, None)?;
        tracing::info!(copy = %copy.display(), "catalog copied before it is brought up to date");
    }
    for (index, step) in MIGRATIONS.iter().enumerate().skip(version) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "user_version", index + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

fn copy_name(path: &Path, version: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".v{version}"));
    name.into()
}
