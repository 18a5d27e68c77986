//! Versions of the schema, each a step from the one before.

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::{CatalogError, Result};

/// The steps, in order. Released ones are never changed.
const MIGRATIONS: &[&str] = &[include_str!("migrations/0001.sql")];

/// Version that this program reads and writes.
#[cfg(test)]
pub(super) fn newest() -> usize {
    MIGRATIONS.len()
}

/// Brings the catalog in `connection` to the newest version. The file at `path` is copied before a
/// step changes data that is there.
pub(super) fn migrate(connection: &mut Connection, path: Option<&Path>) -> Result<()> {
    take(MIGRATIONS, connection, path)
}

fn take(steps: &[&str], connection: &mut Connection, path: Option<&Path>) -> Result<()> {
    let version: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version > steps.len() {
        return Err(CatalogError::Newer { found: version, known: steps.len() });
    }
    if version == steps.len() {
        return Ok(());
    }
    if let (Some(path), 1..) = (path, version) {
        let copy = copy_name(path, version);
        connection.backup("main", &copy, None)?;
        tracing::info!(copy = %copy.display(), "catalog copied before it is brought up to date");
    }
    for (index, step) in steps.iter().enumerate().skip(version) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalog_is_copied_before_a_step_changes_what_is_there_and_a_failed_step_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.db");
        let first = "CREATE TABLE a (x INTEGER); INSERT INTO a VALUES (7);";
        let mut connection = Connection::open(&path).unwrap();
        take(&[first], &mut connection, Some(&path)).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing to copy yet");
        let broken = [first, "DROP TABLE a; CREATE TABLE nonsense"];
        assert!(take(&broken, &mut connection, Some(&path)).is_err());
        let value = |c: &Connection| c.query_row("SELECT x FROM a", [], |row| row.get::<_, i64>(0));
        assert_eq!(value(&connection), Ok(7));
        let second = [first, "UPDATE a SET x = 8;"];
        take(&second, &mut connection, Some(&path)).unwrap();
        assert_eq!(value(&connection), Ok(8));
        let copy = Connection::open(copy_name(&path, 1)).unwrap();
        assert_eq!(value(&copy), Ok(7), "the copy is as it was");
    }
}
