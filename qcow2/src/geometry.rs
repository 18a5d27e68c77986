//! The arithmetic of one image: where a guest byte's L1, L2 and refcount entries are.

use crate::types::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// Smallest cluster the format allows: 512 bytes.
pub(crate) const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster this engine (and qemu) takes: 2 MiB.
pub(crate) const MAX_CLUSTER_BITS: u32 = 21;
/// Bytes of an L2 table that are loaded, kept and written together.
const SLICE_BYTES_BITS: u32 = 12;
/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS_BITS: u32 = 5;

/// Sizes of one image, all derived from its header; copied freely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Version of the format: 2 or 3.
    pub(crate) version: u32,
    /// log2 of the cluster size in bytes.
    pub(crate) cluster_bits: u32,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// log2 of the width of a refcount in bits.
    pub(crate) refcount_order: u32,
    /// L2 entries are 128 bits wide and describe 32 subclusters.
    pub(crate) extended_l2: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// 64-bit words of an L2 entry: 1, or 2 when extended.
    pub(crate) fn words_per_entry(&self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    fn entry_bits(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// log2 of the entries of an L2 table.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.entry_bits()
    }

    /// log2 of the entries of an L2 slice: the part of a table handled as one.
    pub(crate) fn slice_bits(&self) -> u32 {
        self.cluster_bits.min(SLICE_BYTES_BITS) - self.entry_bits()
    }

    /// 64-bit words of an L2 slice.
    pub(crate) fn slice_words(&self) -> usize {
        (1 << self.slice_bits()) * self.words_per_entry()
    }

    /// Bytes of the virtual disk that one L2 slice describes.
    pub(crate) fn slice_span(&self) -> u64 {
        1 << (self.slice_bits() + self.cluster_bits)
    }

    /// Bytes of the virtual disk that one L2 table describes.
    pub(crate) fn table_span(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// log2 of the smallest separately allocated unit: the cluster, or the subcluster.
    pub(crate) fn unit_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - SUBCLUSTERS_BITS } else { self.cluster_bits }
    }

    /// Entries that the active L1 table needs for the virtual size.
    pub(crate) fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.table_span())
    }

    /// log2 of the refcounts in one refcount block.
    pub(crate) fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Largest refcount that an entry can hold.
    pub(crate) fn refcount_max(&self) -> u64 {
        let bits = 1u32 << self.refcount_order;
        if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
    }

    /// The cluster that holds a guest byte.
    pub(crate) fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// The cluster that holds a host byte.
    pub(crate) fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// The first byte of a host cluster.
    pub(crate) fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Position of a byte inside its cluster.
    pub(crate) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// `offset` rounded down to a cluster boundary.
    pub(crate) fn align_down(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// `offset` rounded up to a cluster boundary, saturating at the last boundary of `u64`.
    pub(crate) fn align_up(&self, offset: u64) -> u64 {
        self.align_down(offset.saturating_add(self.cluster_size() - 1))
    }
}
