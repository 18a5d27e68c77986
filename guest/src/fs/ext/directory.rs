//! Directories, walked from their first block to the last: an index (htree) hides its nodes in what
//! looks like unused entries, so that this order finds every name once, whatever the index says.
//!
//! A cursor is a byte of the directory. Blocks are always walked from their start, so that any
//! cursor is safe.

use std::cell::Cell;

use super::bytes::{crc32c, le16, le32};
use super::data;
use super::inode::{BLOCK_AREA, Inode, flags};
use super::map;
use super::superblock::incompat;
use super::volume::Volume;
use super::xattr;
use crate::error::{Error, Result};
use crate::fs::{Entry, FileType, Node};

/// Blocks of a directory, at most: the kernel makes none larger without `largedir`, and with blocks of
/// 4 KiB this is 32 GiB of names.
const MAX_BLOCKS: u64 = 1 << 23;
/// Blocks without a name that are passed one after the other, at most: a directory keeps its blocks when
/// its files are deleted, and this is 4 GiB of them.
const MAX_EMPTY: u64 = 1 << 20;
/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// Shortest entry.
const SHORTEST: usize = 12;
/// An entry's record, or a whole block where it does not fit 16 bits.
const WHOLE_BLOCK: u16 = u16::MAX;
/// File type of the unused entry that holds a block's checksum.
const CHECKSUM_TYPE: u8 = 0xde;
/// Bytes of an inline directory before its entries: the parent's number.
const INLINE_HEADER: usize = 4;

/// What a visitor wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Walk {
    /// The next name.
    On,
    /// No more.
    Stop,
}

/// A name in a directory, where it lies.
pub(super) struct Found<'a> {
    /// Its byte in the directory.
    pub(super) offset: u64,
    pub(super) inode: u32,
    pub(super) name: &'a [u8],
    kind: u8,
}

impl Found<'_> {
    /// As an entry of a page.
    pub(super) fn entry(&self, volume: &Volume) -> Entry {
        // The type does not tell what is encrypted.
        let told = !volume.superblock.has(incompat::ENCRYPT);
        Entry {
            name: self.name.to_vec(),
            node: Node(u64::from(self.inode)),
            file_type: if told { file_type(self.kind) } else { None },
        }
    }
}

fn file_type(kind: u8) -> Option<FileType> {
    Some(match kind {
        1 => FileType::File,
        2 => FileType::Directory,
        3 => FileType::CharDevice,
        4 => FileType::BlockDevice,
        5 => FileType::Fifo,
        6 => FileType::Socket,
        7 => FileType::Symlink,
        _ => return None,
    })
}

/// Calls `visit` with the names from byte `cursor` on, without `.` and `..`.
pub(super) fn walk(
    volume: &Volume,
    directory: &Inode,
    cursor: u64,
    visit: &mut dyn FnMut(&Found<'_>) -> Walk,
) -> Result<()> {
    let visited = Cell::new(false);
    let mut visit = |found: &Found<'_>| {
        let hidden = found.offset < cursor || matches!(found.name, b"." | b"..");
        if hidden {
            return Walk::On;
        }
        visited.set(true);
        visit(found)
    };
    if directory.has(flags::INLINE_DATA) {
        return walk_inline(volume, directory, &mut visit);
    }
    let size = volume.block_size();
    let blocks = map::blocks_of(volume, directory)?;
    if !directory.size.is_multiple_of(size) {
        return Err(directory.corrupt("its directory does not end with a block"));
    }
    // Each has a place of its own. Extents that share one could make a directory of any length.
    if blocks > volume.superblock.blocks {
        return Err(directory.corrupt("its directory has more blocks than the volume"));
    }
    if blocks > MAX_BLOCKS {
        return Err(Error::limit(format!(
            "inode {}: its directory has {blocks} blocks",
            directory.number
        )));
    }
    let mut empty = 0;
    let mut at = cursor / size;
    while at < blocks {
        let segment = map::segment(volume, directory, at)?;
        let Some(first) = segment.physical else {
            return Err(directory.corrupt(format_args!("block {at} of its directory is missing")));
        };
        let count = segment.length.min(blocks - at);
        for index in 0..count {
            let found = volume.block_of_run(first + index, first, count);
            let block = found.map_err(|e| directory.blame(&e))?;
            let place =
                |e: Error| directory.corrupt(format_args!("block {at} of its directory: {e}"));
            let names = &block[..checked_length(directory, &block, at).map_err(place)?];
            if walk_entries(volume, names, block.len(), at * size, &mut visit).map_err(place)?
                == Walk::Stop
            {
                return Ok(());
            }
            empty = if visited.take() { 0 } else { empty + 1 };
            if empty > MAX_EMPTY {
                return Err(Error::limit(format!(
                    "inode {}: its directory has {empty} blocks in a row without a name",
                    directory.number
                )));
            }
            at += 1;
        }
    }
    Ok(())
}

