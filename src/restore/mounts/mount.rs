//! One mount: its worker, its leases, the directory that shows its files, and when it was used.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::{Status, Tree};

use super::{MountInfo, MountStatus};
use crate::backup::{Backups, Failure, FailureKind};
use crate::model::Timestamp;
use crate::restore::fuse::FuseTree;
use crate::worker::Worker;

/// When a mount was used.
struct Use {
    in_flight: usize,
    last: Instant,
    last_at: Timestamp,
}

/// Who wants what: what does not change of a mount.
pub(super) struct Made {
    pub(super) id: String,
    pub(super) backup_id: String,
    pub(super) vm_name: String,
    pub(super) disk: Option<u32>,
    pub(super) created_by: String,
}

/// What a mount holds until it ends.
struct Held {
    /// Before the worker: what it shows comes from there.
    tree: Option<FuseTree>,
    /// Given back after what it shows is gone.
    directory: Option<Directory>,
    /// Given back after the worker is gone.
    leases: Leases,
}

pub(super) struct Mount {
    pub(super) made: Made,
    pub(super) created_at: Timestamp,
    pub(super) worker: Arc<Worker>,
    mount_path: Option<PathBuf>,
    usage: Mutex<Use>,
    held: Mutex<Option<Held>>,
}

impl Mount {
    pub(super) fn new(made: Made, worker: Arc<Worker>, leases: Leases) -> Self {
        let now = Timestamp::now();
        Self {
            made,
            created_at: now,
            worker,
            mount_path: None,
            usage: Mutex::new(Use { in_flight: 0, last: Instant::now(), last_at: now }),
            held: Mutex::new(Some(Held { tree: None, directory: None, leases })),
        }
    }

    /// Shows its files in the directory `at` too.
    ///
    /// # Errors
    /// A sentence, where FUSE is not there or the directory cannot be used.
    pub(super) fn show(&mut self, at: Directory) -> Result<(), String> {
        let trees = self.worker.volumes().iter().enumerate();
        let trees = trees.filter(|(_, about)| !matches!(about.status, Status::Refused(_)));
        let trees = trees.map(|(number, about)| {
            let tree: Arc<dyn Tree> = self.worker.tree(number);
            (about.name.clone(), tree)
        });
        let tree = FuseTree::mount(&at.path, trees.collect())?;
        self.mount_path = Some(at.path.clone());
        if let Some(held) = &mut *self.held() {
            (held.tree, held.directory) = (Some(tree), Some(at));
        }
        Ok(())
    }

