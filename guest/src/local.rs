//! The tree of a volume whose file system is open in this process.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::fs::{Attributes, Cursor, Entry, FileSystem, FileType, Node, Piece, Place};
use crate::path;
use crate::source::{DiskRange, Source};
use crate::tree::{LISTING, Layout, Listed, Listing, Origin, PIECES, Placed, READ, Resolved, Tree};
use crate::volumes::Volume;

/// Longest target of a link that is told in a listing; [`Tree::read_link`] tells any.
const TARGET: usize = 4096;
/// Bytes of a node's extended attributes in all.
const XATTRS: usize = 1 << 20;
/// Extended attributes of a node.
const XATTR_COUNT: usize = 64 << 10;
/// Longest piece of a layout: a longer one is told as several.
const PIECE: u64 = 1 << 30;
/// Ranges of disks in a part of a layout.
const RANGES: usize = 64 << 10;

/// Time after which a listing ends before it is full: where what each name stands for has to be fetched
/// from slow storage, whoever lists gets on with less at a time.
const ENOUGH: Duration = Duration::from_secs(2);
/// Bytes of a note, and of why one name's node cannot be read.
const TEXT: usize = 1024;

/// A volume's tree.
pub struct LocalTree<'a> {
    fs: &'a dyn FileSystem,
    source: &'a dyn Source,
    enough: Duration,
}

impl<'a> LocalTree<'a> {
    /// The tree of `volume`.
    ///
    /// # Errors
    /// `Unsupported` with the reason where it has none that is read here.
    pub fn new(volume: &'a Volume) -> Result<Self> {
        Ok(Self::over(volume.file_system()?, &**volume.source()))
    }

    /// The tree of a file system that lies on `source`.
    pub fn over(fs: &'a dyn FileSystem, source: &'a dyn Source) -> Self {
        Self { fs, source, enough: ENOUGH }
    }

    fn listed(&self, name: Vec<u8>, node: Node) -> Listed {
        let attributes = self.stat(node).map_err(|mut error| {
            cut(&mut error.message);
            error
        });
        let is_link = attributes.as_ref().is_ok_and(|a| a.file_type == FileType::Symlink);
        let target = is_link.then(|| self.fs.read_link(node).ok()).flatten();
        Listed { name, node, attributes, target: target.filter(|t| t.len() <= TARGET) }
    }

    /// Where a piece that is no longer than [`PIECE`] comes from.
    fn origin(&self, place: Place, length: u64) -> Origin {
        type Told = fn(Vec<DiskRange>) -> Origin;
        let (offset, length, told): (_, _, Told) = match place {
            Place::Hole => return Origin::Hole,
            Place::Elsewhere => return Origin::Unknown,
            Place::Volume(offset) => (offset, length, Origin::Plain),
            Place::Encoded { offset, length } if length <= PIECE => {
                (offset, length, Origin::Encoded)
            }
            Place::Encoded { .. } => return Origin::Unknown,
        };
        let (mut ranges, mut covered, mut bounded) = (Vec::new(), 0_u64, true);
        self.source.trace(offset, length, &mut |range| {
            bounded &= ranges.len() < RANGES;
            if bounded {
                covered = covered.saturating_add(range.length);
                ranges.push(range);
            }
        });
        match bounded && covered == length {
            true => told(ranges),
            false => Origin::Unknown,
        }
    }
}

/// The first part of a piece, [`PIECE`] long at most, and the rest.
fn split(piece: Piece) -> (Piece, Option<Piece>) {
    // What is in another form, or nowhere, is in one.
    if piece.length <= PIECE || !matches!(piece.place, Place::Volume(_)) {
        return (piece, None);
    }
    let place = match piece.place {
        Place::Volume(offset) => Place::Volume(offset.saturating_add(PIECE)),
        place => place,
    };
    let rest = Piece { offset: piece.offset + PIECE, length: piece.length - PIECE, place };
    (Piece { length: PIECE, ..piece }, Some(rest))
}

/// Cuts a text that is too long.
fn cut(text: &mut String) {
    if text.len() > TEXT {
        let end = (0..=TEXT).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
    }
}

/// Makes sure that all names can be those of entries, and are each another's.
fn check_names(entries: &[Entry]) -> Result<()> {
    let mut names = BTreeSet::new();
    for entry in entries {
        let what = match (is_name(&entry.name), names.insert(&entry.name)) {
            (false, _) => "the impossible name",
            (true, false) => "two entries of the name",
            (true, true) => continue,
        };
        let shown = entry.name.get(..TEXT).unwrap_or(&entry.name).escape_ascii();
        return Err(Error::corrupt(format!("a directory with {what} `{shown}`")));
    }
    Ok(())
}

/// Whether `name` can be that of an entry.
fn is_name(name: &[u8]) -> bool {
    name.len() <= path::NAME_MAX
        && !name.is_empty()
        && name != b"."
        && name != b".."
        && !name.iter().any(|b| [0, b'/'].contains(b))
}

