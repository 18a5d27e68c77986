//! Tokens, credentials, and the record of who did what.

use rusqlite::{OptionalExtension, params};

use super::{Catalog, Result, conflict};
use crate::model::{Role, Timestamp, new_id};

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: String,
    /// The operator's name for it.
    pub name: String,
    /// What its holder may do.
    pub role: Role,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was used last.
    pub last_used_at: Option<Timestamp>,
}

/// A login of vCenter; the password only as it is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// Its id.
    pub id: String,
    /// The operator's name for it.
    pub name: String,
    /// The vCenter.
    pub vcenter_host: String,
    /// The user there.
    pub username: String,
    /// The encrypted password.
    pub secret: Vec<u8>,
}

/// Something that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its number; later ones are greater.
    pub id: i64,
    /// When.
    pub at: Timestamp,
    /// Who: a token's name, `agent`, or `hub`.
    pub actor: String,
    /// What, in one word such as `backup.started`.
    pub action: String,
    /// To what.
    pub subject: String,
    /// In words.
    pub text: String,
}

impl Catalog {
    /// Records that something was done.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn event(&self, actor: &str, action: &str, subject: &str, text: &str) -> Result<()> {
        self.write(|t| {
            t.execute(
                "INSERT INTO events (at, actor, action, subject, text)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![Timestamp::now(), actor, action, subject, text],
            )?;
            Ok(())
        })
    }

    /// The last `most` events, newest first, of one subject or all.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn events(&self, subject: Option<&str>, most: u32) -> Result<Vec<Event>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, at, actor, action, subject, text FROM events
                 WHERE ?1 IS NULL OR subject = ?1 ORDER BY id DESC LIMIT ?2",
            )?;
            let rows = statement.query_map(params![subject, most], |row| {
                Ok(Event {
                    id: row.get(0)?,
                    at: row.get(1)?,
                    actor: row.get(2)?,
                    action: row.get(3)?,
                    subject: row.get(4)?,
                    text: row.get(5)?,
                })
            })?;
            rows.collect()
        })
    }

    /// When each backup that is there was verified last.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn verified(&self) -> Result<Vec<(String, Timestamp)>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT subject, max(at) FROM events JOIN backups ON backups.id = subject
                 WHERE action = 'backup.verified' GROUP BY subject",
            )?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })
    }

    /// Whether the last verification of a backup found damage.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn is_damaged(&self, backup: &str) -> Result<bool> {
        self.read(|c| {
            let last: Option<String> = c
                .query_row(
                    "SELECT action FROM events WHERE subject = ?1
                     AND action IN ('backup.verified', 'backup.damaged') ORDER BY id DESC LIMIT 1",
                    [backup],
                    |row| row.get(0),
                )
                .optional()?;
            Ok(last.as_deref() == Some("backup.damaged"))
        })
    }

    /// Enters a token by the hash of its secret; its id.
    ///
    /// # Errors
    /// `Conflict` where the name is taken; `Sqlite`.
    pub fn add_token(&self, name: &str, role: Role, hash: &[u8]) -> Result<String> {
        self.write(|t| {
            let id = new_id("token");
            t.execute(
                "INSERT INTO tokens (id, name, role, hash, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![id, name, role, hash, Timestamp::now()],
            )
            .map_err(|e| conflict(e, || format!("there is a token named '{name}'")))?;
            Ok(id)
        })
    }

    /// The token whose secret has this hash; notes its use, to the minute.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn use_token(&self, hash: &[u8]) -> Result<Option<Token>> {
        let found = self.read(|c| {
            c.query_row(
                "SELECT id, name, role, created_at, last_used_at FROM tokens WHERE hash = ?1",
                [hash],
                token,
            )
            .optional()
        })?;
        let now = Timestamp::now();
        if let Some(token) = &found
            && token.last_used_at.is_none_or(|at| now.since(at).as_secs() >= 60)
        {
            self.write(|t| {
                let set = "UPDATE tokens SET last_used_at = ?2 WHERE id = ?1";
                Ok(t.execute(set, params![token.id, now])?)
            })?;
        }
        Ok(found)
    }

    /// All tokens, by name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn tokens(&self) -> Result<Vec<Token>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, name, role, created_at, last_used_at FROM tokens ORDER BY name",
            )?;
            statement.query_map([], token)?.collect()
        })
    }

    /// Removes a token by id or name; whether there was one.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn remove_token(&self, key: &str) -> Result<bool> {
        self.write(|t| Ok(t.execute("DELETE FROM tokens WHERE id = ?1 OR name = ?1", [key])? > 0))
    }

    /// Enters a login, or changes the one of that name; its id.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn put_credential(&self, credential: &Credential) -> Result<String> {
        self.write(|t| {
            let Credential { name, vcenter_host, username, secret, .. } = credential;
            Ok(t.query_row(
                "INSERT INTO credentials VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT (name) DO UPDATE SET vcenter_host = ?3, username = ?4, secret = ?5
                 RETURNING id",
                params![
                    new_id("credential"),
                    name,
                    vcenter_host,
                    username,
                    secret,
                    Timestamp::now()
                ],
                |row| row.get(0),
            )?)
        })
    }

    /// All logins, by name.
    ///
    /// # Errors
    /// `Sqlite`.
    pub fn credentials(&self) -> Result<Vec<Credential>> {
        self.read(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, name, vcenter_host, username, secret FROM credentials ORDER BY name",
            )?;
            let rows = statement.query_map([], |row| {
                Ok(Credential {
                    id: row.get(0)?,
                    name: row.get(1)?,
                    vcenter_host: row.get(2)?,
                    username: row.get(3)?,
                    secret: row.get(4)?,
                })
            })?;
            rows.collect()
        })
    }

    /// Removes a login by id or name; whether there was one.
    ///
    /// # Errors
    /// `Conflict` where a VM uses it; `Sqlite`.
    pub fn remove_credential(&self, key: &str) -> Result<bool> {
        self.write(|t| {
            let removed = t
                .execute("DELETE FROM credentials WHERE id = ?1 OR name = ?1", [key])
                .map_err(|e| conflict(e, || format!("credential '{key}' is used by a VM")))?;
            Ok(removed > 0)
        })
    }
}

fn token(row: &rusqlite::Row<'_>) -> rusqlite::Result<Token> {
    Ok(Token {
        id: row.get(0)?,
        name: row.get(1)?,
        role: row.get(2)?,
        created_at: row.get(3)?,
        last_used_at: row.get(4)?,
    })
}
