//! `sendense-ctl backup` and `sendense-ctl job`

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use super::Context;
use super::error::{CtlError, CtlResult, OK};
use super::http::{LONG, encode, query};
use super::output::{bytes, each, fields, message, number, table, time, word};
use super::restore::{ExtractArguments, MountArguments, extract, mount};
use super::run::{self, RunArguments};
use super::watch;

#[derive(Debug, Subcommand)]
pub(super) enum BackupCommand {
    /// Start a backup of all disks of a VM by its capture appliance
    Start(StartArguments),
    /// Back up disks of this machine: files, block devices, NBD exports
    Run(Box<RunArguments>),
    /// List backups, the newest first
    List(ListArguments),
    /// Show a backup and its disks
    Show(OfBackup),
    /// Cancel a running backup; nothing is left of it but its entry
    Cancel(OfBackup),
    /// Delete a backup that no other builds on
    Delete(OfBackup),
    /// Read all that a backup stores, and compare it with its checksums
    Verify(OfBackup),
    /// Copy a backup, with all that it builds on, into another repository
    Copy(CopyArguments),
    /// List the copies of a backup
    Copies(OfBackup),
    /// Show what the newest restore point of a disk consists of
    Chain(ChainArguments),
    /// Watch a backup until it has ended; the exit code is 0 only if it completed
    Watch(OfBackup),
    /// Make the files of a backup visible; the same as `restore mount`
    Mount(MountArguments),
    /// Take one file or directory out of a backup
    Extract(ExtractArguments),
}

#[derive(Debug, Args)]
pub(super) struct CopyArguments {
    /// Id of the backup
    id: String,
    /// Id or name of the repository
    #[arg(long, value_name = "REPOSITORY")]
    to: String,
}

#[derive(Debug, Subcommand)]
pub(super) enum JobCommand {
    /// List running jobs
    List,
    /// Watch a job until it has ended; the exit code is 0 only if it completed
    Watch(OfBackup),
}

