//! Two trees side by side, a directory at a time.

use std::collections::BTreeMap;

use guest::tree::{LISTING, Listed, Origin, Placed, READ};
use guest::{Attributes, Cursor, DiskRange, FileType, Node, Tree};

use super::super::diff::ChangedClusters;
use super::{Change, ChangeKind, Changes, Side};
use crate::pages::PageBuffer;
use crate::restore::files::names;

/// Most names of one directory that are compared, on each side.
const DIRECTORY: usize = 250_000;
/// Deepest directory that is compared.
const DEPTH: usize = 256;
/// Most notes.
const NOTES: usize = 100;
/// Most bytes of the paths that are told, and of those of directories that wait.
const PATHS: usize = 64 << 20;
/// Most pieces of a file's layout that are compared; a file with more is read.
const LAYOUT: usize = 1 << 20;

/// Compares two restore points. `changed` has what differs of each disk that both have; `most` changes
/// are told. `go_on` is asked now and then; where it says no, the comparison ends early.
pub(super) fn compare(
    from: &Side,
    to: &Side,
    changed: &BTreeMap<u32, ChangedClusters>,
    most: usize,
    go_on: &dyn Fn() -> bool,
) -> Changes {
    let mut comparison = Comparison { changed, most, go_on, found: Changes::default(), told: 0 };
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
    /// Bytes of the paths that are told.
    told: usize,
}

/// What is kept of a name while its directory is compared.
struct Known {
    node: Node,
    attributes: Attributes,
    target: Option<Vec<u8>>,
}

type Names = BTreeMap<Vec<u8>, Result<Known, guest::Error>>;

