//! The journal (jbd2), replayed into a map of blocks: nothing of it is held in memory but where the
//! newest content of each block lies.
//!
//! A transaction counts once its commit block is found; the first one without ends the log. What a
//! transaction revokes is not replayed from it and from earlier ones.

use std::collections::HashMap;

use super::bytes::{be16, be32, crc32c, join};
use super::data;
use super::inode::Inode;
use super::map;
use super::volume::{JOURNAL_MAGIC, JournalCopy, Overlay, Volume};
use crate::error::{Error, Result};

/// Blocks of the largest journal that mke2fs makes.
const MAX_BLOCKS: u64 = 10_240_000;
/// Blocks that a replay may name: about 200 MiB of memory.
const MAX_REPLAYED: usize = 2 << 20;
/// Bytes of the journal that are read at once.
const CHUNK: usize = 256 << 10;
/// Blocks for fast commits where the superblock does not say how many.
const DEFAULT_FAST_BLOCKS: u32 = 256;
/// Tag of the first record of a fast commit (`EXT4_FC_TAG_HEAD`).
const FAST_HEAD: u16 = 0x9;

/// Types of blocks, in their headers.
mod block_type {
    pub(super) const DESCRIPTOR: u32 = 1;
    pub(super) const COMMIT: u32 = 2;
    pub(super) const SUPERBLOCK_V1: u32 = 3;
    pub(super) const SUPERBLOCK_V2: u32 = 4;
    pub(super) const REVOKE: u32 = 5;
}

/// Bits of `s_feature_incompat` of a journal.
mod feature {
    pub(super) const BIT64: u32 = 0x2;
    pub(super) const ASYNC_COMMIT: u32 = 0x4;
    pub(super) const CSUM_V2: u32 = 0x8;
    pub(super) const CSUM_V3: u32 = 0x10;
    pub(super) const FAST_COMMIT: u32 = 0x20;
    pub(super) const KNOWN: u32 = 0x3f;
}

/// Flags of a descriptor's tag.
mod tag {
    pub(super) const ESCAPED: u32 = 1;
    pub(super) const SAME_UUID: u32 = 2;
    pub(super) const LAST: u32 = 8;
}

/// What a journal holds.
pub(super) struct Replay {
    /// Blocks with newer content.
    pub(super) overlay: Overlay,
    /// Whether there are fast commits behind that, which are not replayed.
    pub(super) fast_commits: bool,
}

/// The journal's superblock, checked.
struct Geometry {
    /// Blocks of the log: it wraps from the end to the start.
    first: u64,
    end: u64,
    start: u64,
    sequence: u32,
    features: u32,
    /// First block of fast commits.
    fast: Option<u64>,
    seed: Option<u32>,
}

impl Geometry {
    fn parse(raw: &[u8], block_size: u32, blocks: u64) -> Result<Self> {
        let version = be32(raw, 4);
        let known = matches!(version, block_type::SUPERBLOCK_V1 | block_type::SUPERBLOCK_V2);
        if be32(raw, 0) != JOURNAL_MAGIC || !known {
            return Err(Error::corrupt("the journal has no superblock"));
        }
        let features = if version == block_type::SUPERBLOCK_V2 { be32(raw, 0x28) } else { 0 };
        if features & !feature::KNOWN != 0 {
            return Err(Error::unsupported(format!("features of the journal: {features:#x}")));
        }
        let checksums = features & (feature::CSUM_V2 | feature::CSUM_V3) != 0;
        if features & feature::ASYNC_COMMIT != 0 && !checksums {
            return Err(Error::unsupported("a journal of asynchronous commits with old checksums"));
        }
        if checksums {
            let mut blank = raw.get(..1024).unwrap_or_default().to_vec();
            blank[0xfc..0x100].fill(0);
            if raw[0x50] != 4 || crc32c(!0, &blank) != be32(raw, 0xfc) {
                return Err(Error::corrupt("the journal's superblock fails its checksum"));
            }
        }
        let last = u64::from(be32(raw, 0x10));
        let fast_blocks = match (features & feature::FAST_COMMIT, be32(raw, 0x54)) {
            (0, _) => 0,
            (_, 0) => DEFAULT_FAST_BLOCKS,
            (_, count) => count,
        };
        let end = last.saturating_sub(u64::from(fast_blocks));
        let (first, start) = (u64::from(be32(raw, 0x14)), u64::from(be32(raw, 0x1c)));
        let fits = first > 0 && first < end && last <= blocks && last <= MAX_BLOCKS;
        if be32(raw, 0xc) != block_size || !fits || (start != 0 && !(first..end).contains(&start)) {
            return Err(Error::corrupt("the journal's superblock contradicts itself"));
        }
        Ok(Self {
            first,
            end,
            start,
            sequence: be32(raw, 0x18),
            features,
            fast: (fast_blocks > 0).then_some(end),
            seed: checksums.then(|| crc32c(!0, &raw[0x30..0x40])),
        })
    }