#[derive(Debug, Args)]
pub(super) struct OfBackup {
    /// Id of the backup
    id: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BackupType {
    Full,
    Incremental,
}

impl BackupType {
    fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct StartArguments {
    /// Name of the VM
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// What is wanted; the hub makes a full where an incremental is not possible
    #[arg(long = "type", value_enum, default_value = "incremental", value_name = "TYPE")]
    kind: BackupType,
    /// Id or name of the repository; needed only where there are several
    #[arg(long, value_name = "NAME")]
    repository: Option<String>,
    /// Words about the backup
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
    tags: Vec<(String, String)>,
    /// Show what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Watch it until it has ended
    #[arg(long, conflicts_with = "dry_run")]
    watch: bool,
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    /// Of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// In this status: pending, running, completed, failed, cancelled
    #[arg(long)]
    status: Option<String>,
    /// Of this type
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    kind: Option<BackupType>,
    /// In the repository of this id
    #[arg(long, value_name = "ID")]
    repository: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ChainArguments {
    /// Name of the VM, or id of a backup
    vm: String,
    /// Number of the disk
    #[arg(long, value_name = "N", default_value_t = 0)]
    disk: u32,
}

/// `KEY=VALUE`.
pub(super) fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a tag is KEY=VALUE".into()),
    }
}

/// Tags as the API takes them.
pub(super) fn tags(pairs: &[(String, String)]) -> Value {
    let pairs = pairs.iter().map(|(key, value)| (key.clone(), Value::from(value.as_str())));
    Value::Object(pairs.collect::<Map<_, _>>())
}

pub(super) fn run(context: &Context, command: BackupCommand) -> CtlResult<u8> {
    let Context { api, out } = context;
    let of = |id: &str, what: &str| format!("/backups/{}{what}", encode(id));
    match command {
        BackupCommand::Start(arguments) => return start(context, &arguments),
        BackupCommand::Run(arguments) => return run::run(context, &arguments),
        BackupCommand::Watch(backup) => return watch::watch(context, &backup.id),
        BackupCommand::Mount(arguments) => return mount(context, &arguments),
        BackupCommand::Extract(arguments) => return extract(context, &arguments),
        BackupCommand::List(arguments) => {
            let given = query(&[
                ("vm_name", arguments.vm.as_deref()),
                ("status", arguments.status.as_deref()),
                ("backup_type", arguments.kind.map(BackupType::word)),
                ("repository_id", arguments.repository.as_deref()),
            ]);
            let list = api.get(&format!("/backups{given}"))?;
            out.show(&list, || backups(&list))?;
        }
        BackupCommand::Show(backup) => {
            let found = api.get(&of(&backup.id, ""))?;
            out.show(&found, || describe(&found))?;
        }
        BackupCommand::Cancel(backup) => {
            let cancelled = api.post(&of(&backup.id, "/cancel"), &json!({}), LONG)?;
            out.done(&cancelled, || format!("{} is cancelled", backup.id))?;
        }
        BackupCommand::Delete(backup) => {
            let deleted = api.delete(&of(&backup.id, ""))?;
            out.done(&deleted, || message(&deleted))?;
        }
        BackupCommand::Verify(backup) => {
            out.note("reading all that the backup stores");
            let verified = api.post(&of(&backup.id, "/verify"), &json!({}), LONG)?;
            out.done(&verified, || message(&verified))?;
        }
        BackupCommand::Copy(arguments) => {
            let body = json!({"repository_id": arguments.to});
            let asked = api.post(&of(&arguments.id, "/copy"), &body, LONG)?;
            out.done(&asked, || message(&asked))?;
        }
        BackupCommand::Copies(backup) => {
            let found = api.get(&of(&backup.id, "/copies"))?;
            out.show(&found, || {
                let keys = ["copy_id", "repository_id", "status", "error_message"];
                let row = |copy: &Value| keys.iter().map(|key| word(copy, key)).collect();
                let rows: Vec<Vec<String>> = each(&found, "copies").map(row).collect();
                table(&["COPY", "REPOSITORY", "STATUS", "ERROR"], &rows)
            })?;
        }
        BackupCommand::Chain(arguments) => {
            let number = arguments.disk.to_string();
            let given = query(&[("disk_id", Some(&number))]);
            let found = api.get(&of(&arguments.vm, &format!("/chain{given}")))?;
            out.show(&found, || chain(&found))?;
        }
    }
    Ok(OK)
}

pub(super) fn job(context: &Context, command: JobCommand) -> CtlResult<u8> {
    match command {
        JobCommand::Watch(job) => watch::watch(context, &job.id),
        JobCommand::List => {
            let list = context.api.get("/jobs")?;
            context.out.show(&list, || backups(&list))?;
            Ok(OK)
        }
    }
}

fn start(context: &Context, arguments: &StartArguments) -> CtlResult<u8> {
    let Context { api, out } = context;
    let mut wish = json!({
        "vm_name": arguments.vm,
        "backup_type": arguments.kind.word(),
        "tags": tags(&arguments.tags),
    });
    if let Some(repository) = &arguments.repository {
        wish["repository_id"] = repository.as_str().into();
    }
    if arguments.dry_run {
        let plan = api.post("/backups?dry_run=true", &wish, LONG)?;
        out.show(&plan, || planned(&plan))?;
        return Ok(OK);
    }
    let started = api.post("/backups", &wish, LONG)?;
    if let Some(reason) = started["full_reason"].as_str() {
        out.note(&format!("a full backup instead of an incremental one: {reason}"));
    }
    let id = id_of(&started)?;
    if arguments.watch {
        out.note(&format!("{id} has started"));
        return watch::watch(context, id);
    }
    out.show(&started, || {
        format!("{id}: {} backup is {}", word(&started, "backup_type"), word(&started, "status"))
    })?;
    Ok(OK)
}

/// The id of a backup that the hub has told.
pub(super) fn id_of(backup: &Value) -> CtlResult<&str> {
    backup["backup_id"].as_str().ok_or_else(|| {
        let next = "check that hub and sendense-ctl are of the same version";
        CtlError::failed("the hub answers with a backup that has no id", next)
    })
}

fn backups(list: &Value) -> String {
    let rows: Vec<Vec<String>> = each(list, "backups")
        .map(|backup| {
            vec![
                word(backup, "backup_id"),
                word(backup, "vm_name"),
                word(backup, "backup_type"),
                word(backup, "current_phase"),
                percent(backup),
                bytes(backup, "stored_bytes"),
                time(backup, "created_at"),
            ]
        })
        .collect();
    table(&["ID", "VM", "TYPE", "STATE", "DONE", "STORED", "CREATED"], &rows)
}

fn percent(backup: &Value) -> String {
    backup["progress_percent"].as_f64().map_or_else(|| "-".into(), |p| format!("{p:.0}%"))
}

fn describe(backup: &Value) -> String {
    let mut rows = vec![
        ("backup", word(backup, "backup_id")),
        ("vm", word(backup, "vm_name")),
        ("type", word(backup, "backup_type")),
        ("state", word(backup, "current_phase")),
        ("done", percent(backup)),
        ("repository", word(backup, "repository_id")),
        ("disks", bytes(backup, "total_bytes")),
        ("came in", bytes(backup, "bytes_transferred")),
        ("stored", bytes(backup, "stored_bytes")),
        ("created", time(backup, "created_at")),
        ("completed", time(backup, "completed_at")),
    ];
    for (name, key) in [("full because", "full_reason"), ("error", "error_message")] {
        if backup[key].is_string() {
            rows.push((name, word(backup, key)));
        }
    }
    if let Some(tags) = backup["tags"].as_object().filter(|tags| !tags.is_empty()) {
        let pairs = tags.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()));
        rows.push(("tags", pairs.collect::<Vec<_>>().join(" ")));
    }
    let disks: Vec<Vec<String>> = each(backup, "disk_results")
        .map(|disk| {
            vec![
                word(disk, "disk_id"),
                bytes(disk, "capacity_bytes"),
                word(disk, "status"),
                bytes(disk, "stored_bytes"),
                word(disk, "parent_backup_id"),
                word(disk, "qcow2_path"),
            ]
        })
        .collect();
    let disks = table(&["DISK", "SIZE", "STATE", "STORED", "BUILDS ON", "IMAGE"], &disks);
    format!("{}\n\n{disks}", fields(&rows))
}

