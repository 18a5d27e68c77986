//! Extended attributes: within the inode, in a block, and large values in inodes of their own.

use super::bytes::{crc32c, le16, le32};
use super::data;
use super::inode::{Inode, flags};
use super::volume::Volume;
use crate::error::{Error, Result};

/// `h_magic` of attributes, in the inode and in a block.
const MAGIC: u32 = 0xea02_0000;
/// Bytes of an entry before its name.
const ENTRY: usize = 16;
/// Bytes of the header of an attribute block.
const BLOCK_HEADER: usize = 32;
/// Largest value.
const MAX_VALUE: u32 = 64 << 10;
/// Bytes of all values of one inode.
const MAX_TOTAL: usize = 4 << 20;
/// `e_name_index` of names that begin with `system.`.
const INDEX_SYSTEM: u8 = 7;
/// The name of inline data.
const INLINE_NAME: &[u8] = b"data";

/// What names begin with, by `e_name_index`; POSIX ACLs have no more than that.
const PREFIXES: [(u8, &[u8]); 7] = [
    (1, b"user."),
    (ACL_ACCESS, b"system.posix_acl_access"),
    (ACL_DEFAULT, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
    (INDEX_SYSTEM, b"system."),
    (8, b"system.richacl"),
];
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;

/// An attribute's name and value.
type Attribute = (Vec<u8>, Vec<u8>);

/// An entry of an attribute table.
struct Raw<'a> {
    index: u8,
    name: &'a [u8],
    value_at: usize,
    value_inode: u32,
    value_size: u32,
}

/// Entries of a table whose first one lies at `start`.
fn entries(table: &[u8], start: usize) -> Result<Vec<Raw<'_>>> {
    let mut found = Vec::new();
    let mut at = start;
    // Each round goes on by at least an entry.
    while at + 4 <= table.len() && le32(table, at) != 0 {
        let name_length = usize::from(table[at]);
        let name = table.get(at + ENTRY..at + ENTRY + name_length);
        let name = name.ok_or_else(|| Error::corrupt("an extended attribute is cut off"))?;
        found.push(Raw {
            index: table[at + 1],
            name,
            value_at: usize::from(le16(table, at + 2)),
            value_inode: le32(table, at + 4),
            value_size: le32(table, at + 8),
        });
        at += (ENTRY + name_length).next_multiple_of(4);
    }
    Ok(found)
}

/// The table of attributes within an inode: what follows the magic number.
fn table_in(inode: &Inode) -> Option<&[u8]> {
    let area = inode.attribute_area();
    (le32(area, 0) == MAGIC).then(|| &area[4..])
}

/// Content behind the first 60 bytes of an inode with inline data.
pub(super) fn inline_data(inode: &Inode) -> Result<Option<&[u8]>> {
    let Some(table) = table_in(inode) else { return Ok(None) };
    let entries = entries(table, 0).map_err(|e| inode.blame(&e))?;
    let data = entries.iter().find(|raw| raw.index == INDEX_SYSTEM && raw.name == INLINE_NAME);
    let Some(raw) = data else { return Ok(None) };
    value_in(table, raw).map(Some).map_err(|e| inode.blame(&e))
}

fn value_in<'a>(table: &'a [u8], raw: &Raw<'_>) -> Result<&'a [u8]> {
    let size = usize::try_from(raw.value_size).unwrap_or(usize::MAX);
    let value = table.get(raw.value_at..).and_then(|rest| rest.get(..size));
    value.ok_or_else(|| Error::corrupt("an extended attribute's value lies outside"))
}

/// All of an inode's attributes.
pub(super) fn read(volume: &Volume, inode: &Inode) -> Result<Vec<Attribute>> {
    let mut found = Vec::new();
    if let Some(table) = table_in(inode) {
        collect(volume, table, 0, &mut found).map_err(|e| inode.blame(&e))?;
    }
    if inode.attribute_block != 0 {
        let block = volume.block(inode.attribute_block).map_err(|e| inode.blame(&e))?;
        check_block(volume, inode, &block)?;
        collect(volume, &block, BLOCK_HEADER, &mut found).map_err(|e| inode.blame(&e))?;
    }
    Ok(found)
}

fn check_block(volume: &Volume, inode: &Inode, block: &[u8]) -> Result<()> {
    if le32(block, 0) != MAGIC || le32(block, 8) != 1 {
        return Err(inode.corrupt("its block of extended attributes has a bad header"));
    }
    if let Some(seed) = volume.superblock.checksum_seed {
        let mut crc = crc32c(seed, &inode.attribute_block.to_le_bytes());
        crc = crc32c(crc, &block[..0x10]);
        crc = crc32c(crc, &[0; 4]);
        if crc32c(crc, &block[0x14..]) != le32(block, 0x10) {
            return Err(inode.corrupt("its block of extended attributes fails its checksum"));
        }
    }
    Ok(())
}

fn collect(volume: &Volume, table: &[u8], start: usize, found: &mut Vec<Attribute>) -> Result<()> {
    let mut total: usize = found.iter().map(|(_, value)| value.len()).sum();
    for raw in entries(table, start)? {
        if raw.index == INDEX_SYSTEM && raw.name == INLINE_NAME {
            continue;
        }
        // Kinds without a prefix (the context of encryption) are for the file system alone.
        let Some((_, prefix)) = PREFIXES.iter().find(|(index, _)| *index == raw.index) else {
            continue;
        };
        let mut value = match raw.value_inode {
            0 => value_in(table, &raw)?.to_vec(),
            number => value_of_inode(volume, number, raw.value_size)?,
        };
        if matches!(raw.index, ACL_ACCESS | ACL_DEFAULT) {
            value = acl(&value)?;
        }
        total += value.len();
        if total > MAX_TOTAL {
            return Err(Error::limit(format!(
                "more than {MAX_TOTAL} bytes of extended attributes"
            )));
        }
        found.push(([prefix, raw.name].concat(), value));
    }
    Ok(())
}

/// A value that is an inode's content.
fn value_of_inode(volume: &Volume, number: u32, size: u32) -> Result<Vec<u8>> {
    let inode = Inode::read(volume, u64::from(number))?;
    if !inode.has(flags::EA_INODE) || u64::from(size) != inode.size || size > MAX_VALUE {
        return Err(Error::corrupt(format!("inode {number} is no extended attribute's value")));
    }
    let mut value = vec![0; usize::try_from(size).unwrap_or(0)];
    data::read(volume, &inode, &mut value, 0)?;
    Ok(value)
}

/// A POSIX ACL as programs see it (version 2) from the shorter form on the disk (version 1).
fn acl(stored: &[u8]) -> Result<Vec<u8>> {
    let bad = || Error::corrupt("an access control list is ill-formed");
    if le32(stored, 0) != 1 {
        return Err(bad());
    }
    let mut shown = 2u32.to_le_bytes().to_vec();
    let mut at = 4;
    while at < stored.len() {
        let named = match le16(stored, at) {
            // ACL_USER_OBJ, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER
            0x1 | 0x4 | 0x10 | 0x20 => false,
            // ACL_USER, ACL_GROUP
            0x2 | 0x8 => true,
            _ => return Err(bad()),
        };
        let length = if named { 8 } else { 4 };
        let entry = stored.get(at..at + length).ok_or_else(bad)?;
        shown.extend_from_slice(&entry[..4]);
        let id = if named { le32(entry, 4) } else { u32::MAX };
        shown.extend_from_slice(&id.to_le_bytes());
        at += length;
    }
    Ok(shown)
}