impl Comparison<'_> {
    /// Goes on unless nobody waits any more.
    fn ask(&self) -> guest::Result<()> {
        if (self.go_on)() {
            Ok(())
        } else {
            Err(guest::Error::limit("the comparison was ended here"))
        }
    }

    fn add(&mut self, change: Change) {
        self.found.counts[match change.kind {
            ChangeKind::Added => 0,
            ChangeKind::Removed => 1,
            ChangeKind::Content => 2,
            ChangeKind::Metadata => 3,
        }] += 1;
        if self.found.changes.len() < self.most && self.told + change.path.len() <= PATHS {
            self.told += change.path.len();
            self.found.changes.push(change);
        } else {
            self.found.more = true;
        }
    }

    fn note(&mut self, path: &[u8], text: impl std::fmt::Display) {
        self.found.more = true;
        if self.found.notes.len() < NOTES {
            self.found.notes.push(format!("{}: {text}", names::shown(path)));
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
            let names = [self.names(trees[0], nodes[0]), self.names(trees[1], nodes[1])];
            match names {
                [Ok(a), Ok(b)] => {
                    let mut below = Vec::new();
                    self.directory(trees, &path, (a, b), &mut below);
                    let length = |waits: &(Vec<u8>, _, _)| waits.0.len();
                    let held: usize = waiting.iter().map(length).sum();
                    let more: usize = below.iter().map(|(path, _)| path.len()).sum();
                    if held + more > PATHS {
                        self.note(&path, "too many long paths below it, not compared");
                        continue;
                    }
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
                FileType::Symlink => match targets_differ(trees, (a, b)) {
                    Ok(differs) => differs,
                    Err(error) => return self.note(&path, error),
                },
                // Its size and times are all that can be known.
                FileType::Opaque if (old.size, old.modified) != (new.size, new.modified) => true,
                FileType::Opaque => {
                    return self
                        .note(&path, "its content cannot be read here, and is not compared");
                }
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
        let (a, b) = (self.pieces(trees[0], nodes[0])?, self.pieces(trees[1], nodes[1])?);
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
            self.doubt(a, b, (at, end), &mut doubt);
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

    /// Tells the parts of `start .. end`, which both pieces cover, that may differ.
    fn doubt(
        &self,
        a: &Placed,
        b: &Placed,
        (start, end): (u64, u64),
        tell: &mut dyn FnMut(u64, u64),
    ) {
        let (old, new, plain) = match (&a.origin, &b.origin) {
            (Origin::Hole, Origin::Hole) => return,
            (Origin::Plain(old), Origin::Plain(new)) => (old, new, true),
            (Origin::Encoded(old), Origin::Encoded(new)) => (old, new, false),
            _ => return tell(start, end),
        };
        let whole = a.offset == b.offset && a.length == b.length && old == new;
        if plain && whole {
            return self.changed_parts(b.offset, new, (start, end), tell);
        }
        if plain && let (Some(old), Some(new)) = (cut(a, old, start), cut(b, new, start)) {
            let range = DiskRange { disk: new.0, offset: new.1, length: end - start };
            return match old == new {
                true => self.changed_parts(start, &[range], (start, end), tell),
                false => tell(start, end),
            };
        }
        // In another form: the same as long as all of it is.
        let unchanged = |range: &DiskRange| {
            let changed = self.changed.get(&range.disk);
            changed.is_some_and(|changed| !changed.touches(range.offset, range.length))
        };
        if !(whole && new.iter().all(unchanged)) {
            tell(start, end);
        }
    }

    /// Tells the parts of `start .. end` whose clusters differ, of a piece that begins at byte `offset` of
    /// the file and lies in `ranges` as it is.
    fn changed_parts(
        &self,
        offset: u64,
        ranges: &[DiskRange],
        (start, end): (u64, u64),
        tell: &mut dyn FnMut(u64, u64),
    ) {
        let mut offset = offset;
        for range in ranges {
            let part = (offset.max(start), (offset + range.length).min(end));
            match self.changed.get(&range.disk) {
                _ if part.0 >= part.1 => {}
                None => tell(part.0, part.1),
                Some(changed) => {
                    let on_disk = |at: u64| range.offset + (at - offset);
                    let (mut at, last) = (on_disk(part.0), on_disk(part.1));
                    while let Some((from, to)) = changed.next(at, last) {
                        tell(offset + (from - range.offset), offset + (to - range.offset));
                        at = to;
                    }
                }
            }
            offset += range.length;
        }
    }

    /// A file's layout; `None` where it has too many pieces.
    fn pieces(&self, tree: &dyn Tree, node: Node) -> guest::Result<Option<Vec<Placed>>> {
        let (mut pieces, mut ranges) = (Vec::new(), 0);
        let mut from = 0;
        loop {
            let layout = tree.layout(node, from)?;
            ranges += layout.pieces.iter().map(|piece| piece.origin.ranges().len()).sum::<usize>();
            pieces.extend(layout.pieces);
            match layout.next {
                None => return Ok(Some(pieces)),
                Some(next) if next > from && pieces.len() + ranges <= LAYOUT => from = next,
                Some(_) => return Ok(None),
            }
            self.ask()?;
        }
    }

    /// Everything in a directory.
    fn names(&self, tree: &dyn Tree, directory: Node) -> guest::Result<Names> {
        let mut names = Names::new();
        let mut cursor = Cursor::default();
        loop {
            let page = tree.list(directory, cursor, LISTING)?;
            for Listed { name, node, attributes, target } in page.entries {
                let known = attributes.map(|attributes| Known { node, attributes, target });
                if names.len() >= DIRECTORY {
                    let text = format!("more than {DIRECTORY} names, not compared");
                    return Err(guest::Error::limit(text));
                }
                if names.insert(name, known).is_some() {
                    let text = "it has two entries of the same name, and is not compared";
                    return Err(guest::Error::corrupt(text));
                }
            }
            match page.next {
                Some(next) => cursor = next,
                None => return Ok(names),
            }
            self.ask()?;
        }
    }

    fn bytes_differ(
        &mut self,
        trees: Trees<'_>,
        nodes: [Node; 2],
        start: u64,
        end: u64,
    ) -> guest::Result<bool> {
        let mut buffers = [PageBuffer::new(start, READ), PageBuffer::new(start, READ)];
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
            if counts[0] == 0 {
                let text = format!("it ends at byte {at}, before its size");
                return Err(guest::Error::corrupt(text));
            }
            self.ask()?;
            at += counts[0] as u64;
        }
        Ok(false)
    }
}

/// Whether two links point elsewhere. A listing leaves out what is long or cannot be read.
fn targets_differ(trees: Trees<'_>, (a, b): (&Known, &Known)) -> guest::Result<bool> {
    if a.target.is_some() && b.target.is_some() {
        return Ok(a.target != b.target);
    }
    Ok(trees[0].read_link(a.node)? != trees[1].read_link(b.node)?)
}

/// Where byte `start` of the file lies, in a piece that is one range.
fn cut(piece: &Placed, ranges: &[DiskRange], start: u64) -> Option<(u32, u64)> {
    let [range] = ranges else { return None };
    let skipped = start.checked_sub(piece.offset)?;
    (skipped < range.length).then_some((range.disk, range.offset + skipped))
}
