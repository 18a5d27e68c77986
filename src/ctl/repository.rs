//! `sendense-ctl repository`

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Context;
use super::error::{CtlResult, OK};
use super::http::{LONG, encode};
use super::output::{bytes, each, message, number, size, table, word};
use super::system;

#[derive(Debug, Subcommand)]
pub(super) enum RepositoryCommand {
    /// List repositories and their room
    List,
    /// Make a directory of the hub a repository, or take one that is
    Add(AddArguments),
    /// Try whether a directory of the hub could be a repository
    Test(TestArguments),
    /// Enter a repository and all its restore points, out of their manifests
    Import(ImportArguments),
    /// Forget a repository that holds no backups; its directory stays
    Remove(OfRepository),
    /// Compare what all repositories hold with the catalog
    Check,
}

#[derive(Debug, Args)]
pub(super) struct OfRepository {
    /// Id or name of the repository
    repository: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Type {
    Local,
    Nfs,
    Cifs,
    Smb,
}

#[derive(Debug, Args)]
pub(super) struct AddArguments {
    /// A name for it
    name: String,
    /// The directory, as the hub sees it
    path: String,
    /// What is mounted there
    #[arg(long = "type", value_enum, default_value = "local", value_name = "TYPE")]
    kind: Type,
    /// Backups are not deleted before their time
    #[arg(long)]
    immutable: bool,
    /// Days for which a backup stays at least
    #[arg(long, value_name = "DAYS", default_value_t = 0)]
    min_retention_days: u32,
}

#[derive(Debug, Args)]
pub(super) struct TestArguments {
    /// The directory, as the hub sees it
    path: String,
}

#[derive(Debug, Args)]
pub(super) struct ImportArguments {
    /// The repository's directory, as the hub sees it
    path: String,
}

impl Type {
    fn word(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Nfs => "nfs",
            Self::Cifs => "cifs",
            Self::Smb => "smb",
        }
    }
}

pub(super) fn run(context: &Context, command: RepositoryCommand) -> CtlResult<u8> {
    let Context { api, out } = context;
    match command {
        RepositoryCommand::List => {
            let list = api.get("/repositories")?;
            out.show(&list, || repositories(&list))?;
        }
        RepositoryCommand::Add(arguments) => {
            let wish = json!({
                "name": arguments.name,
                "type": arguments.kind.word(),
                "config": {"path": arguments.path},
                "is_immutable": arguments.immutable,
                "min_retention_days": arguments.min_retention_days,
            });
            let added = api.post("/repositories", &wish, LONG)?;
            out.done(&added, || {
                let free = size(number(&added, "available_bytes"));
                format!("{} '{}' is added: {free} free", word(&added, "id"), arguments.name)
            })?;
        }
        RepositoryCommand::Test(arguments) => {
            let wish = json!({"name": "test", "config": {"path": arguments.path}});
            let tried = api.post("/repositories/test", &wish, LONG)?;
            out.done(&tried, || {
                let free = bytes(&tried, "available_bytes");
                format!("'{}' can be a repository: {free} free", arguments.path)
            })?;
        }
        RepositoryCommand::Import(arguments) => {
            let wish = json!({"path": arguments.path});
            let report = api.post("/repositories/import", &wish, LONG)?;
            out.done(&report, || imported(&report))?;
        }
        RepositoryCommand::Remove(of) => {
            let path = format!("/repositories/{}", encode(&of.repository));
            let removed = api.delete(&path)?;
            out.done(&removed, || message(&removed))?;
        }
        RepositoryCommand::Check => return system::check(context),
    }
    Ok(OK)
}

fn repositories(list: &Value) -> String {
    let rows: Vec<Vec<String>> = each(list, "repositories")
        .map(|repository| {
            let state = match (repository["error"].as_str(), &repository["enabled"]) {
                (Some(error), _) => error.to_owned(),
                (None, Value::Bool(false)) => "disabled".to_owned(),
                _ => "ok".to_owned(),
            };
            vec![
                word(repository, "id"),
                word(repository, "name"),
                word(repository, "type"),
                word(repository, "backup_count"),
                bytes(repository, "used_bytes"),
                bytes(repository, "available_bytes"),
                word(repository, "path"),
                state,
            ]
        })
        .collect();
    table(&["ID", "NAME", "TYPE", "BACKUPS", "USED", "FREE", "PATH", "STATE"], &rows)
}

fn imported(report: &Value) -> String {
    let mut lines = vec![format!(
        "{}: {} backups are entered, {} were known",
        word(report, "repository_id"),
        word(report, "imported"),
        number(report, "known"),
    )];
    lines.extend(each(report, "findings").filter_map(Value::as_str).map(str::to_owned));
    lines.join("\n")
}
