//! `sendense-ctl restore`: restore points as disks, and the files on them.

mod diff;
mod download;
mod extract;
mod fetch;
mod files;
mod get;
mod report;
mod sink;

pub(super) use extract::{ExtractArguments, extract};
pub(super) use files::{MountArguments, mount};

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Context;
use super::error::{CtlError, CtlResult, OK};
use super::http::{LONG, encode};
use super::output::{bytes, each, fields, message, number, size, table, time, word};
use super::run::changes;
use crate::capture::{self, Changes, Progress as Copied, Source, Target};
use fetch::Fetch;
use sink::Sink;

/// Connections to the hub at a time, unless told otherwise.
const CONNECTIONS: usize = 4;

#[derive(Debug, Subcommand)]
pub(super) enum RestoreCommand {
    /// Copy a disk as it was into a file, onto a block device, or to an NBD server
    Disk(DiskArguments),
    /// Serve a disk as it was over NBD
    Export(ExportArguments),
    /// List the restore points that are served
    List,
    /// End such an export; what was written to it is gone
    Remove(OfExport),
    /// Tell what differs between two restore points
    Diff(diff::DiffArguments),
    #[command(flatten)]
    Files(files::FilesCommand),
}

#[derive(Debug, Args)]
pub(super) struct DiskArguments {
    /// The restore point
    #[arg(long, value_name = "ID")]
    backup_id: String,
    /// Number of the disk
    #[arg(long, value_name = "N", default_value_t = 0)]
    disk: u32,
    /// A file that is not there, a block device, nbd://HOST:PORT/EXPORT, or - for standard output
    #[arg(long, value_name = "TO")]
    to: String,
    /// Format of a file
    #[arg(long, value_enum, default_value = "raw")]
    format: Format,
    /// Connections at a time
    #[arg(long, value_name = "N", default_value_t = CONNECTIONS)]
    connections: usize,
    /// Where the hub serves NBD [default: as the hub says]
    #[arg(long, value_name = "HOST:PORT")]
    nbd: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

#[derive(Debug, Args)]
pub(super) struct ExportArguments {
    /// The restore point
    #[arg(long, value_name = "ID")]
    backup_id: String,
    /// Number of the disk
    #[arg(long, value_name = "N", default_value_t = 0)]
    disk: u32,
    /// Take writes, and throw them away with the export: to boot from it
    #[arg(long)]
    writable: bool,
}

#[derive(Debug, Args)]
pub(super) struct OfExport {
    /// Name of the export
    name: String,
}

pub(super) fn run(context: &Context, command: RestoreCommand) -> CtlResult<u8> {
    match command {
        RestoreCommand::Disk(arguments) => disk(context, &arguments),
        RestoreCommand::Export(arguments) => export(context, &arguments),
        RestoreCommand::List => list(context),
        RestoreCommand::Remove(of) => {
            let removed = context.api.delete(&path_of(&of.name))?;
            context.out.done(&removed, || message(&removed))?;
            Ok(OK)
        }
        RestoreCommand::Diff(arguments) => diff::run(context, &arguments),
        RestoreCommand::Files(command) => files::run(context, command),
    }
}

fn path_of(export: &str) -> String {
    format!("/restore/exports/{}", encode(export))
}

fn make_export(context: &Context, backup: &str, disk: u32, writable: bool) -> CtlResult<Value> {
    let body = json!({"backup_id": backup, "disk_index": disk, "writable": writable});
    context.api.post("/restore/export", &body, LONG)
}

fn export(context: &Context, arguments: &ExportArguments) -> CtlResult<u8> {
    let ExportArguments { backup_id, disk, writable } = arguments;
    let made = make_export(context, backup_id, *disk, *writable)?;
    context.out.show(&made, || {
        fields(&[
            ("uri", word(&made, "nbd_uri")),
            ("export", word(&made, "export_name")),
            ("size", bytes(&made, "size")),
        ])
    })?;
    Ok(OK)
}

fn list(context: &Context) -> CtlResult<u8> {
    let found = context.api.get("/restore/exports")?;
    context.out.show(&found, || {
        let row = |export: &Value| {
            let access =
                if export["writable"] == true { "writes thrown away" } else { "read-only" };
            vec![
                word(export, "export_name"),
                word(export, "backup_id"),
                number(export, "disk_index").to_string(),
                access.to_owned(),
                number(export, "connections").to_string(),
                time(export, "created_at"),
            ]
        };
        let rows: Vec<_> = each(&found, "exports").map(row).collect();
        table(&["EXPORT", "BACKUP", "DISK", "ACCESS", "CONNECTIONS", "SINCE"], &rows)
    })?;
    Ok(OK)
}

/// `HOST:PORT` and export of an NBD URI of the hub.
fn parts(uri: &str) -> CtlResult<(String, String)> {
    uri.strip_prefix("nbd://")
        .and_then(|rest| rest.split_once('/'))
        .map(|(address, export)| (address.to_owned(), export.to_owned()))
        .ok_or_else(|| CtlError::usage(format!("'{uri}' is not nbd://HOST:PORT/EXPORT"), ""))
}

fn disk(context: &Context, arguments: &DiskArguments) -> CtlResult<u8> {
    let DiskArguments { backup_id, disk, to, connections, .. } = arguments;
    let made = make_export(context, backup_id, *disk, false)?;
    let name = word(&made, "export_name");
    let copied = copy(context, arguments, &made);
    // The hub takes it away by itself, only later.
    let ended = context.api.delete(&path_of(&name));
    let bytes = copied?;
    ended?;
    let result = json!({"backup_id": backup_id, "disk": disk, "to": to, "bytes": bytes,
        "connections": connections, "verified": true});
    if to != "-" {
        let told = format!("{} of data restored to {to}, all as it was backed up", size(bytes));
        context.out.done(&result, || told)?;
    }
    Ok(OK)
}

/// Copies what is exported; bytes of data.
fn copy(context: &Context, arguments: &DiskArguments, made: &Value) -> CtlResult<u64> {
    let DiskArguments { backup_id, disk, to, format, connections, nbd } = arguments;
    let (address, export) = parts(&word(made, "nbd_uri"))?;
    let address = nbd.clone().unwrap_or(address);
    if to.starts_with("nbd://") {
        let source = Source::open(&format!("nbd://{address}/{export}"))?;
        let (address, export) = parts(to)?;
        let target = Target { connections: *connections, ..Target::new(&address, &export) };
        let summary = capture::copy(&source, &target, &Changes::Everything, &Copied::default())?;
        return Ok(summary.bytes_sent);
    }
    let bytes = number(made, "size");
    let sums = changes::checksums(&context.api, backup_id, u64::from(*disk), bytes)?;
    let sink = match (to.as_str(), format) {
        ("-", Format::Raw) => Sink::output(),
        ("-", Format::Qcow2) => {
            let next = "give --to a file, or --format raw";
            return Err(CtlError::usage("a qcow2 image cannot be written to a stream", next));
        }
        (path, Format::Raw) => Sink::raw(&PathBuf::from(path), bytes)?,
        (path, Format::Qcow2) => Sink::qcow2(&PathBuf::from(path), bytes)?,
    };
    let connections = if sink.is_stream() { 1 } else { (*connections).max(1) };
    Fetch { address, export, size: bytes, sums, connections }.run(&sink, context.out)
}
