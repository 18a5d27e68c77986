//! Where the blocks of a file lie: extent trees of ext4, block maps of ext2 and ext3.
//!
//! Files may have millions of pieces, so that maps are made and kept in windows of bounded size.

use std::sync::Arc;

use super::bytes::{crc32c, join, le16, le32};
use super::inode::{Inode, flags};
use super::volume::Volume;
use crate::error::{Error, ErrorKind, Result};

/// Pieces of a window.
const MAX_RUNS: usize = 8192;
/// Blocks that a window of a block map covers at most.
const MAX_MAPPED: u64 = 256 << 10;
/// Nodes of an extent tree that are read for one window.
const MAX_NODES: usize = 2 * MAX_RUNS;
/// `eh_magic`.
const EXTENT_MAGIC: u16 = 0xf30a;
/// Bytes of an extent header, of an extent and of an index.
const RECORD: usize = 12;
/// Levels below the root of an extent tree.
const MAX_DEPTH: u16 = 5;
/// Longest extent; longer ones are such ones, unwritten.
const MAX_WRITTEN: u16 = 1 << 15;
/// Pointers in an inode to blocks of the file itself.
const DIRECT: u64 = 12;
/// Blocks that extents can address.
const MAX_EXTENT_BLOCKS: u64 = 1 << 32;

/// Blocks of a file that follow each other on the volume too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    logical: u64,
    length: u64,
    physical: u64,
    unwritten: bool,
}

/// The pieces of a file from one block to another; what lies between them are holes.
pub(super) struct Window {
    inode: u32,
    start: u64,
    end: u64,
    runs: Vec<Run>,
}

/// Blocks of a file that lie alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// First block on the volume; `None` for what reads as zeroes.
    pub(super) physical: Option<u64>,
    /// Number of blocks; at least 1.
    pub(super) length: u64,
}

impl Window {
    /// Whether it tells where a block lies.
    pub(super) fn covers(&self, inode: u32, block: u64) -> bool {
        self.inode == inode && (self.start..self.end).contains(&block)
    }

    /// Where `block` lies, and how many blocks from there on lie alike. It must be covered.
    fn segment(&self, block: u64) -> Segment {
        let next = self.runs.partition_point(|run| run.logical + run.length <= block);
        let Some(run) = self.runs.get(next) else {
            return Segment { physical: None, length: self.end - block };
        };
        if run.logical > block {
            return Segment { physical: None, length: run.logical - block };
        }
        let into = block - run.logical;
        let physical = (!run.unwritten).then_some(run.physical + into);
        Segment { physical, length: run.length - into }
    }
}

/// Where `block` of a file lies, and how many blocks from there on lie alike.
pub(super) fn segment(volume: &Volume, inode: &Inode, block: u64) -> Result<Segment> {
    if let Some(window) = volume.cached_window(inode.number, block) {
        return Ok(window.segment(block));
    }
    let window = if inode.has(flags::EXTENTS) {
        extents(volume, inode, block)
    } else {
        block_map(volume, inode, block)
    };
    let window = Arc::new(window.map_err(|e| inode.blame(&e))?);
    let found = window.segment(block);
    volume.keep_window(window);
    Ok(found)
}

/// Blocks that a file's size takes, where its map can have so many.
pub(super) fn blocks_of(volume: &Volume, inode: &Inode) -> Result<u64> {
    let blocks = inode.size.div_ceil(volume.block_size());
    let per = volume.block_size() / 4;
    let most = if inode.has(flags::EXTENTS) {
        MAX_EXTENT_BLOCKS
    } else {
        DIRECT + per + per.pow(2) + per.pow(3)
    };
    if blocks > most {
        return Err(
            inode.corrupt(format_args!("{} bytes are more than a file can have", inode.size))
        );
    }
    Ok(blocks)
}

/// A node of an extent tree on the way to a leaf.
struct Frame {
    node: Arc<[u8]>,
    entries: usize,
    depth: u16,
    next: usize,
    /// File blocks that this node may speak of.
    start: u64,
    end: u64,
}

impl Frame {
    fn new(node: Arc<[u8]>, depth: Option<u16>, start: u64, end: u64) -> Result<Self> {
        let (entries, most) = (usize::from(le16(&node, 2)), usize::from(le16(&node, 4)));
        let found = le16(&node, 6);
        let good = le16(&node, 0) == EXTENT_MAGIC
            && entries <= most
            && most <= node.len() / RECORD - 1
            && found <= MAX_DEPTH
            && depth.is_none_or(|depth| depth == found && entries > 0);
        if !good {
            return Err(Error::corrupt("a node of its extent tree has a bad header"));
        }
        Ok(Self { node, entries, depth: found, next: 0, start, end })
    }

    fn record(&self, index: usize) -> &[u8] {
        self.node.get((index + 1) * RECORD..(index + 2) * RECORD).unwrap_or_default()
    }

