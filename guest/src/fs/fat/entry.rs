//! Directory entries: short names, and the long names before them.

use super::bytes::{u8_at, u16_at, u32_at};
use super::names::harmless;
use super::time::time;
use crate::fs::Time;

const READ_ONLY: u8 = 0x01;
const VOLUME: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
/// The attributes that mark a part of a long name, among these bits.
const LONG: u8 = 0x0f;
const LONG_MASK: u8 = 0x3f;
/// Units in a part of a long name, parts of a name, and units of a name.
const PART: usize = 13;
const PARTS: u8 = 20;
const UNITS: usize = 255;
/// Units of a short name with its point, at most.
pub(crate) const SHORT: usize = 12;

/// The upper half of code page 437.
const UPPER: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// What a short entry says.
#[derive(Debug, Clone)]
pub(crate) struct Short {
    pub(crate) directory: bool,
    pub(crate) read_only: bool,
    pub(crate) first: u32,
    pub(crate) size: u32,
    pub(crate) created: Option<Time>,
    pub(crate) modified: Option<Time>,
    pub(crate) accessed: Option<Time>,
}

/// What a slot of a directory holds.
pub(crate) enum Slot {
    /// Nothing, and nothing after it.
    End,
    /// Nothing of interest: a deleted entry, `.` or `..`.
    Nothing,
    /// The volume's label.
    Label([u8; 11]),
    /// A part of a long name.
    Long,
    /// An entry.
    Short,
}

/// What kind of slot it is.
pub(crate) fn kind(slot: &[u8; 32]) -> Slot {
    let mut name = [0; 11];
    name.copy_from_slice(&slot[..11]);
    match (slot[0], slot[11]) {
        (0, _) => Slot::End,
        (0xe5, _) => Slot::Nothing,
        (_, attributes) if attributes & LONG_MASK == LONG => Slot::Long,
        (_, attributes) if attributes & VOLUME != 0 => Slot::Label(name),
        _ if name == *b".          " || name == *b"..         " => Slot::Nothing,
        _ => Slot::Short,
    }
}

impl Short {
    /// Reads a short entry; `wide` where the first cluster has 32 bits.
    pub(crate) fn parse(slot: &[u8; 32], wide: bool) -> Self {
        let high = if wide { u32::from(u16_at(slot, 20)) << 16 } else { 0 };
        Self {
            directory: slot[11] & DIRECTORY != 0,
            read_only: slot[11] & READ_ONLY != 0,
            first: high | u32::from(u16_at(slot, 26)),
            size: u32_at(slot, 28),
            created: time(u16_at(slot, 16), u16_at(slot, 14), slot[13]),
            modified: time(u16_at(slot, 24), u16_at(slot, 22), 0),
            accessed: time(u16_at(slot, 18), 0, 0),
        }
    }
}

/// Text in code page 437.
pub(crate) fn decode(bytes: &[u8], lower: bool) -> String {
    let letter = |byte: &u8| {
        let upper = UPPER.chars().nth(usize::from(byte.wrapping_sub(128)));
        let letter = if *byte < 128 { char::from(*byte) } else { upper.unwrap_or('\u{fffd}') };
        let mut small = letter.to_lowercase();
        match (lower, small.next(), small.next()) {
            (true, Some(small), None) => small,
            _ => letter,
        }
    };
    bytes.iter().map(letter).collect()
}

/// A short name with its point. The entry tells which half Windows NT would show in lower case.
pub(crate) fn short_name(slot: &[u8; 32]) -> Vec<u16> {
    let mut bytes = [0; 11];
    bytes.copy_from_slice(&slot[..11]);
    if bytes[0] == 0x05 {
        bytes[0] = 0xe5;
    }
    let case = u8_at(slot, 12);
    let base = decode(bytes[..8].trim_ascii_end(), case & 0x08 != 0);
    let extension = decode(bytes[8..].trim_ascii_end(), case & 0x10 != 0);
    let point = if extension.is_empty() { "" } else { "." };
    harmless(format!("{base}{point}{extension}").encode_utf16().collect())
}

/// Collects the parts of a long name, which come last part first.
#[derive(Default)]
pub(crate) struct LongName {
    units: Vec<u16>,
    missing: u8,
    checksum: u8,
}

impl LongName {
    /// Takes the next part. One that does not follow the part before starts anew.
    pub(crate) fn push(&mut self, slot: &[u8; 32]) {
        let order = slot[0] & 0x1f;
        if slot[0] & 0x40 != 0 && (1..=PARTS).contains(&order) {
            *self = Self { units: Vec::new(), missing: order, checksum: slot[13] };
        } else if self.missing == 0 || order != self.missing || slot[13] != self.checksum {
            *self = Self::default();
            return;
        }
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        let part: Vec<u16> = places.map(|at| u16_at(slot, at)).collect();
        debug_assert_eq!(part.len(), PART);
        self.units.splice(..0, part);
        self.missing -= 1;
        if self.missing == 0 {
            self.missing = u8::MAX;
        }
    }

    /// The name of the short entry after the parts, and starts anew: the long name where it is whole and
    /// belongs to that entry, and the short one else, as every system does.
    pub(crate) fn finish(&mut self, slot: &[u8; 32]) -> Vec<u16> {
        let LongName { mut units, missing, checksum } = std::mem::take(self);
        let end = units.iter().position(|unit| *unit == 0).unwrap_or(units.len());
        units.truncate(end);
        let sum = slot[..11].iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        match missing == u8::MAX && sum == checksum && (1..=UNITS).contains(&units.len()) {
            true => harmless(units),
            false => short_name(slot),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_shown_in_the_case_that_the_entry_tells() {
        let mut slot = [0; 32];
        slot[..11].copy_from_slice(b"\x05\x81ME    TXT");
        let shown = |slot: &[u8; 32]| String::from_utf16(&short_name(slot)).unwrap();
        assert_eq!(shown(&slot), "σüME.TXT");
        slot[12] = 0x10;
        assert_eq!(shown(&slot), "σüME.txt");
        slot[..11].copy_from_slice(b"NOEXT      ");
        assert_eq!(shown(&slot), "NOEXT");
        assert_eq!(UPPER.chars().count(), 128);
    }

    #[test]
    fn a_long_name_without_its_first_part_is_not_believed() {
        let mut part = [b'x'; 32];
        (part[0], part[11]) = (0x42, 0x0f);
        let mut long = LongName::default();
        long.push(&part);
        let mut slot = [0; 32];
        slot[..11].copy_from_slice(b"SHORT      ");
        assert_eq!(String::from_utf16(&long.finish(&slot)).unwrap(), "SHORT");
    }
}
