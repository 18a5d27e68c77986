//! Zeroing and discarding without writing data, where the format allows it.

use super::Image;
use crate::error::Result;
use crate::ranges::Access;
use crate::table::entry::L2Entry;
use crate::table::segment::{Segment, SegmentKind};
use crate::types::{GuestOffset, HostOffset};

/// Zeroes that are written as data at once.
const ZERO_BUFFER: u64 = 1 << 20;

/// What becomes of the space of a zeroed range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// It may be given up.
    Unmap,
    /// It stays allocated, or is allocated now.
    KeepAllocated,
}

/// What a whole cluster becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Zero(ZeroMode),
    /// As if it had never been written, with no backing file to shine through.
    Unallocated,
}

impl Image {
    /// Whether [`Self::write_zeroes`] of whole clusters writes no data (version 3).
    pub fn zeroes_fast(&self) -> bool {
        self.geometry.version >= 3
    }

    /// Makes `length` bytes at `offset` read as zeroes. Whole clusters change in the mapping alone
    /// (version 3); in a range that is known to be zero already nothing changes.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<()> {
        let end = self.writable_bounds(offset, length)?;
        let result = self.zero_range(offset, end, mode);
        self.durability.note_write();
        result.map_err(|e| e.in_file(&self.path))
    }

    fn zero_range(&self, start: u64, end: u64, mode: ZeroMode) -> Result<()> {
        if self.geometry.version < 3 {
            return self.zero_by_writing(start, end, mode);
        }
        // The last cluster of the disk may be a part of one.
        let whole_end = if end == self.geometry.size { self.geometry.align_up(end) } else { end };
        let first = self.geometry.align_up(start);
        let last = self.geometry.align_down(whole_end);
        if first >= last {
            return self.zero_by_writing(start, end, mode);
        }
        self.zero_by_writing(start, first, mode)?;
        self.change_clusters(first, last, Target::Zero(mode))?;
        if last < end { self.zero_by_writing(last, end, mode) } else { Ok(()) }
    }

    /// Gives up the content of a range. Clusters inside it read as zeroes afterwards; the edges
    /// keep their content.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        let end = self.writable_bounds(offset, length)?;
        let whole_end = if end == self.geometry.size { self.geometry.align_up(end) } else { end };
        let first = self.geometry.align_up(offset);
        let last = self.geometry.align_down(whole_end);
        let target = match (&self.chain, self.geometry.version) {
            (None, _) => Target::Unallocated,
            (Some(_), 3..) => Target::Zero(ZeroMode::Unmap),
            // Nothing in version 2 hides the backing file without data.
            (Some(_), _) => return Ok(()),
        };
        if first >= last {
            return Ok(());
        }
        let result = self.change_clusters(first, last, target);
        self.durability.note_write();
        result.map_err(|e| e.in_file(&self.path))
    }

    /// Writes literal zeroes where the range does not read as zeroes already.
    fn zero_by_writing(&self, start: u64, end: u64, mode: ZeroMode) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation, reason = "bounded by ZERO_BUFFER")]
        let buffer = vec![0; (end - start).min(ZERO_BUFFER) as usize];
        let mut at = start;
        while at < end {
            let to = (at + ZERO_BUFFER).min(end);
            if mode == ZeroMode::KeepAllocated || !self.is_zero(at, to)? {
                #[allow(clippy::cast_possible_truncation, reason = "bounded by ZERO_BUFFER")]
                self.write_remapping(&buffer[..(to - at) as usize], at, to)?;
                self.checkpoint_if_full()?;
            }
            at = to;
        }
        Ok(())
    }

    /// Whether the mapping alone shows that the range reads as zeroes.
    fn is_zero(&self, start: u64, end: u64) -> Result<bool> {
        let _guard = self.enter_reading(start, end)?;
        let mut segments = Vec::new();
        self.meta().segments(&*self.storage, start, end, &mut segments)?;
        for segment in &segments {
            let zero = match segment.kind {
                SegmentKind::ZeroPlain | SegmentKind::ZeroAllocated { .. } => true,
                SegmentKind::Unallocated => self.chain_is_zero(segment.guest.0, segment.end())?,
                SegmentKind::Data { .. } | SegmentKind::Compressed(_) => false,
            };
            if !zero {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn chain_is_zero(&self, start: u64, end: u64) -> Result<bool> {
        self.chain.as_ref().map_or(Ok(true), |chain| chain.is_zero(start, end))
    }

    /// Changes the whole clusters of `first .. last` to `target`, one L2 table's span at a time.
    fn change_clusters(&self, first: u64, last: u64, target: Target) -> Result<()> {
        let span = self.geometry.table_span();
        let mut at = first;
        while at < last {
            let to = ((at / span + 1).saturating_mul(span)).min(last);
            self.change_table(at, to, target)?;
            self.checkpoint_if_full()?;
            at = to;
        }
        Ok(())
    }

    fn change_table(&self, first: u64, last: u64, target: Target) -> Result<()> {
        let g = self.geometry;
        let _guard = self.enter_changing(first, last, Access::Remap)?;
        let keeps = target == Target::Zero(ZeroMode::KeepAllocated);
        let absent = self.meta().table_is_absent(first / g.table_span())?;
        if absent && !keeps && self.chain_is_zero(first, last.min(g.size))? {
            return Ok(());
        }
        let mut segments = Vec::new();
        self.meta().segments(&*self.storage, first, last.min(g.size), &mut segments)?;
        for segment in &segments {
            let mut at = segment.guest.0;
            while at < segment.end() {
                self.change_cluster(at, segment, target).map_err(|e| e.at_guest(at))?;
                at += g.cluster_size();
            }
        }
        Ok(())
    }

    /// Changes the cluster at `at`, a part of `segment`.
    fn change_cluster(&self, at: u64, segment: &Segment, target: Target) -> Result<()> {
        use SegmentKind::{Compressed, Data, Unallocated, ZeroAllocated, ZeroPlain};
        let g = self.geometry;
        let guest = g.guest_cluster(GuestOffset(at));
        let inside = at - segment.guest.0;
        let cluster_end = (at + g.cluster_size()).min(g.size);
        let install =
            |word, keep: Option<HostOffset>| self.meta().install(&*self.storage, guest, word, keep);
        match (target, segment.kind) {
            (Target::Unallocated, Unallocated)
            | (Target::Zero(ZeroMode::Unmap), ZeroPlain)
            | (Target::Zero(ZeroMode::KeepAllocated), ZeroAllocated { copied: true, .. }) => Ok(()),
            (Target::Unallocated, _) => install(0, None),
            (Target::Zero(ZeroMode::Unmap), Unallocated) => {
                if self.chain_is_zero(at, cluster_end)? {
                    return Ok(());
                }
                install(L2Entry::zero_plain(), None)
            }
            (Target::Zero(ZeroMode::Unmap), _) => install(L2Entry::zero_plain(), None),
            (Target::Zero(ZeroMode::KeepAllocated), Data { host, copied: true }) => {
                let host = host + inside;
                install(L2Entry::zero_allocated(host), Some(host))
            }
            (
                Target::Zero(ZeroMode::KeepAllocated),
                Unallocated | ZeroPlain | Compressed(_) | Data { .. } | ZeroAllocated { .. },
            ) => {
                let run = self.meta().allocate(&*self.storage, 1)?;
                let host = g.host_offset(run.start);
                let installed = install(L2Entry::zero_allocated(host), None);
                if installed.is_err() {
                    self.meta().give_back(&*self.storage, run)?;
                }
                installed
            }
        }
    }
}
