//! The tree of a volume whose file system is open in this process.

use crate::error::{Error, Result};
use crate::fs::{Attributes, Cursor, FileSystem, FileType, Node, Piece, Place};
use crate::path;
use crate::source::Source;
use crate::tree::{LISTING, Layout, Listed, Listing, Origin, PIECES, Placed, READ, Resolved, Tree};
use crate::volumes::Volume;

/// Longest target of a link that is told in a listing; [`Tree::read_link`] tells any.
const TARGET: usize = 4096;
/// Bytes of a node's extended attributes in all.
const XATTRS: usize = 1 << 20;
/// Longest piece of a layout: a longer one is told as several.
const PIECE: u64 = 1 << 30;
/// Ranges of disks in a part of a layout.
const RANGES: usize = 64 << 10;

/// A volume's tree.
pub struct LocalTree<'a> {
    fs: &'a dyn FileSystem,
    source: &'a dyn Source,
}

impl<'a> LocalTree<'a> {
    /// The tree of `volume`.
    ///
    /// # Errors
    /// `Unsupported` with the reason where it has none that is read here.
    pub fn new(volume: &'a Volume) -> Result<Self> {
        Ok(Self { fs: volume.file_system()?, source: &**volume.source() })
    }

    /// The tree of a file system that lies on `source`.
    pub fn over(fs: &'a dyn FileSystem, source: &'a dyn Source) -> Self {
        Self { fs, source }
    }

    fn listed(&self, name: Vec<u8>, node: Node) -> Listed {
        let attributes = self.fs.stat(node);
        let is_link = attributes.as_ref().is_ok_and(|a| a.file_type == FileType::Symlink);
        let target = is_link.then(|| self.fs.read_link(node).ok()).flatten();
        Listed { name, node, attributes, target: target.filter(|t| t.len() <= TARGET) }
    }

    /// Where a piece that is no longer than [`PIECE`] comes from.
    fn origin(&self, place: Place, length: u64) -> Origin {
        let (offset, length) = match place {
            Place::Hole => return Origin::Hole,
            Place::Elsewhere => return Origin::Unknown,
            Place::Volume(offset) => (offset, length),
            Place::Encoded { offset, length } if length <= PIECE => (offset, length),
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
            true => Origin::Disks(ranges),
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

/// Whether `name` can be that of an entry.
fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.iter().any(|b| [0, b'/'].contains(b))
}

impl Tree for LocalTree<'_> {
    fn root(&self) -> Result<Node> {
        Ok(self.fs.root())
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        self.fs.stat(node)
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Listing> {
        let page = self.fs.list(directory, cursor, limit.clamp(1, LISTING))?;
        if let Some(entry) = page.entries.iter().find(|entry| !is_name(&entry.name)) {
            let name = entry.name.escape_ascii();
            return Err(Error::corrupt(format!("a directory with the impossible name `{name}`")));
        }
        let listed = page.entries.into_iter().map(|entry| self.listed(entry.name, entry.node));
        Ok(Listing { entries: listed.collect(), next: page.next })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Listed>> {
        if !is_name(name) || name.len() > path::NAME_MAX {
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
        match bytes <= XATTRS {
            true => Ok(found),
            false => Err(Error::limit(format!("{bytes} bytes of extended attributes"))),
        }
    }

    fn layout(&self, file: Node, from: u64) -> Result<Layout> {
        let mut layout = Layout::default();
        let mut ranges = 0;
        self.fs.layout(file, &mut |piece| {
            let mut left = Some(piece);
            while let Some(piece) = left {
                let (piece, rest) = split(piece);
                left = rest;
                if piece.offset.saturating_add(piece.length) <= from {
                    continue;
                }
                if layout.pieces.len() == PIECES {
                    layout.next = Some(piece.offset);
                    return false;
                }
                let origin = self.origin(piece.place, piece.length);
                if let Origin::Disks(found) = &origin {
                    ranges += found.len();
                    if ranges > RANGES && !layout.pieces.is_empty() {
                        layout.next = Some(piece.offset);
                        return false;
                    }
                }
                layout.pieces.push(Placed { offset: piece.offset, length: piece.length, origin });
            }
            true
        })?;
        Ok(layout)
    }
}
