//! Which host cluster comes next: freed ones first, then holes of the file, then its end.

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::refcount::Refcounts;
use crate::storage::Storage;
use crate::types::{HostCluster, HostOffset};

/// Smallest and largest first piece by which the file is grown ahead of its use, in bytes; between
/// them it is a part of the disk's size.
const FIRST_RESERVE: (u64, u64) = (1 << 20, 32 << 20);
/// The first piece is one of so many parts of the disk.
const FIRST_RESERVE_SHARE: u64 = 64;
/// Largest piece, in bytes. Growing waits for the direct writes in flight: seldom is better.
const MAX_RESERVE: u64 = 256 << 20;
/// Largest host offset that L1 and L2 entries can hold, exclusive: 64 PiB.
const MAX_HOST: u64 = 1 << 56;

/// Contiguous host clusters, counted as used, not yet mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: HostCluster,
    pub(crate) count: u64,
    /// The clusters were never written: they read as zeroes.
    pub(crate) fresh: bool,
}

/// State of the search for free clusters.
pub(crate) struct Allocator {
    geometry: Geometry,
    /// Clusters freed since open, free on disk too; a hint that is checked against the refcounts.
    freed: Vec<HostCluster>,
    /// Holes are searched from here to `scan_end`, once.
    scan: u64,
    scan_end: u64,
    /// First cluster past everything.
    next: u64,
    /// Bytes of the file that are reserved already.
    reserved: u64,
    /// Clusters past the end read as zeroes.
    fresh_end: bool,
}

