//! All volumes of a machine, from all its disks at one point in time.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::fs::{self, FileSystem, Status};
use crate::source::Source;

/// What is known of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeAbout {
    /// Its name, unique in the machine and fit for a path: `disk0`, `disk0-p2`, `vg-root`.
    pub name: String,
    /// Where it lies, for people: `disk 0, partition 2 (EFI system)`, `logical volume vg/root`.
    pub place: String,
    /// Bytes in all.
    pub size: u64,
    /// What it holds: the kind of file system, or of what was recognised (`luks2`, `swap`); empty where
    /// nothing was.
    pub kind: String,
    /// Label; may be empty.
    pub label: String,
    /// UUID or serial number; may be empty.
    pub uuid: String,
    /// Bytes used, where it says so.
    pub used: Option<u64>,
    /// How much it can be trusted.
    pub status: Status,
}

/// A volume, with its file system where it is read here.
pub struct Volume {
    /// What is known of it.
    pub about: VolumeAbout,
    file_system: Option<Box<dyn FileSystem>>,
    source: Arc<dyn Source>,
}

impl Volume {
    /// Its file system.
    ///
    /// # Errors
    /// `Unsupported` with the reason of [`Status::Refused`].
    pub fn file_system(&self) -> Result<&dyn FileSystem> {
        match (&self.file_system, &self.about.status) {
            (Some(fs), _) => Ok(&**fs),
            (None, Status::Refused(reason)) => Err(Error::unsupported(reason.clone())),
            (None, _) => Err(Error::unsupported("nothing that is read here")),
        }
    }

    /// The bytes that it lies on.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }
}

/// A machine's volumes.
pub struct Guest {
    /// The volumes, by disk and place.
    pub volumes: Vec<Volume>,
}

impl Guest {
    /// Finds everything on `disks`, which are numbered as they come. Never fails: what cannot be read
    /// is a volume that says why.
    pub fn open(disks: &[Arc<dyn Source>]) -> Self {
        let open = |(number, source): (usize, &Arc<dyn Source>)| {
            let (file_system, status, error) = match fs::open(source) {
                Ok(fs) => (Some(fs), Status::Clean, None),
                Err(error) => (None, Status::Refused(error.message.clone()), Some(error)),
            };
            let about = file_system.as_ref().map(|fs| fs.about().clone());
            let _ = error.is_some_and(|e| e.kind == ErrorKind::NotFound);
            Volume {
                about: VolumeAbout {
                    name: format!("disk{number}"),
                    place: format!("disk {number}"),
                    size: source.size(),
                    kind: about.as_ref().map_or(String::new(), |a| a.kind.clone()),
                    label: about.as_ref().map_or(String::new(), |a| a.label.clone()),
                    uuid: about.as_ref().map_or(String::new(), |a| a.uuid.clone()),
                    used: about.as_ref().and_then(|a| a.used),
                    status: about.map_or(status, |a| a.status),
                },
                file_system,
                source: Arc::clone(source),
            }
        };
        Self { volumes: disks.iter().enumerate().map(open).collect() }
    }
}
