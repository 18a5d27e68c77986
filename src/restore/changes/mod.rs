//! Which files differ between two restore points. What lies in clusters that did not change is not
//! read: layouts and checksums tell that it is the same.
//!
//! Two trees are walked side by side, a directory at a time. A file whose pieces come from the same
//! unchanged places of the same disks is the same; only pieces of which that cannot be said are read
//! and compared.

mod compare;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use guest::{FileType, Status, Tree};

use super::diff::changed_clusters;
use super::mounts::{MountWish, Mounts, Using};
use crate::backup::{Backups, Failure, FailureKind};
use compare::compare;

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is in the second restore point only.
    Added,
    /// It is in the first only.
    Removed,
    /// Its content differs, or what it is.
    Content,
    /// Only its mode, owner or time of change differs.
    Metadata,
}

impl ChangeKind {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Content => "changed",
            Self::Metadata => "metadata",
        }
    }
}

/// One path that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// How.
    pub kind: ChangeKind,
    /// The path, from the root of all volumes.
    pub path: Vec<u8>,
    /// What it is, in the second restore point unless it was removed.
    pub file_type: FileType,
    /// Its size before.
    pub before: Option<u64>,
    /// Its size after.
    pub after: Option<u64>,
}

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The paths that differ, parents before what is in them; of a directory that is new or gone, only
    /// itself is told. At most as many as were asked for.
    pub changes: Vec<Change>,
    /// All that differ, told or not: added, removed, content, metadata.
    pub counts: [u64; 4],
    /// Files that were compared.
    pub files: u64,
    /// Bytes of content that had to be read, on both sides.
    pub bytes_read: u64,
    /// There are more than were told, or what could be compared was bounded.
    pub more: bool,
    /// What could not be compared, and why.
    pub notes: Vec<String>,
}

/// Volumes of one restore point, by name.
type Side = BTreeMap<String, Arc<dyn Tree>>;

/// A mount that is there for a comparison only.
struct Temporary<'a> {
    mounts: &'a Mounts,
    id: String,
    actor: &'a str,
}

impl<'a> Temporary<'a> {
    fn new(mounts: &'a Mounts, backup: &str, actor: &'a str) -> Result<Self, Failure> {
        let wish = MountWish { backup_id: backup.to_owned(), ..MountWish::default() };
        let id = mounts.mount(&wish, actor)?.id;
        Ok(Self { mounts, id, actor })
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Err(failure) = self.mounts.unmount(&self.id, self.actor) {
            tracing::warn!(mount = %self.id, %failure, "a mount did not end well");
        }
    }
}

/// Compares the files of two restore points of a machine; at most `most` changes are told. Takes two
/// mounts while it lasts. `go_on` is asked now and then; where it says no, the comparison ends.
///
/// # Errors
/// `NotFound`; `Conflict` where one is no restore point, or there are too many mounts; `Invalid` where
/// they are of different machines; `Internal` where disks cannot be read.
pub fn file_changes(
    (backups, mounts): (&Backups, &Mounts),
    (from, to): (&str, &str),
    most: usize,
    actor: &str,
    go_on: &dyn Fn() -> bool,
) -> Result<Changes, Failure> {
    let (a, b) = (backups.backup(from)?, backups.backup(to)?);
    if a.vm_id != b.vm_id {
        let text = "the two backups are of different VMs";
        return Err(Failure::new(FailureKind::Invalid, text, ""));
    }
    let mut changed = BTreeMap::new();
    for disk in b.disks.iter().map(|disk| disk.disk_id) {
        if a.disks.iter().any(|other| other.disk_id == disk) {
            changed.insert(disk, changed_clusters(backups, (from, to), disk)?);
        }
    }
    let first = Temporary::new(mounts, from, actor)?;
    let second = Temporary::new(mounts, to, actor)?;
    let (first, second) = (mounts.using(&first.id)?, mounts.using(&second.id)?);
    let mut notes = Vec::new();
    let (mut before, refused) = side(&first, &mut notes)?;
    let (mut after, others) = side(&second, &mut notes)?;
    // What is not shown on one side is neither new nor gone.
    before.retain(|name, _| !others.contains(name));
    after.retain(|name, _| !refused.contains(name));
    let mut found = compare(&before, &after, &changed, most, go_on);
    found.more |= !notes.is_empty();
    notes.append(&mut found.notes);
    found.notes = notes;
    Ok(found)
}

/// What is no loss where it is not compared.
const NOTHING: [&str; 2] = ["swap", "empty"];

/// The trees of a restore point, and the names of volumes that are not shown. Both that and what is not
/// shown as it was is noted.
fn side(using: &Using, notes: &mut Vec<String>) -> Result<(Side, BTreeSet<String>), Failure> {
    let backup = &using.info().backup_id;
    let (mut side, mut refused) = (Side::new(), BTreeSet::new());
    for volume in using.volumes() {
        let name = &volume.name;
        match &volume.status {
            Status::Clean | Status::Replayed => {}
            Status::Stale(reason) => notes.push(format!("/{name} of {backup} is stale: {reason}")),
            Status::Refused(reason) => {
                refused.insert(name.clone());
                if !NOTHING.contains(&volume.kind.as_str()) {
                    notes.push(format!("/{name} of {backup} is not compared: {reason}"));
                }
                continue;
            }
        }
        side.insert(name.clone(), using.tree(name)?);
    }
    Ok((side, refused))
}
