//! The main boot region of exFAT.

use crate::error::{Error, Result};
use crate::fs::fat::bytes::{u8_at, u16_at, u32_at, u64_at};
use crate::source::Source;

/// Sectors that the boot checksum covers; it fills the one after them.
const COVERED: usize = 11;

/// What the boot sector says, in bytes.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) size: u64,
    pub(crate) cluster: u64,
    pub(crate) clusters: u32,
    /// First byte of the table that counts.
    pub(crate) table: u64,
    /// First byte of cluster 2.
    pub(crate) heap: u64,
    /// First cluster of the root directory.
    pub(crate) root: u32,
    pub(crate) serial: u32,
    /// Whether the second table and bitmap count (TexFAT).
    pub(crate) second: bool,
    pub(crate) dirty: bool,
    pub(crate) failing: bool,
}

/// Whether a sector is meant as such a boot sector.
pub(crate) fn looks_like(sector: &[u8; 512]) -> bool {
    sector[3..11] == *b"EXFAT   " && u16_at(sector, 510) == 0xaa55
}

impl Boot {
    /// Reads it, and its checksum.
    ///
    /// # Errors
    /// `Corrupt`; `Unsupported` for another version; `Io`.
    pub(crate) fn read(source: &dyn Source) -> Result<Self> {
        let wrong = |what: &str| Error::corrupt(format!("exFAT boot sector: {what}"));
        let mut sector = [0; 512];
        source.read_at(&mut sector, 0)?;
        let (bytes_shift, cluster_shift) = (u8_at(&sector, 108), u8_at(&sector, 109));
        if !(9..=12).contains(&bytes_shift) || cluster_shift > 25 - bytes_shift {
            return Err(wrong("the sizes of sectors and clusters are none"));
        }
        let bytes = 1_usize << bytes_shift;
        let mut region = vec![0; bytes * (COVERED + 1)];
        source.read_at(&mut region, 0)?;
        let (covered, sums) = region.split_at(bytes * COVERED);
        let changing = |at: usize| matches!(at, 106 | 107 | 112);
        let fixed = covered.iter().enumerate().filter(|(at, _)| !changing(*at));
        let sum = checksum32(fixed.map(|(_, byte)| *byte));
        if sums.chunks_exact(4).any(|found| u32_at(found, 0) != sum) {
            return Err(wrong("its checksum does not fit"));
        }
        if u16_at(&sector, 104) >> 8 != 1 {
            return Err(Error::unsupported("exFAT of another version than 1"));
        }
        let tables = u8_at(&sector, 110);
        let flags = u16_at(&sector, 106);
        let second = flags & 1 != 0;
        if !(1..=2).contains(&tables) || (second && tables != 2) {
            return Err(wrong("the number of its tables is none"));
        }
        let clusters = u32_at(&sector, 92);
        let heap = u64::from(u32_at(&sector, 88)) << bytes_shift;
        let length = u64::from(u32_at(&sector, 84)) << bytes_shift;
        let table = u64::from(u32_at(&sector, 80)) << bytes_shift;
        let size = u64_at(&sector, 72).checked_mul(1 << bytes_shift);
        let size = size.ok_or_else(|| wrong("its volume has no size"))?;
        let end = heap + (u64::from(clusters) << (bytes_shift + cluster_shift));
        let fits = (u64::from(clusters) + 2) * 4 <= length
            && table + length * u64::from(tables) <= heap
            && end <= size;
        if !fits || clusters == 0 || clusters > 0xffff_fff5 {
            return Err(wrong("tables and clusters do not fit into the volume"));
        }
        Ok(Self {
            size,
            cluster: 1 << (bytes_shift + cluster_shift),
            clusters,
            table: table + if second { length } else { 0 },
            heap,
            root: u32_at(&sector, 96),
            serial: u32_at(&sector, 100),
            second,
            dirty: flags & 2 != 0,
            failing: flags & 4 != 0,
        })
    }
}

/// The checksum of boot regions and up-case tables.
pub(crate) fn checksum32(bytes: impl Iterator<Item = u8>) -> u32 {
    bytes.fold(0, |sum: u32, byte| sum.rotate_right(1).wrapping_add(u32::from(byte)))
}
