//! What an image keeps beside its active tables: internal snapshots and bitmaps.

use super::refmap::Use;
use super::walk::{MAX_TABLE, Place, Walk};
use crate::error::{Error, Result};
use crate::header::{AUTOCLEAR_BITMAPS, Extension};
use crate::meta::read_words;
use crate::types::HostOffset;

/// Bytes of a snapshot table entry before its extra data.
const SNAPSHOT_HEADER: u64 = 40;
/// Most extra data of a snapshot that is believed, in bytes.
const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Bytes of a bitmap directory entry before its extra data.
const BITMAP_HEADER: u64 = 24;
/// Largest bitmap directory that is believed, in bytes: 64 MiB.
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;
/// Bits 9 to 55 of a bitmap table entry: a host offset.
const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 0 of a bitmap table entry without offset: the range is all ones.
const BITMAP_ALL_ONES: u64 = 1;

impl Walk<'_> {
    fn bytes<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.storage
            .read_at(&mut bytes, at)
            .map_err(|e| Error::io(format!("cannot read {N} bytes at {at:#x}"), e))?;
        Ok(bytes)
    }

    fn u16(&self, at: u64) -> Result<u16> {
        Ok(u16::from_be_bytes(self.bytes(at)?))
    }

    fn u32(&self, at: u64) -> Result<u32> {
        Ok(u32::from_be_bytes(self.bytes(at)?))
    }

    fn u64(&self, at: u64) -> Result<u64> {
        Ok(u64::from_be_bytes(self.bytes(at)?))
    }

    /// Counts the snapshot table and the snapshots' L1 tables.
    pub(super) fn snapshots(&mut self) -> Result<()> {
        let start = self.header.snapshots_offset;
        if self.header.snapshots == 0 {
            return Ok(());
        }
        if !start.0.is_multiple_of(self.geometry.cluster_size()) {
            self.broken(|| format!("the snapshot table at {start} is unaligned"));
            return Ok(());
        }
        let mut at = start.0;
        for number in 0..self.header.snapshots {
            let impossible = at.checked_add(SNAPSHOT_HEADER).is_none_or(|e| e > self.file_len);
            if impossible || self.u32(at + 36)? > MAX_SNAPSHOT_EXTRA {
                self.broken(|| format!("snapshot {number} at {at:#x} cannot be read"));
                break;
            }
            let l1 = HostOffset(self.u64(at)?);
            let entries = u64::from(self.u32(at + 8)?);
            let names = u64::from(self.u16(at + 12)?) + u64::from(self.u16(at + 14)?);
            let length = SNAPSHOT_HEADER + u64::from(self.u32(at + 36)?) + names;
            self.l1_table(l1, entries, false, &format!("the L1 table of snapshot {number}"))?;
            at += length.next_multiple_of(8);
        }
        self.exclusive(start, at - start.0, "the snapshot table")?;
        Ok(())
    }

    /// Counts the bitmap directory, bitmap tables and their data, where the image vouches for them.
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        if self.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let directory = self.header.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps { directory_offset, directory_size } => {
                Some((HostOffset(*directory_offset), *directory_size))
            }
            _ => None,
        });
        let Some((start, size)) = directory else {
            return Ok(());
        };
        if size > MAX_BITMAP_DIRECTORY || !start.0.is_multiple_of(self.geometry.cluster_size()) {
            self.broken(|| format!("a bitmap directory of {size} bytes at {start} is impossible"));
            return Ok(());
        }
        if self.exclusive(start, size, "the bitmap directory")? == Place::Outside {
            return Ok(());
        }
        let end = start.0 + size;
        let mut at = start.0;
        while at < end {
            if end - at < BITMAP_HEADER {
                self.broken(|| format!("the bitmap directory entry at {at:#x} is cut off"));
                break;
            }
            let table = HostOffset(self.u64(at)?);
            let entries = u64::from(self.u32(at + 8)?);
            let extra = u64::from(self.u32(at + 20)?);
            let name = u64::from(self.u16(at + 18)?);
            self.bitmap_table(table, entries)?;
            at += (BITMAP_HEADER + extra + name).next_multiple_of(8);
        }
        Ok(())
    }

    fn bitmap_table(&mut self, at: HostOffset, entries: u64) -> Result<()> {
        if entries * 8 > MAX_TABLE || !at.0.is_multiple_of(self.geometry.cluster_size()) {
            self.broken(|| format!("a bitmap table at {at} with {entries} entries is impossible"));
            return Ok(());
        }
        match self.exclusive(at, entries * 8, "a bitmap table")? {
            Place::Outside => return Ok(()),
            Place::Taken => {
                self.broken(|| format!("the bitmap table at {at} lies over other metadata"));
                return Ok(());
            }
            Place::Own => {}
        }
        let cluster = self.geometry.cluster_size();
        #[allow(clippy::cast_possible_truncation, reason = "bounded by MAX_TABLE")]
        for word in read_words(self.storage, at, entries as usize)? {
            let host = HostOffset(word & BITMAP_OFFSET_MASK);
            let flags = word & !BITMAP_OFFSET_MASK;
            let plain = host.0 == 0 && flags & !BITMAP_ALL_ONES == 0;
            if plain {
                continue;
            }
            if flags != 0 || !host.0.is_multiple_of(cluster) {
                self.broken(|| {
                    format!("bitmap table at {at}: entry {word:#018x} is unaligned or uses reserved bits")
                });
                continue;
            }
            self.range(host, cluster, 1, Use::Data, "bitmap data")?;
        }
        Ok(())
    }
}
