//! L1 and L2 entries (QCOW2 specification, "Cluster mapping" and "Extended L2 Entries").

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::types::HostOffset;

/// Bit 63: the refcount of what the entry points to is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard descriptor: the cluster reads as zeroes.
const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of a standard descriptor that are reserved: 1 to 8 and 56 to 61.
const RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;
/// Bytes of a sector, the unit in which compressed data is measured.
const SECTOR: u64 = 512;

/// Where compressed data lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CompressedRef {
    /// First byte; not aligned.
    pub(crate) host: HostOffset,
    /// Bytes up to the end of the last sector used; the data may end earlier.
    pub(crate) length: u64,
}

/// What an L2 entry says of its cluster, subclusters aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum L2Entry {
    /// Nothing here: the backing file decides.
    Unallocated,
    /// Reads as zeroes; `host` is a preallocation, kept or not.
    Zero { host: Option<HostOffset>, copied: bool },
    /// Guest bytes at `host`.
    Standard { host: HostOffset, copied: bool },
    /// Compressed guest bytes.
    Compressed(CompressedRef),
}

impl L2Entry {
    /// Reads the first word of an entry.
    ///
    /// # Errors
    /// `Corrupt` for offsets off a cluster boundary and for reserved bits.
    pub(crate) fn decode(word: u64, geometry: &Geometry) -> Result<Self> {
        if word & COMPRESSED != 0 {
            let offset_bits = 62 - (geometry.cluster_bits - 8);
            let host = word & ((1 << offset_bits) - 1) & ((1 << 56) - 1);
            let sectors = ((word & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
            let length = sectors * SECTOR - (host % SECTOR);
            return Ok(Self::Compressed(CompressedRef { host: HostOffset(host), length }));
        }
        let host = word & OFFSET_MASK;
        if !host.is_multiple_of(geometry.cluster_size()) || word & RESERVED_MASK != 0 {
            return Err(Error::corrupt(format!(
                "L2 entry {word:#018x} is not aligned to a cluster or uses reserved bits; \
                 run a check on the image"
            )));
        }
        let copied = word & COPIED != 0;
        let zero = word & ZERO != 0;
        if zero && (geometry.version < 3 || geometry.extended_l2) {
            return Err(Error::corrupt(format!(
                "L2 entry {word:#018x} has the zero flag, which this image cannot use"
            )));
        }
        Ok(match (zero, host) {
            (true, 0) => Self::Zero { host: None, copied },
            (true, host) => Self::Zero { host: Some(HostOffset(host)), copied },
            (false, 0) => Self::Unallocated,
            (false, host) => Self::Standard { host: HostOffset(host), copied },
        })
    }

    /// The word of a cluster that holds data with refcount one.
    pub(crate) fn standard(host: HostOffset) -> u64 {
        host.0 | COPIED
    }

    /// The word of a cluster that reads as zeroes and owns no host cluster.
    pub(crate) fn zero_plain() -> u64 {
        ZERO
    }

    /// The word of a cluster that reads as zeroes and keeps a host cluster with refcount one.
    pub(crate) fn zero_allocated(host: HostOffset) -> u64 {
        host.0 | COPIED | ZERO
    }
}

/// What an L1 entry points to: the L2 table and whether its refcount is one.
///
/// # Errors
/// `Corrupt` for offsets off a cluster boundary.
pub(crate) fn decode_l1(word: u64, geometry: &Geometry) -> Result<Option<(HostOffset, bool)>> {
    let host = word & OFFSET_MASK;
    if !host.is_multiple_of(geometry.cluster_size()) {
        return Err(Error::corrupt(format!(
            "L1 entry {word:#018x} is not aligned to a cluster; run a check on the image"
        )));
    }
    Ok((host != 0).then_some((HostOffset(host), word & COPIED != 0)))
}

/// Status of subcluster `index` (0 to 31) from an extended entry's bitmap: (allocated, zero).
///
/// # Errors
/// `Corrupt` when both bits are set.
pub(crate) fn subcluster(bitmap: u64, index: u32) -> Result<(bool, bool)> {
    let allocated = bitmap >> index & 1 != 0;
    let zero = bitmap >> (index + 32) & 1 != 0;
    if allocated && zero {
        return Err(Error::corrupt(format!(
            "subcluster {index} is both allocated and zero (bitmap {bitmap:#018x}); \
             run a check on the image"
        )));
    }
    Ok((allocated, zero))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            version: 3,
            cluster_bits: 16,
            size: 1 << 30,
            refcount_order: 4,
            extended_l2: false,
        }
    }

    #[test]
    fn compressed_descriptor_counts_sectors_beyond_the_first() {
        // 62 - (16 - 8) = 54 offset bits; 2 additional sectors; data starts 100 bytes into a sector.
        let word = COMPRESSED | (2 << 54) | (0x50000 + 100);
        let L2Entry::Compressed(c) = L2Entry::decode(word, &geometry()).unwrap() else {
            panic!("not compressed")
        };
        assert_eq!(c.host, HostOffset(0x50064));
        assert_eq!(c.length, 3 * 512 - 100);
    }

    #[test]
    fn unaligned_and_reserved_bits_are_corrupt() {
        for word in [0x50200, 0x50002, 1 << 56 | 0x50000] {
            assert!(L2Entry::decode(word, &geometry()).is_err(), "{word:#x}");
        }
    }

    #[test]
    fn zero_flag_in_version_2_is_corrupt() {
        let v2 = Geometry { version: 2, ..geometry() };
        assert!(L2Entry::decode(1, &v2).is_err());
        assert!(L2Entry::decode(1, &geometry()).is_ok());
    }
}
