//! Partition tables: GPT and MBR.
//!
//! A table is only believed where its entries make sense: boot sectors of FAT and NTFS carry the
//! signature of an MBR too. No partition reaches past its disk: what does is cut, and flagged.

mod gpt;
mod mbr;
mod types;

use crate::error::Result;
use crate::source::Source;

/// Partitions of one disk.
pub(crate) const PARTITIONS_MAX: usize = 1024;

/// What a partition is for, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Anything: its content says.
    Any,
    /// A part of a Windows dynamic disk.
    DynamicDisk,
    /// A part of a pool of Storage Spaces.
    StorageSpaces,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Partition {
    /// Its number, from 1.
    pub(crate) number: u32,
    /// First byte.
    pub(crate) start: u64,
    /// Length in bytes, within the disk.
    pub(crate) length: u64,
    /// Whether the table has it reach past the disk's end.
    pub(crate) cut: bool,
    /// What it is for, for people.
    pub(crate) type_name: String,
    /// What it is for.
    pub(crate) role: Role,
}

impl Partition {
    /// Cuts a partition to its disk.
    fn new(
        disk_size: u64,
        number: u32,
        start: u64,
        length: u64,
        (type_name, role): (String, Role),
    ) -> Self {
        let within = length.min(disk_size.saturating_sub(start));
        Self { number, start, length: within, cut: within < length, type_name, role }
    }
}

/// A partition table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Table {
    /// The partitions by number, without containers.
    pub(crate) partitions: Vec<Partition>,
    /// What was wrong with it, for people.
    pub(crate) notes: Vec<String>,
}

/// Reads the table of a disk; `None` where it has none.
///
/// # Errors
/// `Corrupt` where there is one that cannot be used; `Io`.
pub(crate) fn read(disk: &dyn Source) -> Result<Option<Table>> {
    let mbr = mbr::Sector::read(disk)?;
    if mbr.as_ref().is_some_and(|mbr| mbr.is_file_system()) {
        return Ok(None);
    }
    let plain = mbr.as_ref().filter(|mbr| mbr.is_table(disk.size()));
    // Without a protective entry, what is left of a GPT is from before.
    if plain.is_none_or(mbr::Sector::protects_gpt) {
        match gpt::read(disk)? {
            gpt::Found::Table(table) => return Ok(Some(table)),
            gpt::Found::Nothing if plain.is_none() => return Ok(None),
            gpt::Found::Nothing | gpt::Found::Damaged(_)
                if plain.is_some_and(|mbr| mbr.is_hybrid()) => {}
            gpt::Found::Nothing => {
                let message = "the disk says that it has a GPT, and neither of its two is there";
                return Err(crate::Error::corrupt(message));
            }
            gpt::Found::Damaged(error) => return Err(error),
        }
    }
    plain.map(|mbr| mbr.table(disk)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemoryDisk;

    /// A generator of numbers, the same each time.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 >> 11).unwrap() % bound
        }
    }

    pub(super) fn put(disk: &mut MemoryDisk, at: usize, bytes: &[u8]) {
        disk.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn check_mutations(sound: &[u8], places: &[usize]) {
        let mut dice = Dice(42);
        let mut disk = MemoryDisk { bytes: sound.to_vec(), disk: 0 };
        for _ in 0..5_000 {
            let mut changed = Vec::new();
            for _ in 0..=dice.below(6) {
                let at = places[dice.below(places.len())] + dice.below(512);
                changed.push(at);
                disk.bytes[at] = dice.below(256).to_le_bytes()[0];
            }
            if let Ok(Some(table)) = read(&disk) {
                assert!(table.partitions.len() <= PARTITIONS_MAX);
                for partition in table.partitions {
                    let end = partition.start.saturating_add(partition.length);
                    assert!(partition.length == 0 || end <= disk.size());
                }
            }
            for at in changed {
                disk.bytes[at] = sound[at];
            }
        }
    }

    #[test]
    fn no_damage_of_an_mbr_makes_it_panic_loop_or_reach_outside() {
        check_mutations(&mbr::tests::disk().bytes, &[0, 100 * 512, 200 * 512]);
    }

    #[test]
    fn no_damage_of_a_gpt_makes_it_panic_loop_or_reach_outside() {
        let disk = gpt::tests::disk(512);
        check_mutations(&disk.bytes, &[0, 512, 1024, disk.bytes.len() - 512]);
    }
}
