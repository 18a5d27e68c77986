//! The metadata of an image in memory: L1, cached L2 slices, refcounts and the allocator, with what
//! of them is not on disk yet.
//!
//! Nothing here touches the disk's metadata except by [`Batch`]: a consistent snapshot of all
//! changes, written in the order that `docs/on-disk.md` proves.

use std::collections::{BTreeMap, BTreeSet};

use crate::alloc::{Allocator, Run};
use crate::cache::Cache;
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::refcount::Refcounts;
use crate::storage::Storage;
use crate::table::entry::{COPIED, L2Entry, decode_l1};
use crate::table::segment::{Segment, map_slice};
use crate::types::{GuestCluster, HostCluster, HostOffset};

/// Host clusters and their counts: present in images open for writing only.
pub(crate) struct Space {
    pub(crate) refcounts: Refcounts,
    pub(crate) alloc: Allocator,
}

/// See the module's text.
pub(crate) struct Meta {
    geometry: Geometry,
    l1: Vec<u64>,
    l1_offset: HostOffset,
    /// L1 entries that are not on disk, with the epoch of the change.
    dirty_l1: BTreeMap<u64, u64>,
    /// L2 tables that no L1 entry on disk names: their slices need no order among the writes.
    unpublished: BTreeSet<u64>,
    slices: Cache<Box<[u64]>>,
    space: Option<Space>,
    /// Host clusters that lost a reference in memory, not yet on disk.
    frees: Vec<HostCluster>,
    /// Number of the batch that the next change belongs to.
    epoch: u64,
}

/// Bytes for one place of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Put {
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

/// A snapshot of every change, in the three steps in which it is written.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    epoch: u64,
    /// First: what nothing on disk refers to yet, and refcounts, which may only be too high.
    pub(crate) unreferenced: Vec<Put>,
    /// Then: the refcount table's entries, or the header's pointer to a moved table.
    pub(crate) refcount_pointers: Vec<Put>,
    /// Last: L2 slices and L1 entries that guests' data hangs on.
    pub(crate) mapping: Vec<Put>,
    /// Where (start, end) the refcount table is once the header points to it.
    pub(crate) moved_reftable: Option<(u64, u64)>,
    slices: Vec<u64>,
    blocks: Vec<u64>,
    l1: Vec<u64>,
    frees: Vec<HostCluster>,
}

impl Meta {
    /// Takes over what open has read.
    pub(crate) fn new(
        geometry: Geometry,
        l1: Vec<u64>,
        l1_offset: HostOffset,
        space: Option<Space>,
        cache_bytes: usize,
    ) -> Self {
        let slices = (cache_bytes / (geometry.slice_words() * 8)).max(4);
        Self {
            geometry,
            l1,
            l1_offset,
            dirty_l1: BTreeMap::new(),
            unpublished: BTreeSet::new(),
            slices: Cache::new(slices),
            space,
            frees: Vec::new(),
            epoch: 1,
        }
    }

    /// The allocator and the refcounts.
    ///
    /// # Errors
    /// `ReadOnly` where the image is not open for writing.
    pub(crate) fn space(&mut self) -> Result<&mut Space> {
        self.space.as_mut().ok_or_else(|| {
            Error::new(crate::ErrorKind::ReadOnly, "the image is open for reading only")
        })
    }

