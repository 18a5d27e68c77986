//! Which files differ between two restore points. What lies in clusters that did not change is not
//! read: layouts and checksums tell that it is the same.
//!
//! Two trees are walked side by side, a directory at a time. A file whose pieces come from the same
//! unchanged places of the same disks is the same; only pieces of which that cannot be said are read
//! and compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest::tree::{LISTING, Listed, Origin, Placed, READ};
use guest::{Attributes, Cursor, FileType, Node, Status, Tree};

use super::diff::{ChangedClusters, changed_clusters};
use super::mounts::{MountWish, Mounts, Using};
use crate::backup::{Backups, Failure, FailureKind};

/// Most names of one directory that are compared, on each side.
const DIRECTORY: usize = 250_000;
/// Deepest directory that is compared.
const DEPTH: usize = 256;
/// Most notes.
const NOTES: usize = 100;
/// Most pieces of a file's layout that are compared; a file with more is read.
const LAYOUT: usize = 1 << 20;

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
    let (before, after) = (side(&first, &mut notes)?, side(&second, &mut notes)?);
    let mut found = compare(&before, &after, &changed, most, go_on);
    found.more |= !notes.is_empty();
    notes.append(&mut found.notes);
    found.notes = notes;
    Ok(found)
}

/// The trees of a restore point; what is not shown as it was is noted.
fn side(using: &Using, notes: &mut Vec<String>) -> Result<Side, Failure> {
    let backup = &using.info().backup_id;
    let mut side = Side::new();
    for volume in using.volumes() {
        let name = &volume.name;
        match &volume.status {
            Status::Clean | Status::Replayed => {}
            Status::Stale(reason) => notes.push(format!("/{name} of {backup} is stale: {reason}")),
            // Nothing to compare: swap, empty partitions and the like are no news.
            Status::Refused(_) => continue,
        }
        side.insert(name.clone(), using.tree(name)?);
    }
    Ok(side)
}

/// Compares two restore points. `changed` has what differs of each disk that both have; `most` changes
/// are told. `go_on` is asked now and then; where it says no, the comparison ends early.
fn compare(
    from: &Side,
    to: &Side,
    changed: &BTreeMap<u32, ChangedClusters>,
    most: usize,
    go_on: &dyn Fn() -> bool,
) -> Changes {
    let mut comparison = Comparison { changed, most, go_on, found: Changes::default() };
    let mut names: Vec<_> = from.keys().chain(to.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let path = format!("/{name}").into_bytes();
        let told = |kind| Change {
            kind,
            path: path.clone(),
            file_type: FileType::Directory,
            before: None,
            after: None,
        };
        match (from.get(name), to.get(name)) {
            (Some(a), Some(b)) => comparison.volume([&**a, &**b], path),
            (Some(_), None) => comparison.add(told(ChangeKind::Removed)),
            (None, _) => comparison.add(told(ChangeKind::Added)),
        }
    }
    comparison.found
}

type Trees<'a> = [&'a dyn Tree; 2];

struct Comparison<'a> {
    changed: &'a BTreeMap<u32, ChangedClusters>,
    most: usize,
    go_on: &'a dyn Fn() -> bool,
    found: Changes,
}

/// What is kept of a name while its directory is compared.
struct Known {
    node: Node,
    attributes: Attributes,
    target: Option<Vec<u8>>,
}

type Names = BTreeMap<Vec<u8>, Result<Known, guest::Error>>;

