//! Names: UTF-16 on the disk, UTF-8 outside, and upper case by the volume's own table.

/// UTF-16LE as UTF-8; unpaired surrogates as WTF-8 has them, three bytes each.
pub(super) fn to_utf8(utf16: &[u8]) -> Vec<u8> {
    let units = utf16.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let mut bytes = Vec::with_capacity(utf16.len());
    for decoded in char::decode_utf16(units) {
        match decoded {
            Ok(char) => bytes.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(error) => {
                let [high, low] = error.unpaired_surrogate().to_be_bytes();
                bytes.extend([
                    0xe0 | high >> 4,
                    0x80 | (high & 15) << 2 | low >> 6,
                    0x80 | low & 0x3f,
                ]);
            }
        }
    }
    bytes
}

/// UTF-8 or WTF-8 as UTF-16; `None` where it is neither, and so no name on this volume.
pub(super) fn to_utf16(bytes: &[u8]) -> Option<Vec<u16>> {
    let mut units = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        let valid = match std::str::from_utf8(rest) {
            Ok(text) => text,
            Err(error) => std::str::from_utf8(&rest[..error.valid_up_to()]).unwrap_or(""),
        };
        units.extend(valid.encode_utf16());
        rest = &rest[valid.len()..];
        match rest {
            [] => {}
            [0xed, b @ 0xa0..=0xbf, c @ 0x80..=0xbf, tail @ ..] => {
                units.push(0xd000 | u16::from(b & 0x3f) << 6 | u16::from(c & 0x3f));
                rest = tail;
            }
            _ => return None,
        }
    }
    Some(units)
}

/// Whether a name may be told: what callers are promised of [`crate::Entry::name`].
pub(super) fn is_fit(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// The volume's `$UpCase`.
pub(super) struct UpCase {
    table: Vec<u16>,
}

impl UpCase {
    /// Takes the table's bytes.
    pub(super) fn new(bytes: &[u8]) -> Self {
        let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        Self { table: units.collect() }
    }

    fn of(&self, unit: u16) -> u16 {
        self.table.get(usize::from(unit)).copied().unwrap_or(unit)
    }

    /// Whether a name on the disk and another one are the same, regardless of case.
    pub(super) fn same(&self, utf16: &[u8], other: &[u16]) -> bool {
        utf16.len() == 2 * other.len()
            && utf16
                .chunks_exact(2)
                .zip(other)
                .all(|(a, b)| self.of(u16::from_le_bytes([a[0], a[1]])) == self.of(*b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back_with_unpaired_surrogates() {
        for units in [
            &[0x61_u16, 0x4e2d, 0xd83d, 0xde00][..],
            &[0xd83d],
            &[0xde00, 0xd83d, 0x61],
            &[0xdfff, 0xdfff],
            &[],
        ] {
            let bytes: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
            assert_eq!(to_utf16(&to_utf8(&bytes)).as_deref(), Some(units));
        }
        assert_eq!(to_utf8(&[0x3d, 0xd8]), [0xed, 0xa0, 0xbd]);
        assert_eq!(to_utf16(b"no \xff utf-8"), None);
    }
}