    /// The child that is next: its block, and the file blocks that it may speak of.
    fn child(&mut self) -> Result<Option<(u64, u64, u64)>> {
        if self.next >= self.entries {
            return Ok(None);
        }
        let record = self.record(self.next);
        let start = u64::from(le32(record, 0));
        let block = join(le32(record, 4), u32::from(le16(record, 8)));
        self.next += 1;
        let last = self.next == self.entries;
        let end = if last { self.end } else { u64::from(le32(self.record(self.next), 0)) };
        if start < self.start || start >= end || end > self.end {
            return Err(Error::corrupt("its extent tree is out of order"));
        }
        Ok(Some((block, start, end)))
    }

    /// Adds a leaf's extents that end after block `from`.
    fn extents(&self, volume: &Volume, from: u64, runs: &mut Vec<Run>) -> Result<()> {
        let mut floor = self.start;
        for index in 0..self.entries {
            let record = self.record(index);
            let logical = u64::from(le32(record, 0));
            let length = le16(record, 4);
            let unwritten = length > MAX_WRITTEN;
            let length = u64::from(if unwritten { length - MAX_WRITTEN } else { length });
            let physical = join(le32(record, 8), u32::from(le16(record, 6)));
            if length == 0 || logical < floor || logical + length > self.end {
                return Err(Error::corrupt(format!(
                    "the extent of {length} blocks at block {logical} overlaps others"
                )));
            }
            volume.check_blocks(physical, length)?;
            floor = logical + length;
            if floor > from {
                runs.push(Run { logical, length, physical, unwritten });
            }
        }
        Ok(())
    }
}

fn extents(volume: &Volume, inode: &Inode, from: u64) -> Result<Window> {
    let mut runs = Vec::new();
    let mut nodes = 0;
    let mut end = u64::MAX;
    let mut path = vec![Frame::new(inode.block_area().into(), None, 0, MAX_EXTENT_BLOCKS)?];
    while let Some(frame) = path.last_mut() {
        if frame.depth == 0 {
            let stop = frame.end;
            frame.extents(volume, from, &mut runs)?;
            path.pop();
            if runs.len() >= MAX_RUNS && stop > from {
                end = stop;
                break;
            }
            continue;
        }
        let depth = frame.depth - 1;
        let Some((block, start, stop)) = frame.child()? else {
            path.pop();
            continue;
        };
        if stop <= from {
            continue;
        }
        nodes += 1;
        if nodes > MAX_NODES {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("more than {MAX_NODES} nodes of its extent tree hold too little"),
            ));
        }
        let node = volume.block(block)?;
        let child = Frame::new(node, Some(depth), start, stop)?;
        check_node(inode, &child, block)?;
        path.push(child);
    }
    if path.is_empty() {
        end = u64::MAX;
    }
    Ok(Window { inode: inode.number, start: from, end, runs })
}

fn check_node(inode: &Inode, frame: &Frame, block: u64) -> Result<()> {
    let Some(seed) = inode.checksum_seed else { return Ok(()) };
    let tail = (usize::from(le16(&frame.node, 4)) + 1) * RECORD;
    let covered = frame.node.get(..tail).unwrap_or_default();
    if tail + 4 <= frame.node.len() && crc32c(seed, covered) != le32(&frame.node, tail) {
        return Err(Error::corrupt(format!("block {block} of its extent tree fails its checksum")));
    }
    Ok(())
}

/// Adds a block to runs, and joins it to the last one where it follows it.
fn push(runs: &mut Vec<Run>, logical: u64, physical: u64) {
    if let Some(last) = runs.last_mut()
        && last.logical + last.length == logical
        && last.physical + last.length == physical
    {
        last.length += 1;
        return;
    }
    runs.push(Run { logical, length: 1, physical, unwritten: false });
}

fn block_map(volume: &Volume, inode: &Inode, from: u64) -> Result<Window> {
    let last = blocks_of(volume, inode)?;
    let per = volume.block_size() / 4;
    let mut runs = Vec::new();
    let mut at = from;
    while at < last && runs.len() < MAX_RUNS && at - from < MAX_MAPPED {
        // The level of the tree that `at` is in, and where in that.
        let (mut level, mut within) = (0, at);
        let mut span = DIRECT;
        while within >= span {
            within -= span;
            level += 1;
            span = per.pow(level);
        }
        let area: Arc<[u8]> = inode.block_area().into();
        let (mut table, mut index, mut entries) = (area, within, DIRECT);
        if level > 0 {
            let mut pointer = le32(&table, slot(DIRECT + u64::from(level) - 1));
            while level > 0 && pointer != 0 {
                table = volume.block(u64::from(pointer))?;
                level -= 1;
                let below = per.pow(level);
                (index, within, entries) = (within / below, within % below, per);
                pointer = le32(&table, slot(index));
            }
            if level > 0 {
                // Nothing is below here, to the end of what this pointer stands for.
                at += per.pow(level) - within;
                continue;
            }
        }
        while index < entries && at < last {
            let pointer = u64::from(le32(&table, slot(index)));
            if pointer != 0 {
                volume.check_blocks(pointer, 1)?;
                push(&mut runs, at, pointer);
            }
            (index, at) = (index + 1, at + 1);
        }
    }
    let end = if at >= last { u64::MAX } else { at };
    Ok(Window { inode: inode.number, start: from, end, runs })
}

/// Byte of a pointer in a table of them.
fn slot(index: u64) -> usize {
    usize::try_from(index * 4).unwrap_or(usize::MAX - 4)
}
