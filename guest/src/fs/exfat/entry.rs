//! Directory entry sets: a file entry, its stream extension, and its name.

use crate::error::{Error, Result};
use crate::fs::Time;
use crate::fs::fat::bytes::{u8_at, u16_at, u32_at, u64_at};
use crate::fs::fat::names::harmless;
use crate::fs::fat::time::time;

pub(crate) const END: u8 = 0x00;
pub(crate) const BITMAP: u8 = 0x81;
pub(crate) const UPCASE: u8 = 0x82;
pub(crate) const LABEL: u8 = 0x83;
pub(crate) const FILE: u8 = 0x85;
pub(crate) const STREAM: u8 = 0xc0;
pub(crate) const NAME: u8 = 0xc1;

const READ_ONLY: u16 = 0x01;
const DIRECTORY: u16 = 0x10;
/// Secondary entries of a set: a stream extension, 1 to 17 names, and vendors' extensions.
const SECONDARY: std::ops::RangeInclusive<usize> = 2..=255;

/// What an entry set says.
#[derive(Debug, Clone)]
pub(crate) struct File {
    pub(crate) name: Vec<u16>,
    pub(crate) directory: bool,
    pub(crate) read_only: bool,
    /// Whether its clusters follow each other, and the table does not tell of them.
    pub(crate) contiguous: bool,
    pub(crate) first: u32,
    pub(crate) size: u64,
    /// Bytes that were written; the rest reads as zeroes.
    pub(crate) valid: u64,
    pub(crate) created: Option<Time>,
    pub(crate) modified: Option<Time>,
    pub(crate) accessed: Option<Time>,
}

/// How many slots the set takes that begins with this one.
///
/// # Errors
/// `Corrupt`.
pub(crate) fn slots(slot: &[u8; 32]) -> Result<usize> {
    let secondary = usize::from(slot[1]);
    match SECONDARY.contains(&secondary) {
        true => Ok(secondary + 1),
        false => Err(Error::corrupt(format!("an entry set of {secondary} secondary entries"))),
    }
}

impl File {
    /// Reads a whole set.
    ///
    /// # Errors
    /// `Corrupt` where its checksum does not fit or it contradicts itself.
    pub(crate) fn parse(set: &[[u8; 32]], place: u64) -> Result<Self> {
        let wrong = |what: &str| Error::corrupt(format!("entry set at byte {place}: {what}"));
        let [file, stream, names @ ..] = set else { return Err(wrong("it is too short")) };
        let bytes = set.as_flattened().iter().enumerate();
        let sum = bytes
            .filter(|(at, _)| !matches!(at, 2 | 3))
            .fold(0_u16, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u16::from(*byte)));
        if sum != u16_at(file, 2) {
            return Err(wrong("its checksum does not fit"));
        }
        if file[0] != FILE || stream[0] != STREAM {
            return Err(wrong("it has no stream extension"));
        }
        let length = usize::from(stream[3]);
        let named = length.div_ceil(15);
        let mut name = Vec::with_capacity(named * 15);
        for slot in names.iter().take(named).filter(|slot| slot[0] == NAME) {
            name.extend((2..32).step_by(2).map(|at| u16_at(slot, at)));
        }
        if length == 0 || name.len() < length {
            return Err(wrong("its name is not whole"));
        }
        name.truncate(length);
        let attributes = u16_at(file, 4);
        let (valid, size) = (u64_at(stream, 8), u64_at(stream, 24));
        if valid > size {
            return Err(wrong("more bytes are valid than there are"));
        }
        let at = |stamp: usize, hundredths: u8, zone: usize| {
            let (date, clock) = (u16_at(file, stamp + 2), u16_at(file, stamp));
            time(date, clock, hundredths).map(|time| to_utc(time, u8_at(file, zone)))
        };
        Ok(Self {
            name: harmless(name),
            directory: attributes & DIRECTORY != 0,
            read_only: attributes & READ_ONLY != 0,
            contiguous: stream[1] & 2 != 0,
            first: u32_at(stream, 20),
            size,
            valid,
            created: at(8, file[20], 22),
            modified: at(12, file[21], 23),
            accessed: at(16, 0, 24),
        })
    }
}

/// A local time as UTC: the zone's upper bit says that the others, with a sign, count quarter hours.
fn to_utc(local: Time, zone: u8) -> Time {
    let quarters = match zone {
        0..0x80 => 0,
        0x80..0xc0 => i64::from(zone & 0x7f),
        0xc0.. => i64::from(zone & 0x7f) - 128,
    };
    Time { seconds: local.seconds - quarters * 900, ..local }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_quarters_of_an_hour_with_a_sign() {
        let at = |zone| to_utc(Time { seconds: 0, nanoseconds: 5 }, zone).seconds;
        assert_eq!([at(0), at(0x80), at(0x84), at(0xfc), at(4)], [0, 0, -3600, 3600, 0]);
    }
}
