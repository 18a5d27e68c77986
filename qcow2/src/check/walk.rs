//! Following every reference in an image.

use std::collections::BTreeMap;

use super::refmap::{RefMap, Use};
use super::report::CheckReport;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::header::Header;
use crate::meta::read_words;
use crate::storage::Storage;
use crate::table::entry::{L2Entry, decode_l1};
use crate::types::{HostCluster, HostOffset};

/// Largest L1 or bitmap table that is believed, in bytes: 32 MiB.
pub(super) const MAX_TABLE: u64 = 32 << 20;
/// Most L2 tables that are followed: 4 PiB of disk at 64 KiB clusters, 512 MiB of memory.
const MAX_L2_TABLES: usize = 8 << 20;
/// Bits of an L1 entry that are reserved: 0 to 8 and 56 to 62.
const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a refcount table entry that are reserved: 0 to 8.
const REFTABLE_RESERVED_MASK: u64 = 0x1ff;
/// Bits of an extended entry that mark subclusters as allocated.
const SUBCLUSTERS_ALLOCATED: u64 = 0xffff_ffff;

/// How often L1 entries name an L2 table.
#[derive(Debug, Clone, Copy, Default)]
struct Uses {
    active: u32,
    snapshots: u32,
}

/// Where metadata was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Not wholly in the file.
    Outside,
    /// In clusters of its own.
    Own,
    /// In clusters that hold other metadata too.
    Taken,
}

/// A count of all references, and what was found on the way.
pub(super) struct Walk<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) header: &'a Header,
    pub(super) geometry: Geometry,
    pub(super) file_len: u64,
    pub(super) map: RefMap,
    pub(super) report: CheckReport,
    /// Something that is referenced could not be followed: counts may be too low.
    pub(super) unreadable: bool,
    /// (index in the refcount table, offset) of each refcount block.
    pub(super) refcount_blocks: Vec<(u64, HostOffset)>,
    /// L2 tables by offset. Each is read once, however many L1 entries name it.
    tables: BTreeMap<u64, Uses>,
}

impl<'a> Walk<'a> {
    /// Counts every reference in the image.
    ///
    /// # Errors
    /// `Io`; `Unsupported` where counting would take too much memory. What is wrong with the image
    /// is in the report.
    pub(super) fn new(storage: &'a dyn Storage, header: &'a Header) -> Result<Self> {
        let file_len = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        let geometry = header.geometry;
        let report = CheckReport {
            total_clusters: geometry.size.div_ceil(geometry.cluster_size()),
            ..CheckReport::default()
        };
        let mut walk = Self {
            storage,
            header,
            geometry,
            file_len,
            map: RefMap::default(),
            report,
            unreadable: false,
            refcount_blocks: Vec::new(),
            tables: BTreeMap::new(),
        };
        walk.everything()?;
        Ok(walk)
    }

    fn everything(&mut self) -> Result<()> {
        let header = self.header;
        self.exclusive(HostOffset(0), self.geometry.cluster_size(), "the header")?;
        self.refcount_structures()?;
        let l1 = (header.l1_offset, u64::from(header.l1_entries));
        self.l1_table(l1.0, l1.1, true, "the active L1 table")?;
        self.snapshots()?;
        self.bitmaps()?;
        for (at, uses) in std::mem::take(&mut self.tables) {
            self.l2_table(HostOffset(at), uses)?;
        }
        for cluster in self.map.overlaps() {
            let at = self.geometry.host_offset(cluster);
            self.report
                .corruption(|| format!("the cluster at {at} holds metadata and something else"));
        }
        self.report.image_end_offset = self.map.end() << self.geometry.cluster_bits;
        Ok(())
    }

    /// Notes a reference that cannot be followed.
    pub(super) fn broken(&mut self, sentence: impl FnOnce() -> String) {
        self.unreadable = true;
        self.report.corruption(sentence);
    }

    /// Counts the clusters of a range; `false`, with a finding, where it is not in the file. The
    /// last cluster may be there in part.
    pub(super) fn range(
        &mut self,
        start: HostOffset,
        bytes: u64,
        times: u32,
        usage: Use,
        what: &str,
    ) -> Result<bool> {
        if bytes == 0 {
            return Ok(true);
        }
        let limit = self.geometry.align_up(self.file_len);
        let end = start.0.checked_add(bytes).filter(|end| start.0 < self.file_len && *end <= limit);
        let Some(end) = end else {
            let length = self.file_len;
            self.broken(|| {
                format!("{what} at {start} ({bytes} bytes) lies outside the file of {length} bytes")
            });
            return Ok(false);
        };
        for cluster in self.clusters(start, end) {
            self.map.add(HostCluster(cluster), times, usage)?;
        }
        Ok(true)
    }

    /// Numbers of the clusters of `start .. end`, which is not empty.
    fn clusters(&self, start: HostOffset, end: u64) -> std::ops::RangeInclusive<u64> {
        let g = self.geometry;
        g.host_cluster(start).0..=g.host_cluster(HostOffset(end - 1)).0
    }

    /// Counts clusters that nothing else may use.
    pub(super) fn exclusive(&mut self, start: HostOffset, bytes: u64, what: &str) -> Result<Place> {
        if !self.range(start, bytes, 1, Use::Exclusive, what)? {
            return Ok(Place::Outside);
        }
        let taken = bytes > 0
            && self
                .clusters(start, start.0 + bytes)
                .any(|cluster| self.map.get(HostCluster(cluster)) > 1);
        Ok(if taken { Place::Taken } else { Place::Own })
    }

