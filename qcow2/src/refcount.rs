//! Reference counts of host clusters: the refcount table and its blocks, in memory.
//!
//! Changes stay here until [`crate::image`]'s flush writes them, always before any L2 or L1 entry
//! that relies on them.

use std::collections::BTreeMap;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::storage::Storage;
use crate::types::{HostCluster, HostOffset};

/// Bits of a refcount table entry that hold an offset.
const TABLE_OFFSET_MASK: u64 = !0x1ff;
/// Refcount blocks kept in memory: each covers 2 GiB of file with the default geometry.
const CACHED_BLOCKS_BYTES: u64 = 8 << 20;

/// Reads refcount `index` of a block.
pub(crate) fn read_entry(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let bit = index * width;
            u64::from(block[bit / 8] >> (bit % 8)) & ((1 << width) - 1)
        }
        _ => {
            let width = 1usize << (order - 3);
            block[index * width..(index + 1) * width]
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Stores refcount `index` of a block. `value` fits the width.
#[allow(clippy::cast_possible_truncation, reason = "masked to the entry's width")]
pub(crate) fn write_entry(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let bit = index * width;
            let mask = ((1u16 << width) - 1) as u8;
            let byte = &mut block[bit / 8];
            *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        }
        _ => {
            let width = 1usize << (order - 3);
            block[index * width..(index + 1) * width]
                .copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

/// Refcount metadata of one image open for writing.
pub(crate) struct Refcounts {
    geometry: Geometry,
    /// Offsets of the refcount blocks; 0 where there is none.
    table: Vec<u64>,
    pub(crate) table_offset: HostOffset,
    pub(crate) table_clusters: u64,
    /// Table entries that are not on disk, with the epoch of the change.
    pub(crate) dirty_table: BTreeMap<usize, u64>,
    /// The whole table moved in this epoch: the header must follow.
    pub(crate) moved: Option<u64>,
    /// Clusters of former tables: free once the header no longer names them.
    pub(crate) retired: Vec<HostCluster>,
    pub(crate) blocks: Cache<Vec<u8>>,
}

impl Refcounts {
    /// Loads the table at `table_offset`; blocks follow as they are needed.
    ///
    /// # Errors
    /// `Io`, or `Corrupt` for a misaligned block.
    pub(crate) fn load(
        storage: &dyn Storage,
        geometry: Geometry,
        table_offset: HostOffset,
        table_clusters: u32,
    ) -> Result<Self> {
        let clusters = u64::from(table_clusters);
        #[allow(clippy::cast_possible_truncation, reason = "the header bounds the table to 8 MiB")]
        let mut bytes = vec![0; (clusters << geometry.cluster_bits) as usize];
        storage
            .read_at(&mut bytes, table_offset.0)
            .map_err(|e| Error::io("cannot read the refcount table", e))?;
        let mut table = Vec::with_capacity(bytes.len() / 8);
        for word in bytes.as_chunks::<8>().0 {
            let offset = u64::from_be_bytes(*word) & TABLE_OFFSET_MASK;
            if !offset.is_multiple_of(geometry.cluster_size()) {
                return Err(Error::corrupt(format!(
                    "refcount block at {offset:#x} is not aligned to a cluster; run a check"
                )));
            }
            table.push(offset);
        }
        #[allow(clippy::cast_possible_truncation, reason = "a small constant")]
        let capacity = (CACHED_BLOCKS_BYTES >> geometry.cluster_bits).max(4) as usize;
        Ok(Self {
            geometry,
            table,
            table_offset,
            table_clusters: clusters,
            dirty_table: BTreeMap::new(),
            moved: None,
            retired: Vec::new(),
            blocks: Cache::new(capacity),
        })
    }

    /// Refuses a table that names blocks past the end of a file of `length` bytes: writing there
    /// would only make the damage larger.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(crate) fn require_inside(&self, length: u64) -> Result<()> {
        match self.table.iter().find(|offset| **offset >= length) {
            None => Ok(()),
            Some(offset) => Err(Error::corrupt(format!(
                "the refcount block at {offset:#x} lies past the end of the file ({length} \
                 bytes); nothing was changed, run a check with repair"
            ))),
        }
    }

    /// Whether anything is not on disk yet.
    pub(crate) fn is_dirty(&self) -> bool {
        self.blocks.dirty_count() > 0 || !self.dirty_table.is_empty() || self.moved.is_some()
    }

    /// Number of the block that counts `cluster`, and the index inside it.
    #[allow(clippy::cast_possible_truncation, reason = "masked to a block's entries")]
    fn locate(&self, cluster: HostCluster) -> (u64, usize) {
        let bits = self.geometry.refblock_bits();
        (cluster.0 >> bits, (cluster.0 & ((1 << bits) - 1)) as usize)
    }

    /// Offset of block `index`, where there is one.
    pub(crate) fn block_offset(&self, index: u64) -> Option<HostOffset> {
        let offset = *self.table.get(usize::try_from(index).ok()?)?;
        (offset != 0).then_some(HostOffset(offset))
    }

    /// Entries of the table in memory.
    pub(crate) fn table_len(&self) -> usize {
        self.table.len()
    }

    /// Whether `cluster` has a block that can count it.
    pub(crate) fn covers(&self, cluster: HostCluster) -> bool {
        self.block_offset(self.locate(cluster).0).is_some()
    }

    fn load_block(&mut self, storage: &dyn Storage, index: u64) -> Result<bool> {
        if self.blocks.contains(index) {
            return Ok(true);
        }
        let Some(offset) = self.block_offset(index) else {
            return Ok(false);
        };
        #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        storage
            .read_at(&mut bytes, offset.0)
            .map_err(|e| Error::io(format!("cannot read the refcount block at {offset}"), e))?;
        self.blocks.insert(index, bytes);
        Ok(true)
    }

    /// The refcount of `cluster`; 0 where no block counts it.
    pub(crate) fn get(&mut self, storage: &dyn Storage, cluster: HostCluster) -> Result<u64> {
        let (block, index) = self.locate(cluster);
        if !self.load_block(storage, block)? {
            return Ok(0);
        }
        let order = self.geometry.refcount_order;
        Ok(self.blocks.get(block).map_or(0, |bytes| read_entry(bytes, order, index)))
    }

    /// Sets the refcount of `cluster`, whose block must exist.
    pub(crate) fn set(
        &mut self,
        storage: &dyn Storage,
        cluster: HostCluster,
        value: u64,
        epoch: u64,
    ) -> Result<()> {
        let (block, index) = self.locate(cluster);
        let order = self.geometry.refcount_order;
        if value > self.geometry.refcount_max() {
            return Err(Error::new(ErrorKind::NoSpace, "refcount would exceed its width"));
        }
        self.load_block(storage, block)?;
        match self.blocks.get_dirty(block, epoch) {
            Some(bytes) => {
                write_entry(bytes, order, index, value);
                Ok(())
            }
            None => Err(Error::corrupt(format!(
                "host cluster {:#x} is used but has no refcount block; run a check with repair",
                cluster.0
            ))),
        }
    }

    /// Takes away one reference; returns whether the cluster is free now.
    pub(crate) fn decrement(
        &mut self,
        storage: &dyn Storage,
        cluster: HostCluster,
        epoch: u64,
    ) -> Result<bool> {
        match self.get(storage, cluster)? {
            0 => Err(Error::corrupt(format!(
                "host cluster {:#x} is used but its refcount is 0; run a check with repair",
                cluster.0
            ))),
            count => {
                self.set(storage, cluster, count - 1, epoch)?;
                Ok(count == 1)
            }
        }
    }

    /// First run of free, counted clusters in `from .. to`, at most `want` long; else the cluster
    /// to go on from.
    pub(crate) fn find_free(
        &mut self,
        storage: &dyn Storage,
        from: u64,
        to: u64,
        want: u64,
    ) -> Result<std::result::Result<(u64, u64), u64>> {
        let bits = self.geometry.refblock_bits();
        let order = self.geometry.refcount_order;
        let block = from >> bits;
        let block_end = ((block + 1) << bits).min(to);
        if !self.load_block(storage, block)? {
            return Ok(Err(block_end));
        }
        let Some(bytes) = self.blocks.get(block) else {
            return Ok(Err(block_end));
        };
        let mut run = None;
        for cluster in from..block_end {
            #[allow(clippy::cast_possible_truncation, reason = "masked to a block's entries")]
            let index = (cluster & ((1 << bits) - 1)) as usize;
            match (read_entry(bytes, order, index), &mut run) {
                (0, None) => run = Some((cluster, 1)),
                (0, Some((_, length))) => *length += 1,
                (_, None) => {}
                (_, Some(_)) => break,
            }
            if run.is_some_and(|(_, length)| length == want) {
                break;
            }
        }
        Ok(run.ok_or(block_end))
    }

    /// Makes `offset` the block that counts the range of `cluster`; it starts all zero.
    pub(crate) fn add_block(&mut self, cluster: HostCluster, offset: HostOffset, epoch: u64) {
        let (block, _) = self.locate(cluster);
        #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
        self.blocks.insert(block, vec![0; self.geometry.cluster_size() as usize]);
        self.blocks.get_dirty(block, epoch);
        #[allow(clippy::cast_possible_truncation, reason = "the table was grown over it")]
        let index = block as usize;
        self.table[index] = offset.0;
        self.dirty_table.insert(index, epoch);
    }

    /// Table length in entries that block `index` needs, if the table is too short for it.
    pub(crate) fn table_needs(&self, cluster: HostCluster) -> Option<usize> {
        let (block, _) = self.locate(cluster);
        let index = usize::try_from(block).unwrap_or(usize::MAX - 1);
        (index >= self.table.len()).then_some(index + 1)
    }

    /// Lengthens the table in memory.
    pub(crate) fn grow_table(&mut self, entries: usize) {
        self.table.resize(entries.max(self.table.len()), 0);
    }

    /// The table lives at `offset` from now on; the former one is retired.
    pub(crate) fn relocate_table(&mut self, offset: HostOffset, clusters: u64, epoch: u64) {
        let first = self.geometry.host_cluster(self.table_offset);
        self.retired.extend((0..self.table_clusters).map(|i| first + i));
        self.table_offset = offset;
        self.table_clusters = clusters;
        self.moved = Some(epoch);
    }

    /// The table in its stored form.
    pub(crate) fn encode_table(&self) -> Vec<u8> {
        self.table.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    /// Stored form of one table entry.
    pub(crate) fn table_entry(&self, index: usize) -> [u8; 8] {
        self.table[index].to_be_bytes()
    }

    /// One past the last cluster that is counted as used.
    pub(crate) fn used_end(&mut self, storage: &dyn Storage) -> Result<u64> {
        let bits = self.geometry.refblock_bits();
        let order = self.geometry.refcount_order;
        for block in (0..self.table.len() as u64).rev() {
            if !self.load_block(storage, block)? {
                continue;
            }
            let Some(bytes) = self.blocks.get(block) else {
                continue;
            };
            let last = (0..1usize << bits).rev().find(|i| read_entry(bytes, order, *i) != 0);
            if let Some(index) = last {
                return Ok((block << bits) + index as u64 + 1);
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_reads_back_what_was_written_and_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0u8; 512];
            let entries = (512 * 8) >> order;
            let max = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            for index in [0, 1, 7, entries - 1] {
                write_entry(&mut block, order, index, max);
            }
            write_entry(&mut block, order, 1, 0);
            assert_eq!(read_entry(&block, order, 0), max, "order {order}");
            assert_eq!(read_entry(&block, order, 1), 0);
            assert_eq!(read_entry(&block, order, 2), 0);
            assert_eq!(read_entry(&block, order, 7), max);
            assert_eq!(read_entry(&block, order, entries - 1), max);
        }
    }

    #[test]
    fn sub_byte_refcounts_start_at_the_least_significant_bit() {
        let mut block = vec![0u8; 512];
        write_entry(&mut block, 0, 0, 1);
        write_entry(&mut block, 0, 9, 1);
        assert_eq!(&block[..2], &[0b1, 0b10]);
    }
}
