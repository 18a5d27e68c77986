//! Names: UTF-16 on the disk, WTF-8 outside, and compared regardless of case.

use crate::error::Result;

/// What stands for a unit that no name may have.
const REPLACEMENT: u16 = 0xfffd;

/// How case is taken away.
pub(crate) enum Fold {
    /// As Unicode's simple upper case does.
    Unicode,
    /// By the volume's own table, one unit for each.
    Table(Box<[u16]>),
}

impl Fold {
    fn unit(&self, unit: u16) -> u16 {
        match self {
            Self::Table(table) => table.get(usize::from(unit)).copied().unwrap_or(unit),
            Self::Unicode => {
                let Some(letter) = char::from_u32(u32::from(unit)) else { return unit };
                let mut upper = letter.to_uppercase();
                match (upper.next(), upper.next()) {
                    (Some(one), None) => u16::try_from(u32::from(one)).unwrap_or(unit),
                    _ => unit,
                }
            }
        }
    }

    /// Whether two names are the same but for case.
    pub(crate) fn same(&self, a: &[u16], b: &[u16]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| self.unit(*a) == self.unit(*b))
    }
}

/// Makes a name from a disk fit to be one: never empty, `.` or `..`, and without `/` and NUL.
pub(crate) fn harmless(mut name: Vec<u16>) -> Vec<u16> {
    let dot = u16::from(b'.');
    let dots = name.len() <= 2 && name.iter().all(|unit| *unit == dot);
    for unit in &mut name {
        if dots || *unit == 0 || *unit == u16::from(b'/') {
            *unit = REPLACEMENT;
        }
    }
    if name.is_empty() {
        name.push(REPLACEMENT);
    }
    name
}

/// A name as bytes: UTF-8, with unpaired surrogates as three bytes.
pub(crate) fn to_wtf8(name: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len());
    for unit in char::decode_utf16(name.iter().copied()) {
        match unit {
            Ok(letter) => bytes.extend(letter.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(lone) => {
                let [high, low] = lone.unpaired_surrogate().to_be_bytes();
                bytes.extend([
                    0xe0 | high >> 4,
                    0x80 | (high & 15) << 2 | low >> 6,
                    0x80 | low & 63,
                ]);
            }
        }
    }
    bytes
}

/// The reverse; `None` for bytes that are no such name.
pub(crate) fn from_wtf8(mut bytes: &[u8]) -> Option<Vec<u16>> {
    let mut name = Vec::with_capacity(bytes.len());
    while let [first, rest @ ..] = bytes {
        if let ([second @ 0xa0..=0xbf, third @ 0x80..=0xbf, after @ ..], 0xed) = (rest, first) {
            name.push(0xd000 | u16::from(second & 63) << 6 | u16::from(third & 63));
            bytes = after;
            continue;
        }
        let length = match first {
            0..=0x7f => 1,
            0x80..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0.. => 4,
        };
        let letter = std::str::from_utf8(bytes.get(..length)?).ok()?;
        name.extend(letter.encode_utf16());
        bytes = bytes.get(length..)?;
    }
    Some(name)
}

/// Finds `wanted` among names: the same one, or else the first that differs in case only.
pub(crate) struct Search<'a, T> {
    fold: &'a Fold,
    wanted: &'a [u16],
    found: Option<T>,
}

impl<'a, T> Search<'a, T> {
    /// A search for `wanted`.
    pub(crate) fn new(fold: &'a Fold, wanted: &'a [u16]) -> Self {
        Self { fold, wanted, found: None }
    }

    /// Looks at a name; whether to go on.
    ///
    /// # Errors
    /// None; it fits where slots are visited.
    pub(crate) fn offer(&mut self, name: &[u16], what: T) -> Result<bool> {
        if name == self.wanted {
            self.found = Some(what);
            return Ok(false);
        }
        if self.found.is_none() && self.fold.same(name, self.wanted) {
            self.found = Some(what);
        }
        Ok(true)
    }

    /// What was found.
    pub(crate) fn found(self) -> Option<T> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_out_and_back() {
        let lone = vec![0x61, 0xd83d, 0x62, 0xde00, 0xd83d, 0xde00, 0x4e2d];
        let bytes = to_wtf8(&lone);
        assert_eq!(bytes, b"a\xed\xa0\xbdb\xed\xb8\x80\xf0\x9f\x98\x80\xe4\xb8\xad");
        assert_eq!(from_wtf8(&bytes), Some(lone));
        for wrong in [&b"\xff"[..], b"\xe4\xb8", b"\x80\x80", b"\xed\xa0"] {
            assert_eq!(from_wtf8(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn names_that_would_lead_elsewhere_are_made_harmless() {
        let shown = |name: &str| to_wtf8(&harmless(name.encode_utf16().collect()));
        assert_eq!(shown(""), "\u{fffd}".as_bytes());
        assert_eq!(shown(".."), "\u{fffd}\u{fffd}".as_bytes());
        assert_eq!(shown("../x\0"), "..\u{fffd}x\u{fffd}".as_bytes());
        assert_eq!(shown("..."), b"...");
    }

    #[test]
    fn case_is_taken_away_letter_by_letter() {
        let units = |name: &str| name.encode_utf16().collect::<Vec<_>>();
        assert!(Fold::Unicode.same(&units("Straße-ÜÉ"), &units("sTRAßE-üé")));
        assert!(!Fold::Unicode.same(&units("STRASSE"), &units("straße")));
    }
}
