//! The extents of a file: what its `EXTENT_DATA` items say, one at a time.
//!
//! Items are looked up for every read, from nodes that are in memory: so a file with millions of extents
//! takes no more than one with few.

use std::sync::Arc;

use fs_btrfs::compression::{
    Compression, MAX_COMPRESSED, MAX_UNCOMPRESSED, ShortDecode, decompress,
};
use fs_btrfs::fs::EXTENT_DATA_KEY;

use super::checksums::Checked;
use super::error_of;
use super::volume::{Root, Volume, key};
use crate::error::{Error, Result};
use crate::fs::recent::Recent;
use crate::fs::{Piece, Place};

/// `btrfs_file_extent_item`, after its generation.
const RAM_BYTES: usize = 8;
const COMPRESSION: usize = 16;
const ENCRYPTION: usize = 17;
const OTHER_ENCODING: usize = 18;
const TYPE: usize = 20;
const INLINE_DATA: usize = 21;
const DISK_BYTENR: usize = 21;
const DISK_NUM_BYTES: usize = 29;
const OFFSET: usize = 37;
const NUM_BYTES: usize = 45;
const REGULAR_SIZE: usize = 53;

const INLINE: u8 = 0;
const REGULAR: u8 = 1;
const PREALLOC: u8 = 2;

/// Extents that were decompressed last: 16 to 32 of them.
pub(super) type Decompressed = Recent<u64, Arc<Vec<u8>>>;
/// How many of them one generation holds.
pub(super) const DECOMPRESSED: usize = 16;

/// A file, for reading.
pub(super) struct File<'a> {
    pub(super) tree: Root,
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) data: Checked<'a>,
    pub(super) decompressed: &'a Decompressed,
}

/// Where the bytes of an extent come from.
enum Content<'a> {
    Zeroes,
    Inline(Compression, &'a [u8]),
    /// From this logical address on.
    Plain(u64),
    /// Compressed at `logical`; the bytes begin at `skip` of what comes out.
    Packed {
        algorithm: Compression,
        logical: u64,
        packed: usize,
        unpacked: usize,
        skip: usize,
    },
}

/// An extent of a file.
struct Extent<'a> {
    start: u64,
    length: u64,
    content: Content<'a>,
}

impl Extent<'_> {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    let bytes = data.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

/// What an item says, as far as it can be true.
fn parse<'a>(volume: &Volume, ino: u64, start: u64, data: &'a [u8]) -> Result<Extent<'a>> {
    let bad = |what: &str| {
        Error::corrupt(format!("btrfs: the extent at byte {start} of inode {ino} {what}"))
    };
    if data.len() <= TYPE {
        return Err(bad("is cut off"));
    }
    let ram = u64_at(data, RAM_BYTES);
    let algorithm = Compression::from_byte(data[COMPRESSION]).map_err(error_of)?;
    if data[ENCRYPTION] != 0 || data[OTHER_ENCODING..TYPE] != [0, 0] {
        return Err(Error::unsupported(format!("btrfs: inode {ino} is encrypted")));
    }
    let unpacked = usize::try_from(ram).unwrap_or(usize::MAX);
    if algorithm.is_compressed() && unpacked > MAX_UNCOMPRESSED {
        return Err(bad("is larger than compressed ones are"));
    }
    if data[TYPE] == INLINE {
        let bytes = data.get(INLINE_DATA..).unwrap_or_default();
        let length = if algorithm.is_compressed() { ram } else { bytes.len() as u64 };
        if start != 0 || length > u64::from(volume.sb.sectorsize.max(volume.sb.nodesize)) {
            return Err(bad("is inline where it cannot be"));
        }
        return Ok(Extent { start, length, content: Content::Inline(algorithm, bytes) });
    }
    if data.len() < REGULAR_SIZE {
        return Err(bad("is cut off"));
    }
    let logical = u64_at(data, DISK_BYTENR);
    let disk = u64_at(data, DISK_NUM_BYTES);
    let skip = u64_at(data, OFFSET);
    let length = u64_at(data, NUM_BYTES);
    let sector = u64::from(volume.sb.sectorsize);
    if [start, logical, disk, skip, length].iter().any(|field| !field.is_multiple_of(sector)) {
        return Err(bad("is not made of whole sectors"));
    }
    if length == 0 || start.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
        return Err(bad("has no length that it can have"));
    }
    let content = match data[TYPE] {
        REGULAR | PREALLOC if logical == 0 => Content::Zeroes,
        PREALLOC => Content::Zeroes,
        REGULAR => {
            if skip.checked_add(length).is_none_or(|end| end > ram) {
                return Err(bad("is longer than what it is a part of"));
            }
            if algorithm.is_compressed() {
                if disk == 0 || disk > MAX_COMPRESSED {
                    return Err(bad("is larger than compressed ones are"));
                }
                let packed = usize::try_from(disk).unwrap_or(usize::MAX);
                let skip = usize::try_from(skip).unwrap_or(usize::MAX);
                Content::Packed { algorithm, logical, packed, unpacked, skip }
            } else if skip + length > disk {
                return Err(bad("is longer than what it is a part of"));
            } else {
                Content::Plain(logical.checked_add(skip).ok_or_else(|| bad("is too far"))?)
            }
        }
        kind => return Err(bad(&format!("is of the unknown type {kind}"))),
    };
    Ok(Extent { start, length, content })
}

