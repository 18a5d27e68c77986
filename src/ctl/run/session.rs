//! One backup, from its start to its last disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::RunArguments;
use super::changes::{self, Mode};
use super::heartbeat::{Heartbeat, Pulse};
use super::since;
use super::stop::Stop;
use super::summary::{DiskSummary, Summaries};
use crate::capture::{CaptureError, Changes, Source, Target, copy};
use crate::ctl::Context;
use crate::ctl::error::{CtlError, CtlResult};
use crate::ctl::http::{Api, HUB_RESTART, LONG, encode, query};
use crate::ctl::output::{each, number, word};
use crate::ctl::progress::Display;

/// Time between two looks at a backup that waits for its turn, or for its end.
const LOOK: Duration = Duration::from_millis(500);

/// A running backup that this process sends.
pub(super) struct Session<'a> {
    context: &'a Context,
    arguments: &'a RunArguments,
    id: &'a str,
    pulse: Arc<Pulse>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        context: &'a Context,
        arguments: &'a RunArguments,
        id: &'a str,
        stop: &Stop,
    ) -> Self {
        let pulse = Arc::new(Pulse::new(Display::new(context.out), stop.clone()));
        Self { context, arguments, id, pulse }
    }

    /// Sends all disks; the completed backup, and what was done.
    pub(super) fn run(&self, sources: &[Source]) -> CtlResult<(Value, Summaries)> {
        let began = Instant::now();
        let heartbeat = Heartbeat::start(&self.context.api, self.id, &self.pulse)?;
        let sent = self.send_all(sources);
        drop(heartbeat);
        self.pulse.display().end();
        let (backup, mut summaries) = sent.map_err(|error| {
            // Why the hub or the operator ended it says more than what broke thereby.
            self.pulse.check().err().unwrap_or(error)
        })?;
        summaries.time = began.elapsed();
        Ok((backup, summaries))
    }

    fn send_all(&self, sources: &[Source]) -> CtlResult<(Value, Summaries)> {
        let backup = self.wait_for("receiving")?;
        let mut summaries = Summaries::default();
        for (number, source) in (0u64..).zip(sources) {
            self.pulse.check()?;
            let began = Instant::now();
            let (mode, copied) = self.send(&backup, number, source)?;
            self.pulse.enter(format!("sealing disk {number}"));
            self.complete(number)?;
            let name = self.arguments.disks.get(summaries.disks.len());
            summaries.disks.push(DiskSummary {
                disk: number,
                source: name.cloned().unwrap_or_default(),
                mode,
                copied,
                time: began.elapsed(),
            });
        }
        Ok((self.wait_for("completed")?, summaries))
    }

    /// A call that can be repeated, while the hub is started again.
    fn patiently<T>(&self, call: impl Fn(&Api) -> CtlResult<T>) -> CtlResult<T> {
        let mut told = false;
        let result = self.context.api.patiently(HUB_RESTART, call, |time, error| {
            if !std::mem::replace(&mut told, true) {
                self.pulse.display().say(&format!("{}; it is tried again", error.cause));
            }
            self.pulse.wait(time)
        });
        if told && result.is_ok() {
            self.pulse.display().say("the hub is back");
        }
        result
    }

    /// Waits until the backup is in a state.
    fn wait_for(&self, phase: &str) -> CtlResult<Value> {
        let path = format!("/backups/{}", encode(self.id));
        let mut told = false;
        loop {
            let backup = self.patiently(|api| api.get(&path))?;
            let now = word(&backup, "current_phase");
            if now == phase {
                return Ok(backup);
            }
            if !super::super::watch::is_running(&backup) {
                let cause = format!("the backup is {now}: {}", word(&backup, "error_message"));
                return Err(CtlError::failed(cause, ""));
            }
            if now == "queued" && !std::mem::replace(&mut told, true) {
                self.pulse.display().say("the backup waits for its turn");
            }
            self.pulse.enter(now);
            self.pulse.wait(LOOK)?;
        }
    }

    fn send(
        &self,
        backup: &Value,
        number: u64,
        source: &Source,
    ) -> CtlResult<(Mode, crate::capture::Summary)> {
        self.pulse.enter(format!("disk {number}"));
        let (mode, changes) = self.changes(backup, number, source)?;
        let target = self.target(backup, number, mode)?;
        match copy(source, &target, &changes, &*self.pulse) {
            Ok(copied) => Ok((mode, copied)),
            Err(CaptureError::Cancelled) => {
                self.pulse.check()?;
                Err(CaptureError::Cancelled.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What to send of a disk: the hub's word first, then the best that is known here.
    fn changes(&self, backup: &Value, number: u64, source: &Source) -> CtlResult<(Mode, Changes)> {
        let disk_id = number.to_string();
        let vm = self.arguments.vm.as_str();
        let asked = query(&[("vm_name", Some(vm)), ("disk_id", Some(&disk_id))]);
        let answer = self.patiently(|api| api.get(&format!("/backups/changeid{asked}")))?;
        if answer["backup_job_id"] != self.id {
            let cause = format!(
                "the hub runs another backup of VM '{vm}': {}",
                word(&answer, "backup_job_id")
            );
            return Err(CtlError::failed(cause, "wait for its end, or cancel it"));
        }
        let previous = answer["change_id"].as_str().unwrap_or_default();
        let bitmap = self.arguments.bitmap.as_deref();
        let mode = Mode::after(previous, bitmap);
        if mode == Mode::Everything {
            return Ok((mode, Changes::Everything));
        }
        let row = disk_of(backup, number)?;
        let parent = row["parent_backup_id"].as_str().ok_or_else(|| {
            let cause = format!("the hub does not say what disk {number} builds on");
            CtlError::failed(cause, "make a full backup: --type full")
        })?;
        let path = format!("/backups/{}", encode(parent));
        let earlier = self.patiently(|api| api.get(&path))?;
        let before = changes::size_in(&earlier, number)?;
        let is_last = |api: &Api| since::is_last(api, vm, &earlier, self.id);
        let (mode, doubt) = match mode {
            Mode::Bitmap if !self.patiently(is_last)? => {
                (Mode::Checksums, "other backups may have been made since the one before")
            }
            Mode::Checksums => (mode, "the backup before was made without it"),
            sure => (sure, ""),
        };
        let changes = match (mode, bitmap) {
            (Mode::Bitmap, Some(name)) => changes::by_bitmap(source, name, before)?,
            _ => self.patiently(|api| changes::by_checksums(api, parent, number, before))?,
        };
        if let (Mode::Checksums, Some(name)) = (mode, bitmap) {
            self.pulse.display().say(&format!(
                "disk {number}: the bitmap '{name}' does not tell all changes: {doubt}; all is read, and \
                 compared by checksums"
            ));
        }
        Ok((mode, changes))
    }

    fn target(&self, backup: &Value, number: u64, mode: Mode) -> CtlResult<Target> {
        let export = word(disk_of(backup, number)?, "nbd_export_name");
        let told = address(&word(backup, "nbd_targets_string"), &export);
        let address = self.arguments.nbd.clone().or(told).ok_or_else(|| {
            let cause = format!("the hub does not say where disk {number} is to be sent");
            CtlError::failed(cause, "name its NBD port: --nbd HOST:PORT")
        })?;
        Ok(Target {
            connections: usize::from(self.arguments.connections),
            reconnect: HUB_RESTART,
            reads_as_zeroes: mode == Mode::Everything && backup["backup_type"] == "full",
            ..Target::new(&address, &export)
        })
    }

    /// Says that a disk is complete. The hub answers a repetition the same.
    fn complete(&self, number: u64) -> CtlResult<()> {
        let change_id = changes::change_id(self.arguments.bitmap.as_deref());
        let body = json!({"change_id": change_id, "disk_id": number, "bytes_transferred": 0});
        let path = format!("/backups/{}/complete", encode(self.id));
        self.patiently(|api| api.post(&path, &body, LONG)).map(drop)
    }
}

/// The row of a disk.
fn disk_of(backup: &Value, disk: u64) -> CtlResult<&Value> {
    each(backup, "disk_results").find(|row| number(row, "disk_id") == disk).ok_or_else(|| {
        CtlError::failed(format!("the hub's backup has no disk {disk}"), "start the backup again")
    })
}

/// Host and port of an export in `KEY:nbd://HOST:PORT/EXPORT,...`.
fn address(targets: &str, export: &str) -> Option<String> {
    targets.split(',').find_map(|target| {
        let (_, uri) = target.split_once(':')?;
        let (address, name) = uri.strip_prefix("nbd://")?.rsplit_once('/')?;
        (name == export).then(|| address.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn an_export_is_found_among_the_targets_by_its_name() {
        let targets = "2000:nbd://127.0.0.1:10809/a-disk0,2001:nbd://[::1]:10100/a-disk1";
        assert_eq!(address(targets, "a-disk0").as_deref(), Some("127.0.0.1:10809"));
        assert_eq!(address(targets, "a-disk1").as_deref(), Some("[::1]:10100"));
        assert_eq!(address(targets, "a-disk"), None);
        assert_eq!(address("", "a-disk0"), None);
    }
}
