//! All volumes of a machine, from all its disks at one point in time.
//!
//! The picture is complete: what holds no file system, or none that is read here, is a volume too, and
//! says why. Only parts of what is shown as a whole are left out: physical volumes of volume groups that
//! were found, and containers of logical partitions.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::fs::{self, FileSystem, Status};
use crate::guarded::{self, Guarded};
use crate::lvm;
use crate::recognise::{self, Recognised};
use crate::source::{DiskRange, Slice, Source};
use crate::tables::{self, Partition, Role};

/// Disks of a machine that are looked at.
pub const DISKS_MAX: usize = 64;
/// Partitions of all disks together that are looked at.
pub const PARTITIONS_MAX: usize = 1024;
/// Letters of a volume's name.
const NAME_MAX: usize = 200;

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
    /// The volumes: by disk and place, and then the logical volumes by group.
    pub volumes: Vec<Volume>,
    /// What was left out, repaired or cut, for people.
    pub notes: Vec<String>,
}

impl Guest {
    /// Finds everything on `disks`, which are numbered as they come. Never fails: what cannot be read
    /// is a volume that says why.
    pub fn open(disks: &[Arc<dyn Source>]) -> Self {
        Self::open_numbered(&disks.iter().map(Arc::clone).enumerate().collect::<Vec<_>>())
    }

    /// The same for disks that have numbers of their own.
    pub fn open_numbered(disks: &[(usize, Arc<dyn Source>)]) -> Self {
        let mut search = Search::default();
        if disks.len() > DISKS_MAX {
            let more = format!("of {} disks, the first {DISKS_MAX} were looked at", disks.len());
            search.notes.push(more);
        }
        for (number, disk) in disks.iter().take(DISKS_MAX) {
            search.disk(*number, disk);
        }
        search.finish()
    }
}

/// A place that may hold a file system, or a part of something.
#[derive(Clone)]
struct Spot {
    /// Disk and partition, to sort by.
    order: (usize, u32),
    name: String,
    place: String,
    source: Arc<dyn Source>,
}

#[derive(Default)]
struct Search {
    found: Vec<((usize, u32), Volume)>,
    members: Vec<lvm::Member>,
    /// Where the members lie.
    spots: Vec<Spot>,
    partitions: usize,
    notes: Vec<String>,
}

impl Search {
    fn disk(&mut self, number: usize, disk: &Arc<dyn Source>) {
        let whole = Spot {
            order: (number, 0),
            name: format!("disk{number}"),
            place: format!("disk {number}"),
            source: Arc::clone(disk),
        };
        let table =
            guarded::call(|| format!("the table of disk {number}"), || tables::read(&**disk));
        match table {
            Ok(None) => self.spot(whole, None),
            Ok(Some(table)) => {
                let told = table.notes.iter().map(|note| format!("disk {number}: {note}"));
                self.notes.extend(told);
                if table.partitions.is_empty() {
                    self.refuse(whole, "", "its partition table is empty".into());
                }
                for partition in table.partitions {
                    self.partition(number, disk, &partition);
                }
            }
            Err(error) => self.refuse(whole, "", error.message),
        }
    }

    fn partition(&mut self, disk: usize, source: &Arc<dyn Source>, partition: &Partition) {
        let number = partition.number;
        let place = format!("disk {disk}, partition {number} ({})", partition.type_name);
        self.partitions += 1;
        if self.partitions > PARTITIONS_MAX {
            if self.partitions == PARTITIONS_MAX + 1 {
                self.notes.push(format!("from {place} on, partitions are left out: too many"));
            }
            return;
        }
        if partition.cut {
            self.notes.push(format!("{place}: it reaches past the end of its disk, and was cut"));
        }
        let spot = Spot {
            order: (disk, number),
            name: format!("disk{disk}-p{number}"),
            place,
            source: Arc::new(Slice::new(Arc::clone(source), partition.start, partition.length)),
        };
        let part = "a part of something that is not put together here";
        match partition.role {
            _ if partition.length == 0 => {
                self.refuse(spot, "", "it lies outside of its disk".into());
            }
            Role::DynamicDisk => {
                let kind = "windows-dynamic-disk";
                self.refuse(spot, kind, format!("Windows dynamic disk: {part}"));
            }
            Role::StorageSpaces => {
                self.refuse(spot, "storage-spaces", format!("Windows Storage Spaces: {part}"));
            }
            Role::Any => {
                let why = partition.cut.then_some("it reaches past the end of its disk");
                self.spot(spot, why);
            }
        }
    }

    /// Finds out what is at `spot`. `known` is what is wrong with it in any case.
    fn spot(&mut self, spot: Spot, known: Option<&str>) {
        let what = || spot.place.clone();
        let strong = guarded::call(what, || recognise::strong(&*spot.source));
        match strong {
            Ok(None) => {}
            Ok(Some(Recognised { kind, reason })) => return self.refuse(spot, kind, reason),
            Err(error) => return self.refuse(spot, "", error.message),
        }
        match guarded::call(what, || lvm::member(&spot.source)) {
            Ok(None) => self.file_system(spot, known),
            Ok(Some(member)) => {
                self.members.push(member);
                self.spots.push(spot);
            }
            Err(error) => self.refuse(spot, "lvm", error.message),
        }
    }

