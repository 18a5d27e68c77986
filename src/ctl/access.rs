//! `sendense-ctl token` and `sendense-ctl credential`

use std::io::{self, BufRead, IsTerminal, Read, Write};

use clap::{Args, Subcommand};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde_json::json;
use zeroize::Zeroizing;

use super::Context;
use super::error::{CtlError, CtlResult, OK};
use super::http::{LONG, encode};
use super::output::{each, message, table, time, word};
use crate::model::Role;

/// Longest password that is read, in bytes.
const PASSWORD: u64 = 4096;

#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make a token; it is told this once
    Create(NewToken),
    /// List tokens, without what is secret of them
    List,
    /// Make a token worthless
    Revoke(OfName),
}

#[derive(Debug, Args)]
pub(super) struct NewToken {
    /// A name for it
    name: String,
    /// What its holder may do: viewer (look), operator (back up and restore), admin (manage)
    #[arg(long)]
    role: Role,
}

#[derive(Debug, Args)]
pub(super) struct OfName {
    /// Its id or name
    name: String,
}

pub(super) fn token(context: &Context, command: TokenCommand) -> CtlResult<u8> {
    let Context { api, out } = context;
    match command {
        TokenCommand::Create(new) => {
            let wish = json!({"name": new.name, "role": new.role});
            let made = api.post("/tokens", &wish, LONG)?;
            // Nothing but the token: it goes into a file, or to somebody.
            out.show(&made, || word(&made, "token"))?;
        }
        TokenCommand::List => {
            let list = api.get("/tokens")?;
            out.show(&list, || {
                let rows: Vec<Vec<String>> = each(&list, "tokens")
                    .map(|token| {
                        let mut row: Vec<String> =
                            ["id", "name", "role"].iter().map(|key| word(token, key)).collect();
                        row.extend([time(token, "created_at"), time(token, "last_used_at")]);
                        row
                    })
                    .collect();
                table(&["ID", "NAME", "ROLE", "CREATED", "LAST USED"], &rows)
            })?;
        }
        TokenCommand::Revoke(token) => {
            let revoked = api.delete(&format!("/tokens/{}", encode(&token.name)))?;
            out.done(&revoked, || message(&revoked))?;
        }
    }
    Ok(OK)
}

#[derive(Debug, Subcommand)]
pub(super) enum CredentialCommand {
    /// Enter a login of a vCenter, or change the one of that name. The password is asked for, or
    /// read from standard input: it is never an argument
    Add(NewCredential),
    /// List logins, without their passwords
    List,
    /// Remove a login that no VM uses
    Remove(OfName),
}

#[derive(Debug, Args)]
pub(super) struct NewCredential {
    /// A name for it
    name: String,
    /// The vCenter
    #[arg(long, value_name = "HOST")]
    host: String,
    /// The user there
    #[arg(long, value_name = "USER")]
    user: String,
}

pub(super) fn credential(context: &Context, command: CredentialCommand) -> CtlResult<u8> {
    let Context { api, out } = context;
    match command {
        CredentialCommand::Add(new) => {
            let password = password(&format!("Password of {} at {}: ", new.user, new.host))?;
            let wish = json!({
                "name": new.name,
                "vcenter_host": new.host,
                "username": new.user,
                "password": password.as_str(),
            });
            let added = api.post("/credentials", &wish, LONG)?;
            out.done(&added, || format!("{} '{}' is entered", word(&added, "id"), new.name))?;
        }
        CredentialCommand::List => {
            let list = api.get("/credentials")?;
            out.show(&list, || {
                let keys = ["id", "name", "vcenter_host", "username"];
                let rows: Vec<Vec<String>> = each(&list, "credentials")
                    .map(|credential| keys.iter().map(|key| word(credential, key)).collect())
                    .collect();
                table(&["ID", "NAME", "VCENTER", "USER"], &rows)
            })?;
        }
        CredentialCommand::Remove(credential) => {
            let path = format!("/credentials/{}", encode(&credential.name));
            let removed = api.delete(&path)?;
            out.done(&removed, || message(&removed))?;
        }
    }
    Ok(OK)
}

/// Hides what is typed until it is dropped.
struct Hidden(Termios);

impl Hidden {
    fn new() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        hidden.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(io::stdin(), OptionalActions::Flush, &hidden).ok()?;
        Some(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

/// The first line of standard input; on a terminal it is asked for, and not shown.
fn password(prompt: &str) -> CtlResult<Zeroizing<String>> {
    let stdin = io::stdin();
    let hidden = match stdin.is_terminal() {
        true => {
            // Standard output is for the answer.
            let _ = write!(io::stderr(), "{prompt}").and_then(|()| io::stderr().flush());
            Hidden::new()
        }
        false => None,
    };
    let mut text = Zeroizing::new(String::new());
    let read = stdin.lock().take(PASSWORD).read_line(&mut text);
    drop(hidden);
    let next = "type it, or give it on standard input: sendense-ctl credential add ... < FILE";
    read.map_err(|e| CtlError::failed(format!("cannot read the password: {e}"), next))?;
    let password = text.trim_end_matches(['\n', '\r']);
    if password.is_empty() {
        return Err(CtlError::usage("no password was given", next));
    }
    Ok(Zeroizing::new(password.to_owned()))
}
