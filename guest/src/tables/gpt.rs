//! GUID partition tables (UEFI specification, chapter 5), for sectors of 512 and of 4096 bytes.

use super::{PARTITIONS_MAX, Partition, Table, types};
use crate::bytes::{le32, le64, take};
use crate::crc::crc32;
use crate::error::{Error, Result};
use crate::source::Source;

const SIGNATURE: &[u8] = b"EFI PART";
/// Bytes of the header that have a meaning.
const HEADER: usize = 92;
/// Bytes of an entry: 128 times a power of two, and no more than this.
const ENTRY_MAX: usize = 4096;

/// What a search for a GPT came to.
pub(super) enum Found {
    /// A table whose checksums hold.
    Table(Table),
    /// There is one, and it cannot be used.
    Damaged(Error),
    /// There is none.
    Nothing,
}

/// Looks for a table: the primary one, and where that is damaged the one at the disk's end.
pub(super) fn read(disk: &dyn Source) -> Result<Found> {
    let mut damage = None;
    for sector in [512, 4096] {
        let backup = (disk.size() / sector).saturating_sub(1);
        for lba in [1, backup] {
            if lba == 0 || (lba + 1).checked_mul(sector).is_none_or(|end| end > disk.size()) {
                continue;
            }
            match read_one(disk, sector, lba) {
                Ok(Some(mut table)) => {
                    if lba != 1 {
                        let why = "the GPT at the start of the disk is damaged: its copy at the end \
                                   was read";
                        table.notes.push(why.into());
                    }
                    return Ok(Found::Table(table));
                }
                Ok(None) => {}
                Err(error) if error.kind == crate::ErrorKind::Io => return Err(error),
                Err(error) => damage = damage.or(Some(error)),
            }
        }
    }
    Ok(damage.map_or(Found::Nothing, Found::Damaged))
}

/// Reads the table whose header lies at `lba`; `None` where no header does.
fn read_one(disk: &dyn Source, sector: u64, lba: u64) -> Result<Option<Table>> {
    let mut header = [0; 512];
    disk.read_at(&mut header, lba * sector)?;
    if !header.starts_with(SIGNATURE) {
        return Ok(None);
    }
    let bad = |what: &str| Error::corrupt(format!("GPT at sector {lba} ({sector} bytes): {what}"));
    let length = le32(&header, 12) as usize;
    let stored = le32(&header, 16);
    header[16..20].fill(0);
    let covered = header.get(..length).filter(|_| length >= HEADER);
    if crc32(covered.ok_or_else(|| bad("its header has no sane size"))?) != stored {
        return Err(bad("the checksum of its header is wrong"));
    }
    if le64(&header, 24) != lba {
        return Err(bad("its header belongs elsewhere"));
    }
    let (count, entry) = (le32(&header, 80) as usize, le32(&header, 84) as usize);
    if count > PARTITIONS_MAX {
        return Err(bad(&format!("{count} entries, and at most {PARTITIONS_MAX} are read")));
    }
    if entry < 128 || entry > ENTRY_MAX || entry % 128 != 0 {
        return Err(bad(&format!("entries of {entry} bytes")));
    }
    let mut entries = vec![0; count * entry];
    let place = le64(&header, 72).checked_mul(sector);
    disk.read_at(&mut entries, place.ok_or_else(|| bad("its entries lie nowhere"))?)?;
    if crc32(&entries) != le32(&header, 88) {
        return Err(bad("the checksum of its entries is wrong"));
    }
    let mut table = Table::default();
    for (index, bytes) in (0_u32..).zip(entries.chunks_exact(entry)) {
        let type_guid = take::<16>(bytes, 0);
        if type_guid == [0; 16] {
            continue;
        }
        let (first, last) = (le64(bytes, 32), le64(bytes, 40));
        let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1));
        let Some(sectors) = sectors.filter(|_| first > 0) else {
            table.notes.push(format!("partition {} has no sane range", index + 1));
            continue;
        };
        let start = first.saturating_mul(sector);
        let length = sectors.saturating_mul(sector);
        let kind = types::of_gpt(type_guid);
        table.partitions.push(Partition::new(disk.size(), index + 1, start, length, kind));
    }
    Ok(Some(table))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::put;
    use super::*;
    use crate::source::MemoryDisk;

    /// A disk with a protective MBR and two equal tables: one partition of 10 sectors from 100 on.
    pub(in super::super) fn disk(sector: usize) -> MemoryDisk {
        let sectors = 300;
        let mut disk = MemoryDisk { bytes: vec![0; sectors * sector], disk: 0 };
        put(&mut disk, 446 + 4, &[0xee]);
        put(&mut disk, 446 + 8, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        put(&mut disk, 510, &[0x55, 0xaa]);
        let mut entries = vec![0; 4 * 128];
        entries[..16].copy_from_slice(&[7; 16]);
        entries[32] = 100;
        entries[40] = 109;
        for (lba, entries_lba) in [(1, 2), (sectors - 1, sectors - 2)] {
            let mut header = [0; HEADER];
            header[..8].copy_from_slice(SIGNATURE);
            header[12] = 92;
            header[24..32].copy_from_slice(&(lba as u64).to_le_bytes());
            header[72..80].copy_from_slice(&(entries_lba as u64).to_le_bytes());
            header[80] = 4;
            header[84] = 128;
            header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
            let sum = crc32(&header);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            put(&mut disk, lba * sector, &header);
            put(&mut disk, entries_lba * sector, &entries);
        }
        disk
    }

    fn table(disk: &MemoryDisk) -> Table {
        super::super::read(disk).unwrap().unwrap()
    }

    #[test]
    fn sectors_of_both_sizes_are_known() {
        for sector in [512, 4096] {
            let found = table(&disk(sector));
            let place = (found.partitions[0].start, found.partitions[0].length);
            assert_eq!(place, (100 * sector as u64, 10 * sector as u64));
            assert!(found.notes.is_empty());
        }
    }

    #[test]
    fn the_copy_at_the_end_helps_out_and_that_is_told() {
        for at in [512 + 40, 1024 + 3] {
            let mut disk = disk(512);
            let sound = table(&disk);
            put(&mut disk, at, &[99]);
            let found = table(&disk);
            assert_eq!(found.partitions, sound.partitions);
            assert_eq!(found.notes.len(), 1);
        }
    }

    #[test]
    fn two_damaged_tables_are_an_error_and_no_empty_disk() {
        let mut disk = disk(512);
        put(&mut disk, 512 + 40, &[99]);
        put(&mut disk, 299 * 512 + 40, &[99]);
        assert_eq!(super::super::read(&disk).unwrap_err().kind, crate::ErrorKind::Corrupt);
    }

    #[test]
    fn a_partition_that_reaches_past_the_disk_is_cut_and_flagged() {
        let mut disk = disk(512);
        let mut whole = disk.bytes.clone();
        whole.truncate(105 * 512);
        disk.bytes = whole;
        let found = table(&disk);
        assert_eq!((found.partitions[0].length, found.partitions[0].cut), (5 * 512, true));
    }
}
