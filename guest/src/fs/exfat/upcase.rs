//! The up-case table: what each unit of a name is in upper case.

use super::boot::checksum32;
use crate::error::{Error, Result};
use crate::fs::fat::bytes::u16_at;

/// Units there are, and so bytes of a table at most.
const UNITS: usize = 1 << 16;
/// Bytes of a table, at most.
pub(crate) const LONGEST: u64 = 2 * UNITS as u64;
/// Says that as many units as the next one tells are their own upper case.
const SAME: u16 = 0xffff;

/// Reads a table; units past its end are their own upper case.
///
/// # Errors
/// `Corrupt` where its checksum does not fit, or it tells of more units than there are.
pub(crate) fn parse(bytes: &[u8], checksum: u32) -> Result<Box<[u16]>> {
    if checksum32(bytes.iter().copied()) != checksum {
        return Err(Error::corrupt("the checksum of the up-case table does not fit"));
    }
    let mut table: Vec<u16> = (0..=u16::MAX).collect();
    let mut unit = 0_usize;
    let mut told = bytes.chunks_exact(2).map(|pair| u16_at(pair, 0));
    while let Some(value) = told.next() {
        // In a table that is whole, the last unit stands for itself.
        match (value, told.len()) {
            (SAME, 1..) => unit += usize::from(told.next().unwrap_or(0)),
            _ => {
                let place = table.get_mut(unit);
                *place.ok_or_else(|| Error::corrupt("the up-case table is too long"))? = value;
                unit += 1;
            }
        }
    }
    Ok(table.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_skips_units_that_stay_as_they_are() {
        let bytes = [0xff, 0xff, 0x61, 0, 0x41, 0, 0x42, 0];
        let sum = checksum32(bytes.into_iter());
        let table = parse(&bytes, sum).unwrap();
        assert_eq!(table[0x60..0x64], [0x60, 0x41, 0x42, 0x63]);
        assert!(parse(&bytes, sum ^ 1).is_err());
    }
}