    /// Counts an L1 table and remembers the L2 tables it names.
    pub(super) fn l1_table(
        &mut self,
        at: HostOffset,
        entries: u64,
        active: bool,
        what: &str,
    ) -> Result<()> {
        if entries * 8 > MAX_TABLE || !at.0.is_multiple_of(self.geometry.cluster_size()) {
            self.broken(|| format!("{what} at {at} with {entries} entries is impossible"));
            return Ok(());
        }
        match self.exclusive(at, entries * 8, what)? {
            Place::Outside => return Ok(()),
            Place::Taken if !active => {
                self.broken(|| format!("{what} at {at} lies over other metadata"));
                return Ok(());
            }
            Place::Taken | Place::Own => {}
        }
        #[allow(clippy::cast_possible_truncation, reason = "bounded by MAX_TABLE")]
        let words = read_words(self.storage, at, entries as usize)?;
        for (index, word) in words.iter().enumerate() {
            if word & L1_RESERVED_MASK != 0 {
                self.report.corruption(|| {
                    format!("{what}, entry {index} ({word:#018x}) uses reserved bits")
                });
            }
            match decode_l1(*word, &self.geometry) {
                Ok(None) => {}
                Ok(Some((table, _))) => self.note_table(table, active)?,
                Err(error) => self.broken(|| format!("{what}, entry {index}: {error}")),
            }
        }
        Ok(())
    }

    fn note_table(&mut self, at: HostOffset, active: bool) -> Result<()> {
        let size = self.geometry.cluster_size();
        if !self.range(at, size, 1, Use::Table, "an L2 table")? {
            return Ok(());
        }
        if self.tables.len() >= MAX_L2_TABLES && !self.tables.contains_key(&at.0) {
            return Err(Error::unsupported(
                "the image has more L2 tables than a check can follow; check it with qemu-img",
            ));
        }
        let uses = self.tables.entry(at.0).or_default();
        let count = if active { &mut uses.active } else { &mut uses.snapshots };
        *count = count.saturating_add(1);
        Ok(())
    }

    fn l2_table(&mut self, at: HostOffset, uses: Uses) -> Result<()> {
        let g = self.geometry;
        let per_entry = g.words_per_entry();
        let times = uses.active.saturating_add(uses.snapshots);
        let words = read_words(self.storage, at, (1 << g.l2_bits()) * per_entry)?;
        let mut expected = None;
        for (index, entry) in words.chunks_exact(per_entry).enumerate() {
            let decoded = match L2Entry::decode(entry[0], &g) {
                Ok(decoded) => decoded,
                Err(error) => {
                    self.broken(|| format!("L2 table at {at}, entry {index}: {error}"));
                    continue;
                }
            };
            let active = u64::from(uses.active);
            match decoded {
                L2Entry::Unallocated => {}
                L2Entry::Zero { host: None, .. } => self.report.zero_clusters += active,
                L2Entry::Standard { host, .. } | L2Entry::Zero { host: Some(host), .. } => {
                    if self.range(host, g.cluster_size(), times, Use::Data, "guest data")? {
                        let elsewhere = expected.is_some_and(|e| e != host);
                        self.report.allocated_clusters += active;
                        self.report.fragmented_clusters += active * u64::from(elsewhere);
                        let zero = matches!(decoded, L2Entry::Zero { .. });
                        self.report.zero_clusters += active * u64::from(zero);
                        expected = Some(host + g.cluster_size());
                    }
                }
                L2Entry::Compressed(data) => {
                    // The last sector may reach past the end of the file.
                    let rest = self.file_len.saturating_sub(data.host.0);
                    let length = data.length.min(rest).max(1);
                    if self.range(data.host, length, times, Use::Data, "compressed data")? {
                        self.report.allocated_clusters += active;
                        self.report.compressed_clusters += active;
                        self.report.fragmented_clusters += active;
                    }
                }
            }
            if g.extended_l2 {
                self.subclusters(at, index, decoded, entry[1]);
            }
        }
        Ok(())
    }

    /// The bitmap of an extended entry must fit the entry.
    fn subclusters(&mut self, at: HostOffset, index: usize, entry: L2Entry, bitmap: u64) {
        let wrong = match entry {
            L2Entry::Compressed(_) => bitmap != 0,
            L2Entry::Standard { .. } => bitmap & bitmap >> 32 & SUBCLUSTERS_ALLOCATED != 0,
            L2Entry::Unallocated | L2Entry::Zero { .. } => bitmap & SUBCLUSTERS_ALLOCATED != 0,
        };
        if wrong {
            self.report.corruption(|| {
                format!(
                    "L2 table at {at}, entry {index}: the subcluster bitmap {bitmap:#018x} \
                     contradicts the entry or itself"
                )
            });
        }
    }

    fn refcount_structures(&mut self) -> Result<()> {
        let g = self.geometry;
        let bytes = u64::from(self.header.reftable_clusters) << g.cluster_bits;
        let table = self.header.reftable_offset;
        if self.exclusive(table, bytes, "the refcount table")? == Place::Outside {
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation, reason = "bounded by the header's check")]
        let words = read_words(self.storage, table, (bytes / 8) as usize)?;
        for (index, word) in (0..).zip(words) {
            if word & REFTABLE_RESERVED_MASK != 0 {
                self.report.corruption(|| {
                    format!("refcount table entry {index} ({word:#018x}) uses reserved bits")
                });
            }
            let block = HostOffset(word & !REFTABLE_RESERVED_MASK);
            if block.0 == 0 {
                continue;
            }
            if !block.0.is_multiple_of(g.cluster_size()) {
                self.report
                    .corruption(|| format!("refcount block {index} at {block} is unaligned"));
            } else if block.0 >= self.file_len {
                self.report.corruption(|| {
                    format!("refcount block {index} at {block} lies outside the file")
                });
            } else {
                self.exclusive(block, g.cluster_size(), "a refcount block")?;
                self.refcount_blocks.push((index, block));
            }
        }
        Ok(())
    }
}