    /// Whether dirty metadata takes so much of the caches that it should be written out.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        let full = |dirty: usize, capacity: usize| dirty >= capacity - capacity / 4;
        full(self.slices.dirty_count(), self.slices.capacity())
            || self.space.as_ref().is_some_and(|s| {
                let blocks = &s.refcounts.blocks;
                full(blocks.dirty_count(), blocks.capacity())
            })
    }

    /// Whether anything is not on disk yet.
    pub(crate) fn is_dirty(&self) -> bool {
        self.slices.dirty_count() > 0
            || !self.dirty_l1.is_empty()
            || !self.frees.is_empty()
            || self.space.as_ref().is_some_and(|s| s.refcounts.is_dirty())
    }

    /// Bytes of metadata held in memory.
    pub(crate) fn memory(&self) -> usize {
        let blocks = self.space.as_ref().map_or(0, |s| s.refcounts.blocks.len());
        #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
        let cluster = self.geometry.cluster_size() as usize;
        self.slices.len() * self.geometry.slice_words() * 8 + blocks * cluster + self.l1.len() * 8
    }

    fn slice_of(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.geometry.slice_bits()
    }

    /// L1 index of slice `slice`, and the byte offset of the slice inside its table.
    fn table_of(&self, slice: u64) -> (u64, u64) {
        let bits = self.geometry.l2_bits() - self.geometry.slice_bits();
        let inside = slice & ((1 << bits) - 1);
        (slice >> bits, inside * self.geometry.slice_words() as u64 * 8)
    }

    /// The L2 table of L1 entry `index` and whether its refcount is one.
    fn table_at(&self, index: u64) -> Result<Option<(HostOffset, bool)>> {
        let word = usize::try_from(index).ok().and_then(|i| self.l1.get(i)).copied().unwrap_or(0);
        decode_l1(word, &self.geometry)
    }

    /// Loads slice `slice`; `false` where it has no table.
    fn load_slice(&mut self, storage: &dyn Storage, slice: u64) -> Result<bool> {
        if self.slices.contains(slice) {
            return Ok(true);
        }
        let (index, inside) = self.table_of(slice);
        let Some((table, _)) = self.table_at(index)? else {
            return Ok(false);
        };
        let length = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        if table.0 + inside >= length {
            return Err(Error::corrupt(format!(
                "the L2 table at {table} lies past the end of the file ({length} bytes); the file \
                 is truncated, restore it from another copy"
            )));
        }
        let words = read_words(storage, table + inside, self.geometry.slice_words())?;
        self.slices.insert(slice, words);
        Ok(true)
    }

    /// Whether no cluster of L1 entry `index` is allocated in this image.
    pub(crate) fn table_is_absent(&self, index: u64) -> Result<bool> {
        Ok(self.table_at(index)?.is_none())
    }

    /// Appends the segments of `start .. end` to `out`.
    pub(crate) fn segments(
        &mut self,
        storage: &dyn Storage,
        start: u64,
        end: u64,
        out: &mut Vec<Segment>,
    ) -> Result<()> {
        let span = self.geometry.slice_span();
        let mut at = start;
        while at < end {
            let slice = at / span;
            let slice_end = ((slice + 1) * span).min(end);
            let loaded = self.load_slice(storage, slice)?;
            let words = if loaded { self.slices.get(slice) } else { None };
            map_slice(&self.geometry, words.map(|w| &**w), at, slice_end, out)?;
            at = slice_end;
        }
        Ok(())
    }

    /// Takes up to `want` host clusters.
    pub(crate) fn allocate(&mut self, storage: &dyn Storage, want: u64) -> Result<Run> {
        let epoch = self.epoch;
        let space = self.space()?;
        let run = space.alloc.allocate(storage, &mut space.refcounts, want, epoch)?;
        let retired = std::mem::take(&mut space.refcounts.retired);
        self.frees.extend(retired);
        Ok(run)
    }

    /// Gives back clusters that were never mapped.
    pub(crate) fn give_back(&mut self, storage: &dyn Storage, run: Run) -> Result<()> {
        let epoch = self.epoch;
        let space = self.space()?;
        for cluster in run.start.0..run.start.0 + run.count {
            if space.refcounts.decrement(storage, HostCluster(cluster), epoch)? {
                space.alloc.release(HostCluster(cluster));
            }
        }
        Ok(())
    }

    /// Replaces the L2 entry of `cluster`; what the old entry held loses its reference, except
    /// `keep`, which the new entry took over.
    ///
    /// # Errors
    /// `NoSpace` for a new L2 table, `Io`, `Corrupt`. The mapping is then as before.
    pub(crate) fn install(
        &mut self,
        storage: &dyn Storage,
        cluster: GuestCluster,
        word: u64,
        keep: Option<HostOffset>,
    ) -> Result<()> {
        let slice = self.slice_of(cluster);
        let (table, _) = self.table_of(slice);
        self.own_table(storage, table)?;
        self.load_slice(storage, slice)?;
        #[allow(clippy::cast_possible_truncation, reason = "masked to a slice's entries")]
        let index = (cluster.0 & ((1 << self.geometry.slice_bits()) - 1)) as usize;
        let epoch = self.epoch;
        let Some(words) = self.slices.get_dirty(slice, epoch) else {
            return Err(Error::corrupt("an L2 table vanished"));
        };
        let old = std::mem::replace(&mut words[index], word);
        self.drop_references(old, keep)
    }

    fn drop_references(&mut self, old: u64, keep: Option<HostOffset>) -> Result<()> {
        let g = self.geometry;
        match L2Entry::decode(old, &g)? {
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => {}
            L2Entry::Standard { host, .. } | L2Entry::Zero { host: Some(host), .. } => {
                if keep != Some(host) {
                    self.frees.push(g.host_cluster(host));
                }
            }
            L2Entry::Compressed(data) => {
                let first = g.host_cluster(data.host).0;
                let last = g.host_cluster(data.host + (data.length - 1)).0;
                self.frees.extend((first..=last).map(HostCluster));
            }
        }
        Ok(())
    }

    /// Makes L1 entry `index` name a table with refcount one, new or copied where needed.
    fn own_table(&mut self, storage: &dyn Storage, index: u64) -> Result<()> {
        let old = match self.table_at(index)? {
            Some((_, true)) => return Ok(()),
            old => old,
        };
        let run = self.allocate(storage, 1)?;
        let home = self.geometry.host_offset(run.start);
        if let Err(error) = self.fill_table(storage, home, run.fresh, old.map(|(table, _)| table)) {
            self.give_back(storage, run)?;
            return Err(error);
        }
        if let Some((table, _)) = old {
            self.frees.push(self.geometry.host_cluster(table));
        }
        let Some(word) = usize::try_from(index).ok().and_then(|i| self.l1.get_mut(i)) else {
            return Err(Error::corrupt("the L1 table is too short for the disk"));
        };
        *word = home.0 | COPIED;
        self.dirty_l1.insert(index, self.epoch);
        self.unpublished.insert(index);
        Ok(())
    }

    /// Gives a table, which nothing refers to yet, its first content.
    fn fill_table(
        &self,
        storage: &dyn Storage,
        home: HostOffset,
        fresh: bool,
        copy_of: Option<HostOffset>,
    ) -> Result<()> {
        #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        match copy_of {
            Some(old) => storage
                .read_at(&mut bytes, old.0)
                .map_err(|e| Error::io(format!("cannot read the L2 table at {old}"), e))?,
            None if fresh => return Ok(()),
            None => {}
        }
        storage
            .write_at(&bytes, home.0)
            .map_err(|e| Error::io(format!("cannot write an L2 table at {home}"), e))
    }

    /// Takes a snapshot of all changes. Later changes belong to the next batch.
    pub(crate) fn take_batch(&mut self) -> Batch {
        let mut batch = Batch { epoch: self.epoch, ..Batch::default() };
        self.epoch += 1;
        let Some(space) = &self.space else {
            return batch;
        };
        for (index, bytes) in space.refcounts.blocks.dirty_entries() {
            if let Some(offset) = space.refcounts.block_offset(index) {
                batch.unreferenced.push(Put { offset: offset.0, bytes: bytes.clone() });
                batch.blocks.push(index);
            }
        }
        let table = space.refcounts.table_offset.0;
        if space.refcounts.moved.is_some() {
            let bytes = space.refcounts.encode_table();
            batch.moved_reftable = Some((table, table + bytes.len() as u64));
            batch.unreferenced.push(Put { offset: table, bytes });
            batch.refcount_pointers.push(header_pointer(&space.refcounts));
        } else {
            for index in space.refcounts.dirty_table.keys() {
                let bytes = space.refcounts.table_entry(*index).to_vec();
                batch.refcount_pointers.push(Put { offset: table + *index as u64 * 8, bytes });
            }
        }
        for (slice, words) in self.slices.dirty_entries() {
            let (index, inside) = self.table_of(slice);
            let Ok(Some((home, _))) = self.table_at(index) else {
                continue;
            };
            let bytes = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            let put = Put { offset: home.0 + inside, bytes };
            if self.unpublished.contains(&index) {
                batch.unreferenced.push(put);
            } else {
                batch.mapping.push(put);
            }
            batch.slices.push(slice);
        }
        for index in self.dirty_l1.keys() {
            let word = usize::try_from(*index).ok().and_then(|i| self.l1.get(i)).copied();
            let bytes = word.unwrap_or(0).to_be_bytes().to_vec();
            batch.mapping.push(Put { offset: self.l1_offset.0 + index * 8, bytes });
            batch.l1.push(*index);
        }
        batch.frees = std::mem::take(&mut self.frees);
        batch
    }

    /// The batch's mapping is about to be written: from now on its tables count as referenced.
    pub(crate) fn publish(&mut self, batch: &Batch) {
        for index in &batch.l1 {
            self.unpublished.remove(index);
        }
    }

    /// Everything in the batch is durable: it is clean now, and what it freed can be used again.
    pub(crate) fn commit(&mut self, storage: &dyn Storage, batch: Batch) -> Result<()> {
        let done = batch.epoch;
        self.slices.mark_clean(batch.slices.into_iter(), done);
        self.dirty_l1.retain(|_, since| *since > done);
        let epoch = self.epoch;
        let Some(space) = &mut self.space else {
            return Ok(());
        };
        space.refcounts.blocks.mark_clean(batch.blocks.into_iter(), done);
        space.refcounts.dirty_table.retain(|_, since| *since > done);
        if space.refcounts.moved.is_some_and(|since| since <= done) {
            space.refcounts.moved = None;
        }
        for cluster in batch.frees {
            if space.refcounts.decrement(storage, cluster, epoch)? {
                space.alloc.release(cluster);
            }
        }
        Ok(())
    }

    /// The batch could not be written: its changes stay for the next one.
    pub(crate) fn abort(&mut self, batch: Batch) {
        self.frees.extend(batch.frees);
    }
}

/// The header's refcount table pointer: offset and length, adjacent and in one sector.
fn header_pointer(refcounts: &Refcounts) -> Put {
    let mut bytes = refcounts.table_offset.0.to_be_bytes().to_vec();
    #[allow(clippy::cast_possible_truncation, reason = "a table of 2^32 clusters fits no file")]
    bytes.extend_from_slice(&(refcounts.table_clusters as u32).to_be_bytes());
    Put { offset: crate::header::field::REFTABLE_OFFSET, bytes }
}

/// Reads `count` big-endian words at `offset`.
///
/// # Errors
/// `Io`.
pub(crate) fn read_words(
    storage: &dyn Storage,
    offset: HostOffset,
    count: usize,
) -> Result<Box<[u64]>> {
    let mut bytes = vec![0; count * 8];
    storage
        .read_at(&mut bytes, offset.0)
        .map_err(|e| Error::io(format!("cannot read a table at {offset}"), e))?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}
