//! Inodes: where they lie, what they say, and whether their checksum is right.

use std::sync::Arc;

use super::bytes::{crc32c, join, le16, le32};
use super::superblock::{incompat, ro_compat};
use super::volume::Volume;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{Attributes, FileType, Time};

/// The root directory's inode.
pub(super) const ROOT: u32 = 2;
/// Bytes of an inode that every revision has.
const GOOD_OLD_SIZE: usize = 128;
/// Bytes of `i_block`.
pub(super) const BLOCK_AREA: usize = 60;
const BLOCK_AREA_AT: usize = 0x28;
/// Group descriptor flag: the group's inode table was never written.
const INODE_UNINIT: u16 = 0x1;

/// Bits of `i_flags`.
pub(super) mod flags {
    pub(crate) const ENCRYPT: u32 = 0x800;
    pub(crate) const INDEX: u32 = 0x1000;
    pub(crate) const HUGE_FILE: u32 = 0x4_0000;
    pub(crate) const EXTENTS: u32 = 0x8_0000;
    pub(crate) const EA_INODE: u32 = 0x20_0000;
    pub(crate) const INLINE_DATA: u32 = 0x1000_0000;
    pub(crate) const CASEFOLD: u32 = 0x4000_0000;
}

/// An inode, read and checked.
pub(super) struct Inode {
    pub(super) number: u32,
    pub(super) mode: u16,
    pub(super) links: u16,
    pub(super) size: u64,
    pub(super) flags: u32,
    /// Block of further extended attributes; 0 for none.
    pub(super) attribute_block: u64,
    /// Seed of the checksums of what belongs to this inode.
    pub(super) checksum_seed: Option<u32>,
    raw: Vec<u8>,
}

impl Inode {
    /// Reads an inode that a directory may name.
    pub(super) fn read(volume: &Volume, number: u64) -> Result<Self> {
        let superblock = &volume.superblock;
        let named = u32::try_from(number).ok().filter(|number| {
            (*number == ROOT || *number >= superblock.first_inode) && *number <= superblock.inodes
        });
        let number =
            named.ok_or_else(|| Error::not_found(format!("there is no inode {number}")))?;
        let inode = Self::read_any(volume, number)?;
        if inode.links == 0 || inode.mode == 0 {
            return Err(Error::not_found(format!("inode {number} is not in use")));
        }
        Ok(inode)
    }

    /// Reads any inode, those of the file system itself included.
    pub(super) fn read_any(volume: &Volume, number: u32) -> Result<Self> {
        let superblock = &volume.superblock;
        if number == 0 || number > superblock.inodes {
            return Err(Error::not_found(format!("there is no inode {number}")));
        }
        let group = (number - 1) / superblock.inodes_per_group;
        let index = u64::from((number - 1) % superblock.inodes_per_group);
        let table = inode_table(volume, group)?
            .ok_or_else(|| Error::not_found(format!("inode {number} is not in use")))?;
        let per_block = volume.block_size() / superblock.inode_size as u64;
        let length = u64::from(superblock.inodes_per_group).div_ceil(per_block);
        let in_table = |e: Error| Error::new(e.kind, format!("inode {number}: {}", e.message));
        let block =
            volume.block_of_run(table + index / per_block, table, length).map_err(in_table)?;
        let start = usize::try_from(index % per_block).unwrap_or(0) * superblock.inode_size;
        let raw = block.get(start..start + superblock.inode_size);
        let raw = raw.ok_or_else(|| Error::corrupt(format!("inode {number} is cut off")))?;
        Self::parse(volume, number, raw.to_vec())
    }