    fn usage(&self) -> MutexGuard<'_, Use> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn status(&self) -> MountStatus {
        match self.worker.is_alive() {
            true => MountStatus::Mounted,
            false => MountStatus::Failed(self.worker.ended().unwrap_or("it is gone").to_owned()),
        }
    }

    /// What is open in its directory, and how long ago that was used last.
    fn shown(&self) -> Option<(usize, Duration)> {
        let held = self.held();
        let tree = held.as_ref()?.tree.as_ref()?;
        Some((tree.in_flight(), tree.last_use().elapsed()))
    }

    /// Requests that are being answered, and files that are open in its directory.
    pub(super) fn in_flight(&self) -> usize {
        self.usage().in_flight + self.shown().map_or(0, |(open, _)| open)
    }

    /// How long it has not been used.
    fn unused(&self) -> Duration {
        if self.in_flight() > 0 {
            return Duration::ZERO;
        }
        let unused = self.usage().last.elapsed();
        self.shown().map_or(unused, |(_, ago)| unused.min(ago))
    }

    pub(super) fn expires_at(&self, idle: Duration) -> Timestamp {
        let (last_at, last) = {
            let usage = self.usage();
            (usage.last_at, usage.last)
        };
        // Uses of the directory are later than what was noted.
        let later = last.elapsed().saturating_sub(self.unused());
        last_at.after(later).after(idle)
    }

    pub(super) fn is_idle(&self, idle: Duration) -> bool {
        self.unused() >= idle
    }

    pub(super) fn info(&self, idle: Duration) -> MountInfo {
        let status = self.status();
        let memory = if status == MountStatus::Mounted { self.worker.memory() } else { 0 };
        MountInfo {
            id: self.made.id.clone(),
            backup_id: self.made.backup_id.clone(),
            vm_name: self.made.vm_name.clone(),
            disk: self.made.disk,
            mount_path: self.mount_path.clone(),
            volumes: self.worker.volumes().to_vec(),
            notes: self.worker.notes().to_vec(),
            status,
            created_by: self.made.created_by.clone(),
            created_at: self.created_at,
            expires_at: self.expires_at(idle),
            requests_in_flight: self.in_flight(),
            memory,
        }
    }

    pub(super) fn begin(&self) {
        self.usage().in_flight += 1;
    }

    pub(super) fn finish(&self) {
        let mut usage = self.usage();
        usage.in_flight = usage.in_flight.saturating_sub(1);
        (usage.last, usage.last_at) = (Instant::now(), Timestamp::now());
    }

    /// Takes its directory away, ends the worker, and only then lets go of the restore point.
    pub(super) fn end(&self) -> Result<(), Failure> {
        let held = self.held().take();
        // What waits for the worker is answered with an error first: nobody holds the directory.
        self.worker.end();
        let Some(Held { tree, directory, leases }) = held else { return Ok(()) };
        drop(tree);
        drop(directory);
        leases.release()
    }
}

/// Directories that are in use.
pub(super) type Taken = Arc<Mutex<BTreeSet<PathBuf>>>;

/// A directory that no other mount uses while this lives. It is given back only when nothing shows
/// anything there any more: the end of a FUSE session unmounts whatever its path leads to.
pub(super) struct Directory {
    path: PathBuf,
    taken: Taken,
}

impl Directory {
    /// Takes the directory `path`.
    ///
    /// # Errors
    /// `Unprocessable` where another mount uses it.
    pub(super) fn take(taken: &Taken, path: PathBuf) -> Result<Self, Failure> {
        let is_new = taken.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone());
        if !is_new {
            let text = format!("'{}' shows another mount", path.display());
            let next = "give another name, or unmount that one first";
            return Err(Failure::new(FailureKind::Unprocessable, text, next));
        }
        Ok(Self { path, taken: Arc::clone(taken) })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.path);
    }
}

/// Leases of a restore point's disks, given back when they are dropped.
pub(super) struct Leases {
    backups: Arc<Backups>,
    ids: Vec<String>,
}

impl Leases {
    pub(super) fn none(backups: Arc<Backups>) -> Self {
        Self { backups, ids: Vec::new() }
    }

    /// Takes one on a disk of a restore point.
    pub(super) fn take(&mut self, id: String, backup: &str, disk: u32) -> Result<(), Failure> {
        self.backups.catalog().lease(&id, backup, disk)?;
        self.ids.push(id);
        Ok(())
    }

    fn release(mut self) -> Result<(), Failure> {
        self.release_all()
    }

    fn release_all(&mut self) -> Result<(), Failure> {
        while let Some(id) = self.ids.last() {
            self.backups.catalog().release_lease(id)?;
            self.ids.pop();
        }
        Ok(())
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        if let Err(failure) = self.release_all() {
            tracing::warn!(%failure, "a restore point stays leased until the hub starts again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_for_one_mount_at_a_time() {
        let taken = Taken::default();
        let first = Directory::take(&taken, "/mnt/a".into()).unwrap();
        let failure = Directory::take(&taken, "/mnt/a".into()).err().unwrap();
        assert_eq!(failure.kind, FailureKind::Unprocessable);
        assert!(failure.message.contains("shows another mount"), "{failure:?}");
        let _other = Directory::take(&taken, "/mnt/b".into()).unwrap();
        drop(first);
        assert!(Directory::take(&taken, "/mnt/a".into()).is_ok());
    }
}
