//! Where the log ends: its last record that is whole, and what is open there.
//!
//! A machine has several records under way at once. A copy made while it ran can have a later one and
//! not the one before it, or half of one. The kernel ends the log before the first that is not whole, and
//! so does this; the records after it are hidden from the crate, which would refuse the log or take an
//! old record for a new one.

use std::collections::HashSet;

use fs_xfs::Superblock;
use fs_xfs::log::record_checksum;

use super::intents::Intents;
use crate::error::{Error, Result};
use crate::source::{Source, check_range};

/// Bytes of a basic block.
const BLOCK: u64 = 512;
/// Blocks that can be under way at once: eight buffers of 256 KiB.
const WINDOW: u64 = 8 * 256 * 1024 / BLOCK;
/// Blocks of a record's headers and of its data, at most.
const MAX_HEADERS: u64 = 16;
const MAX_DATA: u64 = 2 * 256 * 1024;
/// Bytes of data that one block of headers has the cycles of (`XLOG_HEADER_CYCLE_SIZE`).
const CYCLE_SIZE: u64 = 32 * 1024;
/// Blocks between tail and head that are replayed at most, because they are held in memory: 512 MiB.
const MAX_REPLAY: u64 = (512 << 20) / BLOCK;
/// Records that can be under way at once, and so be torn (`XLOG_MAX_ICLOGS`).
const MAX_TORN: usize = 8;
const MAGIC: u32 = 0xfeed_babe;

/// `xlog_rec_header`.
const CYCLE: usize = 4;
const VERSION: usize = 8;
const LEN: usize = 12;
const LSN: usize = 16;
const TAIL_LSN: usize = 24;
const CRC: usize = 32;
const OPERATIONS: usize = 40;
const CYCLE_DATA: usize = 44;
/// Blocks of data that a block of headers has the cycles of, and where a further one has them.
const CYCLES: usize = 64;
const MORE_CYCLE_DATA: usize = 4;
const FS_UUID: usize = 304;
const SIZE: usize = 320;

/// The log as a ring of blocks.
struct Ring<'a> {
    source: &'a dyn Source,
    sb: &'a Superblock,
    start: u64,
    blocks: u64,
}

/// The header of a record.
#[derive(Clone, Copy)]
struct Record {
    lsn: u64,
    tail: u64,
    block: u64,
    headers: u64,
    length: u64,
    operations: u32,
}

/// What there is to know of a log before it is replayed.
#[derive(Default)]
pub(super) struct End {
    /// The blocks of the log, by their byte on the volume, whose records come after the last whole one.
    /// None where the log is whole, or is nothing that this can tell.
    pub(super) torn: HashSet<u64>,
    /// Changes of files' mappings that are left open.
    pub(super) open: usize,
}