    fn parse(volume: &Volume, number: u32, raw: Vec<u8>) -> Result<Self> {
        let superblock = &volume.superblock;
        let generation = raw.get(0x64..0x68).unwrap_or_default();
        let checksum_seed = superblock
            .checksum_seed
            .map(|seed| crc32c(crc32c(seed, &number.to_le_bytes()), generation));
        if let Some(seed) = checksum_seed {
            // Inodes that were never written are all zeroes, and have no checksum.
            if !checksum_holds(seed, &raw) && raw.iter().any(|byte| *byte != 0) {
                return Err(Error::corrupt(format!("inode {number} fails its checksum")));
            }
        }
        let mode = le16(&raw, 0);
        let wide = match mode >> 12 {
            0x4 => superblock.has(incompat::LARGEDIR),
            kind => kind == 0x8,
        };
        let size = join(le32(&raw, 0x4), if wide { le32(&raw, 0x6c) } else { 0 });
        let high = if superblock.has(incompat::BIT64) { le16(&raw, 0x76) } else { 0 };
        let inode = Self {
            number,
            mode,
            links: le16(&raw, 0x1a),
            size,
            flags: le32(&raw, 0x20),
            attribute_block: join(le32(&raw, 0x68), u32::from(high)),
            checksum_seed,
            raw,
        };
        if inode.extra_size() + GOOD_OLD_SIZE > inode.raw.len() {
            return Err(inode.corrupt("it names more extra fields than it has room for"));
        }
        Ok(inode)
    }

    /// Whether it has a flag.
    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// `i_block`: block map, root of the extent tree, a short link's target or inline data.
    pub(super) fn block_area(&self) -> &[u8] {
        &self.raw[BLOCK_AREA_AT..BLOCK_AREA_AT + BLOCK_AREA]
    }

    /// What follows the fixed fields: the extended attributes within the inode.
    pub(super) fn attribute_area(&self) -> &[u8] {
        match self.raw.len() {
            GOOD_OLD_SIZE => &[],
            _ => self.raw.get(GOOD_OLD_SIZE + self.extra_size()..).unwrap_or_default(),
        }
    }

    fn extra_size(&self) -> usize {
        if self.raw.len() > GOOD_OLD_SIZE { usize::from(le16(&self.raw, 0x80)) } else { 0 }
    }

    /// A 32-bit field behind the old inode, where it is there.
    fn extra(&self, at: usize) -> Option<u32> {
        (at + 4 <= GOOD_OLD_SIZE + self.extra_size()).then(|| le32(&self.raw, at))
    }

    /// An error about this inode.
    pub(super) fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::corrupt(format!("inode {}: {what}", self.number))
    }

    /// The error `e` with this inode's number.
    pub(super) fn blame(&self, e: &Error) -> Error {
        Error::new(e.kind, format!("inode {}: {}", self.number, e.message))
    }

    /// What it is by its mode; `None` for kinds that do not exist.
    fn kind(&self) -> Option<FileType> {
        Some(match self.mode >> 12 {
            0x1 => FileType::Fifo,
            0x2 => FileType::CharDevice,
            0x4 => FileType::Directory,
            0x6 => FileType::BlockDevice,
            0x8 => FileType::File,
            0xa => FileType::Symlink,
            0xc => FileType::Socket,
            _ => return None,
        })
    }

    /// What it is, and why it cannot be read if so.
    pub(super) fn file_type(&self) -> Result<(FileType, Option<&'static str>)> {
        let kind = self.kind().ok_or_else(|| {
            self.corrupt(format_args!("mode {:o} is of no kind of file", self.mode))
        })?;
        let stored = matches!(kind, FileType::File | FileType::Directory | FileType::Symlink);
        Ok(match self.has(flags::ENCRYPT) && stored {
            true => (FileType::Opaque, Some("encrypted (fscrypt): its key is not on the disk")),
            false => (kind, None),
        })
    }

    /// Refuses what is not of kind `wanted`, by the error `otherwise`.
    pub(super) fn expect(&self, wanted: FileType, otherwise: ErrorKind) -> Result<()> {
        let (kind, note) = self.file_type()?;
        if kind == wanted {
            return Ok(());
        }
        let number = self.number;
        Err(match note {
            Some(note) if self.kind() == Some(wanted) => {
                Error::unsupported(format!("inode {number} is {note}"))
            }
            _ => Error::new(otherwise, format!("inode {number} is a {kind:?}, not a {wanted:?}")),
        })
    }

    /// Everything that is told of it.
    pub(super) fn attributes(&self, volume: &Volume) -> Result<Attributes> {
        let (file_type, note) = self.file_type()?;
        let raw = &self.raw;
        let sized = matches!(file_type, FileType::File | FileType::Symlink | FileType::Opaque);
        let time = |at, extra_at| Some(time(le32(raw, at), self.extra(extra_at).unwrap_or(0)));
        Ok(Attributes {
            file_type,
            size: if sized { self.size } else { 0 },
            allocated: Some(self.allocated(volume)),
            mode: u32::from(self.mode & 0o7777),
            uid: u32::from(le16(raw, 0x2)) | u32::from(le16(raw, 0x78)) << 16,
            gid: u32::from(le16(raw, 0x18)) | u32::from(le16(raw, 0x7a)) << 16,
            links: u32::from(self.links),
            modified: time(0x10, 0x88),
            accessed: time(0x8, 0x8c),
            changed: time(0xc, 0x84),
            created: self.extra(0x90).map(|low| self::time(low, self.extra(0x94).unwrap_or(0))),
            note: note.map(str::to_owned),
        })
    }

    /// Bytes that it takes: `i_blocks`, in sectors of 512 bytes or, for huge files, in blocks.
    fn allocated(&self, volume: &Volume) -> u64 {
        let huge = volume.superblock.ro_compat & ro_compat::HUGE_FILE != 0;
        let high = if huge { u32::from(le16(&self.raw, 0x74)) } else { 0 };
        let unit = if huge && self.has(flags::HUGE_FILE) { volume.block_size() } else { 512 };
        join(le32(&self.raw, 0x1c), high).saturating_mul(unit)
    }
}