impl Comparison<'_> {
    fn add(&mut self, change: Change) {
        self.found.counts[match change.kind {
            ChangeKind::Added => 0,
            ChangeKind::Removed => 1,
            ChangeKind::Content => 2,
            ChangeKind::Metadata => 3,
        }] += 1;
        if self.found.changes.len() < self.most {
            self.found.changes.push(change);
        } else {
            self.found.more = true;
        }
    }

    fn note(&mut self, path: &[u8], text: impl std::fmt::Display) {
        self.found.more = true;
        if self.found.notes.len() < NOTES {
            self.found.notes.push(format!("{}: {text}", super::files::names::shown(path)));
        }
    }

    fn volume(&mut self, trees: Trees<'_>, path: Vec<u8>) {
        let roots = match (trees[0].root(), trees[1].root()) {
            (Ok(a), Ok(b)) => [a, b],
            (Err(error), _) | (_, Err(error)) => return self.note(&path, error),
        };
        // Directories that wait, deepest last: memory is that of one path's siblings.
        let mut waiting = vec![(path, roots, 0)];
        while let Some((path, nodes, depth)) = waiting.pop() {
            if !(self.go_on)() {
                self.note(&path, "the comparison was ended here");
                return;
            }
            if depth > DEPTH {
                self.note(&path, format!("deeper than {DEPTH} directories, not compared"));
                continue;
            }
            let names = [names(trees[0], nodes[0]), names(trees[1], nodes[1])];
            match names {
                [Ok(a), Ok(b)] => {
                    let mut below = Vec::new();
                    self.directory(trees, &path, (a, b), &mut below);
                    let deeper = |(path, nodes)| (path, nodes, depth + 1);
                    waiting.extend(below.into_iter().rev().map(deeper));
                }
                [Err(error), _] | [_, Err(error)] => self.note(&path, error),
            }
        }
    }

    fn directory(
        &mut self,
        trees: Trees<'_>,
        path: &[u8],
        (before, mut after): (Names, Names),
        below: &mut Vec<(Vec<u8>, [Node; 2])>,
    ) {
        for (name, a) in before {
            let path = [path, b"/", &name].concat();
            match (a, after.remove(&name)) {
                (Ok(a), Some(Ok(b))) => self.both(trees, path, (&a, &b), below),
                (Ok(a), None) => self.one(ChangeKind::Removed, path, &a.attributes),
                (Err(error), _) | (_, Some(Err(error))) => self.note(&path, error),
            }
        }
        for (name, b) in after {
            let path = [path, b"/", &name].concat();
            match b {
                Ok(b) => self.one(ChangeKind::Added, path, &b.attributes),
                Err(error) => self.note(&path, error),
            }
        }
    }

    fn one(&mut self, kind: ChangeKind, path: Vec<u8>, attributes: &Attributes) {
        let size = Some(attributes.size).filter(|_| attributes.file_type == FileType::File);
        let (before, after) = if kind == ChangeKind::Removed { (size, None) } else { (None, size) };
        self.add(Change { kind, path, file_type: attributes.file_type, before, after });
    }

    fn both(
        &mut self,
        trees: Trees<'_>,
        path: Vec<u8>,
        (a, b): (&Known, &Known),
        below: &mut Vec<(Vec<u8>, [Node; 2])>,
    ) {
        let (old, new) = (&a.attributes, &b.attributes);
        let file_type = new.file_type;
        let content = if old.file_type != file_type {
            true
        } else {
            match file_type {
                FileType::File => {
                    self.found.files += 1;
                    match self.content_differs(trees, (a, b)) {
                        Ok(differs) => differs,
                        Err(error) => return self.note(&path, error),
                    }
                }
                FileType::Symlink => a.target != b.target,
                // A directory's size and times tell of its names, which are compared one by one.
                _ => false,
            }
        };
        let kept = (old.mode, old.uid, old.gid) == (new.mode, new.uid, new.gid);
        let times = file_type == FileType::Directory || old.modified == new.modified;
        let size = |attributes: &Attributes| {
            Some(attributes.size).filter(|_| attributes.file_type == FileType::File)
        };
        let (before, after) = (size(old), size(new));
        if content || !kept || !times {
            let kind = if content { ChangeKind::Content } else { ChangeKind::Metadata };
            self.add(Change { kind, path: path.clone(), file_type, before, after });
        }
        if file_type == FileType::Directory && old.file_type == file_type {
            below.push((path, [a.node, b.node]));
        }
    }

    fn content_differs(
        &mut self,
        trees: Trees<'_>,
        (a, b): (&Known, &Known),
    ) -> guest::Result<bool> {
        let size = a.attributes.size;
        if size != b.attributes.size {
            return Ok(true);
        }
        if size == 0 {
            return Ok(false);
        }
        for (start, end) in self.doubtful(trees, [a.node, b.node], size)? {
            if self.bytes_differ(trees, [a.node, b.node], start, end)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The ranges of a file whose bytes must be compared.
    fn doubtful(
        &self,
        trees: Trees<'_>,
        nodes: [Node; 2],
        size: u64,
    ) -> guest::Result<Vec<(u64, u64)>> {
        let (a, b) = (pieces(trees[0], nodes[0])?, pieces(trees[1], nodes[1])?);
        let (Some(a), Some(b)) = (a, b) else { return Ok(vec![(0, size)]) };
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut doubt = |start: u64, end: u64| match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        };
        let (mut left, mut right) = (a.iter().peekable(), b.iter().peekable());
        let mut at = 0;
        while at < size {
            let (Some(a), Some(b)) = (left.peek(), right.peek()) else {
                doubt(at, size);
                break;
            };
            let ends = [a.offset.saturating_add(a.length), b.offset.saturating_add(b.length)];
            let end = ends[0].min(ends[1]).min(size);
            if end <= at {
                doubt(at, size);
                break;
            }
            if !self.same(a, b, at, end) {
                doubt(at, end);
            }
            at = end;
            if ends[0] <= at {
                left.next();
            }
            if ends[1] <= at {
                right.next();
            }
        }
        Ok(ranges)
    }

    /// Whether two pieces are surely the same in `start .. end`, which both cover.
    fn same(&self, a: &Placed, b: &Placed, start: u64, end: u64) -> bool {
        match (&a.origin, &b.origin) {
            (Origin::Hole, Origin::Hole) => true,
            (Origin::Disks(old), Origin::Disks(new)) => {
                let unchanged = |range: &guest::DiskRange| {
                    let changed = self.changed.get(&range.disk);
                    changed.is_some_and(|changed| !changed.touches(range.offset, range.length))
                };
                let same_places = if a.offset == b.offset && a.length == b.length {
                    old == new
                } else {
                    let part = |piece: &Placed, ranges: &[guest::DiskRange]| {
                        cut(piece, ranges, start, end)
                    };
                    let (old, new) = (part(a, old), part(b, new));
                    old.is_some() && old == new
                };
                same_places && new.iter().all(unchanged)
            }
            _ => false,
        }
    }

    fn bytes_differ(
        &mut self,
        trees: Trees<'_>,
        nodes: [Node; 2],
        start: u64,
        end: u64,
    ) -> guest::Result<bool> {
        let mut buffers = [vec![0; READ], vec![0; READ]];
        let mut at = start;
        while at < end {
            let length = usize::try_from(end - at).map_or(READ, |left| left.min(READ));
            let mut counts = [0; 2];
            for side in 0..2 {
                let buf = &mut buffers[side][..length];
                counts[side] = trees[side].read_at(nodes[side], buf, at)?;
                self.found.bytes_read += counts[side] as u64;
            }
            let [a, b] = &buffers;
            if counts[0] != counts[1] || a[..counts[0]] != b[..counts[0]] {
                return Ok(true);
            }
            if counts[0] == 0 || !(self.go_on)() {
                let text = format!("it ends at byte {at}, before its size");
                return Err(guest::Error::corrupt(text));
            }
            at += counts[0] as u64;
        }
        Ok(false)
    }
}