    fn file_system(&mut self, spot: Spot, known: Option<&str>) {
        let what = || spot.place.clone();
        let error = match guarded::call(what, || fs::open(&spot.source)) {
            Ok(file_system) => return self.add(spot, file_system),
            Err(error) => error,
        };
        if error.kind != ErrorKind::NotFound {
            let kind = recognise::kind_of_damaged(&*spot.source);
            let known = known.map(|known| format!(" ({known})")).unwrap_or_default();
            return self.refuse(spot, kind, format!("{error}{known}"));
        }
        let (kind, reason) = match guarded::call(what, || recognise::weak(&*spot.source)) {
            Ok(Some(Recognised { kind, reason })) => (kind, reason),
            Ok(None) => ("", "it holds no file system that is known here".into()),
            Err(error) => ("", error.message),
        };
        self.refuse(spot, kind, reason);
    }

    fn add(&mut self, spot: Spot, file_system: Box<dyn FileSystem>) {
        let about = file_system.about().clone();
        let about = VolumeAbout {
            name: spot.name,
            place: spot.place,
            size: spot.source.size(),
            kind: about.kind,
            label: about.label,
            uuid: about.uuid,
            used: about.used,
            status: about.status,
        };
        let file_system: Option<Box<dyn FileSystem>> = Some(Box::new(Guarded(file_system)));
        self.found.push((spot.order, Volume { about, file_system, source: spot.source }));
    }

    fn refuse(&mut self, spot: Spot, kind: &str, reason: String) {
        let about = VolumeAbout {
            name: spot.name,
            place: spot.place,
            size: spot.source.size(),
            kind: kind.into(),
            label: String::new(),
            uuid: String::new(),
            used: None,
            status: Status::Refused(reason),
        };
        self.found.push((spot.order, Volume { about, file_system: None, source: spot.source }));
    }

    fn logical(&mut self, volume: lvm::Logical) {
        let lvm::Logical { group, name, size, source } = volume;
        let mut spot = Spot {
            order: (usize::MAX, 0),
            name: format!("{group}-{name}"),
            place: format!("logical volume {group}/{name}"),
            source: Arc::new(Absent(size)),
        };
        match source {
            Err((kind, reason)) => self.refuse(spot, &kind, reason),
            Ok(source) => {
                spot.source = source;
                let what = || spot.place.clone();
                match guarded::call(what, || recognise::strong(&*spot.source)) {
                    Ok(None) => self.file_system(spot, None),
                    Ok(Some(Recognised { kind, reason })) => self.refuse(spot, kind, reason),
                    Err(error) => self.refuse(spot, "", error.message),
                }
            }
        }
    }

    fn finish(mut self) -> Guest {
        let members = std::mem::take(&mut self.members);
        let spots = std::mem::take(&mut self.spots);
        match guarded::call(|| "volume groups".into(), || Ok(lvm::assemble(&members))) {
            Ok(assembly) => {
                self.notes.extend(assembly.notes);
                for (number, reason) in assembly.unused {
                    if let Some(spot) = spots.get(number) {
                        self.refuse(spot.clone(), "lvm", reason);
                    }
                }
                assembly.volumes.into_iter().for_each(|volume| self.logical(volume));
            }
            Err(error) => {
                for spot in spots {
                    self.refuse(spot, "lvm", error.message.clone());
                }
            }
        }
        self.found.sort_by_key(|(order, _)| *order);
        let mut taken = BTreeSet::new();
        let mut volumes: Vec<Volume> = self.found.into_iter().map(|(_, volume)| volume).collect();
        for volume in &mut volumes {
            volume.about.name = unique(&volume.about.name, &mut taken);
        }
        Guest { volumes, notes: self.notes }
    }
}

/// A name of letters that are fit for a path and that no other volume has.
fn unique(name: &str, taken: &mut BTreeSet<String>) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
    let name: String = name.chars().map(fit).take(NAME_MAX).collect();
    let mut free = name.clone();
    let mut number = 2;
    while !taken.insert(free.clone()) {
        free = format!("{name}-{number}");
        number += 1;
    }
    free
}

/// The bytes of a volume that could not be put together.
struct Absent(u64);

impl Source for Absent {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        Err(Error::unsupported("the volume was not put together"))
    }

    fn trace(&self, _: u64, _: u64, _: &mut dyn FnMut(DiskRange)) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fit_for_paths_and_there_once() {
        let mut taken = BTreeSet::new();
        assert_eq!(unique("vg-../a b\0\u{e4}", &mut taken), "vg-.._a_b__");
        assert_eq!(unique("disk0-p1", &mut taken), "disk0-p1");
        assert_eq!(unique("disk0-p1", &mut taken), "disk0-p1-2");
        assert_eq!(unique("disk0-p1-2", &mut taken), "disk0-p1-2-2");
        assert_eq!(unique(&"x".repeat(5000), &mut taken).len(), NAME_MAX);
    }
}
