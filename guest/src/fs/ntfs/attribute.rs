//! Attributes of a file record, and the list of those in other records.

use super::bytes::{part, u8_at, u16_at, u32_at, u64_at};
use crate::error::{Error, Result};

/// Types of attributes.
pub(super) mod kind {
    pub(in super::super) const STANDARD_INFORMATION: u32 = 0x10;
    pub(in super::super) const ATTRIBUTE_LIST: u32 = 0x20;
    pub(in super::super) const VOLUME_NAME: u32 = 0x60;
    pub(in super::super) const VOLUME_INFORMATION: u32 = 0x70;
    pub(in super::super) const DATA: u32 = 0x80;
    pub(in super::super) const INDEX_ROOT: u32 = 0x90;
    pub(in super::super) const INDEX_ALLOCATION: u32 = 0xa0;
    pub(in super::super) const BITMAP: u32 = 0xb0;
    pub(in super::super) const REPARSE_POINT: u32 = 0xc0;
    pub(in super::super) const END: u32 = 0xffff_ffff;
}

/// Flags: the method of compression; 1 is LZNT1.
pub(super) const COMPRESSION: u16 = 0x00ff;
/// Flag: encrypted by EFS.
pub(super) const ENCRYPTED: u16 = 0x4000;
/// Largest attribute list of the format.
pub(super) const MAX_LIST: u64 = 256 << 10;

/// An attribute as it lies in a record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attribute<'a> {
    /// Its type.
    pub(super) kind: u32,
    /// Its name, UTF-16LE; empty for the unnamed one.
    pub(super) name: &'a [u8],
    /// Compressed, encrypted, sparse.
    pub(super) flags: u16,
    /// Its number in the record.
    pub(super) instance: u16,
    /// Its value, or where that lies.
    pub(super) form: Form<'a>,
}

/// Where the value is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form<'a> {
    /// In the record.
    Resident(&'a [u8]),
    /// In clusters.
    NonResident(Extent<'a>),
}

/// The part of a value that one record describes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent<'a> {
    /// First cluster of the value that the mapping pairs speak of.
    pub(super) lowest: u64,
    /// Mapping pairs.
    pub(super) pairs: &'a [u8],
    /// Clusters of a compression unit, as a power of two; 0 where there are none.
    pub(super) unit: u8,
    /// Bytes allocated; like the next, only in the first extent.
    pub(super) allocated: u64,
    /// Bytes of the value.
    pub(super) size: u64,
    /// Bytes of the value that were ever written: what follows reads as zeroes.
    pub(super) initialized: u64,
    /// Bytes that a compressed or sparse value really takes.
    pub(super) taken: Option<u64>,
}

impl<'a> Attribute<'a> {
    /// The attribute at byte `at` of a record, and where the next one is; `None` at the end.
    pub(super) fn parse(record: &'a [u8], at: usize) -> Result<Option<(Self, usize)>> {
        let kind = u32_at(record, at)?;
        if kind == kind::END {
            return Ok(None);
        }
        let length = u32_at(record, at + 4)? as usize;
        if length < 0x18 || !length.is_multiple_of(8) {
            return Err(Error::corrupt(format!("an attribute of {length} bytes at byte {at}")));
        }
        let bytes = part(record, at, length)?;
        let name_length = 2 * usize::from(u8_at(bytes, 9)?);
        let name = match name_length {
            0 => &[][..],
            _ => part(bytes, usize::from(u16_at(bytes, 0x0a)?), name_length)?,
        };
        let form = match u8_at(bytes, 8)? {
            0 => Form::Resident(part(
                bytes,
                usize::from(u16_at(bytes, 0x14)?),
                u32_at(bytes, 0x10)? as usize,
            )?),
            1 => Form::NonResident(Extent::parse(bytes)?),
            other => {
                return Err(Error::corrupt(format!("an attribute of form {other} at byte {at}")));
            }
        };
        let attribute =
            Self { kind, name, flags: u16_at(bytes, 0x0c)?, instance: u16_at(bytes, 0x0e)?, form };
        Ok(Some((attribute, at + length)))
    }
}

impl<'a> Extent<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self> {
        let lowest = u64_at(bytes, 0x10)?;
        let pairs_at = usize::from(u16_at(bytes, 0x20)?);
        let pairs = bytes
            .get(pairs_at..)
            .filter(|_| pairs_at >= 0x40)
            .ok_or_else(|| Error::corrupt(format!("mapping pairs at byte {pairs_at}")))?;
        let first = lowest == 0;
        let unit = u8_at(bytes, 0x22)?;
        Ok(Self {
            lowest,
            pairs,
            unit,
            allocated: if first { u64_at(bytes, 0x28)? } else { 0 },
            size: if first { u64_at(bytes, 0x30)? } else { 0 },
            initialized: if first { u64_at(bytes, 0x38)? } else { 0 },
            taken: if first && pairs_at >= 0x48 && unit != 0 {
                Some(u64_at(bytes, 0x40)?)
            } else {
                None
            },
        })
    }
}

/// An entry of an attribute list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListEntry {
    /// Type of the attribute.
    pub(super) kind: u32,
    /// Its name, UTF-16LE.
    pub(super) name: Vec<u8>,
    /// First cluster of the value that its extent describes.
    pub(super) lowest: u64,
    /// File reference of the record that holds it.
    pub(super) reference: u64,
    /// Its number in that record.
    pub(super) instance: u16,
}

/// The entries of an attribute list, in order.
///
/// # Errors
/// `Corrupt`.
pub(super) fn parse_list(bytes: &[u8]) -> Result<Vec<ListEntry>> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let length = usize::from(u16_at(bytes, at + 4)?);
        if length < 0x1a {
            return Err(Error::corrupt(format!("an attribute list entry of {length} bytes")));
        }
        let entry = part(bytes, at, length)?;
        let name_length = 2 * usize::from(u8_at(entry, 6)?);
        entries.push(ListEntry {
            kind: u32_at(entry, 0)?,
            name: part(entry, usize::from(u8_at(entry, 7)?), name_length)?.to_vec(),
            lowest: u64_at(entry, 8)?,
            reference: u64_at(entry, 0x10)?,
            instance: u16_at(entry, 0x18)?,
        });
        at += length;
    }
    Ok(entries)
}
