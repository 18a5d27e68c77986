//! The superblock: geometry and features. What is not known here is refused by name.

use super::bytes::{crc32c, join, le16, le32};
use crate::error::{Error, Result};

/// Where the superblock lies on every volume.
pub(super) const SUPERBLOCK_OFFSET: u64 = 1024;
/// Its length.
pub(super) const SUPERBLOCK_SIZE: usize = 1024;
/// `s_magic`.
const MAGIC: u16 = 0xef53;
/// Blocks of 1 KiB shifted by this much are 64 KiB, the largest.
const MAX_LOG_BLOCK_SIZE: u32 = 6;
/// Largest group descriptor.
const MAX_DESCRIPTOR_SIZE: usize = 1024;

/// Bits of `s_feature_compat`.
pub(super) mod compat {
    pub(crate) const HAS_JOURNAL: u32 = 0x4;
    pub(crate) const SPARSE_SUPER2: u32 = 0x200;
}

/// Bits of `s_feature_incompat`.
pub(super) mod incompat {
    pub(crate) const FILETYPE: u32 = 0x2;
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const META_BG: u32 = 0x10;
    pub(crate) const EXTENTS: u32 = 0x40;
    pub(crate) const BIT64: u32 = 0x80;
    pub(crate) const CSUM_SEED: u32 = 0x2000;
    pub(crate) const LARGEDIR: u32 = 0x4000;
    pub(crate) const ENCRYPT: u32 = 0x1_0000;
    /// What is read: the above, `mmp`, `flex_bg`, `ea_inode`, `inline_data`, `casefold`.
    pub(crate) const KNOWN: u32 = FILETYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BIT64
        | 0x100
        | 0x200
        | 0x400
        | CSUM_SEED
        | LARGEDIR
        | 0x8000
        | ENCRYPT
        | 0x2_0000;
    /// Names of bits that are not read.
    pub(crate) const NAMES: [(u32, &str); 3] =
        [(0x1, "compression"), (0x8, "journal_dev"), (0x1000, "dirdata")];
}

/// Bits of `s_feature_ro_compat`.
pub(super) mod ro_compat {
    pub(crate) const SPARSE_SUPER: u32 = 0x1;
    pub(crate) const HUGE_FILE: u32 = 0x8;
    pub(crate) const METADATA_CSUM: u32 = 0x400;
    /// `gdt_csum`, `extra_isize`, `quota`, `bigalloc`, `project` and the like: only ext4 has them.
    pub(crate) const OF_EXT4: u32 = !(SPARSE_SUPER | 0x2 | 0x4);
}

/// What the superblock says, checked.
#[derive(Debug, Clone)]
pub(super) struct Superblock {
    pub(super) block_size: u32,
    pub(super) blocks: u64,
    pub(super) free_blocks: u64,
    pub(super) first_data_block: u32,
    pub(super) blocks_per_group: u32,
    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: usize,
    pub(super) first_inode: u32,
    pub(super) descriptor_size: usize,
    first_meta_bg: u32,
    backup_groups: [u32; 2],
    pub(super) compat: u32,
    pub(super) incompat: u32,
    pub(super) ro_compat: u32,
    pub(super) label: String,
    pub(super) uuid: [u8; 16],
    pub(super) journal_inode: u32,
    /// Whether it was unmounted in order (`s_state`).
    pub(super) unmounted: bool,
    /// Seed of metadata checksums, where there are any.
    pub(super) checksum_seed: Option<u32>,
}

/// Whether these first bytes of a superblock carry its magic number.
pub(super) fn has_magic(raw: &[u8]) -> bool {
    le16(raw, 0x38) == MAGIC
}

