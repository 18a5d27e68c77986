//! The volume as blocks: the disk, what the journal puts in place of some of its blocks, and a
//! small cache of metadata blocks.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::map::Window;
use super::superblock::Superblock;
use crate::error::{Error, Result};
use crate::source::Source;

/// Bytes of metadata blocks that are kept.
const CACHED_BYTES: usize = 8 << 20;
/// Bytes of metadata that are read at once where they follow each other.
const READ_AHEAD: u64 = 64 << 10;
/// File maps that are kept.
const CACHED_WINDOWS: usize = 32;
/// First bytes of a journalled block that were taken out because they are the journal's own magic.
pub(super) const JOURNAL_MAGIC: u32 = 0xc03b_3998;

/// A block's newer content in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JournalCopy {
    /// Block of the volume where it lies.
    pub(super) block: u64,
    /// Whether its first four bytes are the journal's magic number, and lie there as zeroes.
    pub(super) escaped: bool,
}

/// Blocks whose content is in the journal.
pub(super) type Overlay = BTreeMap<u64, JournalCopy>;

/// An open volume.
pub(super) struct Volume {
    source: Arc<dyn Source>,
    pub(super) superblock: Superblock,
    overlay: Overlay,
    blocks: Mutex<BlockCache>,
    windows: Mutex<VecDeque<Arc<Window>>>,
}

/// Blocks read lately, in two generations: a full young one becomes the old one.
struct BlockCache {
    young: HashMap<u64, Arc<[u8]>>,
    old: HashMap<u64, Arc<[u8]>>,
    generation: usize,
}

impl BlockCache {
    fn find(&mut self, block: u64) -> Option<Arc<[u8]>> {
        if let Some(found) = self.young.get(&block) {
            return Some(found.clone());
        }
        let found = self.old.remove(&block)?;
        self.insert(block, found.clone());
        Some(found)
    }

    fn insert(&mut self, block: u64, content: Arc<[u8]>) {
        if self.young.len() >= self.generation {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(block, content);
    }
}

impl Volume {
    pub(super) fn new(source: Arc<dyn Source>, superblock: Superblock, overlay: Overlay) -> Self {
        let generation = CACHED_BYTES / 2 / superblock.block_size as usize;
        let (young, old) = (HashMap::new(), HashMap::new());
        let blocks = Mutex::new(BlockCache { young, old, generation });
        Self { source, superblock, overlay, blocks, windows: Mutex::default() }
    }

    /// The same volume, by what its superblock says once the journal was replayed.
    pub(super) fn with_superblock(self, superblock: Superblock) -> Self {
        Self::new(self.source, superblock, self.overlay)
    }

    /// Bytes of a block.
    pub(super) fn block_size(&self) -> u64 {
        u64::from(self.superblock.block_size)
    }

    /// Refuses blocks that the volume does not have, and block 0, which no pointer may name.
    pub(super) fn check_blocks(&self, first: u64, count: u64) -> Result<()> {
        match first.checked_add(count) {
            Some(end) if first > 0 && end <= self.superblock.blocks => Ok(()),
            _ => Err(Error::corrupt(format!(
                "{count} blocks from {first} on are named, and there are {}",
                self.superblock.blocks
            ))),
        }
    }

    /// Fills `buf` from byte `offset` of the volume, as the journal leaves it.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let size = self.block_size();
        let end = offset.checked_add(buf.len() as u64);
        let end = end.ok_or_else(|| Error::corrupt("a place past the end of all volumes"))?;
        let mut at = offset;
        let mut rest = buf;
        for (block, copy) in self.overlay.range(offset / size..end.div_ceil(size)) {
            let start = (block * size).max(at);
            let (before, others) = rest.split_at_mut(offset_in(start - at));
            self.read_disk(before, at)?;
            let stop = ((block + 1) * size).min(end);
            let (replaced, others) = others.split_at_mut(offset_in(stop - start));
            self.read_copy(replaced, *copy, offset_in(start - block * size))?;
            (at, rest) = (stop, others);
        }
        self.read_disk(rest, at)
    }

    fn read_disk(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if buf.is_empty() { Ok(()) } else { self.source.read_at(buf, offset) }
    }

    fn read_copy(&self, buf: &mut [u8], copy: JournalCopy, from: usize) -> Result<()> {
        self.read_disk(buf, copy.block * self.block_size() + from as u64)?;
        if copy.escaped {
            let magic = JOURNAL_MAGIC.to_be_bytes();
            for (byte, right) in buf.iter_mut().zip(magic.iter().skip(from)) {
                *byte = *right;
            }
        }
        Ok(())
    }

    /// The first block from `first` on, of `count`, whose content is in the journal.
    pub(super) fn first_in_journal(&self, first: u64, count: u64) -> Option<u64> {
        self.overlay.range(first..first.saturating_add(count)).next().map(|(block, _)| *block)
    }

    /// A block of metadata.
    pub(super) fn block(&self, block: u64) -> Result<Arc<[u8]>> {
        self.block_of_run(block, block, 1)
    }

    /// A block of metadata that lies in a run of `count` blocks from `first` on, of which more may
    /// be wanted soon.
    pub(super) fn block_of_run(&self, block: u64, first: u64, count: u64) -> Result<Arc<[u8]>> {
        if let Some(found) = self.lock_blocks().find(block) {
            return Ok(found);
        }
        self.check_blocks(block, 1)?;
        let ahead = (READ_AHEAD / self.block_size()).max(1);
        let last = first.saturating_add(count).min(self.superblock.blocks);
        let start = block - (block.saturating_sub(first)) % ahead;
        let end = (start + ahead).min(last).max(block + 1);
        let mut bytes = vec![0; offset_in((end - start) * self.block_size())];
        // What is not wanted yet must not make this fail.
        let (start, bytes) = match self.read(&mut bytes, start * self.block_size()) {
            Ok(()) => (start, bytes),
            Err(_) => {
                bytes.truncate(self.superblock.block_size as usize);
                self.read(&mut bytes, block * self.block_size())?;
                (block, bytes)
            }
        };
        let mut cache = self.lock_blocks();
        let mut wanted = None;
        for (number, content) in
            (start..).zip(bytes.chunks_exact(self.superblock.block_size as usize))
        {
            let content: Arc<[u8]> = content.into();
            if number == block {
                wanted = Some(content.clone());
            }
            cache.insert(number, content);
        }
        wanted.ok_or_else(|| Error::corrupt(format!("block {block} cannot be read")))
    }

    fn lock_blocks(&self) -> std::sync::MutexGuard<'_, BlockCache> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A map of `inode` that covers `block`, if it is kept.
    pub(super) fn cached_window(&self, inode: u32, block: u64) -> Option<Arc<Window>> {
        let windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.iter().find(|window| window.covers(inode, block)).cloned()
    }

    /// Keeps a map, and forgets the oldest.
    pub(super) fn keep_window(&self, window: Arc<Window>) {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.push_front(window);
        windows.truncate(CACHED_WINDOWS);
    }
}

/// A distance within a buffer.
fn offset_in(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}