/// Finds where the log ends.
///
/// # Errors
/// `Io`; `Corrupt` where no record can be replayed; `Limit` where they are too many.
pub(super) fn end(source: &dyn Source, sb: &Superblock) -> Result<End> {
    let start = sb.fsblock_offset(sb.logstart);
    let blocks = u64::from(sb.logblocks) * u64::from(sb.blocksize) / BLOCK;
    check_range(source.size(), start, 0)?;
    let ring = Ring { source, sb, start, blocks };
    if blocks == 0 {
        return Ok(End::default());
    }
    let mut records = ring.near(ring.head()?)?;
    if records.is_empty() {
        records = ring.records(0, blocks)?;
    }
    records.sort_unstable_by_key(|record| std::cmp::Reverse(record.lsn));
    for (index, record) in records.iter().enumerate().take(MAX_TORN + 1) {
        if let Some(intents) = ring.reached(record)? {
            let torn = records[..index].iter().map(|torn| start + torn.block * BLOCK).collect();
            return Ok(End { torn, open: intents.open() });
        }
    }
    match records.len() {
        0 => Ok(End::default()),
        _ => Err(Error::corrupt("the last records of the XFS log are damaged")),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Ring<'_> {
    /// `count` blocks from `at` on, around the end of the ring.
    fn read(&self, at: u64, count: u64) -> Result<Vec<u8>> {
        let count = count.min(self.blocks);
        let bytes = |blocks: u64| usize::try_from(blocks * BLOCK).unwrap_or(usize::MAX);
        let mut buf = vec![0; bytes(count)];
        let at = at % self.blocks;
        let (first, second) = buf.split_at_mut(bytes(count.min(self.blocks - at)));
        self.source.read_at(first, self.start + at * BLOCK)?;
        self.source.read_at(second, self.start)?;
        Ok(buf)
    }

    fn cycle(&self, at: u64) -> Result<u32> {
        let block = self.read(at, 1)?;
        let first = u32_at(&block, 0);
        Ok(if first == MAGIC { u32_at(&block, CYCLE) } else { first })
    }

    /// About where the next record would be: where the cycle changes.
    fn head(&self) -> Result<u64> {
        let first = self.cycle(0)?;
        if self.cycle(self.blocks - 1)? == first {
            return Ok(0);
        }
        let (mut low, mut high) = (0, self.blocks - 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cycle(middle)? == first { low = middle } else { high = middle }
        }
        Ok(high)
    }

    /// The records within the window before and after `head`.
    fn near(&self, head: u64) -> Result<Vec<Record>> {
        if self.blocks <= 2 * WINDOW {
            return self.records(0, self.blocks);
        }
        self.records((head + self.blocks - WINDOW) % self.blocks, 2 * WINDOW)
    }

    /// The records that begin in `count` blocks from `at` on.
    fn records(&self, at: u64, count: u64) -> Result<Vec<Record>> {
        let mut found = Vec::new();
        let mut done = 0;
        while done < count {
            let step = WINDOW.min(count - done);
            let bytes = self.read(at + done, step)?;
            for (index, block) in bytes.chunks_exact(512).enumerate() {
                found.extend(self.record((at + done + index as u64) % self.blocks, block));
            }
            done += step;
        }
        Ok(found)
    }

    /// The header in the block at `at`, where there is one that was written there.
    fn record(&self, at: u64, block: &[u8]) -> Option<Record> {
        let uuid = block.get(FS_UUID..FS_UUID + 16)?;
        let lsn = u64_at(block, LSN);
        if u32_at(block, 0) != MAGIC || uuid != self.sb.uuid || lsn & 0xffff_ffff != at {
            return None;
        }
        let two = u32_at(block, VERSION) & 2 != 0;
        let headers =
            if two { u64::from(u32_at(block, SIZE)).div_ceil(CYCLE_SIZE).max(1) } else { 1 };
        let length = u64::from(u32_at(block, LEN));
        if headers > MAX_HEADERS
            || length > MAX_DATA
            || length.div_ceil(CYCLE_SIZE) > headers && two
        {
            return None;
        }
        let (tail, operations) = (u64_at(block, TAIL_LSN), u32_at(block, OPERATIONS));
        Some(Record { lsn, tail, block: at, headers, length, operations })
    }

    /// What is open at the end of `last`, where it is whole and every record from the tail that it names up
    /// to it.
    fn reached(&self, last: &Record) -> Result<Option<Intents>> {
        let Some(end) = self.content(last)? else { return Ok(None) };
        let mut intents = Intents::default();
        let mut at = last.tail & 0xffff_ffff;
        let mut lsn = last.tail;
        let mut walked = 0;
        while at < self.blocks && walked <= self.blocks {
            let record = self.record(at, &self.read(at, 1)?);
            let Some(record) = record.filter(|record| record.lsn >= lsn) else { return Ok(None) };
            if walked > MAX_REPLAY {
                return Err(Error::limit("more of the XFS log is in use than is held in memory"));
            }
            if record.lsn == last.lsn {
                intents.add(&end, last.operations)?;
                return Ok(Some(intents));
            }
            if record.lsn > last.lsn {
                return Ok(None);
            }
            let Some(data) = self.content(&record)? else { return Ok(None) };
            intents.add(&data, record.operations)?;
            let blocks = record.headers + record.length.div_ceil(BLOCK);
            walked += blocks;
            at = (at + blocks) % self.blocks;
            lsn = record.lsn + 1;
        }
        Ok(None)
    }

    /// The data of a record, where it is what its checksum says; one without a checksum is taken as it is.
    fn content(&self, record: &Record) -> Result<Option<Vec<u8>>> {
        let headers = self.read(record.block, record.headers)?;
        let stored = headers.get(CRC..CRC + 4).and_then(|bytes| bytes.try_into().ok());
        let stored = stored.map_or(0, u32::from_le_bytes);
        let mut data = self.read(record.block + record.headers, record.length.div_ceil(BLOCK))?;
        let length = usize::try_from(record.length).unwrap_or(usize::MAX);
        let Some(sealed) = data.get(..length) else { return Ok(None) };
        if stored != 0 && record_checksum(&headers, sealed) != stored {
            return Ok(None);
        }
        // The first word of each block lies in the headers, and the cycle in its place.
        for (index, block) in data.chunks_exact_mut(512).enumerate() {
            let within = 4 * (index % CYCLES);
            let at = match index / CYCLES {
                0 => CYCLE_DATA + within,
                more => more * 512 + MORE_CYCLE_DATA + within,
            };
            if let Some(word) = headers.get(at..at + 4) {
                block[..4].copy_from_slice(word);
            }
        }
        data.truncate(length);
        Ok(Some(data))
    }
}
