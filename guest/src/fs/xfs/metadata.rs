//! The volume as the XFS crate sees it: metadata in chunks that stay in memory for a while, without the
//! torn records of its log, and with a mask where the log cannot be replayed.
//!
//! The mask is up only while the crate opens the volume. It makes the log look empty, an external log
//! look internal, and lists of unlinked inodes look empty, which the crate refuses on a clean log. No
//! inode and no directory is changed by it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use fs_core::BlockRead;
use fs_xfs::Superblock;

use crate::error::{Error, ErrorKind};
use crate::fs::recent::Recent;
use crate::source::{DiskRange, Source, check_range};

/// Bytes of a chunk.
const CHUNK: u64 = 16 << 10;
/// Chunks of one generation of the cache: 8 MiB.
const CHUNKS: usize = 512;
/// Reads of at least this many bytes (the log) go past the cache.
const LARGE: usize = 128 << 10;

/// Basic blocks that a replay may put in memory, each of which it reads once before: 256 MiB.
const MAX_REPLAYED: usize = 1 << 19;
/// Bytes of a basic block.
const BASIC_BLOCK: usize = 512;

/// `sb_logstart`, `sb_logblocks` within the superblock.
const SB_LOGSTART: usize = 48;
const SB_LOGBLOCKS: usize = 96;
/// `agi_unlinked`: 64 heads of lists, and its value for "none".
const AGI_UNLINKED: std::ops::Range<usize> = 40..296;
/// `agi_crc`.
const AGI_CRC: usize = 312;

/// What the mask needs to know of the volume.
struct Mask {
    up: AtomicBool,
    superblock: Superblock,
    /// Bytes of the log that read as zeroes.
    log: std::ops::Range<u64>,
}

/// The volume, for the crate.
pub(super) struct Metadata {
    source: Arc<dyn Source>,
    chunks: Recent<u64, Arc<Vec<u8>>>,
    /// Bytes on the volume where blocks of the log begin that are hidden.
    torn: HashSet<u64>,
    mask: Option<Mask>,
    opening: Opening,
}

/// What goes on while the crate opens the volume. Its replay takes no notice of reads that fail, and has
/// no bound of its own.
struct Opening {
    goes_on: AtomicBool,
    failed: AtomicBool,
    /// Reads of one basic block.
    blocks: AtomicUsize,
}

impl Metadata {
    /// The volume without the `torn` blocks of its log.
    pub(super) fn new(source: Arc<dyn Source>, torn: HashSet<u64>) -> Self {
        let opening = Opening {
            goes_on: AtomicBool::new(true),
            failed: AtomicBool::new(false),
            blocks: AtomicUsize::new(0),
        };
        Self { source, chunks: Recent::new(CHUNKS), torn, mask: None, opening }
    }

    /// The volume without its log, until [`Self::opened`].
    pub(super) fn masked(source: Arc<dyn Source>, superblock: &Superblock) -> Self {
        let mut superblock = superblock.clone();
        if !superblock.has_internal_log() {
            // The end of the first group: what is there is not read while the mask is up.
            superblock.logstart = u64::from(superblock.agblocks.saturating_sub(1));
            superblock.logblocks = 1;
        }
        let start = superblock.fsblock_offset(superblock.logstart);
        let length = u64::from(superblock.logblocks) * u64::from(superblock.blocksize);
        let log = start..start.saturating_add(length);
        let mask = Mask { up: AtomicBool::new(true), superblock, log };
        Self { mask: Some(mask), ..Self::new(source, HashSet::new()) }
    }

    /// Shows the volume as it is from now on. Whether all could be read until here.
    pub(super) fn opened(&self) -> bool {
        self.opening.goes_on.store(false, Ordering::Release);
        if let Some(mask) = &self.mask {
            mask.up.store(false, Ordering::Release);
        }
        !self.opening.failed.load(Ordering::Acquire)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> crate::Result<()> {
        check_range(self.source.size(), offset, buf.len())?;
        if buf.len() >= LARGE {
            return self.source.read_at(buf, offset);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let chunk = self.chunk(at / CHUNK)?;
            let within = usize::try_from(at % CHUNK).unwrap_or(usize::MAX);
            let Some(held) = chunk.get(within..).filter(|held| !held.is_empty()) else {
                return Err(Error::new(ErrorKind::Io, format!("nothing at byte {at}")));
            };
            let n = held.len().min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&held[..n]);
            done += n;
        }
        Ok(())
    }

