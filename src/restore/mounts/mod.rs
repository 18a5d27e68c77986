//! Restore points whose files are looked at: a worker each, over all disks of the machine at that time.
//!
//! A mount is in memory and in its worker, and nowhere else: what a crash leaves is nothing. Its leases
//! keep the restore point from being deleted; those of an earlier process are cleared at a start. It
//! ends when it is told to, with the hub, or when nothing has been asked of it for the idle time. A
//! request in flight is a use as long as it lasts.

mod mount;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guest::{Status, Tree, VolumeAbout};

use crate::backup::{Backups, Failure, FailureKind};
use crate::model::{BackupState, Timestamp, random_hex};
use crate::restore::fuse;
use crate::worker::{Limits, Program, Worker};
use mount::{Directory, Leases, Made, Mount, Taken};

/// Random bytes in the id of a mount.
const RANDOM: usize = 8;
/// Longest name of a directory that shows a mount's files.
const NAME: usize = 64;

/// Bounds of mounts.
#[derive(Debug, Clone)]
pub struct MountSettings {
    /// Most of them at a time.
    pub mounts: usize,
    /// Time without a request after which one ends.
    pub idle: Duration,
    /// What is started as a worker.
    pub program: Program,
    /// What each worker may take.
    pub limits: Limits,
    /// Directory below which mounts show their files, where that is asked for. What an earlier process
    /// left there is taken away at a start.
    pub root: PathBuf,
}

/// What is to be mounted.
#[derive(Debug, Clone, Default)]
pub struct MountWish {
    /// The restore point.
    pub backup_id: String,
    /// This disk only; otherwise all of them.
    pub disk: Option<u32>,
    /// Show the files in a directory of this name too, directly below [`MountSettings::root`].
    pub mount_path: Option<String>,
}

/// How a mount is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountStatus {
    /// It can be used.
    Mounted,
    /// Its worker is gone, and why. It waits to be taken away.
    Failed(String),
}

/// A mount as it is now.
#[derive(Debug, Clone)]
pub struct MountInfo {
    /// Its name.
    pub id: String,
    /// The restore point.
    pub backup_id: String,
    /// The machine.
    pub vm_name: String,
    /// The disk, where it is one only.
    pub disk: Option<u32>,
    /// Where its files appear too.
    pub mount_path: Option<PathBuf>,
    /// What is on its disks.
    pub volumes: Vec<VolumeAbout>,
    /// What people should know of the machine as a whole.
    pub notes: Vec<String>,
    /// How it is.
    pub status: MountStatus,
    /// Who made it.
    pub created_by: String,
    /// Since when it is there.
    pub created_at: Timestamp,
    /// When it ends unless somebody uses it.
    pub expires_at: Timestamp,
    /// Requests that are being answered.
    pub requests_in_flight: usize,
    /// Bytes of memory of its worker.
    pub memory: u64,
}

/// How mounts are cleaned up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CleanupReport {
    /// Time without a request after which one ends.
    pub idle: Duration,
    /// Those that are there, failed ones included.
    pub mounts: usize,
    /// Those of them whose worker is gone.
    pub failed: usize,
    /// Requests that are being answered, of all of them.
    pub requests_in_flight: usize,
    /// When the next one ends, unless somebody uses it.
    pub next_expiry: Option<Timestamp>,
    /// Mounts that ended because nobody used them, since the hub started.
    pub ended_idle: u64,
    /// When it was looked after them last.
    pub last_look: Option<Timestamp>,
}

/// A request to a mount: it is in use as long as this lives.
pub struct Using {
    mount: Arc<Mount>,
    info: MountInfo,
}

impl Using {
    /// The mount as it was when the request began.
    pub fn info(&self) -> &MountInfo {
        &self.info
    }

    /// Its volumes.
    pub fn volumes(&self) -> &[VolumeAbout] {
        self.mount.worker.volumes()
    }

    /// The tree of a volume, to be used no longer than this lives.
    ///
    /// # Errors
    /// `NotFound`; `Unprocessable` with the reason where it is not shown.
    pub fn tree(&self, volume: &str) -> Result<Arc<dyn Tree>, Failure> {
        let mut volumes = self.volumes().iter().enumerate();
        let (number, about) = volumes
            .find(|(_, about)| about.name == volume)
            .ok_or_else(|| Failure::not_found("volume", volume))?;
        if let Status::Refused(reason) = &about.status {
            let text = format!("volume {volume} cannot be read: {reason}");
            return Err(Failure::new(FailureKind::Unprocessable, text, ""));
        }
        Ok(self.mount.worker.tree(number))
    }
}

impl Drop for Using {
    fn drop(&mut self) {
        self.mount.finish();
    }
}

#[derive(Default)]
struct State {
    mounts: BTreeMap<String, Arc<Mount>>,
    /// Those that are being made.
    beginning: usize,
    stopping: bool,
    ended_idle: u64,
    last_look: Option<Timestamp>,
}

/// The mounts.
pub struct Mounts {
    backups: Arc<Backups>,
    settings: MountSettings,
    state: Mutex<State>,
    /// Directories that show a mount, or are about to, or did so until now.
    taken: Taken,
}

