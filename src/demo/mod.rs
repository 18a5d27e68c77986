//! The demonstration: a hub on its defaults, a disk with a file system, backed up as a full and an
//! incremental, read back and compared, and a file taken out of it. Needs nothing but a directory for temporary files.

mod api;
mod disk;
mod files;
mod transfer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use qcow2::Repair;
use serde_json::json;

use crate::app::{Hub, Reachable};
use crate::capture::{self, Changes, Progress, Source, Target};
use crate::config::HubConfig;
use api::Api;
use disk::Disk;
pub use files::Taken;
use transfer::{changed_blocks, read_back};

/// Threads of the hub's API and negotiations.
const THREADS: usize = 2;
/// Name of the VM.
const VM: &str = "demo";
/// What the hub is configured with: ports that are free, and no minimum of room.
const CONFIG: &str = "[nbd]\nlisten = [\"127.0.0.1:0\"]\n[api]\nagent_listen = \"127.0.0.1:0\"\n\
                      [backups]\nmin_free = \"0\"\n";

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Step {
    /// What was done.
    pub name: &'static str,
    /// Bytes that went over the wire.
    pub bytes: u64,
    /// Length of the file it made, where it made one.
    pub file: Option<u64>,
    /// How long it took.
    pub took: Duration,
}

/// What the demonstration found.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Bytes of the disk.
    pub disk: u64,
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The chain, from the full on: ids of the backups and their types.
    pub chain: Vec<(String, String)>,
    /// The first byte in which the newest restore point differs from the disk; `None` is as it
    /// should be.
    pub difference: Option<u64>,
    /// What was found in the newest restore point.
    pub taken: Taken,
    /// What the check of the images and of the catalog found, in words; empty is as it should be.
    pub findings: Vec<String>,
}

/// Runs the demonstration in `directory`, which stays as it was.
///
/// # Errors
/// When a file, a socket, an image or the hub fails.
pub fn run(directory: &Path) -> io::Result<Outcome> {
    let work = directory.join(format!("sendense-demo-{}", std::process::id()));
    fs::create_dir_all(&work)?;
    let outcome = in_directory(&work);
    let cleaned = fs::remove_dir_all(&work);
    let outcome = outcome?;
    cleaned.map(|()| outcome)
}

fn in_directory(work: &Path) -> io::Result<Outcome> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let config = HubConfig::parse(CONFIG).map_err(io::Error::other)?;
    let hub = runtime.block_on(Hub::start(&config, &work.join("hub")))?;
    let shown = show(work, hub.reachable());
    let clean = runtime.block_on(hub.stop());
    let shown = shown?;
    if clean { Ok(shown) } else { Err(io::Error::other("the hub did not end cleanly")) }
}

fn show(work: &Path, hub: &Reachable) -> io::Result<Outcome> {
    let api = Api::new(hub)?;
    let mut disk = Disk::create(&work.join("disk.raw"))?;
    let disks = json!([{"disk_id": 0, "label": "demo", "capacity_bytes": disk.size()}]);
    api.put(&format!("vms/{VM}"), &json!({"disks": disks}))?;

    let (full, first) = back_up(&api, &disk, "full backup", "full", || Ok(Changes::Everything))?;
    let before = disk.keep_copy(&work.join("before.raw"))?;
    disk.change()?;
    let (incremental, second) = back_up(&api, &disk, "incremental", "incremental", || {
        Ok(Changes::Extents(changed_blocks(&before, disk.path())?))
    })?;

    let image = image_of(&incremental)?;
    api.post("nbd/exports", &json!({"export_name": "look", "path": image, "read_only": true}))?;
    let started = Instant::now();
    let difference = read_back(api.nbd(), "look", disk.path())?;
    let took = started.elapsed();
    let third = Step { name: "read back, compare", bytes: disk.size(), file: None, took };
    api.delete("nbd/exports/look")?;

    let newest = incremental["backup_id"].as_str().unwrap_or_default();
    let taken = files::take(&api, newest, &disk)?;

    let mut findings = Vec::new();
    for backup in [&full, &incremental] {
        let report = qcow2::check(Path::new(&image_of(backup)?), Repair::None);
        findings.extend(report.map_err(io::Error::other)?.findings);
        let id = backup["backup_id"].as_str().unwrap_or_default();
        api.post(&format!("backups/{id}/verify"), &json!({}))?;
    }
    let checked = api.post("catalog/check", &json!({}))?;
    findings.extend(checked["findings"].as_array().into_iter().flatten().map(ToString::to_string));
    let chain = api.get(&format!("backups/{VM}/chain"))?;
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let chain = chain["backups"].as_array().into_iter().flatten();
    let chain = chain.map(|b| (word(&b["backup_id"]), word(&b["backup_type"]))).collect();
    let steps = vec![first, second, third];
    Ok(Outcome { disk: disk.size(), steps, chain, difference, taken, findings })
}

fn image_of(backup: &serde_json::Value) -> io::Result<String> {
    let path = backup["disk_results"][0]["qcow2_path"].as_str();
    path.map(str::to_owned).ok_or_else(|| io::Error::other("the hub told no path"))
}

/// What a capture agent does: asks, sends, completes.
fn back_up(
    api: &Api,
    disk: &Disk,
    name: &'static str,
    kind: &str,
    changes: impl FnOnce() -> io::Result<Changes>,
) -> io::Result<(serde_json::Value, Step)> {
    let changes = changes()?;
    let started = Instant::now();
    let wish = json!({"vm_name": VM, "backup_type": kind, "agent": "caller"});
    let backup = api.post("backups", &wish)?;
    let told = |key: &str| backup[key].as_str().unwrap_or_default();
    if told("backup_type") != kind {
        return Err(io::Error::other(format!("no {kind} backup: {}", told("full_reason"))));
    }
    let export = backup["disk_results"][0]["nbd_export_name"].as_str().unwrap_or_default();
    let target =
        Target { reads_as_zeroes: kind == "full", ..Target::new(&api.nbd().to_string(), export) };
    let source = Source::open(&disk.path().to_string_lossy()).map_err(io::Error::other)?;
    let copied = capture::copy(&source, &target, &changes, &Progress::default());
    let summary = copied.map_err(io::Error::other)?;
    let id = told("backup_id");
    let body = json!({"change_id": format!("demo/{id}"), "disk_id": 0});
    api.post(&format!("backups/{id}/complete"), &body)?;
    let took = started.elapsed();
    let backup = api.get(&format!("backups/{id}"))?;
    let file = Some(fs::metadata(image_of(&backup)?)?.len());
    Ok((backup, Step { name, bytes: summary.bytes_sent, file, took }))
}

/// Where the demonstration works unless told otherwise.
pub fn default_directory() -> PathBuf {
    std::env::temp_dir()
}