fn chain(chain: &Value) -> String {
    let rows: Vec<Vec<String>> = each(chain, "backups")
        .map(|backup| {
            vec![
                word(backup, "backup_id"),
                word(backup, "backup_type"),
                bytes(backup, "stored_bytes"),
                time(backup, "completed_at"),
            ]
        })
        .collect();
    format!(
        "disk {} of '{}': {} backups, {} in files\n\n{}",
        number(chain, "disk_id"),
        word(chain, "vm_name"),
        number(chain, "backup_count"),
        bytes(chain, "total_size_bytes"),
        table(&["ID", "TYPE", "STORED", "COMPLETED"], &rows)
    )
}

fn planned(plan: &Value) -> String {
    let mut lines = vec![format!(
        "{} backup of '{}' into {}: {} expected, {} free",
        word(plan, "backup_type"),
        word(plan, "vm_name"),
        word(plan, "repository_id"),
        bytes(plan, "expected_bytes"),
        bytes(plan, "free_bytes"),
    )];
    if let Some(reason) = plan["full_reason"].as_str() {
        lines.push(format!("full because {reason}"));
    }
    lines.extend(each(plan, "warnings").filter_map(Value::as_str).map(str::to_owned));
    let disks: Vec<Vec<String>> = each(plan, "disks")
        .map(|disk| {
            vec![
                word(disk, "disk_id"),
                word(disk, "disk_key"),
                bytes(disk, "capacity_bytes"),
                word(disk, "parent_backup_id"),
            ]
        })
        .collect();
    lines.push(table(&["DISK", "KEY", "SIZE", "BUILDS ON"], &disks));
    lines.join("\n")
}
