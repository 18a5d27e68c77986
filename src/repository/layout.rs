//! Where things are in a repository.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Result, failed, invalid, sync_directory};
use crate::model::Timestamp;

/// Name of the file that makes a directory a repository.
const IDENTITY: &str = ".sendense-repo.json";
/// Version of the layout that this program reads and writes.
const VERSION: u32 = 1;
/// What unfinished files end in.
const PARTIAL: &str = ".partial";
/// Name of the file that is written to try a directory out.
const PROBE: &str = ".sendense-probe";

/// What makes a directory a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the layout.
    pub format: u32,
    /// Id, the same in every catalog.
    pub id: String,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Room on a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// In all.
    pub total: u64,
    /// What this process may still use.
    pub free: u64,
}

/// The directory of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root(PathBuf);

impl Root {
    /// The repository in `directory`, which [`open`](Self::open) would open.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self(directory.into())
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// Makes `directory` a repository with the given id, or takes the one that is there.
    ///
    /// # Errors
    /// `Io`; `Invalid` for a layout of another version.
    pub fn create(directory: &Path, id: &str) -> Result<(Self, Identity)> {
        fs::create_dir_all(directory).map_err(failed("cannot make the directory", directory))?;
        let path = directory.join(IDENTITY);
        if !path.exists() {
            let identity =
                Identity { format: VERSION, id: id.to_owned(), created_at: Timestamp::now() };
            let text = serde_json::to_vec_pretty(&identity).unwrap_or_default();
            write_durably(&path, &text)?;
        }
        Self::open(directory)
    }

    /// Opens the repository in `directory`.
    ///
    /// # Errors
    /// `Io`; `Invalid` where it is none, or one of another version.
    pub fn open(directory: &Path) -> Result<(Self, Identity)> {
        let path = directory.join(IDENTITY);
        let text = fs::read(&path).map_err(failed("this is no repository: cannot read", &path))?;
        let identity: Identity = serde_json::from_slice(&text)
            .map_err(|e| invalid(&path, format!("is no identity of a repository: {e}")))?;
        if identity.format != VERSION {
            let text =
                format!("has layout version {}, this program knows {VERSION}", identity.format);
            return Err(invalid(&path, text));
        }
        Ok((Self(directory.to_owned()), identity))
    }

    /// Tries whether files can be made, flushed and removed here.
    ///
    /// # Errors
    /// `Io` with what failed.
    pub fn probe(directory: &Path) -> Result<Space> {
        let path = directory.join(PROBE);
        write_durably(&path, b"probe")?;
        fs::remove_file(&path).map_err(failed("cannot remove", &path))?;
        Self::new(directory).space()
    }

    /// Room in the repository's file system.
    ///
    /// # Errors
    /// `Io`.
    pub fn space(&self) -> Result<Space> {
        let found = rustix::fs::statvfs(&self.0)
            .map_err(|e| failed("cannot ask for the space of", &self.0)(e.into()))?;
        Ok(Space {
            total: found.f_blocks.saturating_mul(found.f_frsize),
            free: found.f_bavail.saturating_mul(found.f_frsize),
        })
    }

    /// The directory of a disk.
    pub fn disk_directory(&self, vm: &str, disk: u32) -> PathBuf {
        self.0.join(vm).join(format!("disk-{disk}"))
    }

    /// The files of one disk of a backup.
    pub fn files(&self, vm: &str, disk: u32, backup: &str) -> DiskFiles {
        DiskFiles { directory: self.disk_directory(vm, disk), backup: backup.to_owned() }
    }

    /// The files that belong to the image at `path`, which is relative to the repository.
    ///
    /// # Errors
    /// `Invalid` where that is no path of an image in a repository.
    pub fn files_at(&self, path: &str) -> Result<DiskFiles> {
        let parts: Vec<&str> = path.split('/').collect();
        let safe = |part: &&str| !part.is_empty() && *part != "." && *part != "..";
        if let [vm, disk, file] = parts.as_slice()
            && parts.iter().all(safe)
            && let Some(backup) = file.strip_suffix(".qcow2")
        {
            let directory = self.0.join(vm).join(disk);
            return Ok(DiskFiles { directory, backup: backup.to_owned() });
        }
        Err(invalid(&self.0.join(path), "is no path of an image in a repository"))
    }
}

/// The files of one disk of one backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFiles {
    /// Their directory.
    pub directory: PathBuf,
    backup: String,
}

impl DiskFiles {
    /// Path of the image relative to the repository.
    pub fn relative(vm: &str, disk: u32, backup: &str) -> String {
        format!("{vm}/disk-{disk}/{backup}.qcow2")
    }

    fn named(&self, ending: &str) -> PathBuf {
        self.directory.join(format!("{}{ending}", self.backup))
    }

    /// Name of the image inside its directory: what an overlay calls its backing file.
    pub fn image_name(&self) -> String {
        format!("{}.qcow2", self.backup)
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.named(".qcow2")
    }

    /// The checksums.
    pub fn checksums(&self) -> PathBuf {
        self.named(".crc")
    }

    /// The manifest.
    pub fn manifest(&self) -> PathBuf {
        self.named(".json")
    }

    /// Which ranges were durable: kept only while the image is being received.
    pub fn durable(&self) -> PathBuf {
        self.named(".durable")
    }

    /// The name of a file while it is not finished.
    pub fn partial(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(PARTIAL);
        name.into()
    }

    /// The finished files, in the order in which they get their names: the manifest last, because
    /// it says that the others are there.
    pub fn finished(&self) -> [PathBuf; 3] {
        [self.image(), self.checksums(), self.manifest()]
    }
}

/// The name of a file while [`write_durably`] writes it.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Writes a whole file so that it is there with all its bytes, or not at all.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed("cannot write", &temporary))?;
    fs::rename(&temporary, path).map_err(failed("cannot rename to", path))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_becomes_a_repository_once() {
        let dir = tempfile::tempdir().unwrap();
        let (_, first) = Root::create(dir.path(), "repo-1").unwrap();
        let (root, again) = Root::create(dir.path(), "repo-2").unwrap();
        assert_eq!(first, again);
        assert!(root.space().unwrap().free > 0);
        assert!(Root::open(&dir.path().join("elsewhere")).is_err());
        fs::write(
            dir.path().join(IDENTITY),
            r#"{"format":9,"id":"x","created_at":"2026-01-01T00:00:00Z"}"#,
        )
        .unwrap();
        assert!(Root::open(dir.path()).unwrap_err().to_string().contains("version 9"));
    }

    #[test]
    fn paths_that_lead_out_of_the_repository_are_none() {
        let root = Root::new("/repo");
        assert_eq!(root.files_at("ctx/disk-0/b.qcow2").unwrap(), root.files("ctx", 0, "b"));
        for path in ["../disk-0/b.qcow2", "ctx/../b.qcow2", "/etc/b.qcow2", "b.qcow2", "a/b/c.raw"]
        {
            assert!(root.files_at(path).is_err(), "{path}");
        }
    }
}
