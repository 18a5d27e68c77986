//! Repositories and policies.

use rusqlite::{Row, params};
use serde::{Deserialize, Serialize};

use super::{Catalog, Result, conflict};
use crate::model::{Timestamp, new_id};

/// A place for backups.
#[derive(Debug, Clone, PartialEq)]
pub struct Repository {
    /// Its id.
    pub id: String,
    /// The operator's name for it.
    pub name: String,
    /// What it is: `local`, `nfs`, `cifs`, ...
    pub kind: String,
    /// New backups may go there.
    pub enabled: bool,
    /// Its directory.
    pub path: String,
    /// What was given when it was made.
    pub config: serde_json::Value,
    /// Backups are not deleted before their time.
    pub is_immutable: bool,
    /// Days for which a backup stays at least.
    pub min_retention_days: u32,
    /// When it was made.
    pub created_at: Timestamp,
}

/// How long backups are kept, and where copies go.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Its id.
    pub id: String,
    /// The operator's name for it.
    pub name: String,
    /// It is followed.
    pub enabled: bool,
    /// Where backups go.
    pub primary_repository_id: String,
    /// Days for which backups are kept.
    pub retention_days: u32,
    /// Where copies go.
    pub copy_rules: Vec<CopyRule>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// When a rule copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CopyMode {
    /// Once a backup is complete.
    Immediate,
    /// At times of its own. Not possible yet.
    Scheduled,
    /// When somebody asks.
    Manual,
}

/// Where backups of a policy are copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyRule {
    /// Id or name of the repository.
    pub destination_repository_id: String,
    /// When.
    pub copy_mode: CopyMode,
    /// Rules with a lower number come first.
    #[serde(default)]
    pub priority: i32,
    /// It is followed.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Said for the record: every copy is verified.
    #[serde(default = "yes")]
    pub verify_after_copy: bool,
}

fn yes() -> bool {
    true
}

impl Catalog {
    /// Enters a repository.
    ///
    /// # Errors
    /// `Conflict` where name or path are taken; `Sqlite`.
    pub fn add_repository(&self, repository: &Repository) -> Result<()> {
        self.write(|t| {
            t.execute(
                "INSERT INTO repositories VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
                params![
                    repository.id,
                    repository.name,
                    repository.kind,
                    repository.enabled,
                    repository.path,
                    repository.config.to_string(),
                    repository.is_immutable,
                    repository.min_retention_days,
                    repository.created_at
                ],
            )
            .map_err(|e| {
                conflict(e, || {
                    format!(
                        "there is a repository named '{}', or one at '{}'",
                        repository.name, repository.path
                    )
                })
            })?;
            Ok(())
        })
    }

    /// All repositories, the oldest first.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn repositories(&self) -> Result<Vec<Repository>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, name, type, enabled, path, config, is_immutable, min_retention_days,
                   created_at FROM repositories ORDER BY created_at, id",
            )?;
            statement.query_map([], repository)?.collect()
        })
    }

    /// The repository of that id or name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn repository(&self, key: &str) -> Result<Option<Repository>> {
        Ok(self.repositories()?.into_iter().find(|r| r.id == key || r.name == key))
    }

    /// Notes that a repository is elsewhere now.
    ///
    /// # Errors
    /// `Conflict` where another one is there; `Sqlite`.
    pub fn move_repository(&self, id: &str, path: &str) -> Result<()> {
        self.write(|t| {
            t.execute("UPDATE repositories SET path = ?2 WHERE id = ?1", params![id, path])
                .map_err(|e| conflict(e, || format!("another repository is at '{path}'")))?;
            Ok(())
        })
    }

    /// Forgets a repository; its files stay.
    ///
    /// # Errors
    /// `Conflict` while it holds backups or a policy names it; `Sqlite`.
    pub fn remove_repository(&self, id: &str) -> Result<bool> {
        self.write(|t| {
            // What never became a restore point holds nothing.
            t.execute(
                "DELETE FROM backups WHERE repository_id = ?1 AND state IN ('failed', 'cancelled')",
                [id],
            )?;
            let removed =
                t.execute("DELETE FROM repositories WHERE id = ?1", [id]).map_err(|e| {
                    conflict(e, || {
                        "the repository holds backups, or a policy names it: delete those first"
                            .into()
                    })
                })?;
            Ok(removed > 0)
        })
    }

    /// Enters a policy; its id.
    ///
    /// # Errors
    /// `Conflict` where the name is taken or the repository is not there; `Sqlite`.
    pub fn add_policy(&self, policy: &Policy) -> Result<String> {
        self.write(|t| {
            let id = new_id("policy");
            t.execute(
                "INSERT INTO policies VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                params![
                    id,
                    policy.name,
                    policy.enabled,
                    policy.primary_repository_id,
                    policy.retention_days,
                    serde_json::to_string(&policy.copy_rules).unwrap_or_else(|_| "[]".into()),
                    policy.created_at
                ],
            )
            .map_err(|e| {
                conflict(e, || {
                    format!("there is a policy named '{}', or no such repository", policy.name)
                })
            })?;
            Ok(id)
        })
    }

    /// All policies, by name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn policies(&self) -> Result<Vec<Policy>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, name, enabled, primary_repository_id, retention_days, copy_rules,
                   created_at FROM policies ORDER BY name",
            )?;
            let rows = statement.query_map([], |row| {
                Ok(Policy {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    enabled: row.get(2)?,
                    primary_repository_id: row.get(3)?,
                    retention_days: row.get(4)?,
                    copy_rules: serde_json::from_str(&row.get::<_, String>(5)?).unwrap_or_default(),
                    created_at: row.get(6)?,
                })
            })?;
            rows.collect()
        })
    }

    /// Removes a policy; its backups stay. Whether there was one.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn remove_policy(&self, key: &str) -> Result<bool> {
        self.write(|t| Ok(t.execute("DELETE FROM policies WHERE id = ?1 OR name = ?1", [key])? > 0))
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_default()
}

fn repository(row: &Row<'_>) -> rusqlite::Result<Repository> {
    Ok(Repository {
        id: row.get(0)?,
        name: row.get(1)?,
        kind: row.get(2)?,
        enabled: row.get(3)?,
        path: row.get(4)?,
        config: json(&row.get::<_, String>(5)?),
        is_immutable: row.get(6)?,
        min_retention_days: row.get(7)?,
        created_at: row.get(8)?,
    })
}
