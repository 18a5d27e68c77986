//! MBR partition tables, with logical partitions.

use std::collections::BTreeSet;

use super::{Partition, Table, types};
use crate::bytes::{le32, take};
use crate::error::{Error, Result};
use crate::source::Source;

const SECTOR: u64 = 512;
/// Logical partitions of one disk.
const LOGICAL_MAX: u32 = 256;
const GPT_PROTECTIVE: u8 = 0xee;
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

#[derive(Debug, Clone, Copy)]
struct Entry {
    status: u8,
    kind: u8,
    start: u64,
    sectors: u64,
}

/// A sector with the signature of a boot sector.
pub(super) struct Sector([u8; 512]);

impl Sector {
    /// The first sector of a disk; `None` where it has no signature.
    pub(super) fn read(disk: &dyn Source) -> Result<Option<Self>> {
        Self::read_from(disk, 0)
    }

    fn read_from(disk: &dyn Source, lba: u64) -> Result<Option<Self>> {
        let offset = lba.saturating_mul(SECTOR);
        if offset.saturating_add(SECTOR) > disk.size() {
            return Ok(None);
        }
        let mut bytes = [0; 512];
        disk.read_at(&mut bytes, offset)?;
        Ok((bytes[510..] == [0x55, 0xaa]).then_some(Self(bytes)))
    }

    fn entries(&self) -> [Entry; 4] {
        [446, 462, 478, 494].map(|at| {
            let bytes: [u8; 16] = take(&self.0, at);
            Entry {
                status: bytes[0],
                kind: bytes[4],
                start: u64::from(le32(&bytes, 8)),
                sectors: u64::from(le32(&bytes, 12)),
            }
        })
    }

    fn used(&self) -> impl Iterator<Item = (u32, Entry)> + '_ {
        (1..).zip(self.entries()).filter(|(_, entry)| entry.kind != 0 && entry.sectors != 0)
    }

    /// Whether it is the boot sector of a file system, for certain.
    pub(super) fn is_file_system(&self) -> bool {
        [b"NTFS    ", b"EXFAT   ", b"-FVE-FS-"].iter().any(|name| self.0[3..11] == name[..])
    }

    /// Whether its entries can be partitions of a disk of `size` bytes: there is one, all have a known
    /// status, none begins at the sector itself, no two overlap, and one begins on the disk.
    pub(super) fn is_table(&self, size: u64) -> bool {
        if self.entries().iter().any(|entry| entry.status & 0x7f != 0) {
            return false;
        }
        let mut used: Vec<Entry> = self.used().map(|(_, entry)| entry).collect();
        if used.iter().any(|entry| entry.start == 0) {
            return false;
        }
        let hybrid = used.iter().any(|entry| entry.kind == GPT_PROTECTIVE);
        used.sort_by_key(|entry| entry.start);
        let apart = used.windows(2).all(|two| two[0].start + two[0].sectors <= two[1].start);
        (apart || hybrid) && used.first().is_some_and(|entry| entry.start * SECTOR < size)
    }

    /// Whether it says that the true table is a GPT.
    pub(super) fn protects_gpt(&self) -> bool {
        self.used().any(|(_, entry)| entry.kind == GPT_PROTECTIVE)
    }

    /// Whether it has partitions besides saying so.
    pub(super) fn is_hybrid(&self) -> bool {
        self.protects_gpt() && self.used().any(|(_, entry)| entry.kind != GPT_PROTECTIVE)
    }

    /// Its partitions, and the logical ones.
    pub(super) fn table(&self, disk: &dyn Source) -> Result<Table> {
        let mut table = Table::default();
        if self.is_hybrid() {
            table.notes.push("the GPT cannot be read: the hybrid MBR beside it was".into());
        }
        for (number, entry) in self.used().filter(|(_, entry)| entry.kind != GPT_PROTECTIVE) {
            if !EXTENDED.contains(&entry.kind) {
                table.partitions.push(partition(disk.size(), number, entry.start, entry));
            }
        }
        let mut number = 5;
        for (_, extended) in self.used().filter(|(_, entry)| EXTENDED.contains(&entry.kind)) {
            if let Err(error) = logical(disk, extended.start, &mut number, &mut table) {
                if error.kind == crate::ErrorKind::Io {
                    return Err(error);
                }
                table.notes.push(error.message);
            }
        }
        Ok(table)
    }
}

