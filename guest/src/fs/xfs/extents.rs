//! Where the blocks of a fork lie: its extents, checked and joined into runs of bytes.

use std::sync::Arc;

use fs_xfs::Superblock;
use fs_xfs::extent::{self, Extent};
use fs_xfs::inode::{Format, Inode};

use super::error_of;
use crate::error::{Error, Result};
use crate::fs::{Piece, Place};
use crate::source::Source;

/// Extents of a file, at most: each takes up to 64 bytes while they are read.
const MAX_EXTENTS: u64 = 1 << 21;
/// Blocks of a `bmbt` that are read for few extents; more extents may have more.
const BMBT_BLOCKS: u64 = 64;

/// Bytes of a file that lie together on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First byte of the file.
    pub(super) start: u64,
    /// Length in bytes; never 0.
    pub(super) length: u64,
    /// First byte on the volume.
    pub(super) disk: u64,
    /// Allocated and never written: it reads as zeroes.
    pub(super) unwritten: bool,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// The runs of a data fork, in order and apart from each other.
///
/// # Errors
/// `Corrupt`, `Limit`, `Io`.
pub(super) fn runs(
    sb: &Superblock,
    inode: &Inode,
    raw: &[u8],
    mut read_block: impl FnMut(u64) -> fs_xfs::Result<Vec<u8>>,
) -> Result<Arc<[Run]>> {
    let ino = inode.ino;
    if inode.nextents > MAX_EXTENTS {
        return Err(Error::limit(format!(
            "inode {ino} has {} extents; {MAX_EXTENTS} are read at most",
            inode.nextents
        )));
    }
    let (start, end) = inode.data_fork_range(usize::from(sb.inodesize));
    let fork = raw.get(start..end).unwrap_or_default();
    let extents = match inode.format {
        Format::Extents => extent::parse_list(fork, inode.nextents).map_err(error_of)?,
        Format::Btree => {
            // Blocks are at least a quarter full, but for the root's.
            let mut left = BMBT_BLOCKS + inode.nextents / 3;
            let read = |block| {
                left = left.checked_sub(1).ok_or_else(|| {
                    fs_xfs::Error::BadSuperblock(format!("inode {ino}: its bmbt has no end"))
                })?;
                if !in_one_group(sb, block, 1) {
                    return Err(fs_xfs::Error::BadSuperblock(format!(
                        "inode {ino}: its bmbt points at block {block}, where none can be"
                    )));
                }
                read_block(block)
            };
            fs_xfs::bmbt::walk(fork, inode.nextents, sb, ino, read).map_err(error_of)?
        }
        format => return Err(Error::corrupt(format!("inode {ino} keeps its data as {format:?}"))),
    };
    joined(sb, ino, &extents)
}

fn joined(sb: &Superblock, ino: u64, extents: &[Extent]) -> Result<Arc<[Run]>> {
    let block = u64::from(sb.blocksize);
    let mut runs: Vec<Run> = Vec::with_capacity(extents.len());
    for extent in extents {
        let bad = |what: &str| {
            Error::corrupt(format!("inode {ino}: its extent at block {} {what}", extent.startoff))
        };
        if !in_one_group(sb, extent.startblock, extent.blockcount) {
            return Err(bad("lies in no allocation group"));
        }
        let start = extent.startoff.checked_mul(block);
        let length = extent.blockcount.checked_mul(block);
        let (Some(start), Some(length)) = (start, length) else {
            return Err(bad("is too far"));
        };
        if start.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
            return Err(bad("is too far"));
        }
        let disk = sb.fsblock_offset(extent.startblock);
        let run = Run { start, length, disk, unwritten: extent.unwritten };
        match runs.last_mut() {
            Some(last) if last.end() > start => return Err(bad("overlaps the one before it")),
            Some(last)
                if last.end() == start
                    && last.disk + last.length == disk
                    && last.unwritten == run.unwritten =>
            {
                last.length += length;
            }
            _ => runs.push(run),
        }
    }
    Ok(runs.into())
}

/// Whether `count` blocks from the packed number `first` on lie within one group, past its headers.
fn in_one_group(sb: &Superblock, first: u64, count: u64) -> bool {
    let Some(last) = count.checked_sub(1).and_then(|rest| first.checked_add(rest)) else {
        return false;
    };
    let group = first >> sb.agblklog;
    if group >= u64::from(sb.agcount) || last >> sb.agblklog != group {
        return false;
    }
    let mask = (1_u64 << sb.agblklog) - 1;
    let before = group.saturating_mul(u64::from(sb.agblocks));
    let length = sb.dblocks.saturating_sub(before).min(u64::from(sb.agblocks));
    let headers = 4 * u64::from(sb.sectsize);
    (first & mask).saturating_mul(u64::from(sb.blocksize)) >= headers && last & mask < length
}

/// The first of `runs` that ends after byte `at`.
pub(super) fn first_after(runs: &[Run], at: u64) -> usize {
    runs.partition_point(|run| run.end() <= at)
}

/// Fills `buf` with the bytes from `offset` on, from few large reads.
///
/// # Errors
/// `Corrupt`, `Io`.
pub(super) fn read(source: &dyn Source, runs: &[Run], buf: &mut [u8], offset: u64) -> Result<()> {
    let end = offset.saturating_add(buf.len() as u64);
    let mut rest = buf;
    let mut at = offset;
    for run in &runs[first_after(runs, offset)..] {
        if run.start >= end {
            break;
        }
        let from = run.start.max(at);
        let (hole, after) = rest.split_at_mut(bytes(from - at));
        hole.fill(0);
        let (piece, after) = after.split_at_mut(bytes(run.end().min(end) - from));
        if run.unwritten {
            piece.fill(0);
        } else {
            source.read_at(piece, run.disk + (from - run.start))?;
        }
        at = from + piece.len() as u64;
        rest = after;
    }
    rest.fill(0);
    Ok(())
}

/// A length that fits a buffer, because it is a part of one.
fn bytes(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// Tells the pieces of a file of `size` bytes, from byte `from` on.
pub(super) fn layout(runs: &[Run], size: u64, from: u64, visit: &mut dyn FnMut(Piece) -> bool) {
    let runs = &runs[first_after(runs, from)..];
    let mut at = runs.first().map_or(from, |run| run.start.min(from));
    for run in runs {
        if run.start >= size {
            break;
        }
        let hole = Piece { offset: at, length: run.start - at, place: Place::Hole };
        if hole.length > 0 && !visit(hole) {
            return;
        }
        let place = if run.unwritten { Place::Hole } else { Place::Volume(run.disk) };
        at = run.end().min(size);
        if !visit(Piece { offset: run.start, length: at - run.start, place }) {
            return;
        }
    }
    if at < size {
        visit(Piece { offset: at, length: size - at, place: Place::Hole });
    }
}