impl File<'_> {
    /// Calls `visit` with the extents that end after `from`, in order, until it returns `false`.
    fn extents(&self, from: u64, visit: &mut dyn FnMut(Extent<'_>) -> Result<bool>) -> Result<()> {
        let ino = self.ino;
        let mut end = 0;
        let first = key(ino, EXTENT_DATA_KEY, from);
        self.data.volume.for_each_around(self.tree, first, &mut |key, data| {
            if (key.objectid, key.key_type) < (ino, EXTENT_DATA_KEY) {
                return Ok(true);
            }
            if (key.objectid, key.key_type) != (ino, EXTENT_DATA_KEY) || key.offset >= self.size {
                return Ok(false);
            }
            let extent = parse(self.data.volume, ino, key.offset, data)?;
            if extent.start < end {
                return Err(Error::corrupt(format!(
                    "btrfs: the extents of inode {ino} overlap at byte {}",
                    extent.start
                )));
            }
            end = extent.end();
            if end <= from {
                return Ok(true);
            }
            visit(extent)
        })
    }

    /// Fills `buf`, which ends within the file, from `offset`.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Io`.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        let mut at = offset;
        self.extents(offset, &mut |extent| {
            if extent.start >= end {
                return Ok(false);
            }
            let from = extent.start.max(at);
            let until = extent.end().min(end);
            let part = |byte: u64| usize::try_from(byte - offset).unwrap_or(usize::MAX);
            buf[part(at)..part(from)].fill(0);
            self.fill(&mut buf[part(from)..part(until)], &extent, from - extent.start)?;
            at = until;
            Ok(at < end)
        })?;
        let done = usize::try_from(at - offset).unwrap_or(usize::MAX);
        buf[done..].fill(0);
        Ok(())
    }

    /// Fills `buf` from byte `within` of an extent.
    fn fill(&self, buf: &mut [u8], extent: &Extent<'_>, within: u64) -> Result<()> {
        let held;
        let (bytes, skip): (&[u8], usize) = match &extent.content {
            Content::Zeroes => {
                buf.fill(0);
                return Ok(());
            }
            Content::Plain(logical) => return self.data.read(buf, logical + within),
            Content::Inline(Compression::None, bytes) => (bytes, 0),
            Content::Inline(algorithm, bytes) => {
                let length = usize::try_from(extent.length).unwrap_or(usize::MAX);
                held = Arc::new(self.unpack(*algorithm, bytes, length)?);
                (&held, 0)
            }
            &Content::Packed { algorithm, logical, packed, unpacked, skip } => {
                held = self.packed(algorithm, logical, packed, unpacked)?;
                (&held, skip)
            }
        };
        let from = usize::try_from(within).unwrap_or(usize::MAX).saturating_add(skip);
        let bytes = bytes.get(from..).and_then(|rest| rest.get(..buf.len())).ok_or_else(|| {
            Error::corrupt(format!("btrfs: an extent of inode {} is too short", self.ino))
        })?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    /// A compressed extent as a whole: 128 KiB at most.
    fn packed(
        &self,
        algorithm: Compression,
        logical: u64,
        packed: usize,
        unpacked: usize,
    ) -> Result<Arc<Vec<u8>>> {
        match self.decompressed.get(&logical) {
            Some(held) if held.len() == unpacked => return Ok(held),
            _ => {}
        }
        let mut bytes = vec![0; packed];
        self.data.read(&mut bytes, logical)?;
        let bytes = Arc::new(self.unpack(algorithm, &bytes, unpacked)?);
        self.decompressed.put(logical, Arc::clone(&bytes), 1);
        Ok(bytes)
    }

    /// What comes out of `bytes`. It may be shorter than it says, where it was the end of a file: the
    /// rest of the sector is zeroes.
    fn unpack(&self, algorithm: Compression, bytes: &[u8], length: usize) -> Result<Vec<u8>> {
        let sector = self.data.volume.sb.sectorsize as usize;
        decompress(algorithm, bytes, length, sector, ShortDecode::Pad).map_err(|error| {
            Error::corrupt(format!("btrfs: inode {} cannot be decompressed: {error}", self.ino))
        })
    }

    /// Tells the pieces of the file, from byte `from` on.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Io`.
    pub(super) fn layout(&self, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let volume = self.data.volume;
        let mut at = from;
        let mut goes_on = true;
        let mut tell = |offset: u64, end: u64, place: Place| {
            let length = end.min(self.size).saturating_sub(offset);
            length == 0 || visit(Piece { offset, length, place })
        };
        self.extents(from, &mut |extent| {
            goes_on = tell(at, extent.start, Place::Hole);
            at = extent.start;
            let end = extent.end();
            while goes_on && at < end {
                let (place, next) = match &extent.content {
                    Content::Zeroes => (Place::Hole, end),
                    Content::Inline(..) => (Place::Elsewhere, end),
                    Content::Plain(logical) => {
                        let logical = logical + (at - extent.start);
                        let (place, length) = volume.place(logical, 0, end - at)?;
                        (Place::Volume(place), at + length.max(1))
                    }
                    // Where in the extent it begins is nothing that a place tells.
                    Content::Packed { skip, .. } if *skip != 0 => (Place::Elsewhere, end),
                    Content::Packed { logical, packed, .. } => {
                        let length = *packed as u64;
                        match volume.place(*logical, 0, length)? {
                            (offset, whole) if whole == length => {
                                (Place::Encoded { offset, length }, end)
                            }
                            _ => (Place::Elsewhere, end),
                        }
                    }
                };
                goes_on = tell(at, next, place);
                at = next;
            }
            Ok(goes_on && at < self.size)
        })?;
        if goes_on {
            tell(at, self.size, Place::Hole);
        }
        Ok(())
    }
}