fn partition(size: u64, number: u32, start: u64, entry: Entry) -> Partition {
    let (start, length) = (start * SECTOR, entry.sectors * SECTOR);
    Partition::new(size, number, start, length, types::of_mbr(entry.kind))
}

/// Follows the chain of an extended partition: each sector has a logical partition, whose start counts
/// from that sector, and the next one of the chain, which counts from the extended partition.
fn logical(disk: &dyn Source, start: u64, number: &mut u32, table: &mut Table) -> Result<()> {
    let mut seen = BTreeSet::new();
    let mut at = start;
    loop {
        if !seen.insert(at) {
            return Err(Error::corrupt("the chain of logical partitions runs in a circle"));
        }
        let Some(sector) = Sector::read_from(disk, at)? else {
            let message = format!("the chain of logical partitions breaks off at sector {at}");
            return Err(Error::corrupt(message));
        };
        let mut next = None;
        for (_, entry) in sector.used() {
            if EXTENDED.contains(&entry.kind) {
                next = next.or(Some(start + entry.start));
            } else if *number - 5 >= LOGICAL_MAX {
                let message =
                    format!("more than {LOGICAL_MAX} logical partitions: the rest is left out");
                return Err(Error::limit(message));
            } else {
                table.partitions.push(partition(disk.size(), *number, at + entry.start, entry));
                *number += 1;
            }
        }
        match next {
            // An empty chain may go on nowhere: two sectors without partitions are no circle yet.
            Some(_) if seen.len() > LOGICAL_MAX as usize => {
                return Err(Error::limit("the chain of logical partitions is too long"));
            }
            Some(next) => at = next,
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::put;
    use super::*;
    use crate::source::MemoryDisk;

    fn entry(disk: &mut MemoryDisk, at: usize, kind: u8, start: u32, sectors: u32) {
        put(disk, at + 4, &[kind]);
        put(disk, at + 8, &start.to_le_bytes());
        put(disk, at + 12, &sectors.to_le_bytes());
        let sector = at / 512 * 512;
        put(disk, sector + 510, &[0x55, 0xaa]);
    }

    /// A primary partition, and two logical ones.
    pub(in super::super) fn disk() -> MemoryDisk {
        let mut disk = MemoryDisk { bytes: vec![0; 400 * 512], disk: 0 };
        entry(&mut disk, 446, 0x83, 10, 50);
        entry(&mut disk, 462, 0x05, 100, 300);
        entry(&mut disk, 100 * 512 + 446, 0x83, 5, 20);
        entry(&mut disk, 100 * 512 + 462, 0x05, 100, 100);
        entry(&mut disk, 200 * 512 + 446, 0x07, 5, 1000);
        disk
    }

    fn table(disk: &MemoryDisk) -> Table {
        super::super::read(disk).unwrap().unwrap()
    }

    #[test]
    fn logical_partitions_are_found_where_their_sectors_are_and_cut_to_the_disk() {
        let found: Vec<_> = table(&disk())
            .partitions
            .iter()
            .map(|p| (p.number, p.start / 512, p.length / 512, p.cut))
            .collect();
        assert_eq!(found, [(1, 10, 50, false), (5, 105, 20, false), (6, 205, 195, true)]);
    }

    #[test]
    fn a_chain_in_a_circle_ends_and_is_told() {
        let mut disk = disk();
        entry(&mut disk, 200 * 512 + 462, 0x05, 0, 100);
        let found = table(&disk);
        assert_eq!(found.partitions.len(), 3);
        assert!(found.notes[0].contains("circle"));
    }

    #[test]
    fn boot_sectors_of_file_systems_are_no_tables() {
        let mut ntfs = disk();
        put(&mut ntfs, 3, b"NTFS    ");
        let mut fat = disk();
        put(&mut fat, 446, b"Non-system disk, press any key to go on, and so on......");
        let mut blank = disk();
        blank.bytes[446..510].fill(0);
        for disk in [ntfs, fat, blank] {
            assert_eq!(super::super::read(&disk).unwrap(), None);
        }
    }

    #[test]
    fn a_protective_entry_without_a_gpt_is_an_error_unless_it_is_hybrid() {
        let mut disk = disk();
        entry(&mut disk, 478, GPT_PROTECTIVE, 1, 9);
        assert_eq!(table(&disk).partitions.len(), 3);
        disk.bytes[446..478].fill(0);
        assert_eq!(super::super::read(&disk).unwrap_err().kind, crate::ErrorKind::Corrupt);
    }
}
