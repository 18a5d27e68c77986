//! Directories: the index `$I30`, its root and its blocks.
//!
//! Blocks are walked by the index's bitmap, which says which of them are part of it. That order is the
//! same for every listing, and a cursor is a place in it. An entry that points to a block which the
//! bitmap does not have is damage.

use std::collections::HashSet;

use super::attribute::kind;
use super::bytes::{part, u8_at, u16_at, u32_at, u64_at};
use super::mft::{I30, Mft};
use super::record::{Record, apply_fixups, in_record};
use super::stream::Stream;
use crate::error::{Error, Result};

/// Largest index root: it lies in a file record.
const MAX_ROOT: u64 = 64 << 10;
/// Largest bitmap of an index: 256 GiB of names in blocks of 4 KiB.
const MAX_BITMAP: u64 = 8 << 20;
const MAX_BLOCK: u32 = 64 << 10;
const COLLATION_FILE_NAME: u32 = 1;
const HAS_CHILD: u16 = 1;
const LAST: u16 = 2;
/// Namespace of names that only DOS sees.
const DOS: u8 = 2;

/// A name in a directory.
#[derive(Debug, Clone)]
pub(super) struct Name<'a> {
    /// File reference of what it names.
    pub(super) reference: u64,
    /// UTF-16LE.
    pub(super) utf16: &'a [u8],
    /// Flags of the file, as they were when the name was written.
    pub(super) flags: u32,
}

/// A directory's index, ready to be walked.
#[derive(Debug)]
pub(super) struct Directory {
    number: u64,
    root: Vec<u8>,
    blocks: Option<Stream>,
    bitmap: Vec<u8>,
    block_size: u32,
    /// Bytes that a block's number counts.
    unit: u64,
    sector: u32,
}

impl Directory {
    /// The index of the directory in `record`; `None` where it has none and so is no directory.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub(super) fn open(mft: &Mft, record: &Record) -> Result<Option<Self>> {
        let open = || {
            let source = &*mft.source;
            let Some(root) = mft.value(record, kind::INDEX_ROOT, I30)? else { return Ok(None) };
            let root = root.read_all(source, MAX_ROOT)?;
            let block_size = u32_at(&root, 8)?;
            if u32_at(&root, 4)? != COLLATION_FILE_NAME
                || !block_size.is_power_of_two()
                || !(512..=MAX_BLOCK).contains(&block_size)
            {
                return Err(Error::corrupt(format!("an index with blocks of {block_size} bytes")));
            }
            let blocks = mft.value(record, kind::INDEX_ALLOCATION, I30)?;
            let bitmap = match mft.value(record, kind::BITMAP, I30)? {
                Some(bitmap) => bitmap.read_all(source, MAX_BITMAP)?,
                None if blocks.is_some() => {
                    return Err(Error::corrupt("an index without its bitmap"));
                }
                None => Vec::new(),
            };
            let cluster = mft.geometry.cluster;
            let unit = if u64::from(block_size) >= cluster { cluster } else { 512 };
            let sector = mft.geometry.sector;
            let number = record.number;
            Ok(Some(Self { number, root, blocks, bitmap, block_size, unit, sector }))
        };
        open().map_err(|e| in_record(record.number, &e))
    }

    /// Number of the next part from `from` on that has entries: 0 is the root, then the blocks.
    fn next_part(&self, from: u64) -> Option<u64> {
        if from == 0 {
            return Some(0);
        }
        let bits = self.bitmap.len() as u64 * 8;
        (from..=bits).find(|part| self.is_marked(part - 1))
    }

    fn is_marked(&self, block: u64) -> bool {
        usize::try_from(block / 8)
            .ok()
            .and_then(|at| self.bitmap.get(at))
            .is_some_and(|byte| byte & 1 << (block % 8) != 0)
    }

    /// Calls `visit` with the names from `cursor` on, each with the cursor behind it, until it returns
    /// `false`.
    ///
    /// # Errors
    /// `Corrupt` where a part of the index is damaged; `Io`.
    pub(super) fn walk(
        &self,
        mft: &Mft,
        cursor: u64,
        visit: &mut dyn FnMut(&Name<'_>, u64) -> Result<bool>,
    ) -> Result<()> {
        let mut number = cursor >> 16;
        let mut skip = cursor & 0xffff;
        while let Some(next) = self.next_part(number) {
            if next != number {
                skip = 0;
            }
            let go_on = self.walk_part(mft, next, skip, visit).map_err(|e| {
                in_record(
                    self.number,
                    &Error::new(e.kind, format!("part {next} of the directory: {}", e.message)),
                )
            })?;
            if !go_on {
                return Ok(());
            }
            number = next + 1;
            skip = 0;
        }
        Ok(())
    }

    fn walk_part(
        &self,
        mft: &Mft,
        number: u64,
        skip: u64,
        visit: &mut dyn FnMut(&Name<'_>, u64) -> Result<bool>,
    ) -> Result<bool> {
        let block;
        let header = if number == 0 {
            self.root.get(0x10..).unwrap_or(&[])
        } else {
            block = self.block(mft, number - 1)?;
            block.get(0x18..).unwrap_or(&[])
        };
        let used = part(header, 0, u32_at(header, 4)? as usize)?;
        let mut at = u32_at(header, 0)? as usize;
        let mut index = 0;
        let mut seen = HashSet::new();
        loop {
            let length = usize::from(u16_at(used, at + 8)?);
            let flags = u16_at(used, at + 0x0c)?;
            if length < 0x10 || !length.is_multiple_of(8) {
                return Err(Error::corrupt(format!("an entry of {length} bytes at byte {at}")));
            }
            let entry = part(used, at, length)?;
            if flags & HAS_CHILD != 0 {
                let child = u64_at(entry, length - 8)?.checked_mul(self.unit);
                let child = child.map(|byte| byte / u64::from(self.block_size));
                if !child.is_some_and(|child| self.is_marked(child) && seen.insert(child)) {
                    return Err(Error::corrupt(format!("the entry at byte {at} leads nowhere")));
                }
            }
            if flags & LAST != 0 {
                return Ok(true);
            }
            index += 1;
            if index > skip {
                let key = part(entry, 0x10, usize::from(u16_at(entry, 0x0a)?))?;
                let name = part(key, 0x42, 2 * usize::from(u8_at(key, 0x40)?))?;
                if u8_at(key, 0x41)? != DOS {
                    let flags = u32_at(key, 0x38)?;
                    let name = Name { reference: u64_at(entry, 0)?, utf16: name, flags };
                    if !visit(&name, number << 16 | index)? {
                        return Ok(false);
                    }
                }
            }
            at += length;
        }
    }

    fn block(&self, mft: &Mft, number: u64) -> Result<Vec<u8>> {
        let size = u64::from(self.block_size);
        let offset = number.saturating_mul(size);
        let mut bytes = vec![0; self.block_size as usize];
        let blocks = self.blocks.as_ref().ok_or_else(|| Error::corrupt("there are no blocks"))?;
        if blocks.read_at(&*mft.source, &mut bytes, offset)? < bytes.len() {
            return Err(Error::corrupt("the block is behind the end of the index"));
        }
        apply_fixups(&mut bytes, b"INDX", self.sector)?;
        let own = u64_at(&bytes, 0x10)?;
        let units = [self.unit, if self.unit == 512 { u64::from(self.sector) } else { self.unit }];
        if !units.iter().any(|unit| own.checked_mul(*unit) == Some(offset)) {
            return Err(Error::corrupt(format!("the block says that it is number {own}")));
        }
        Ok(bytes)
    }
}