/// The place of a mount that is being made.
struct Beginning<'a>(&'a Mounts);

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        self.0.state().beginning -= 1;
    }
}

impl Mounts {
    /// None yet. Leases of an earlier process have been given back by
    /// [`Restores::new`](super::Restores::new).
    ///
    /// # Errors
    /// `Invalid` for settings under which nothing can be mounted.
    pub fn new(backups: Arc<Backups>, settings: MountSettings) -> Result<Self, Failure> {
        if settings.mounts == 0 || settings.idle.is_zero() {
            let text = "mounts and their idle time must be more than nothing";
            return Err(Failure::new(FailureKind::Invalid, text, ""));
        }
        let left = fuse::clear_stale(&settings.root);
        if left > 0 {
            tracing::info!(left, "took away directories that an earlier process showed files in");
        }
        Ok(Self { backups, settings, state: Mutex::default(), taken: Taken::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its bounds.
    pub fn settings(&self) -> &MountSettings {
        &self.settings
    }

    fn begin(&self) -> Result<Beginning<'_>, Failure> {
        let mut state = self.state();
        if state.stopping {
            return Err(ending());
        }
        let most = self.settings.mounts;
        if state.mounts.len() + state.beginning >= most {
            let text = format!("{most} restore points are mounted already, the maximum");
            let what = "unmount one first, or raise restore.mounts";
            return Err(Failure::new(FailureKind::Conflict, text, what));
        }
        state.beginning += 1;
        Ok(Beginning(self))
    }

    /// Mounts a restore point: on return its volumes are known and its files can be read. The same one
    /// may be mounted many times.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where it is no restore point, or there are too many mounts;
    /// `Unprocessable` for a directory; `Internal` where its disks cannot be opened. Nothing is left
    /// then.
    pub fn mount(&self, wish: &MountWish, actor: &str) -> Result<MountInfo, Failure> {
        let shown = wish.mount_path.as_deref().map(|path| self.directory(path)).transpose()?;
        let beginning = self.begin()?;
        let shown = shown.map(|at| Directory::take(&self.taken, at)).transpose()?;
        let backup = self.backups.backup(&wish.backup_id)?;
        if backup.state != BackupState::Completed {
            let text = format!("backup {} is {}, no restore point", backup.id, backup.state);
            return Err(Failure::new(FailureKind::Conflict, text, ""));
        }
        let is_wanted = |number: u32| wish.disk.is_none_or(|wanted| wanted == number);
        let disks: Vec<_> = backup.disks.iter().filter(|disk| is_wanted(disk.disk_id)).collect();
        if disks.is_empty() {
            let wanted = wish.disk.map_or_else(|| "any".into(), |disk| disk.to_string());
            return Err(Failure::not_found("disk in this backup:", &wanted));
        }

        let id = format!("mount-{}", random_hex(RANDOM));
        let mut leases = Leases::none(Arc::clone(&self.backups));
        for disk in &disks {
            leases.take(format!("{id}-disk{}", disk.disk_id), &backup.id, disk.disk_id)?;
        }
        let root = self.backups.repository_root(&backup)?;
        let images = disks
            .iter()
            .map(|disk| Ok((disk.disk_id, root.files_at(&disk.path)?.image())))
            .collect::<Result<Vec<_>, Failure>>()?;
        let MountSettings { program, limits, .. } = &self.settings;
        let worker = Worker::start(program, &images, limits).map_err(|e| {
            let text = format!("backup {} cannot be mounted: {e}", backup.id);
            let next = "verify the backup; the hub's log says more";
            Failure::new(FailureKind::Internal, text, next)
        })?;
        let made = Made {
            id: id.clone(),
            backup_id: backup.id.clone(),
            vm_name: backup.vm_name.clone(),
            disk: wish.disk,
            created_by: actor.to_owned(),
        };
        let mut mount = Mount::new(made, Arc::new(worker), leases);
        if let Some(at) = shown {
            mount.show(at).map_err(|text| {
                let next = "mount it without a directory: API and sendense-ctl need none";
                Failure::new(FailureKind::Unprocessable, text, next)
            })?;
        }
        let mount = Arc::new(mount);
        self.backups.catalog().event(actor, "restore.mounted", &backup.id, &id)?;
        let entered = {
            let mut state = self.state();
            if !state.stopping {
                state.mounts.insert(id, Arc::clone(&mount));
            }
            !state.stopping
        };
        drop(beginning);
        if !entered {
            mount.end()?;
            return Err(ending());
        }
        Ok(mount.info(self.settings.idle))
    }

    /// The directory for a wish: a name, or a path that ends in one, directly below the root.
    fn directory(&self, wish: &str) -> Result<PathBuf, Failure> {
        let root = &self.settings.root;
        let wished = Path::new(wish);
        let name = match wished.parent() {
            Some(parent) if parent == root || parent.as_os_str().is_empty() => wished.file_name(),
            _ => None,
        };
        let fit = |name: &&str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            name.len() <= NAME && !name.starts_with('.') && name.chars().all(plain)
        };
        let name = name.and_then(|name| name.to_str()).filter(fit).ok_or_else(|| {
            let text = format!("'{wish}' is no name for a directory below {}", root.display());
            let next = "give a name of letters, digits, '.', '_' and '-'; restore.mount_root says \
                        where it appears";
            Failure::new(FailureKind::Invalid, text, next)
        })?;
        let make = || {
            use std::os::unix::fs::DirBuilderExt;
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(root)
        };
        make().map_err(|e| {
            let text = format!("cannot make '{}': {e}", root.display());
            Failure::new(FailureKind::Unprocessable, text, "set restore.mount_root")
        })?;
        Ok(root.join(name))
    }

    fn found(&self, id: &str) -> Result<Arc<Mount>, Failure> {
        let found = self.state().mounts.get(id).map(Arc::clone);
        found.ok_or_else(|| Failure::not_found("mount", id))
    }

    /// All of them, by id.
    pub fn list(&self) -> Vec<MountInfo> {
        let mounts: Vec<_> = self.state().mounts.values().map(Arc::clone).collect();
        mounts.iter().map(|mount| mount.info(self.settings.idle)).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn info(&self, id: &str) -> Result<MountInfo, Failure> {
        Ok(self.found(id)?.info(self.settings.idle))
    }

    /// Begins a request to a mount.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where its worker is gone.
    pub fn using(&self, id: &str) -> Result<Using, Failure> {
        let mount = {
            // While the mounts are locked none of them is found idle.
            let state = self.state();
            let mount = state.mounts.get(id).map(Arc::clone);
            let mount = mount.ok_or_else(|| Failure::not_found("mount", id))?;
            mount.begin();
            mount
        };
        let info = mount.info(self.settings.idle);
        let using = Using { mount, info };
        if let MountStatus::Failed(reason) = &using.info.status {
            let text = format!("mount {id} has failed: {reason}");
            let what = "unmount it, and mount the backup again";
            return Err(Failure::new(FailureKind::Conflict, text, what));
        }
        Ok(using)
    }

    /// Ends a mount, and with it every request that is still being answered.
    ///
    /// # Errors
    /// `NotFound`; `Internal` where the catalog fails.
    pub fn unmount(&self, id: &str, actor: &str) -> Result<(), Failure> {
        let mount = self.state().mounts.remove(id);
        let mount = mount.ok_or_else(|| Failure::not_found("mount", id))?;
        self.finish(&mount, actor)
    }

    fn finish(&self, mount: &Mount, actor: &str) -> Result<(), Failure> {
        mount.end()?;
        self.backups.catalog().event(
            actor,
            "restore.unmounted",
            &mount.made.backup_id,
            &mount.made.id,
        )?;
        Ok(())
    }

    /// Ends those that nobody has used for the idle time, and notices workers that are gone.
    pub fn look(&self) {
        let idle: Vec<Arc<Mount>> = {
            let mut state = self.state();
            state.last_look = Some(Timestamp::now());
            let is_idle = |mount: &Arc<Mount>| mount.is_idle(self.settings.idle);
            let ids: Vec<String> =
                state.mounts.values().filter(|m| is_idle(m)).map(|m| m.made.id.clone()).collect();
            state.ended_idle += ids.len() as u64;
            ids.iter().filter_map(|id| state.mounts.remove(id)).collect()
        };
        for mount in idle {
            if let Err(failure) = self.finish(&mount, "hub") {
                tracing::warn!(mount = %mount.made.id, %failure, "an idle mount did not end well");
            }
        }
        let mounts: Vec<_> = self.state().mounts.values().map(Arc::clone).collect();
        for mount in mounts {
            mount.worker.is_alive();
        }
    }

    /// Ends all of them, for a hub that ends; none begins from here on.
    pub fn stop(&self) {
        let mounts = {
            let mut state = self.state();
            state.stopping = true;
            std::mem::take(&mut state.mounts)
        };
        for mount in mounts.values() {
            if let Err(failure) = self.finish(mount, "hub") {
                tracing::warn!(mount = %mount.made.id, %failure, "a mount did not end well");
            }
        }
    }

    /// How they are cleaned up.
    pub fn cleanup(&self) -> CleanupReport {
        let (mounts, ended_idle, last_look) = {
            let state = self.state();
            let mounts: Vec<_> = state.mounts.values().map(Arc::clone).collect();
            (mounts, state.ended_idle, state.last_look)
        };
        let idle = self.settings.idle;
        CleanupReport {
            idle,
            mounts: mounts.len(),
            failed: mounts.iter().filter(|mount| !mount.worker.is_alive()).count(),
            requests_in_flight: mounts.iter().map(|mount| mount.in_flight()).sum(),
            next_expiry: mounts.iter().map(|mount| mount.expires_at(idle)).min(),
            ended_idle,
            last_look,
        }
    }
}

/// Whether a failure of a tree is that the worker of its mount is gone: the mount is of no more use.
pub fn is_end_of_worker(error: &guest::Error) -> bool {
    Worker::is_end(error)
}

fn ending() -> Failure {
    Failure::new(FailureKind::Conflict, "the hub is ending; nothing is mounted any more", "")
}
