//! The boot sector of FAT12, FAT16 and FAT32 with its BIOS parameter block (BPB).

use super::bytes::{u8_at, u16_at, u32_at};
use super::table::Width;
use crate::error::{Error, Result};

/// Bytes of the boot sector that are looked at.
pub(crate) const LENGTH: usize = 512;

/// Where the root directory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RootPlace {
    /// At one place, before the clusters.
    Fixed {
        /// First byte.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// In the chain from this cluster on.
    Chain(u32),
}

/// What the boot sector says, in bytes.
#[derive(Debug)]
pub(crate) struct Boot {
    pub(crate) width: Width,
    pub(crate) size: u64,
    pub(crate) cluster: u64,
    pub(crate) clusters: u32,
    /// First byte of the table that counts.
    pub(crate) table: u64,
    /// First byte of cluster 2.
    pub(crate) heap: u64,
    pub(crate) root: RootPlace,
    pub(crate) serial: Option<u32>,
    /// In the code page of the machine that wrote it.
    pub(crate) label: [u8; 11],
    /// Whether Linux or Windows NT marked the volume as in use here.
    pub(crate) dirty: bool,
}

/// Whether a sector is meant as such a boot sector.
pub(crate) fn looks_like(sector: &[u8; LENGTH]) -> bool {
    u16_at(sector, 510) == 0xaa55
        && matches!(sector[0], 0xeb | 0xe9)
        && (Boot::parse(sector).is_ok()
            || [54, 82].iter().any(|at| sector[*at..*at + 5].starts_with(b"FAT")))
}

impl Boot {
    /// Reads it.
    ///
    /// # Errors
    /// `Corrupt`; `Unsupported` for a later version of FAT32.
    pub(crate) fn parse(sector: &[u8; LENGTH]) -> Result<Self> {
        let wrong = |what: &str| Error::corrupt(format!("FAT boot sector: {what}"));
        let bytes = u64::from(u16_at(sector, 11));
        let per_cluster = u64::from(u8_at(sector, 13));
        let reserved = u64::from(u16_at(sector, 14));
        let tables = u64::from(u8_at(sector, 16));
        let root_entries = u64::from(u16_at(sector, 17));
        if !bytes.is_power_of_two() || !(512..=4096).contains(&bytes) {
            return Err(wrong("sectors of neither 512, 1024, 2048 nor 4096 bytes"));
        }
        if !per_cluster.is_power_of_two() || reserved == 0 || !(1..=4).contains(&tables) {
            return Err(wrong("the numbers of sectors or tables are none"));
        }
        if !matches!(u8_at(sector, 21), 0xf0 | 0xf8..) {
            return Err(wrong("the media type is none"));
        }
        let either = |small: u16, large: u32| match small {
            0 => u64::from(large),
            small => u64::from(small),
        };
        let sectors = either(u16_at(sector, 19), u32_at(sector, 32));
        let large = u16_at(sector, 22) == 0;
        let table_sectors = either(u16_at(sector, 22), u32_at(sector, 36));
        let root_sectors = (root_entries * 32).div_ceil(bytes);
        let before = reserved + tables * table_sectors + root_sectors;
        let clusters = sectors.saturating_sub(before) / per_cluster;
        if table_sectors == 0 || clusters == 0 || large != (root_entries == 0) {
            return Err(wrong("the sizes of tables, root directory and volume do not fit"));
        }
        let width = match clusters {
            _ if large => Width::Fat32,
            0..4085 => Width::Fat12,
            4085..65_525 => Width::Fat16,
            _ => return Err(wrong("too many clusters for a table of 16 bits")),
        };
        // A table may be too short for the last clusters; those are then none.
        let held = match width {
            Width::Fat12 => table_sectors * bytes * 2 / 3,
            Width::Fat16 => table_sectors * bytes / 2,
            Width::Fat32 | Width::ExFat => table_sectors * bytes / 4,
        };
        let clusters = u32::try_from(clusters.min(held.saturating_sub(2))).unwrap_or(u32::MAX);
        if clusters == 0 || clusters > 0x0fff_fff5 {
            return Err(wrong("no number of clusters that its tables can hold"));
        }
        let flags = if large { u16_at(sector, 40) } else { 0 };
        let active = if flags & 0x80 == 0 { 0 } else { u64::from(flags & 15) };
        if active >= tables {
            return Err(wrong("the active table is not among its tables"));
        }
        if large && u16_at(sector, 42) != 0 {
            return Err(Error::unsupported("FAT32 of another version than 0.0"));
        }
        let root = match large {
            true => RootPlace::Chain(u32_at(sector, 44) & 0x0fff_ffff),
            false => RootPlace::Fixed {
                start: (reserved + tables * table_sectors) * bytes,
                length: root_entries * 32,
            },
        };
        let extended = if large { 64 } else { 36 };
        let signature = u8_at(sector, extended + 2);
        let mut label = [b' '; 11];
        if signature == 0x29 {
            label.copy_from_slice(&sector[extended + 7..extended + 18]);
        }
        let serial = matches!(signature, 0x28 | 0x29).then(|| u32_at(sector, extended + 3));
        Ok(Self {
            width,
            size: sectors * bytes,
            cluster: per_cluster * bytes,
            clusters,
            table: (reserved + active * table_sectors) * bytes,
            heap: before * bytes,
            root,
            serial,
            label,
            dirty: serial.is_some() && u8_at(sector, extended + 1) & 1 != 0,
        })
    }
}