/// A time: 32 bits of signed seconds, two bits that extend them, and 30 bits of nanoseconds.
fn time(low: u32, extra: u32) -> Time {
    let seconds = i64::from(low.cast_signed()) + (i64::from(extra & 3) << 32);
    // Ill-formed nanoseconds are not worth losing a file for.
    Time { seconds, nanoseconds: (extra >> 2).min(999_999_999) }
}

fn checksum_holds(seed: u32, raw: &[u8]) -> bool {
    let extra = if raw.len() > GOOD_OLD_SIZE { usize::from(le16(raw, 0x80)) } else { 0 };
    let mut blank = raw.to_vec();
    blank[0x7c..0x7e].fill(0);
    if extra < 4 {
        return crc32c(seed, &blank) & 0xffff == u32::from(le16(raw, 0x7c));
    }
    blank[0x82..0x84].fill(0);
    crc32c(seed, &blank) == u32::from(le16(raw, 0x7c)) | u32::from(le16(raw, 0x82)) << 16
}

/// First block of a group's inode table; `None` where it was never written.
fn inode_table(volume: &Volume, group: u32) -> Result<Option<u64>> {
    let superblock = &volume.superblock;
    let (block, start) = superblock.descriptor_place(u64::from(group));
    let content: Arc<[u8]> = volume.block(block)?;
    let descriptor = content.get(start..start + superblock.descriptor_size);
    let descriptor =
        descriptor.ok_or_else(|| Error::corrupt(format!("group {group} has no descriptor")))?;
    let mut lazy = superblock.ro_compat & 0x10 != 0;
    if let Some(seed) = superblock.checksum_seed {
        lazy = true;
        let mut blank = descriptor.to_vec();
        blank[0x1e..0x20].fill(0);
        let found = crc32c(crc32c(seed, &group.to_le_bytes()), &blank) & 0xffff;
        if found != u32::from(le16(descriptor, 0x1e)) {
            return Err(Error::corrupt(format!(
                "the descriptor of group {group} fails its checksum"
            )));
        }
    }
    if lazy && le16(descriptor, 0x12) & INODE_UNINIT != 0 {
        return Ok(None);
    }
    let high = if descriptor.len() >= 64 { le32(descriptor, 0x28) } else { 0 };
    Ok(Some(join(le32(descriptor, 0x8), high)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_epoch_bits_go_on_where_32_bits_of_seconds_end() {
        let seconds = |low: u32, epoch| time(low, epoch).seconds;
        assert_eq!(seconds(0x7fff_ffff, 0), 0x7fff_ffff);
        assert_eq!(seconds(0x8000_0000, 0), -0x8000_0000);
        assert_eq!(seconds(0x8000_0000, 1), 0x8000_0000);
        assert_eq!(seconds(0x7fff_ffff, 3), 0x3_7fff_ffff);
        assert_eq!(time(0, 5 << 2), Time { seconds: 0, nanoseconds: 5 });
        assert!(time(0, u32::MAX).nanoseconds < 1_000_000_000);
    }
}