impl Allocator {
    /// Looks at how large the storage is.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) fn new(
        storage: &dyn Storage,
        geometry: Geometry,
        refcounts: &mut Refcounts,
    ) -> Result<Self> {
        let fresh_end = storage.grows_with_zeroes();
        let len = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        let next = if fresh_end {
            len.div_ceil(geometry.cluster_size())
        } else {
            refcounts.used_end(storage)?
        };
        Ok(Self {
            geometry,
            freed: Vec::new(),
            scan: 0,
            scan_end: next,
            next,
            reserved: len,
            fresh_end,
        })
    }

    /// Takes up to `want` (at least 1) contiguous clusters and counts them as used.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Corrupt`.
    pub(crate) fn allocate(
        &mut self,
        storage: &dyn Storage,
        refcounts: &mut Refcounts,
        want: u64,
        epoch: u64,
    ) -> Result<Run> {
        debug_assert!(want > 0, "a run has at least one cluster");
        if let Some(run) = self.take_free(storage, refcounts, want)? {
            for cluster in run.start.0..run.start.0 + run.count {
                refcounts.set(storage, HostCluster(cluster), 1, epoch)?;
            }
            return Ok(run);
        }
        self.append(storage, refcounts, want, epoch)
    }

    fn take_free(
        &mut self,
        storage: &dyn Storage,
        refcounts: &mut Refcounts,
        want: u64,
    ) -> Result<Option<Run>> {
        while let Some(first) = self.freed.pop() {
            if refcounts.get(storage, first)? != 0 {
                continue;
            }
            let mut run = Run { start: first, count: 1, fresh: false };
            // Runs are freed in ascending order, so they come back in descending order.
            while run.count < want
                && run.start.0 > 0
                && self.freed.last() == Some(&HostCluster(run.start.0 - 1))
                && refcounts.get(storage, HostCluster(run.start.0 - 1))? == 0
            {
                self.freed.pop();
                run.start.0 -= 1;
                run.count += 1;
            }
            return Ok(Some(run));
        }
        while self.scan < self.scan_end {
            match refcounts.find_free(storage, self.scan, self.scan_end, want)? {
                Ok((start, count)) => {
                    self.scan = start + count;
                    return Ok(Some(Run { start: HostCluster(start), count, fresh: false }));
                }
                Err(go_on) => self.scan = go_on,
            }
        }
        Ok(None)
    }

    /// Takes clusters at the end of the file, with the refcount blocks that they need.
    fn append(
        &mut self,
        storage: &dyn Storage,
        refcounts: &mut Refcounts,
        want: u64,
        epoch: u64,
    ) -> Result<Run> {
        // A block takes the first cluster that nothing counts; the cluster behind it can lie in the
        // next block's range.
        while !refcounts.covers(HostCluster(self.next)) {
            if let Some(entries) = refcounts.table_needs(HostCluster(self.next)) {
                self.move_table(storage, refcounts, entries, epoch)?;
                continue;
            }
            let block = HostCluster(self.next);
            self.reserve(storage, 1)?;
            refcounts.add_block(block, self.geometry.host_offset(block), epoch);
            refcounts.set(storage, block, 1, epoch)?;
            self.next += 1;
        }
        // Stay inside one refcount block: the rest is another run.
        let bits = self.geometry.refblock_bits();
        let block_end = ((self.next >> bits) + 1) << bits;
        let count = want.min(block_end - self.next);
        self.reserve(storage, count)?;
        let run = Run { start: HostCluster(self.next), count, fresh: self.fresh_end };
        for cluster in self.next..self.next + count {
            refcounts.set(storage, HostCluster(cluster), 1, epoch)?;
        }
        self.next += count;
        Ok(run)
    }

    /// Moves the refcount table to the end of the file, at least twice as long.
    ///
    /// The table is contiguous and may span the ranges of several blocks, so the blocks that count
    /// it (and themselves) follow behind it instead of starting each range.
    fn move_table(
        &mut self,
        storage: &dyn Storage,
        refcounts: &mut Refcounts,
        entries: usize,
        epoch: u64,
    ) -> Result<()> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let bits = self.geometry.refblock_bits();
        let wanted = (entries as u64 + 1).max(refcounts.table_len() as u64 * 2);
        let table = wanted.div_ceil(per_cluster) + 1;
        #[allow(clippy::cast_possible_truncation, reason = "memory bounds it first")]
        refcounts.grow_table((table * per_cluster) as usize);

        let start = self.next;
        let uncovered = |end: u64| -> Vec<HostCluster> {
            (start >> bits..=(end - 1) >> bits)
                .map(|block| HostCluster((block << bits).max(start)))
                .filter(|first| !refcounts.covers(*first))
                .collect()
        };
        let mut blocks = Vec::new();
        loop {
            let needed = uncovered(start + table + blocks.len() as u64);
            if needed.len() == blocks.len() {
                break;
            }
            blocks = needed;
        }
        let count = table + blocks.len() as u64;
        self.reserve(storage, count)?;
        for (i, first) in blocks.into_iter().enumerate() {
            let home = self.geometry.host_offset(HostCluster(start + table + i as u64));
            refcounts.add_block(first, home, epoch);
        }
        for cluster in start..start + count {
            refcounts.set(storage, HostCluster(cluster), 1, epoch)?;
        }
        self.next += count;
        refcounts.relocate_table(self.geometry.host_offset(HostCluster(start)), table, epoch);
        Ok(())
    }

    /// Grows the file over the next `count` clusters, ahead of need while it is cheap.
    fn reserve(&mut self, storage: &dyn Storage, count: u64) -> Result<()> {
        let end = (self.next + count) << self.geometry.cluster_bits;
        if end > MAX_HOST {
            return Err(Error::new(ErrorKind::NoSpace, "the image file would exceed 64 PiB"));
        }
        if end <= self.reserved {
            return Ok(());
        }
        let disk = self.geometry.size / FIRST_RESERVE_SHARE;
        let ahead = (end / 2).clamp(disk.clamp(FIRST_RESERVE.0, FIRST_RESERVE.1), MAX_RESERVE);
        let goal = self.geometry.align_up(end + ahead);
        let from = self.reserved;
        if self.fresh_end && storage.reserve(from, goal - from).is_ok() {
            self.reserved = goal;
            return Ok(());
        }
        // Too little room for comfort: ask for what is needed, and report its failure.
        storage
            .reserve(from, end - from)
            .map_err(|e| Error::io(format!("cannot grow the image file to {end} bytes"), e))?;
        self.reserved = end;
        Ok(())
    }

    /// `clusters` are free, on disk too: they may be used again.
    pub(crate) fn release(&mut self, cluster: HostCluster) {
        self.freed.push(cluster);
    }

    /// Where the file may be cut: the end of everything in use.
    pub(crate) fn end(&self) -> HostOffset {
        self.geometry.host_offset(HostCluster(self.next))
    }

    /// Whether the file was grown ahead of its use.
    pub(crate) fn has_slack(&self) -> bool {
        self.reserved > self.end().0
    }
}
