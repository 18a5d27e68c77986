//! Exports of restore points: read-only, or with an overlay that takes writes and is thrown away.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use qcow2::{BackingFormat, CreateOptions};

use crate::backup::{Backups, Failure, FailureKind};
use crate::block::BlockDevice;
use crate::export;
use crate::model::{BackupState, Format, Source, Timestamp, export_name, random_hex};
use crate::nbd::exports::Export;
use crate::nbd::publisher::Publication;

/// Random bytes in the name of an export.
const RANDOM: usize = 4;
/// Time that clients of an export which is taken away have to finish.
const NOTICE: Duration = Duration::from_millis(200);

/// Bounds of exports of restore points.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most of them at a time.
    pub exports: usize,
    /// Time without a connection after which one is taken away.
    pub idle: Duration,
    /// Directory for overlays; what is in it at a start is removed.
    pub overlays: PathBuf,
}

/// What is to be exported.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The restore point.
    pub backup_id: String,
    /// Number of the disk.
    pub disk_id: u32,
    /// Take writes, and throw them away with the export.
    pub writable: bool,
}

/// A restore point as a disk.
#[derive(Debug, Clone)]
pub struct RestoreExport {
    /// Name of the export.
    pub name: String,
    /// The restore point.
    pub backup_id: String,
    /// Number of the disk.
    pub disk_id: u32,
    /// Writes are taken.
    pub writable: bool,
    /// Bytes of the disk.
    pub size: u64,
    /// Its own port, where it has one.
    pub port: Option<u16>,
    /// Connections now.
    pub connections: usize,
    /// Since when.
    pub created_at: Timestamp,
}

struct Entry {
    shown: RestoreExport,
    export: Arc<Export>,
    overlay: Option<PathBuf>,
    /// When somebody was connected last.
    used: Instant,
}