/// The inode of a name. A directory whose names are alike regardless of case has it by other letters too,
/// where only one of its names is alike: the kernel folds by its tables of Unicode, and this by small
/// letters, which may find less.
pub(super) fn find(volume: &Volume, directory: &Inode, name: &[u8]) -> Result<Option<u32>> {
    let wanted = directory.has(flags::CASEFOLD).then(|| lowercase(name)).flatten();
    let mut exact = None;
    let (mut alike, mut others) = (None, false);
    walk(volume, directory, 0, &mut |found| {
        if found.name == name {
            exact = Some(found.inode);
            return Walk::Stop;
        }
        if wanted.is_some() && lowercase(found.name) == wanted {
            others |= alike.is_some();
            alike = Some(found.inode);
        }
        Walk::On
    })?;
    Ok(exact.or(alike.filter(|_| !others)))
}

/// A name in small letters, where it is text.
fn lowercase(name: &[u8]) -> Option<String> {
    std::str::from_utf8(name).ok().map(str::to_lowercase)
}

/// Bytes of a block that hold entries, once its checksum was compared.
fn checked_length(directory: &Inode, block: &[u8], at: u64) -> Result<usize> {
    let Some(seed) = directory.checksum_seed else { return Ok(block.len()) };
    let end = block.len() - SHORTEST;
    let tail = &block[end..];
    let is_tail = le32(tail, 0) == 0 && le16(tail, 4) == 12 && tail[6..8] == [0, CHECKSUM_TYPE];
    let whole = record_length(block, 0, block.len()) == block.len();
    let is_index = directory.has(flags::INDEX) && (at == 0 || (le32(block, 0) == 0 && whole));
    if is_index {
        // Nodes of the index have their checksum elsewhere, and no names but `.` and `..`.
        return Ok(block.len());
    }
    if !is_tail {
        return Err(Error::corrupt("it has no checksum"));
    }
    if crc32c(seed, &block[..end]) != le32(tail, 8) {
        return Err(Error::corrupt("it fails its checksum"));
    }
    Ok(end)
}

fn record_length(block: &[u8], at: usize, whole: usize) -> usize {
    match le16(block, at + 4) {
        0 | WHOLE_BLOCK if whole >= usize::from(WHOLE_BLOCK) => whole,
        length => usize::from(length),
    }
}

fn walk_entries(
    volume: &Volume,
    entries: &[u8],
    whole: usize,
    base: u64,
    visit: &mut dyn FnMut(&Found<'_>) -> Walk,
) -> Result<Walk> {
    let typed = volume.superblock.has(incompat::FILETYPE);
    let mut at = 0;
    while at < entries.len() {
        let bad = |what: &str| Error::corrupt(format!("the entry at byte {at} {what}"));
        let length = record_length(entries, at, whole);
        let end = at + length;
        if length < SHORTEST || !length.is_multiple_of(4) || end > entries.len() {
            return Err(bad("has a bad length"));
        }
        let inode = le32(entries, at);
        if inode != 0 {
            let high = entries[at + 7];
            let (name_length, kind) = match typed {
                true => (usize::from(entries[at + 6]), high),
                false => (usize::from(le16(entries, at + 6)), 0),
            };
            let name = entries[at + HEADER..end].get(..name_length);
            let name = name.ok_or_else(|| bad("has a name that is too long"))?;
            if name.is_empty() || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                return Err(bad("has a name that no file can have"));
            }
            if inode > volume.superblock.inodes {
                return Err(bad("names an inode that does not exist"));
            }
            let found = Found { offset: base + at as u64, inode, name, kind };
            if visit(&found) == Walk::Stop {
                return Ok(Walk::Stop);
            }
        }
        at = end;
    }
    Ok(Walk::On)
}

/// Entries in the inode: behind the parent's number, and in an attribute for what is more.
fn walk_inline(
    volume: &Volume,
    directory: &Inode,
    visit: &mut dyn FnMut(&Found<'_>) -> Walk,
) -> Result<()> {
    let place = |e: Error| directory.corrupt(format_args!("its inline directory: {e}"));
    let content = data::inline(directory)?;
    let size = usize::try_from(directory.size).unwrap_or(usize::MAX);
    let first = content.get(INLINE_HEADER..BLOCK_AREA.min(size)).unwrap_or_default();
    let base = INLINE_HEADER as u64;
    if walk_entries(volume, first, first.len(), base, visit).map_err(place)? == Walk::Stop {
        return Ok(());
    }
    if size <= BLOCK_AREA {
        return Ok(());
    }
    let more = xattr::inline_data(directory)?.unwrap_or_default();
    let more = more.get(..size - BLOCK_AREA);
    let more = more.ok_or_else(|| place(Error::corrupt("it is cut off")))?;
    walk_entries(volume, more, more.len(), BLOCK_AREA as u64, visit).map_err(place)?;
    Ok(())
}