impl Tree for LocalTree<'_> {
    fn root(&self) -> Result<Node> {
        Ok(self.fs.root())
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        let mut attributes = self.fs.stat(node)?;
        attributes.note.as_mut().map(cut);
        Ok(attributes)
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Listing> {
        let begun = Instant::now();
        let mut page = self.fs.list(directory, cursor, limit.clamp(1, LISTING))?;
        let mut entries: Vec<Listed> = Vec::with_capacity(page.entries.len());
        check_names(&page.entries)?;
        for entry in &page.entries {
            if !entries.is_empty() && begun.elapsed() >= self.enough {
                break;
            }
            entries.push(self.listed(entry.name.clone(), entry.node));
        }
        if entries.len() < page.entries.len() {
            // Where it goes on after these is known to the file system only.
            page = self.fs.list(directory, cursor, entries.len())?;
            entries.truncate(page.entries.len());
            let same = page.entries.iter().zip(&entries).all(|(a, b)| a.name == b.name);
            if !same || entries.is_empty() {
                return Err(Error::corrupt("a directory that is another each time it is read"));
            }
        }
        Ok(Listing { entries, next: page.next })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Listed>> {
        if !is_name(name) {
            return Ok(None);
        }
        let node = self.fs.lookup(directory, name)?;
        Ok(node.map(|node| self.listed(name.to_vec(), node)))
    }

    fn resolve(&self, path: &[u8], follow: bool) -> Result<Resolved> {
        let found = path::resolve(self.fs, path, follow)?;
        Ok(Resolved { node: found.node, path: found.path })
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let length = buf.len().min(READ);
        self.fs.read_at(file, &mut buf[..length], offset)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        let target = self.fs.read_link(link)?;
        match target.len() <= path::PATH_MAX {
            true => Ok(target),
            false => Err(Error::limit(format!("a link's target of {} bytes", target.len()))),
        }
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let found = self.fs.xattrs(node)?;
        let bytes: usize = found.iter().map(|(name, value)| name.len() + value.len()).sum();
        match bytes <= XATTRS && found.len() <= XATTR_COUNT {
            true => Ok(found),
            false => {
                Err(Error::limit(format!("{} extended attributes of {bytes} bytes", found.len())))
            }
        }
    }

    fn layout(&self, file: Node, from: u64) -> Result<Layout> {
        let begun = Instant::now();
        let mut layout = Layout { checked: self.fs.checks_content(), ..Layout::default() };
        let mut ranges = 0;
        self.fs.layout(file, from, &mut |piece| {
            let mut left = Some(piece);
            while let Some(piece) = left {
                let (piece, rest) = split(piece);
                left = rest;
                if piece.offset.saturating_add(piece.length) <= from {
                    continue;
                }
                let slow = !layout.pieces.is_empty() && begun.elapsed() >= self.enough;
                if layout.pieces.len() == PIECES || slow {
                    layout.next = Some(piece.offset);
                    return false;
                }
                let origin = self.origin(piece.place, piece.length);
                ranges += origin.ranges().len();
                if ranges > RANGES && !layout.pieces.is_empty() {
                    layout.next = Some(piece.offset);
                    return false;
                }
                layout.pieces.push(Placed { offset: piece.offset, length: piece.length, origin });
            }
            true
        })?;
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::fs::{About, Page};
    use crate::memory::MemoryFs;
    use crate::source::MemoryDisk;

    fn disk() -> MemoryDisk {
        MemoryDisk { bytes: vec![0; 4096], disk: 1 }
    }

    #[test]
    fn a_listing_tells_what_its_names_stand_for_and_damage_of_one_hides_no_other() {
        let mut fs = MemoryFs::new();
        fs.file("d/file", "text");
        fs.symlink("d/link", "file");
        fs.symlink("d/long", "x".repeat(TARGET + 1));
        let gone = fs.symlink("d/gone", "file");
        fs.damage(gone, Error::corrupt("damaged"));
        let directory = fs.dir("d");
        let disk = disk();
        let listing = LocalTree::over(&fs, &disk).list(directory, Cursor(0), 10).unwrap();
        let of = |name: &str| {
            listing.entries.iter().find(|entry| entry.name == name.as_bytes()).unwrap()
        };
        assert_eq!(of("file").attributes.as_ref().unwrap().size, 4);
        assert_eq!(of("link").target.as_deref(), Some(&b"file"[..]));
        assert_eq!(of("long").target, None);
        assert_eq!((of("gone").target.clone(), of("gone").attributes.is_ok()), (None, true));
        assert_eq!(listing.next, None);
    }

    #[test]
    fn a_directory_with_a_name_that_leads_elsewhere_is_damaged() {
        for name in ["", ".", "..", "a/b", "a\0"] {
            let mut fs = MemoryFs::new();
            let file = fs.file("file", "");
            fs.link(fs.root(), name, file);
            let disk = disk();
            let tree = LocalTree::over(&fs, &disk);
            let error = tree.list(fs.root(), Cursor(0), 10).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Corrupt, "{name:?}");
            assert_eq!(tree.lookup(fs.root(), name.as_bytes()).unwrap(), None);
        }
    }

    #[test]
    fn answers_are_bounded() {
        let mut fs = MemoryFs::new();
        let many = fs.many("many", 5000, 0);
        let file = fs.large("large", 10 << 20, 1);
        fs.xattr(file, "user.a", vec![0; XATTRS]);
        let disk = disk();
        let tree = LocalTree::over(&fs, &disk);
        let listing = tree.list(many, Cursor(0), usize::MAX).unwrap();
        assert_eq!((listing.entries.len(), listing.next.is_some()), (LISTING, true));
        assert_eq!(tree.read_at(file, &mut vec![0; 2 * READ], 0).unwrap(), READ);
        assert_eq!(tree.xattrs(file).unwrap_err().kind, ErrorKind::Limit);
    }

    #[test]
    fn a_listing_that_takes_long_ends_early_and_goes_on_where_it_ended() {
        let mut fs = MemoryFs::new();
        let many = fs.many("many", 5, 0);
        let disk = disk();
        let slow = LocalTree { enough: Duration::ZERO, ..LocalTree::over(&fs, &disk) };
        let mut names = Vec::new();
        let mut next = Some(Cursor(0));
        while let Some(cursor) = next {
            let listing = slow.list(many, cursor, 100).unwrap();
            assert!(listing.entries.len() <= 1);
            names.extend(listing.entries);
            next = listing.next;
        }
        let whole = LocalTree::over(&fs, &disk).list(many, Cursor(0), 100).unwrap();
        assert_eq!(names, whole.entries);
    }

    /// A file system with one file, which lies as told.
    struct Laid(MemoryFs, Vec<Piece>);

    impl FileSystem for Laid {
        fn about(&self) -> &About {
            self.0.about()
        }

        fn root(&self) -> Node {
            self.0.root()
        }

        fn stat(&self, node: Node) -> Result<Attributes> {
            self.0.stat(node)
        }

        fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
            self.0.lookup(directory, name)
        }

        fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
            self.0.list(directory, cursor, limit)
        }

        fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
            self.0.read_at(file, buf, offset)
        }

        fn read_link(&self, link: Node) -> Result<Vec<u8>> {
            self.0.read_link(link)
        }

        fn layout(
            &self,
            _file: Node,
            _from: u64,
            visit: &mut dyn FnMut(Piece) -> bool,
        ) -> Result<()> {
            let _ = self.1.iter().all(|piece| visit(*piece));
            Ok(())
        }
    }

    /// Stripes of one kibibyte on two disks.
    struct Striped;

    impl Source for Striped {
        fn size(&self) -> u64 {
            1 << 40
        }

        fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
            buf.fill(0);
            Ok(())
        }

        fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
            let end = offset + length;
            let mut at = offset;
            while at < end {
                let length = (1024 - at % 1024).min(end - at);
                let stripe = at / 1024;
                let disk = u32::from(stripe % 2 == 1);
                visit(DiskRange { disk, offset: stripe / 2 * 1024 + at % 1024, length });
                at += length;
            }
        }
    }

    fn all(tree: &LocalTree<'_>) -> Vec<Placed> {
        let (mut pieces, mut from) = (Vec::new(), 0);
        loop {
            let part = tree.layout(Node(2), from).unwrap();
            assert!(part.pieces.len() <= PIECES);
            pieces.extend(part.pieces);
            match part.next {
                Some(next) => from = next,
                None => return pieces,
            }
        }
    }

    #[test]
    fn a_layout_names_the_ranges_of_all_disks_and_comes_in_parts() {
        let piece = |offset, length, place| Piece { offset, length, place };
        let laid = Laid(
            MemoryFs::new(),
            vec![
                piece(0, 1024, Place::Hole),
                piece(1024, 2048, Place::Volume(512)),
                piece(3072, 100, Place::Encoded { offset: 0, length: 50 }),
                piece(3172, 10, Place::Elsewhere),
            ],
        );
        let range = |disk, offset, length| DiskRange { disk, offset, length };
        let found: Vec<_> = all(&LocalTree::over(&laid, &Striped))
            .into_iter()
            .map(|placed| placed.origin)
            .collect();
        let wanted = [
            Origin::Hole,
            Origin::Plain(vec![range(0, 512, 512), range(1, 0, 1024), range(0, 1024, 512)]),
            Origin::Encoded(vec![range(0, 0, 50)]),
            Origin::Unknown,
        ];
        assert_eq!(found, wanted);

        // More pieces than go into a part, and a piece with more ranges than that.
        let mut pieces: Vec<_> =
            (0..10_000).map(|n| piece(n * 1024, 1024, Place::Volume(n * 4096))).collect();
        pieces.push(piece(10_000 * 1024, 3 * PIECE, Place::Volume(1 << 30)));
        let laid = Laid(MemoryFs::new(), pieces);
        let found = all(&LocalTree::over(&laid, &Striped));
        assert_eq!(found.len(), 10_003);
        let covered: u64 = found.iter().map(|placed| placed.length).sum();
        assert_eq!(covered, 10_000 * 1024 + 3 * PIECE);
        assert!(found.windows(2).all(|w| w[0].offset + w[0].length == w[1].offset));
        assert_eq!(found[10_002].origin, Origin::Unknown, "too many ranges");
    }
}