/// The exports of restore points.
pub struct Restores {
    backups: Arc<Backups>,
    settings: Settings,
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl Restores {
    /// None yet. What an earlier process left behind is removed.
    ///
    /// # Errors
    /// When the directory for overlays, or the catalog, cannot be used.
    pub fn new(backups: Arc<Backups>, settings: Settings) -> Result<Self, Failure> {
        let clear = || -> std::io::Result<()> {
            if settings.overlays.exists() {
                fs::remove_dir_all(&settings.overlays)?;
            }
            fs::create_dir_all(&settings.overlays)
        };
        clear().map_err(|e| {
            let text = format!("cannot use '{}': {e}", settings.overlays.display());
            Failure::new(FailureKind::Internal, text, "")
        })?;
        backups.catalog().release_all_leases()?;
        Ok(Self { backups, settings, entries: Mutex::default() })
    }

    /// A directory for what need not outlive the hub.
    pub fn scratch(&self) -> &Path {
        &self.settings.overlays
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a restore point visible as an export.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where it is no restore point, or there are too many exports;
    /// `Internal` where its images cannot be opened.
    pub fn export(&self, wish: &Wish, actor: &str) -> Result<RestoreExport, Failure> {
        let backup = self.backups.backup(&wish.backup_id)?;
        if backup.state != BackupState::Completed {
            let text = format!("backup {} is {}, no restore point", backup.id, backup.state);
            return Err(Failure::new(FailureKind::Conflict, text, ""));
        }
        let disk =
            backup.disks.iter().find(|disk| disk.disk_id == wish.disk_id).ok_or_else(|| {
                Failure::not_found("disk in this backup:", &wish.disk_id.to_string())
            })?;
        let most = self.settings.exports;
        if self.entries().len() >= most {
            let text = format!("{most} restore points are exported already, the maximum");
            return Err(Failure::new(FailureKind::Conflict, text, "take one away first"));
        }
        let name =
            format!("restore-{}-{}", random_hex(RANDOM), export_name(&backup.id, disk.disk_id));
        // From here on the backup cannot be deleted.
        self.backups.catalog().lease(&name, &backup.id, disk.disk_id)?;
        let root = self.backups.repository_root(&backup)?;
        let image = root.files_at(&disk.path)?.image();
        let opened = self.open(&name, &image, wish.writable);
        let published = opened.and_then(|(device, overlay)| {
            let publication = Publication {
                name: name.clone(),
                alias: None,
                description: format!(
                    "disk {} of {} at {}",
                    disk.disk_id, backup.vm_name, backup.id
                ),
                device: Arc::clone(&device),
                max_connections: None,
            };
            match self.backups.publisher().publish(publication) {
                Ok((export, port)) => Ok((export, port, overlay)),
                Err(text) => {
                    let _ = device.close();
                    remove_overlay(overlay.as_deref());
                    Err(Failure::new(FailureKind::Conflict, text, ""))
                }
            }
        });
        let (export, port, overlay) = match published {
            Ok(published) => published,
            Err(failure) => {
                self.backups.catalog().release_lease(&name)?;
                return Err(failure);
            }
        };
        let shown = RestoreExport {
            name: name.clone(),
            backup_id: backup.id.clone(),
            disk_id: disk.disk_id,
            writable: wish.writable,
            size: export.device.info().size,
            port,
            connections: 0,
            created_at: Timestamp::now(),
        };
        let entry = Entry { shown: shown.clone(), export, overlay, used: Instant::now() };
        self.entries().insert(name.clone(), entry);
        self.backups.catalog().event(actor, "restore.exported", &backup.id, &name)?;
        Ok(shown)
    }

    fn open(
        &self,
        name: &str,
        image: &Path,
        writable: bool,
    ) -> Result<(Arc<dyn BlockDevice>, Option<PathBuf>), Failure> {
        if !writable {
            let source = Source { format: Format::Qcow2, path: image.to_owned() };
            return Ok((export::open(&source, true)?, None));
        }
        let overlay = self.settings.overlays.join(format!("{name}.qcow2"));
        let below = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
        let options = CreateOptions::new(0)
            .backing(below.to_string_lossy().into_owned(), BackingFormat::Qcow2);
        let size = qcow2::Image::open(&below, &qcow2::OpenOptions::new().read_only())
            .map(|image| image.size());
        let create = size
            .and_then(|size| qcow2::create(&overlay, &CreateOptions { size, ..options }))
            .map_err(crate::repository::RepositoryError::from);
        create?;
        let source = Source { format: Format::Qcow2, path: overlay.clone() };
        match export::open(&source, false) {
            Ok(device) => Ok((device, Some(overlay))),
            Err(error) => {
                remove_overlay(Some(&overlay));
                Err(error.into())
            }
        }
    }

    /// The exports, by name.
    pub fn list(&self) -> Vec<RestoreExport> {
        let shown = |entry: &Entry| {
            let connections = entry.export.connections().0;
            RestoreExport { connections, ..entry.shown.clone() }
        };
        self.entries().values().map(shown).collect()
    }

    /// Takes an export away, with what was written to it.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn remove(&self, name: &str, actor: &str) -> Result<(), Failure> {
        let entry = self.entries().remove(name);
        let entry = entry.ok_or_else(|| Failure::not_found("export of a restore point:", name))?;
        if let Err(error) = self.backups.publisher().withdraw(name, NOTICE) {
            tracing::warn!(export = %name, %error, "closed with an error");
        }
        remove_overlay(entry.overlay.as_deref());
        self.backups.catalog().release_lease(name)?;
        self.backups.catalog().event(actor, "restore.ended", &entry.shown.backup_id, name)?;
        Ok(())
    }

    /// Takes those away that nobody has been connected to for the idle time.
    pub fn look(&self) {
        let mut idle = Vec::new();
        for (name, entry) in self.entries().iter_mut() {
            if entry.export.connections().0 > 0 {
                entry.used = Instant::now();
            } else if entry.used.elapsed() >= self.settings.idle {
                idle.push(name.clone());
            }
        }
        for name in idle {
            if let Err(failure) = self.remove(&name, "hub") {
                tracing::warn!(export = %name, %failure, "an idle export cannot be taken away");
            }
        }
    }

    /// Takes all of them away, for a hub that ends.
    pub fn stop(&self) {
        let names: Vec<String> = self.entries().keys().cloned().collect();
        for name in names {
            if let Err(failure) = self.remove(&name, "hub") {
                tracing::warn!(export = %name, %failure, "an export cannot be taken away");
            }
        }
    }
}

fn remove_overlay(path: Option<&Path>) {
    if let Some(path) = path
        && let Err(error) = fs::remove_file(path)
    {
        tracing::warn!(path = %path.display(), %error, "an overlay cannot be removed");
    }
}
