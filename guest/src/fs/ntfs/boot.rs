//! The boot sector: the geometry of the volume.

use super::bytes::{u8_at, u16_at, u64_at};
use crate::error::{Error, Result};

/// Bytes of the boot sector that are read.
pub(super) const BOOT_SECTOR: usize = 512;
/// Largest exponent of sectors in a cluster: 2 MiB of 512-byte sectors.
const MAX_CLUSTER_SHIFT: u32 = 12;
const MAX_CLUSTER: u64 = 2 << 20;
const MAX_RECORD: u64 = 64 << 10;
const MAX_INDEX_BLOCK: u64 = 64 << 10;

/// Sizes and places that the boot sector names. Every size is a power of two.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// Bytes in a sector.
    pub(super) sector: u32,
    /// Bytes in a cluster.
    pub(super) cluster: u64,
    /// Bytes in a file record.
    pub(super) record: u32,
    /// Bytes in an index block, where an index does not say otherwise.
    pub(super) index_block: u32,
    /// Sectors of the volume.
    pub(super) sectors: u64,
    /// First cluster of $MFT.
    pub(super) mft: u64,
    /// First cluster of $MFTMirr.
    pub(super) mirror: u64,
    /// Serial number.
    pub(super) serial: u64,
}

/// Whether these first bytes are of an NTFS volume. Those of BitLocker say `-FVE-FS-`.
pub(super) fn is_ntfs(boot: &[u8]) -> bool {
    boot.get(3..11) == Some(b"NTFS    ".as_slice())
}

impl Geometry {
    /// Reads and checks the boot sector.
    ///
    /// # Errors
    /// `Corrupt` with the field that cannot be.
    pub(super) fn parse(boot: &[u8]) -> Result<Self> {
        let sector = u32::from(u16_at(boot, 0x0b)?);
        if !(256..=4096).contains(&sector) || !sector.is_power_of_two() {
            return Err(Error::corrupt(format!("NTFS boot sector: sectors of {sector} bytes")));
        }
        let per_cluster = u8_at(boot, 0x0d)?;
        let sectors_per_cluster = match per_cluster {
            1..=0x80 if per_cluster.is_power_of_two() => u64::from(per_cluster),
            0x81.. if per_cluster.wrapping_neg() <= 12 => 1 << per_cluster.wrapping_neg(),
            _ => {
                return Err(Error::corrupt(format!(
                    "NTFS boot sector: {per_cluster:#04x} sectors in a cluster (at most 1 << {MAX_CLUSTER_SHIFT})"
                )));
            }
        };
        let cluster = u64::from(sector) * sectors_per_cluster;
        if cluster > MAX_CLUSTER {
            return Err(Error::corrupt(format!("NTFS boot sector: clusters of {cluster} bytes")));
        }
        let size = |at: usize, largest: u64, what: &str| {
            let coded = u8_at(boot, at)?;
            let size = match coded {
                1..=0x7f => u64::from(coded) * cluster,
                0xe1.. => 1 << coded.wrapping_neg(),
                _ => 0,
            };
            u32::try_from(size)
                .ok()
                .filter(|size| {
                    size.is_power_of_two() && (512..=largest).contains(&u64::from(*size))
                })
                .ok_or_else(|| Error::corrupt(format!("NTFS boot sector: {what} of {size} bytes")))
        };
        let geometry = Self {
            sector,
            cluster,
            record: size(0x40, MAX_RECORD, "file records")?,
            index_block: size(0x44, MAX_INDEX_BLOCK, "index blocks")?,
            sectors: u64_at(boot, 0x28)?,
            mft: u64_at(boot, 0x30)?,
            mirror: u64_at(boot, 0x38)?,
            serial: u64_at(boot, 0x48)?,
        };
        if geometry.sectors.checked_mul(u64::from(sector)).is_none_or(|size| size > i64::MAX as u64)
            || geometry.sectors == 0
        {
            return Err(Error::corrupt(format!("NTFS boot sector: {} sectors", geometry.sectors)));
        }
        if geometry.mft >= geometry.clusters() {
            return Err(Error::corrupt(format!(
                "NTFS boot sector: $MFT at cluster {} of {}",
                geometry.mft,
                geometry.clusters()
            )));
        }
        Ok(geometry)
    }

    /// Bytes of the volume.
    pub(super) fn size(&self) -> u64 {
        self.sectors * u64::from(self.sector)
    }

    /// Clusters of the volume; the last may be cut short by the copy of the boot sector behind it.
    pub(super) fn clusters(&self) -> u64 {
        self.size().div_ceil(self.cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(per_cluster: u8, record: u8) -> Vec<u8> {
        let mut boot = vec![0; BOOT_SECTOR];
        boot[3..11].copy_from_slice(b"NTFS    ");
        boot[0x0b..0x0d].copy_from_slice(&512_u16.to_le_bytes());
        boot[0x0d] = per_cluster;
        boot[0x28..0x30].copy_from_slice(&1_000_000_u64.to_le_bytes());
        boot[0x30] = 4;
        boot[0x40] = record;
        boot[0x44] = 0xf4;
        boot
    }

    #[test]
    fn clusters_beyond_64_kib_are_coded_as_exponents() {
        for (coded, cluster) in
            [(1, 512), (8, 4096), (0x80, 64 << 10), (0xf8, 128 << 10), (0xf4, 2 << 20)]
        {
            let geometry = Geometry::parse(&boot(coded, 0xf6)).unwrap();
            assert_eq!(
                (geometry.cluster, geometry.record, geometry.index_block),
                (cluster, 1024, 4096)
            );
        }
        for coded in [0, 3, 0x81, 0xf3] {
            assert!(Geometry::parse(&boot(coded, 0xf6)).is_err(), "{coded:#x}");
        }
    }

    #[test]
    fn records_of_no_sensible_size_are_refused() {
        for coded in [0, 0x80, 0xe1, 0xff, 0x7f] {
            assert!(Geometry::parse(&boot(8, coded)).is_err(), "{coded:#x}");
        }
        assert_eq!(Geometry::parse(&boot(8, 1)).unwrap().record, 4096);
    }
}