impl Superblock {
    /// Parses the 1024 bytes of a superblock.
    pub(super) fn parse(raw: &[u8; SUPERBLOCK_SIZE]) -> Result<Self> {
        if !has_magic(raw) {
            return Err(Error::corrupt("the superblock has no magic number"));
        }
        let dynamic = le32(raw, 0x4c) >= 1;
        let when = |present: bool, value: u32| if present { value } else { 0 };
        let compat = when(dynamic, le32(raw, 0x5c));
        let incompat = when(dynamic, le32(raw, 0x60));
        let ro_compat = when(dynamic, le32(raw, 0x64));
        refuse_unknown(incompat)?;
        let checksummed = ro_compat & ro_compat::METADATA_CSUM != 0;
        if checksummed && crc32c(!0, &raw[..0x3fc]) != le32(raw, 0x3fc) {
            return Err(Error::corrupt("the superblock fails its checksum"));
        }

        let log_block_size = le32(raw, 0x18);
        if log_block_size > MAX_LOG_BLOCK_SIZE {
            return Err(Error::corrupt(format!(
                "the superblock names blocks of 2^{log_block_size} KiB"
            )));
        }
        let block_size = 1024u32 << log_block_size;
        let wide = incompat & incompat::BIT64 != 0;
        let blocks = join(le32(raw, 0x4), when(wide, le32(raw, 0x150)));
        let free_blocks = join(le32(raw, 0xc), when(wide, le32(raw, 0x158)));
        let first_data_block = le32(raw, 0x14);
        let blocks_per_group = le32(raw, 0x20);
        let inodes = le32(raw, 0);
        let inodes_per_group = le32(raw, 0x28);
        let inode_size = if dynamic { usize::from(le16(raw, 0x58)) } else { 128 };
        let descriptor_size = if wide { usize::from(le16(raw, 0xfe)) } else { 32 };

        let geometry = |good: bool, what: &str| {
            let bad = || Error::corrupt(format!("the superblock contradicts itself: {what}"));
            if good { Ok(()) } else { Err(bad()) }
        };
        let bytes = blocks.checked_mul(u64::from(block_size));
        geometry(bytes.is_some_and(|bytes| i64::try_from(bytes).is_ok()), "number of blocks")?;
        geometry(
            u64::from(first_data_block) < blocks && first_data_block <= 1,
            "first data block",
        )?;
        geometry(blocks_per_group > 0, "blocks of a group")?;
        geometry(inodes_per_group > 0 && inodes_per_group <= 8 * block_size, "inodes of a group")?;
        let fits = inode_size >= 128 && inode_size <= block_size as usize;
        geometry(fits && inode_size.is_power_of_two(), "size of an inode")?;
        let descriptors = (32..=MAX_DESCRIPTOR_SIZE).contains(&descriptor_size);
        geometry(descriptors && descriptor_size.is_power_of_two(), "size of a group descriptor")?;
        let groups = (blocks - u64::from(first_data_block)).div_ceil(u64::from(blocks_per_group));
        geometry(u64::from(inodes) <= groups * u64::from(inodes_per_group), "number of inodes")?;

        let mut uuid = [0; 16];
        uuid.copy_from_slice(&raw[0x68..0x78]);
        let seed = match incompat & incompat::CSUM_SEED {
            0 => crc32c(!0, &uuid),
            _ => le32(raw, 0x270),
        };
        let label = raw[0x78..0x88].split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Self {
            block_size,
            blocks,
            free_blocks,
            first_data_block,
            blocks_per_group,
            inodes,
            inodes_per_group,
            inode_size,
            first_inode: if dynamic { le32(raw, 0x54).max(11) } else { 11 },
            descriptor_size,
            first_meta_bg: le32(raw, 0x104),
            backup_groups: [le32(raw, 0x24c), le32(raw, 0x250)],
            compat,
            incompat,
            ro_compat,
            label: String::from_utf8_lossy(label).into_owned(),
            uuid,
            journal_inode: le32(raw, 0xe0),
            unmounted: le16(raw, 0x3a) & 1 != 0,
            checksum_seed: checksummed.then_some(seed),
        })
    }

    /// Whether it has a feature of `s_feature_incompat`.
    pub(super) fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    /// What people call it.
    pub(super) fn kind(&self) -> &'static str {
        let of_ext4 =
            incompat::KNOWN & !(incompat::FILETYPE | incompat::RECOVER | incompat::META_BG);
        match self.compat & compat::HAS_JOURNAL {
            _ if self.has(of_ext4) || self.ro_compat & ro_compat::OF_EXT4 != 0 => "ext4",
            0 => "ext2",
            _ => "ext3",
        }
    }

    /// The block and the byte in it where the descriptor of `group` lies.
    pub(super) fn descriptor_place(&self, group: u64) -> (u64, usize) {
        let per_block = u64::from(self.block_size) / self.descriptor_size as u64;
        let (table, index) = (group / per_block, group % per_block);
        let superblock = SUPERBLOCK_OFFSET / u64::from(self.block_size);
        let block = if self.has(incompat::META_BG) && table >= u64::from(self.first_meta_bg) {
            let first = table * per_block;
            let mut before = u64::from(self.has_backup(first));
            // In blocks of 1 KiB that count from 0, block 0 comes before the superblock.
            before +=
                u64::from(self.block_size == 1024 && table == 0 && self.first_data_block == 0);
            let start = first * u64::from(self.blocks_per_group);
            u64::from(self.first_data_block) + start + before
        } else {
            superblock + 1 + table
        };
        // The index is below 65536 / 32.
        (block, usize::try_from(index).unwrap_or(0) * self.descriptor_size)
    }

    /// Whether `group` begins with a superblock.
    fn has_backup(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & compat::SPARSE_SUPER2 != 0 {
            return self.backup_groups.iter().any(|backup| u64::from(*backup) == group);
        }
        if group == 1 || self.ro_compat & ro_compat::SPARSE_SUPER == 0 {
            return true;
        }
        [3u64, 5, 7].iter().any(|base| {
            let mut power = *base;
            while power < group {
                power = power.saturating_mul(*base);
            }
            power == group
        })
    }

    /// The UUID as people write it.
    pub(super) fn uuid_text(&self) -> String {
        crate::bytes::uuid(&self.uuid)
    }
}

fn refuse_unknown(features: u32) -> Result<()> {
    let unknown = features & !incompat::KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let named = incompat::NAMES.iter().filter(|(bit, _)| unknown & bit != 0);
    let mut names: Vec<String> = named.map(|(_, name)| (*name).to_owned()).collect();
    let nameless = incompat::NAMES.iter().fold(unknown, |left, (bit, _)| left & !bit);
    if nameless != 0 {
        names.push(format!("{nameless:#x}"));
    }
    Err(Error::unsupported(format!("features that are not read: {}", names.join(", "))))
}