    fn chunk(&self, number: u64) -> crate::Result<Arc<Vec<u8>>> {
        if let Some(chunk) = self.chunks.get(&number) {
            return Ok(chunk);
        }
        let start = number * CHUNK;
        let length = self.source.size().saturating_sub(start).min(CHUNK);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        self.source.read_at(&mut bytes, start)?;
        let chunk = Arc::new(bytes);
        self.chunks.put(number, Arc::clone(&chunk), 1);
        Ok(chunk)
    }
}

impl BlockRead for Metadata {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> fs_core::Result<()> {
        let opening = &self.opening;
        if buf.len() == BASIC_BLOCK
            && opening.goes_on.load(Ordering::Acquire)
            && opening.blocks.fetch_add(1, Ordering::Relaxed) >= MAX_REPLAYED
        {
            // The replay would go on after an error. Who opens the volume catches this.
            std::panic::resume_unwind(Box::new("too large a replay"));
        }
        self.read(offset, buf).map_err(|e| {
            opening.failed.store(true, Ordering::Release);
            fs_core::Error::Io(std::io::Error::other(e.to_string()))
        })?;
        for &block in &self.torn {
            let within = block.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
            if let Some(magic) = within.and_then(|at| buf.get_mut(at..)?.get_mut(..4)) {
                magic.fill(0);
            }
        }
        if let Some(mask) = self.mask.as_ref().filter(|mask| mask.up.load(Ordering::Acquire)) {
            mask.apply(offset, buf);
        }
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.source.size()
    }
}

/// The volume as a replay left it: metadata only, file content lies where it always lay.
pub(super) struct Replayed {
    source: Arc<dyn Source>,
    fs: fs_xfs::Filesystem,
}

impl Replayed {
    /// What `fs`, which replayed the log of `source`, reads.
    pub(super) fn new(source: Arc<dyn Source>, fs: fs_xfs::Filesystem) -> Self {
        Self { source, fs }
    }
}

impl Source for Replayed {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> crate::Result<()> {
        check_range(self.source.size(), offset, buf.len())?;
        let read = self.fs.device().read_at(offset, buf);
        read.map_err(|e| Error::new(ErrorKind::Io, e.to_string()))
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        self.source.trace(offset, length, visit);
    }
}

impl Mask {
    fn apply(&self, offset: u64, buf: &mut [u8]) {
        let sb = &self.superblock;
        let sector = usize::from(sb.sectsize);
        if offset == 0 {
            self.mask_superblock(buf);
        } else if self.log.contains(&offset) {
            let length = usize::try_from(self.log.end - offset).unwrap_or(usize::MAX);
            let length = length.min(buf.len());
            buf[..length].fill(0);
        } else if buf.len() == sector && buf.starts_with(b"XAGI") {
            buf[AGI_UNLINKED].fill(0xff);
            if sb.is_v5() {
                fs_xfs::group_write::restamp_crc(buf, AGI_CRC);
            }
        }
    }

    /// Puts in where the log is taken to be, where the checksum was right before.
    fn mask_superblock(&self, buf: &mut [u8]) {
        let sb = &self.superblock;
        let Some(sector) = buf.get_mut(..usize::from(sb.sectsize)) else { return };
        sector[SB_LOGSTART..SB_LOGSTART + 8].copy_from_slice(&sb.logstart.to_be_bytes());
        sector[SB_LOGBLOCKS..SB_LOGBLOCKS + 4].copy_from_slice(&sb.logblocks.to_be_bytes());
        if sb.is_v5() {
            fs_xfs::super_write::stamp_crc(sector);
        }
    }
}
