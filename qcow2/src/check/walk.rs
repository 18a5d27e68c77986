//! Following every reference in an image.

use super::refmap::RefMap;
use super::report::CheckReport;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::header::{AUTOCLEAR_BITMAPS, Extension, Header};
use crate::meta::read_words;
use crate::storage::Storage;
use crate::table::entry::{L2Entry, decode_l1, subcluster};
use crate::types::{HostCluster, HostOffset};

/// Bytes of a snapshot table entry before its extra data.
const SNAPSHOT_HEADER: u64 = 40;
/// Most extra data of a snapshot that is believed, in bytes.
const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Bytes of a bitmap directory entry before its extra data.
const BITMAP_HEADER: u64 = 24;
/// Largest bitmap directory that is believed, in bytes: 64 MiB.
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;
/// Largest L1 or bitmap table that is believed, in bytes: 32 MiB.
const MAX_TABLE: u64 = 32 << 20;
/// Bits 9 to 55 of a bitmap table entry: a host offset.
const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A count of all references, and what was found on the way.
pub(super) struct Walk<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    geometry: Geometry,
    file_len: u64,
    pub(super) map: RefMap,
    pub(super) report: CheckReport,
    /// Something that is referenced could not be followed: counts may be too low.
    pub(super) unreadable: bool,
    /// (index in the refcount table, offset) of each refcount block.
    pub(super) refcount_blocks: Vec<(u64, HostOffset)>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(storage: &'a dyn Storage, header: &'a Header) -> Result<Self> {
        let file_len = storage
            .len()
            .map_err(|e| Error::io("cannot tell the file's length", e))?;
        let geometry = header.geometry;
        let report = CheckReport {
            total_clusters: geometry.size.div_ceil(geometry.cluster_size()),
            ..CheckReport::default()
        };
        Ok(Self {
            storage,
            header,
            geometry,
            file_len,
            map: RefMap::default(),
            report,
            unreadable: false,
            refcount_blocks: Vec::new(),
        })
    }

    /// Counts everything; guest data and snapshots first, so that metadata that something else
    /// uses too is noticed.
    pub(super) fn everything(&mut self) -> Result<()> {
        let header = self.header;
        let l1 = (header.l1_offset, u64::from(header.l1_entries));
        self.l1_table(l1.0, l1.1, true, "the active L1 table")?;
        self.snapshots()?;
        self.bitmaps()?;
        self.exclusive(HostOffset(0), self.geometry.cluster_size(), "the header")?;
        self.refcount_structures()?;
        self.report.image_end_offset = self.map.end() << self.geometry.cluster_bits;
        Ok(())
    }

    fn broken(&mut self, sentence: impl FnOnce() -> String) {
        self.unreadable = true;
        self.report.corruption(sentence);
    }

    /// Counts the clusters of a range; `false`, with a finding, where it is not in the file.
    fn range(&mut self, start: HostOffset, bytes: u64, what: &str) -> Result<bool> {
        if bytes == 0 {
            return Ok(true);
        }
        let end = start
            .0
            .checked_add(bytes)
            .filter(|_| start.0 < self.file_len);
        let limit = self.geometry.align_up(self.file_len);
        let Some(end) = end.filter(|end| *end <= limit) else {
            let length = self.file_len;
            self.broken(|| {
                format!("{what} at {start} ({bytes} bytes) lies outside the file of {length} bytes")
            });
            return Ok(false);
        };
        let g = self.geometry;
        for cluster in g.host_cluster(start).0..=g.host_cluster(HostOffset(end - 1)).0 {
            self.map.add(HostCluster(cluster))?;
        }
        Ok(true)
    }

    /// Counts clusters that nothing else may use.
    fn exclusive(&mut self, start: HostOffset, bytes: u64, what: &str) -> Result<bool> {
        if !self.range(start, bytes, what)? {
            return Ok(false);
        }
        let g = self.geometry;
        let clusters = g.host_cluster(start).0..(start.0 + bytes).div_ceil(g.cluster_size());
        for cluster in clusters {
            if self.map.get(HostCluster(cluster)) > 1 {
                let at = g.host_offset(HostCluster(cluster));
                self.report
                    .corruption(|| format!("{what} at {at} is used for something else too"));
            }
        }
        Ok(true)
    }

    fn l1_table(&mut self, at: HostOffset, entries: u64, active: bool, what: &str) -> Result<()> {
        if entries * 8 > MAX_TABLE || !at.0.is_multiple_of(self.geometry.cluster_size()) {
            self.broken(|| format!("{what} at {at} with {entries} entries is impossible"));
            return Ok(());
        }
        if !self.exclusive(at, entries * 8, what)? {
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation, reason = "bounded by MAX_TABLE")]
        let words = read_words(self.storage, at, entries as usize)?;
        for (index, word) in words.iter().enumerate() {
            match decode_l1(*word, &self.geometry) {
                Ok(None) => {}
                Ok(Some((table, _))) => {
                    if self.range(table, self.geometry.cluster_size(), "an L2 table")? {
                        self.l2_table(table, active)?;
                    }
                }
                Err(error) => self.broken(|| format!("{what}, entry {index}: {error}")),
            }
        }
        Ok(())
    }

    fn l2_table(&mut self, at: HostOffset, active: bool) -> Result<()> {
        let g = self.geometry;
        let per_entry = g.words_per_entry();
        let words = read_words(self.storage, at, (1 << g.l2_bits()) * per_entry)?;
        for (index, entry) in words.chunks_exact(per_entry).enumerate() {
            let decoded = match L2Entry::decode(entry[0], &g) {
                Ok(decoded) => decoded,
                Err(error) => {
                    self.broken(|| format!("L2 table at {at}, entry {index}: {error}"));
                    continue;
                }
            };
            let counted = match decoded {
                L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => false,
                L2Entry::Standard { host, .. }
                | L2Entry::Zero {
                    host: Some(host), ..
                } => self.range(host, g.cluster_size(), "guest data")?,
                L2Entry::Compressed(data) => {
                    self.report.compressed_clusters += u64::from(active);
                    self.compressed(data.host, data.length)?
                }
            };
            self.report.allocated_clusters += u64::from(active && counted);
            if g.extended_l2 && !matches!(decoded, L2Entry::Compressed(_)) {
                self.subclusters(at, index, entry[1]);
            }
        }
        Ok(())
    }

    /// The last sector of compressed data may reach past the end of the file.
    fn compressed(&mut self, host: HostOffset, length: u64) -> Result<bool> {
        let length = length.min(self.file_len.saturating_sub(host.0)).max(1);
        self.range(host, length, "compressed guest data")
    }

    fn subclusters(&mut self, at: HostOffset, index: usize, bitmap: u64) {
        if let Some(error) = (0..32).find_map(|bit| subcluster(bitmap, bit).err()) {
            self.broken(|| format!("L2 table at {at}, entry {index}: {error}"));
        }
    }

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

    fn snapshots(&mut self) -> Result<()> {
        let start = self.header.snapshots_offset;
        if self.header.snapshots == 0 {
            return Ok(());
        }
        let mut at = start.0;
        for number in 0..self.header.snapshots {
            let impossible = at
                .checked_add(SNAPSHOT_HEADER)
                .is_none_or(|e| e > self.file_len);
            if impossible || self.u32(at + 36)? > MAX_SNAPSHOT_EXTRA {
                self.broken(|| format!("snapshot {number} at {at:#x} cannot be read"));
                break;
            }
            let l1 = HostOffset(self.u64(at)?);
            let entries = u64::from(self.u32(at + 8)?);
            let names = u64::from(self.u16(at + 12)?) + u64::from(self.u16(at + 14)?);
            let length = SNAPSHOT_HEADER + u64::from(self.u32(at + 36)?) + names;
            self.l1_table(
                l1,
                entries,
                false,
                &format!("the L1 table of snapshot {number}"),
            )?;
            at += length.next_multiple_of(8);
        }
        self.exclusive(start, at - start.0, "the snapshot table")?;
        Ok(())
    }

    fn bitmaps(&mut self) -> Result<()> {
        if self.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let directory = self.header.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps {
                directory_offset,
                directory_size,
            } => Some((HostOffset(*directory_offset), *directory_size)),
            _ => None,
        });
        let Some((start, size)) = directory else {
            return Ok(());
        };
        if size > MAX_BITMAP_DIRECTORY {
            self.broken(|| format!("a bitmap directory of {size} bytes is impossible"));
            return Ok(());
        }
        if !self.exclusive(start, size, "the bitmap directory")? {
            return Ok(());
        }
        let end = start.0 + size;
        let mut at = start.0;
        while at + BITMAP_HEADER <= end {
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
        if entries * 8 > MAX_TABLE || !self.exclusive(at, entries * 8, "a bitmap table")? {
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation, reason = "bounded by MAX_TABLE")]
        for word in read_words(self.storage, at, entries as usize)? {
            let host = HostOffset(word & BITMAP_OFFSET_MASK);
            if host.0 != 0 {
                self.range(host, self.geometry.cluster_size(), "bitmap data")?;
            }
        }
        Ok(())
    }

    fn refcount_structures(&mut self) -> Result<()> {
        let g = self.geometry;
        let bytes = u64::from(self.header.reftable_clusters) << g.cluster_bits;
        let table = self.header.reftable_offset;
        if !self.exclusive(table, bytes, "the refcount table")? {
            return Ok(());
        }
        #[allow(
            clippy::cast_possible_truncation,
            reason = "bounded by the header's check"
        )]
        let words = read_words(self.storage, table, (bytes / 8) as usize)?;
        for (index, word) in (0..).zip(words) {
            let block = HostOffset(word & !0x1ff);
            if block.0 == 0 {
                continue;
            }
            if !block.0.is_multiple_of(g.cluster_size()) {
                self.report
                    .corruption(|| format!("refcount block {index} at {block} is unaligned"));
            } else if self.exclusive(block, g.cluster_size(), "a refcount block")? {
                self.refcount_blocks.push((index, block));
            }
        }
        Ok(())
    }
}