    /// The block after `block`.
    fn after(&self, block: u64) -> u64 {
        if block + 1 < self.end { block + 1 } else { self.first }
    }

    /// Bytes of a tag without its UUID.
    fn tag_size(&self) -> usize {
        if self.features & feature::CSUM_V3 != 0 {
            return 16;
        }
        let checksum = if self.features & feature::CSUM_V2 != 0 { 2 } else { 0 };
        let high = if self.features & feature::BIT64 != 0 { 4 } else { 0 };
        8 + checksum + high
    }

    /// Whether the checksum at the end of a descriptor or revoke block is right.
    fn tail_holds(&self, block: &[u8]) -> bool {
        let Some(seed) = self.seed else { return true };
        let end = block.len() - 4;
        crc32c(crc32c(seed, &block[..end]), &[0; 4]) == be32(block, end)
    }

    fn commit_holds(&self, block: &[u8]) -> bool {
        let Some(seed) = self.seed else { return true };
        let mut crc = crc32c(seed, &block[..0x10]);
        crc = crc32c(crc, &[0; 4]);
        crc32c(crc, &block[0x14..]) == be32(block, 0x10)
    }
}

/// Blocks of the journal, read in chunks.
struct Log<'a> {
    volume: &'a Volume,
    inode: Inode,
    chunk: Vec<u8>,
    from: u64,
}

impl Log<'_> {
    fn block(&mut self, number: u64) -> Result<&[u8]> {
        let size = self.volume.superblock.block_size as usize;
        let held = (self.chunk.len() / size) as u64;
        if number < self.from || number >= self.from + held {
            self.chunk.resize(CHUNK, 0);
            let length =
                data::read(self.volume, &self.inode, &mut self.chunk, number * size as u64)?;
            self.chunk.truncate(length);
            self.from = number;
        }
        let start = usize::try_from(number - self.from).unwrap_or(usize::MAX) * size;
        let found = self.chunk.get(start..start + size);
        found.ok_or_else(|| Error::corrupt(format!("the journal ends before block {number}")))
    }

    /// Where a block of the journal lies.
    fn place(&self, number: u64) -> Result<u64> {
        let segment = map::segment(self.volume, &self.inode, number)?;
        segment.physical.ok_or_else(|| Error::corrupt(format!("the journal has no block {number}")))
    }
}

/// A block that a transaction wrote.
struct Write {
    block: u64,
    copy: u64,
    escaped: bool,
}

/// A transaction whose commit was not found yet.
#[derive(Default)]
struct Pending {
    writes: Vec<Write>,
    revokes: Vec<u64>,
    damage: Option<Error>,
}

/// Walks the journal of `volume`, which must be as the disk has it.
pub(super) fn replay(volume: &Volume) -> Result<Replay> {
    let inode = Inode::read_any(volume, volume.superblock.journal_inode)?;
    let blocks = map::blocks_of(volume, &inode)?;
    let mut log = Log { volume, inode, chunk: Vec::new(), from: 0 };
    let geometry = Geometry::parse(log.block(0)?, volume.superblock.block_size, blocks)?;
    let mut replayed = Replayed::default();
    if geometry.start != 0 {
        walk(&mut log, &geometry, &mut replayed)?;
    }
    let fast_commits = match geometry.fast {
        Some(fast) if geometry.start != 0 => {
            let block = log.block(fast)?;
            let head = u16::from_le_bytes([block[0], block[1]]);
            head == FAST_HEAD && super::bytes::le32(block, 8) == replayed.next_sequence
        }
        _ => false,
    };
    Ok(Replay { overlay: replayed.overlay, fast_commits })
}

/// What was replayed so far.
#[derive(Default)]
struct Replayed {
    overlay: Overlay,
    /// Sequence of the transaction that comes after the last one.
    next_sequence: u32,
    /// When that was committed: seconds and nanoseconds.
    committed: (u64, u32),
}