/// The part of a piece's places for `start .. end` of the file, where they lie as they are: a single
/// range of the piece's own length.
fn cut(piece: &Placed, ranges: &[guest::DiskRange], start: u64, end: u64) -> Option<(u32, u64)> {
    let [range] = ranges else { return None };
    let skipped = start.checked_sub(piece.offset)?;
    (range.length == piece.length && end - piece.offset <= piece.length)
        .then_some((range.disk, range.offset.checked_add(skipped)?))
}

/// A file's layout; `None` where it has too many pieces.
fn pieces(tree: &dyn Tree, node: Node) -> guest::Result<Option<Vec<Placed>>> {
    let mut pieces = Vec::new();
    let mut from = 0;
    loop {
        let layout = tree.layout(node, from)?;
        pieces.extend(layout.pieces);
        match layout.next {
            None => return Ok(Some(pieces)),
            Some(next) if next > from && pieces.len() <= LAYOUT => from = next,
            Some(_) => return Ok(None),
        }
    }
}

fn names(tree: &dyn Tree, directory: Node) -> guest::Result<Names> {
    let mut names = Names::new();
    let mut cursor = Cursor::default();
    loop {
        let page = tree.list(directory, cursor, LISTING)?;
        for Listed { name, node, attributes, target } in page.entries {
            let known = attributes.map(|attributes| Known { node, attributes, target });
            names.insert(name, known);
        }
        if names.len() > DIRECTORY {
            let text = format!("more than {DIRECTORY} names, not compared");
            return Err(guest::Error::limit(text));
        }
        match page.next {
            Some(next) => cursor = next,
            None => return Ok(names),
        }
    }
}
