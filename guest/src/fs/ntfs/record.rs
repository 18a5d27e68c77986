//! File records of the MFT, and what protects them: the update sequence array.

use super::attribute::Attribute;
use super::bytes::{part, u16_at, u32_at, u64_at};
use crate::error::{Error, Result};

const IN_USE: u16 = 1;
/// Distance of the words that the update sequence array keeps, whatever the sector size.
const STRIDE: usize = 512;
/// Most attributes in one record: each takes 24 bytes.
const MAX_ATTRIBUTES: usize = 4096;

/// Checks the update sequence array of a protected structure and puts back the words that it keeps.
///
/// # Errors
/// `Corrupt` where the signature is another, or a sector was not written with the rest.
pub(super) fn apply_fixups(bytes: &mut [u8], magic: &[u8; 4], sector: u32) -> Result<()> {
    if bytes.get(..4) != Some(magic.as_slice()) {
        return Err(Error::corrupt(format!(
            "the signature {} is missing",
            String::from_utf8_lossy(magic)
        )));
    }
    let at = usize::from(u16_at(bytes, 4)?);
    let count = usize::from(u16_at(bytes, 6)?);
    let strides = count.saturating_sub(1);
    let stride =
        [STRIDE, sector as usize].into_iter().find(|stride| strides * stride == bytes.len());
    let Some(stride) =
        stride.filter(|_| at % 2 == 0 && at + 2 * count <= STRIDE.min(bytes.len()) - 2)
    else {
        return Err(Error::corrupt(format!(
            "an update sequence array of {count} words at byte {at} of {}",
            bytes.len()
        )));
    };
    let array = part(bytes, at, 2 * count)?.to_vec();
    let (number, kept) = array.split_at(2);
    for (block, word) in bytes.chunks_exact_mut(stride).zip(kept.chunks_exact(2)) {
        let end = block.len() - 2;
        if block[end..] != *number {
            return Err(Error::corrupt("a sector of it was not written with the others"));
        }
        block[end..].copy_from_slice(word);
    }
    Ok(())
}

/// A file record, its fixups verified and undone.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// Its place in the MFT.
    pub(super) number: u64,
    bytes: Vec<u8>,
}

impl Record {
    /// Takes the bytes of record `number`.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(super) fn parse(number: u64, mut bytes: Vec<u8>, sector: u32) -> Result<Self> {
        let check = |bytes: &mut Vec<u8>| {
            apply_fixups(bytes, b"FILE", sector)?;
            let used = u32_at(bytes, 0x18)? as usize;
            let first = usize::from(u16_at(bytes, 0x14)?);
            if used > bytes.len() || first < 0x28 || !first.is_multiple_of(8) || first >= used {
                return Err(Error::corrupt(format!("attributes from byte {first} of {used}")));
            }
            bytes.truncate(used);
            Ok(())
        };
        check(&mut bytes).map_err(|e| in_record(number, &e))?;
        Ok(Self { number, bytes })
    }

    /// How often the record was used.
    pub(super) fn sequence(&self) -> u16 {
        u16_at(&self.bytes, 0x10).unwrap_or(0)
    }

    /// Names that the file has.
    pub(super) fn links(&self) -> u16 {
        u16_at(&self.bytes, 0x12).unwrap_or(0)
    }

    /// Whether it describes something.
    pub(super) fn in_use(&self) -> bool {
        u16_at(&self.bytes, 0x16).unwrap_or(0) & IN_USE != 0
    }

    /// The file reference of the record that this one extends; 0 where it stands alone.
    pub(super) fn base(&self) -> u64 {
        u64_at(&self.bytes, 0x20).unwrap_or(0)
    }

    /// Its file reference.
    pub(super) fn reference(&self) -> u64 {
        self.number | u64::from(self.sequence()) << 48
    }

    /// Its attributes, in order. What cannot be parsed is an error for all of them.
    pub(super) fn attributes(&self) -> Result<Vec<Attribute<'_>>> {
        let mut attributes = Vec::new();
        let mut at = usize::from(u16_at(&self.bytes, 0x14)?);
        loop {
            match Attribute::parse(&self.bytes, at).map_err(|e| in_record(self.number, &e))? {
                Some((attribute, next)) => {
                    attributes.push(attribute);
                    at = next;
                }
                None => return Ok(attributes),
            }
            if attributes.len() > MAX_ATTRIBUTES {
                return Err(Error::limit(format!("more than {MAX_ATTRIBUTES} attributes")));
            }
        }
    }
}

/// Says where a failure happened.
pub(super) fn in_record(number: u64, error: &Error) -> Error {
    Error::new(error.kind, format!("MFT record {number}: {}", error.message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> Vec<u8> {
        let mut bytes = vec![7; 1024];
        bytes[..8].copy_from_slice(b"FILE\x30\0\x03\0");
        bytes[0x30..0x36].copy_from_slice(&[1, 2, 0xa, 0xb, 0xc, 0xd]);
        bytes[510..512].copy_from_slice(&[1, 2]);
        bytes[1022..].copy_from_slice(&[1, 2]);
        bytes
    }

    #[test]
    fn fixups_are_undone_and_torn_writes_are_found() {
        let mut bytes = block();
        apply_fixups(&mut bytes, b"FILE", 512).unwrap();
        assert_eq!((&bytes[510..512], &bytes[1022..]), (&[0xa, 0xb][..], &[0xc, 0xd][..]));
        let mut torn = block();
        torn[1022] = 9;
        assert!(apply_fixups(&mut torn, b"FILE", 512).is_err());
        assert!(apply_fixups(&mut block(), b"INDX", 512).is_err());
        for count in [0, 1, 2, 4, 0xff] {
            let mut bytes = block();
            bytes[6] = count;
            assert!(apply_fixups(&mut bytes, b"FILE", 512).is_err(), "{count}");
        }
    }
}