fn walk(log: &mut Log<'_>, geometry: &Geometry, replayed: &mut Replayed) -> Result<()> {
    let mut transactions: Vec<Pending> = Vec::new();
    let mut pending = Pending::default();
    let mut sequence = geometry.sequence;
    let mut at = geometry.start;
    let mut left = geometry.end - geometry.first;
    let mut named = 0;
    while left > 0 {
        let block = log.block(at)?.to_vec();
        if be32(&block, 0) != JOURNAL_MAGIC || be32(&block, 8) != sequence {
            break;
        }
        left -= 1;
        at = geometry.after(at);
        match be32(&block, 4) {
            block_type::DESCRIPTOR => {
                if !geometry.tail_holds(&block) {
                    pending.damage = Some(Error::corrupt("a descriptor block fails its checksum"));
                }
                let tags = match tags(&block, geometry) {
                    Err(_) if pending.damage.is_some() => break,
                    tags => tags?,
                };
                named += tags.len();
                if named > MAX_REPLAYED {
                    return Err(Error::limit(format!(
                        "the journal names over {MAX_REPLAYED} blocks"
                    )));
                }
                if tags.len() as u64 > left {
                    return Err(Error::corrupt("a transaction is longer than the journal"));
                }
                left -= tags.len() as u64;
                for tag in tags {
                    let copy = log.place(at)?;
                    if !tag.holds(geometry, sequence, log.block(at)?) {
                        pending.damage =
                            Some(Error::corrupt(format!("block {at} fails its checksum")));
                    }
                    pending.writes.push(Write { block: tag.block, copy, escaped: tag.escaped });
                    at = geometry.after(at);
                }
            }
            block_type::REVOKE => {
                if !geometry.tail_holds(&block) {
                    pending.damage = Some(Error::corrupt("a revoke block fails its checksum"));
                }
                match revokes(&block, geometry) {
                    Err(_) if pending.damage.is_some() => break,
                    found => pending.revokes.extend(found?),
                }
            }
            block_type::COMMIT => {
                if !geometry.commit_holds(&block) {
                    break;
                }
                let time = (join(be32(&block, 0x34), be32(&block, 0x30)), be32(&block, 0x38));
                if let Some(damage) = pending.damage.take() {
                    // An older commit is what is left of an earlier round.
                    if time < replayed.committed {
                        break;
                    }
                    return Err(damage);
                }
                replayed.committed = time;
                transactions.push(std::mem::take(&mut pending));
                sequence = sequence.wrapping_add(1);
            }
            _ => break,
        }
    }
    replayed.next_sequence = sequence;
    replayed.overlay = merge(log.volume, &transactions)?;
    Ok(())
}

/// The newest content of each block, but for what was revoked.
fn merge(volume: &Volume, transactions: &[Pending]) -> Result<Overlay> {
    let mut revoked: HashMap<u64, usize> = HashMap::new();
    for (number, transaction) in transactions.iter().enumerate() {
        for block in &transaction.revokes {
            revoked.insert(*block, number);
        }
    }
    let mut overlay = Overlay::new();
    for (number, transaction) in transactions.iter().enumerate() {
        for write in &transaction.writes {
            if revoked.get(&write.block).is_some_and(|last| number <= *last) {
                continue;
            }
            if write.block >= volume.superblock.blocks {
                return Err(Error::corrupt(format!(
                    "it writes block {}, and there are {}",
                    write.block, volume.superblock.blocks
                )));
            }
            let copy = JournalCopy { block: write.copy, escaped: write.escaped };
            overlay.insert(write.block, copy);
        }
    }
    Ok(overlay)
}

/// A descriptor's word on one of the blocks that follow it.
struct Tag {
    block: u64,
    escaped: bool,
    checksum: u32,
}

impl Tag {
    fn holds(&self, geometry: &Geometry, sequence: u32, content: &[u8]) -> bool {
        let Some(seed) = geometry.seed else { return true };
        let found = crc32c(crc32c(seed, &sequence.to_be_bytes()), content);
        let bits = if geometry.features & feature::CSUM_V3 != 0 { u32::MAX } else { 0xffff };
        found & bits == self.checksum
    }
}

fn tags(block: &[u8], geometry: &Geometry) -> Result<Vec<Tag>> {
    let size = geometry.tag_size();
    let end = block.len() - if geometry.seed.is_some() { 4 } else { 0 };
    let third = geometry.features & feature::CSUM_V3 != 0;
    let mut found = Vec::new();
    let mut at = 12;
    while at + size <= end {
        let (flags, checksum) = match third {
            true => (be32(block, at + 4), be32(block, at + 12)),
            false => (u32::from(be16(block, at + 6)), u32::from(be16(block, at + 4))),
        };
        let high = if geometry.features & feature::BIT64 != 0 { be32(block, at + 8) } else { 0 };
        let escaped = flags & tag::ESCAPED != 0;
        found.push(Tag { block: join(be32(block, at), high), escaped, checksum });
        at += size + if flags & tag::SAME_UUID != 0 { 0 } else { 16 };
        if flags & tag::LAST != 0 {
            return Ok(found);
        }
    }
    if found.is_empty() {
        Err(Error::corrupt("a descriptor block names nothing"))
    } else {
        Ok(found)
    }
}

fn revokes(block: &[u8], geometry: &Geometry) -> Result<Vec<u64>> {
    let end = block.len() - if geometry.seed.is_some() { 4 } else { 0 };
    let used = usize::try_from(be32(block, 12)).unwrap_or(usize::MAX);
    if used > end || used < 16 {
        return Err(Error::corrupt("a revoke block is longer than a block"));
    }
    let records = &block[16..used];
    Ok(if geometry.features & feature::BIT64 != 0 {
        records.chunks_exact(8).map(|record| join(be32(record, 4), be32(record, 0))).collect()
    } else {
        records.chunks_exact(4).map(|record| u64::from(be32(record, 0))).collect()
    })
}
