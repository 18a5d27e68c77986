//! Exports that an operator added, and ports that somebody asked for.

use rusqlite::params;

use super::{Catalog, Result, conflict};
use crate::model::Timestamp;

/// An export that an operator added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRow {
    /// Its name.
    pub name: String,
    /// The image.
    pub path: String,
    /// Writes are refused.
    pub read_only: bool,
    /// Most connections; the server's bound where not given.
    pub max_connections: Option<u32>,
}

/// A port that is set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortAllocation {
    /// The port.
    pub port: u16,
    /// For which job.
    pub job_id: String,
    /// For which export.
    pub export_name: String,
    /// Since when.
    pub allocated_at: Timestamp,
    /// Until when, unless released before.
    pub expires_at: Timestamp,
}

impl Catalog {
    /// Enters an export.
    ///
    /// # Errors
    /// `Conflict` where the name is taken; `Sqlite`.
    pub fn add_export(&self, export: &ExportRow) -> Result<()> {
        self.write(|t| {
            t.execute(
                "INSERT INTO exports VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    export.name,
                    export.path,
                    export.read_only,
                    export.max_connections,
                    Timestamp::now()
                ],
            )
            .map_err(|e| conflict(e, || format!("there is an export named '{}'", export.name)))?;
            Ok(())
        })
    }

    /// The exports, by name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn exports(&self) -> Result<Vec<ExportRow>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT name, path, read_only, max_connections FROM exports ORDER BY name",
            )?;
            let rows = statement.query_map([], |row| {
                Ok(ExportRow {
                    name: row.get(0)?,
                    path: row.get(1)?,
                    read_only: row.get(2)?,
                    max_connections: row.get(3)?,
                })
            })?;
            rows.collect()
        })
    }

    /// Removes an export; whether there was one.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn remove_export(&self, name: &str) -> Result<bool> {
        self.write(|t| Ok(t.execute("DELETE FROM exports WHERE name = ?1", [name])? > 0))
    }

    /// Sets ports aside, all or none.
    ///
    /// # Errors
    /// `Conflict` where one is taken; `Sqlite`.
    pub fn allocate_ports(&self, allocations: &[PortAllocation]) -> Result<()> {
        self.write(|t| {
            for a in allocations {
                t.execute(
                    "INSERT INTO port_allocations VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![a.port, a.job_id, a.export_name, a.allocated_at, a.expires_at],
                )
                .map_err(|e| conflict(e, || format!("port {} is taken", a.port)))?;
            }
            Ok(())
        })
    }

    /// The ports that are set aside now, in order; what has expired is forgotten.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn port_allocations(&self) -> Result<Vec<PortAllocation>> {
        self.write(|t| {
            t.execute("DELETE FROM port_allocations WHERE expires_at < ?1", [Timestamp::now()])?;
            let mut statement = t.prepare_cached(
                "SELECT port, job_id, export_name, allocated_at, expires_at
                 FROM port_allocations ORDER BY port",
            )?;
            let rows = statement.query_map([], |row| {
                Ok(PortAllocation {
                    port: row.get(0)?,
                    job_id: row.get(1)?,
                    export_name: row.get(2)?,
                    allocated_at: row.get(3)?,
                    expires_at: row.get(4)?,
                })
            })?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        })
    }

    /// Gives ports of a job back, all of them where none is named; how many it had.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn release_ports(&self, job: &str, ports: &[u16]) -> Result<usize> {
        self.write(|t| {
            if ports.is_empty() {
                return Ok(t.execute("DELETE FROM port_allocations WHERE job_id = ?1", [job])?);
            }
            let mut released = 0;
            for port in ports {
                released += t.execute(
                    "DELETE FROM port_allocations WHERE job_id = ?1 AND port = ?2",
                    params![job, port],
                )?;
            }
            Ok(released)
        })
    }
}
