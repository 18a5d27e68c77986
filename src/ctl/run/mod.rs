//! `sendense-ctl backup run`: the agent that sends disks of this machine.
//!
//! It does what the contract asks of a capture agent: it starts a backup, asks what to send of each
//! disk, sends it over NBD, and completes the disk with a change id. What must stay true:
//!
//! - A backup that does not complete is cancelled, whatever the reason, and that is told.
//! - Changes are sent only against the backup that the hub says it builds on: by that backup's
//!   checksums, or by a bitmap where that backup was made with it and is the last one ([`since`]).
//! - A hub that is started again meanwhile is waited for, over NBD and over HTTP.

pub(super) mod changes;
mod heartbeat;
mod register;
mod session;
mod since;
mod stop;
mod summary;

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Context;
use super::backup::{id_of, tag, tags};
use super::error::{CtlError, CtlResult, Kind, OK};
use super::http::{Api, LONG, encode};
use super::output::word;
use crate::capture::Source;
use session::Session;
use stop::Stop;

/// Longest name of a bitmap, in bytes: it becomes part of a change id.
const BITMAP: usize = 512;
/// How long it is tried to cancel a backup: somebody waits for the end.
const CANCEL: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
#[command(
    after_help = "The disks must not change meanwhile: snapshots, a stopped machine, or what a \
hypervisor exports for a backup.

Incrementals read the whole disk and send what has another checksum than in the backup before. With \
--bitmap only what the dirty bitmap tells is read; the bitmap must have been there, under the same \
name, since the backup before was made with it. It may only be cleared once a backup has completed, \
at the very moment whose state that backup holds."
)]
pub(super) struct RunArguments {
    /// Name of the VM; it is entered with its disks where the hub does not know it
    #[arg(long, value_name = "NAME")]
    pub(super) vm: String,
    /// Its disks in order: paths of files and devices, nbd://HOST[:PORT]/EXPORT, or
    /// nbd+unix:///EXPORT?socket=PATH
    #[arg(long = "disk", value_name = "SOURCE", value_delimiter = ',', required = true)]
    pub(super) disks: Vec<String>,
    /// What is wanted; `auto` is an incremental where that is possible
    #[arg(long = "type", value_enum, default_value = "auto", value_name = "TYPE")]
    pub(super) kind: RunType,
    /// Id or name of the repository; needed only where there are several
    #[arg(long, value_name = "NAME")]
    pub(super) repository: Option<String>,
    /// Dirty bitmap of the NBD sources that tells what changed
    #[arg(long, value_name = "NAME")]
    pub(super) bitmap: Option<String>,
    /// NBD connections at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(super) connections: u8,
    /// Where the hub's NBD port is reached from here [default: what the hub says]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) nbd: Option<String>,
    /// Words about the backup
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
    pub(super) tags: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RunType {
    Auto,
    Full,
    Incremental,
}

pub(super) fn run(context: &Context, arguments: &RunArguments) -> CtlResult<u8> {
    let sources = open(arguments)?;
    let stop = Stop::install()?;
    register::register(context, &arguments.vm, &sources)?;
    let mut wish = json!({
        "vm_name": arguments.vm,
        "backup_type": if arguments.kind == RunType::Full { "full" } else { "incremental" },
        "agent": "caller",
        "tags": tags(&arguments.tags),
    });
    if let Some(repository) = &arguments.repository {
        wish["repository_id"] = repository.as_str().into();
    }
    let started = context.api.post("/backups", &wish, LONG)?;
    let id = id_of(&started)?.to_owned();
    context.out.note(&format!("{id} has started"));
    if let Some(reason) = started["full_reason"].as_str() {
        context.out.note(&format!("it is a full backup, not an incremental one: {reason}"));
    }
    let session = Session::new(context, arguments, &id, &stop);
    match session.run(&sources) {
        Ok((backup, summaries)) => {
            let result = summaries.to_json(&backup);
            context.out.done(&result, || summaries.words(&backup))?;
            Ok(OK)
        }
        Err(error) => Err(give_up(&context.api, &id, error)),
    }
}

/// Opens all sources before anything is begun.
fn open(arguments: &RunArguments) -> CtlResult<Vec<Source>> {
    let mut sources = Vec::new();
    for name in &arguments.disks {
        let source = Source::open(name)?;
        if let Some(bitmap) = &arguments.bitmap
            && !source.bitmaps().contains(bitmap)
        {
            let offered = match source.bitmaps() {
                none if none.is_empty() => "it offers none".to_owned(),
                some => format!("it offers {}", some.join(", ")),
            };
            let cause = format!("the source {name} has no dirty bitmap '{bitmap}'; {offered}");
            let next = "add it before the first backup that is made with it, and export it \
                        (qemu-nbd --bitmap)";
            return Err(CtlError::usage(cause, next));
        }
        sources.push(source);
    }
    if arguments.bitmap.as_ref().is_some_and(|name| name.len() > BITMAP) {
        let cause = format!("a bitmap's name has at most {BITMAP} bytes");
        return Err(CtlError::usage(cause, "name the bitmap otherwise"));
    }
    Ok(sources)
}

/// Cancels a backup that cannot complete; the error with what became of it.
fn give_up(api: &Api, id: &str, error: CtlError) -> CtlError {
    let path = format!("/backups/{}", encode(id));
    let cancel = |api: &Api| api.post(&format!("{path}/cancel"), &json!({}), LONG);
    let cancelled = api.patiently(CANCEL, cancel, |time, _| {
        std::thread::sleep(time);
        Ok(())
    });
    let became = match cancelled {
        Ok(_) => format!("the backup {id} was cancelled; start it again"),
        Err(refused) if refused.kind == Kind::Conflict => {
            let backup = api.get(&path).unwrap_or_default();
            ended(&backup, id)
        }
        Err(refused) => format!(
            "the backup {id} could not be cancelled ({}): `sendense-ctl backup cancel {id}`",
            refused.cause
        ),
    };
    let next = match error.next.as_str() {
        "" => became,
        next => format!("{next}\n  {became}"),
    };
    CtlError { next, ..error }
}

fn ended(backup: &Value, id: &str) -> String {
    match backup["error_message"].as_str() {
        Some(error) => format!("the backup {id} is {}: {error}", word(backup, "status")),
        None => format!("the backup {id} is {}", word(backup, "current_phase")),
    }
}
