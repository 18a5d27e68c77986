//! `sendense-ctl policy`, `event`, `catalog` and `completions`

use std::io::Write;

use clap::{Args, CommandFactory, Subcommand};
use clap_complete::Shell;
use serde_json::{Value, json};

use super::error::{CtlError, CtlResult, FAILED, OK};
use super::http::{LONG, query};
use super::output::{each, table, time, word};
use super::{Cli, Context};

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// List the policies
    List,
    /// Delete what no policy keeps any more, as the hub does every hour
    Apply(ApplyArguments),
}

#[derive(Debug, Args)]
pub(super) struct ApplyArguments {
    /// Tell what would be deleted, and delete nothing
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn policy(context: &Context, command: &PolicyCommand) -> CtlResult<u8> {
    if let PolicyCommand::Apply(ApplyArguments { dry_run }) = command {
        let path = format!("/policies/apply?dry_run={dry_run}");
        let applied = context.api.post(&path, &json!({}), LONG)?;
        context.out.show(&applied, || {
            let ids = applied["deleted"].as_array().into_iter().flatten();
            ids.filter_map(Value::as_str).collect::<Vec<_>>().join("\n")
        })?;
        return Ok(OK);
    }
    let list = context.api.get("/policies")?;
    context.out.show(&list, || {
        let keys = ["id", "name", "enabled", "primary_repository_id", "retention_days"];
        let rows: Vec<Vec<String>> = each(&list, "policies")
            .map(|policy| keys.iter().map(|key| word(policy, key)).collect())
            .collect();
        table(&["ID", "NAME", "ENABLED", "REPOSITORY", "DAYS"], &rows)
    })?;
    Ok(OK)
}

#[derive(Debug, Subcommand)]
pub(super) enum EventCommand {
    /// List what was done, the newest first
    List(EventArguments),
}

#[derive(Debug, Args)]
pub(super) struct EventArguments {
    /// Of this backup, VM, repository, ... only
    #[arg(long, value_name = "ID")]
    subject: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
}

pub(super) fn event(context: &Context, command: EventCommand) -> CtlResult<u8> {
    let EventCommand::List(arguments) = command;
    let limit = arguments.limit.to_string();
    let given =
        query(&[("subject", arguments.subject.as_deref()), ("limit", Some(limit.as_str()))]);
    let list = context.api.get(&format!("/events{given}"))?;
    context.out.show(&list, || {
        let rows: Vec<Vec<String>> = each(&list, "events")
            .map(|event| {
                let mut row = vec![time(event, "at")];
                row.extend(["actor", "action", "subject", "text"].map(|key| word(event, key)));
                row
            })
            .collect();
        table(&["TIME", "WHO", "WHAT", "OF", "TEXT"], &rows)
    })?;
    Ok(OK)
}

#[derive(Debug, Subcommand)]
pub(super) enum CatalogCommand {
    /// Compare the catalog with what the repositories hold
    Check,
}

pub(super) fn catalog(context: &Context, command: &CatalogCommand) -> CtlResult<u8> {
    let CatalogCommand::Check = command;
    check(context)
}

/// Compares the catalog with what the repositories hold; findings are a failure.
pub(super) fn check(context: &Context) -> CtlResult<u8> {
    let checked = context.api.post("/catalog/check", &json!({}), LONG)?;
    context.out.done(&checked, || {
        let findings: Vec<&str> = each(&checked, "findings").filter_map(Value::as_str).collect();
        match findings.is_empty() {
            true => "catalog and repositories agree".to_owned(),
            false => findings.join("\n"),
        }
    })?;
    Ok(if each(&checked, "findings").next().is_some() { FAILED } else { OK })
}

#[derive(Debug, Args)]
pub(super) struct CompletionsArguments {
    /// The shell
    shell: Shell,
}

pub(super) fn completions(arguments: &CompletionsArguments) -> CtlResult<u8> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "sendense-ctl", &mut script);
    let written = std::io::stdout().write_all(&script);
    written.map_err(|e| CtlError::failed(format!("cannot write the output: {e}"), ""))?;
    Ok(OK)
}
