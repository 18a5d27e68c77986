//! ext2, ext3 and ext4, read-only.
//!
//! ```text
//! superblock -> journal (overlay of newer blocks) -> volume (blocks) -> inode -> map -> data, directory
//! ```
//!
//! The journal is replayed in memory: [`volume::Volume`] gives each block as the journal leaves it, so
//! that nothing above knows of it. Metadata checksums are compared wherever there are some. A node is
//! an inode's number, a cursor is a byte of a directory.

mod bytes;
mod data;
mod directory;
mod inode;
mod journal;
mod map;
mod superblock;
mod volume;
mod xattr;

use std::sync::Arc;

use self::directory::Walk;
use self::inode::{BLOCK_AREA, Inode, ROOT, flags};
use self::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock, compat, incompat};
use self::volume::{Overlay, Volume};
use super::{About, Attributes, Cursor, FileSystem, FileType, Node, Page, Piece, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// Longest target of a symbolic link: a block of 4 KiB, as the kernel has it, and more.
const MAX_LINK: u64 = 64 << 10;

/// Whether `source` holds such a file system, by its signature.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(source: &dyn Source) -> Result<bool> {
    if source.size() < SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64 {
        return Ok(false);
    }
    let mut raw = [0; SUPERBLOCK_SIZE];
    source.read_at(&mut raw, SUPERBLOCK_OFFSET)?;
    Ok(superblock::has_magic(&raw))
}

/// Opens it.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    let mut raw = [0; SUPERBLOCK_SIZE];
    source.read_at(&mut raw, SUPERBLOCK_OFFSET)?;
    let superblock = Superblock::parse(&raw)?;
    let plain = Volume::new(source.clone(), superblock, Overlay::new());
    let (volume, status) = recover(source, plain)?;
    let root = Inode::read(&volume, u64::from(ROOT))?;
    root.expect(FileType::Directory, ErrorKind::Corrupt)?;
    let about = about(&volume.superblock, status);
    Ok(Box::new(Ext { volume, about }))
}

/// Replays the journal where that is needed, and says what became of it.
fn recover(source: &Arc<dyn Source>, plain: Volume) -> Result<(Volume, Status)> {
    let superblock = &plain.superblock;
    if superblock.compat & compat::HAS_JOURNAL == 0 {
        let status = if superblock.unmounted {
            Status::Clean
        } else {
            Status::Stale("it was not unmounted, and has no journal".to_owned())
        };
        return Ok((plain, status));
    }
    if !superblock.has(incompat::RECOVER) {
        return Ok((plain, Status::Clean));
    }
    if superblock.journal_inode == 0 {
        let reason = "its journal is on another device, and was not replayed".to_owned();
        return Ok((plain, Status::Stale(reason)));
    }
    match replayed(source, &plain) {
        Ok(Some((volume, status))) => Ok((volume, status)),
        Ok(None) => Ok((plain, Status::Clean)),
        Err(e) if e.kind == ErrorKind::Io => Err(e),
        Err(e) => Ok((plain, Status::Stale(format!("its journal cannot be replayed: {e}")))),
    }
}

/// The volume as its journal leaves it; `None` where there is nothing to replay.
fn replayed(source: &Arc<dyn Source>, plain: &Volume) -> Result<Option<(Volume, Status)>> {
    let replay = journal::replay(plain)?;
    let status = if replay.fast_commits {
        let reason = "its newest changes are fast commits in its journal, which are not replayed";
        Status::Stale(reason.to_owned())
    } else if replay.overlay.is_empty() {
        return Ok(None);
    } else {
        Status::Replayed
    };
    let volume = Volume::new(source.clone(), plain.superblock.clone(), replay.overlay);
    let mut raw = [0; SUPERBLOCK_SIZE];
    volume.read(&mut raw, SUPERBLOCK_OFFSET)?;
    let superblock = Superblock::parse(&raw)?;
    if superblock.block_size != plain.superblock.block_size {
        return Err(Error::corrupt("it changes the size of blocks"));
    }
    Ok(Some((volume.with_superblock(superblock), status)))
}

fn about(superblock: &Superblock, status: Status) -> About {
    let block_size = u64::from(superblock.block_size);
    let used = superblock.blocks.checked_sub(superblock.free_blocks);
    About {
        kind: superblock.kind().to_owned(),
        label: superblock.label.clone(),
        uuid: superblock.uuid_text(),
        size: superblock.blocks * block_size,
        used: used.map(|blocks| blocks * block_size),
        status,
    }
}

/// An open file system.
struct Ext {
    volume: Volume,
    about: About,
}

impl Ext {
    fn inode(&self, node: Node) -> Result<Inode> {
        Inode::read(&self.volume, node.0)
    }

    fn directory(&self, node: Node) -> Result<Inode> {
        let inode = self.inode(node)?;
        inode.expect(FileType::Directory, ErrorKind::NotADirectory)?;
        Ok(inode)
    }

    fn file(&self, node: Node) -> Result<Inode> {
        let inode = self.inode(node)?;
        inode.expect(FileType::File, ErrorKind::NotAFile)?;
        Ok(inode)
    }
}

impl FileSystem for Ext {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node(u64::from(ROOT))
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        self.inode(node)?.attributes(&self.volume)
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let directory = self.directory(directory)?;
        let found = directory::find(&self.volume, &directory, name)?;
        Ok(found.map(|inode| Node(u64::from(inode))))
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        let directory = self.directory(directory)?;
        let mut page = Page::default();
        directory::walk(&self.volume, &directory, cursor.0, &mut |found| {
            if page.entries.len() >= limit.max(1) {
                page.next = Some(Cursor(found.offset));
                return Walk::Stop;
            }
            page.entries.push(found.entry(&self.volume));
            Walk::On
        })?;
        Ok(page)
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        data::read(&self.volume, &self.file(file)?, buf, offset)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        let inode = self.inode(link)?;
        inode.expect(FileType::Symlink, ErrorKind::NotALink)?;
        if inode.size > MAX_LINK.min(self.volume.block_size()) {
            return Err(inode.corrupt(format_args!("a link's target of {} bytes", inode.size)));
        }
        let length = usize::try_from(inode.size).unwrap_or(0);
        let fast = length < BLOCK_AREA && !inode.has(flags::EXTENTS | flags::INLINE_DATA);
        let mut target = vec![0; length];
        if fast {
            target.copy_from_slice(&inode.block_area()[..length]);
        } else {
            data::read(&self.volume, &inode, &mut target, 0)?;
        }
        Ok(target)
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        xattr::read(&self.volume, &self.inode(node)?)
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        data::layout(&self.volume, &self.file(file)?, from, visit)
    }
}
