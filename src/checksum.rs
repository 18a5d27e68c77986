//! The checksum of one cluster of a disk, as kept beside each image.

use twox_hash::XxHash3_64;

/// Bytes of an encoded checksum.
pub const LENGTH: usize = 8;

/// CRC-32 (IEEE) and the lower half of XXH3 of the same bytes. The CRC finds every short damage; both
/// together tell changed from unchanged clusters with a chance of error of 2^-64, which a CRC-32
/// alone would not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    crc: u32,
    xxh: u32,
}

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        #[allow(clippy::cast_possible_truncation, reason = "the lower half is meant")]
        let xxh = XxHash3_64::oneshot(bytes) as u32;
        let crc = crc32fast::hash(bytes);
        // All zeroes means "none" where checksums are stored.
        if (crc, xxh) == (0, 0) { Self { crc, xxh: 1 } } else { Self { crc, xxh } }
    }

    /// Little-endian CRC, then XXH3.
    pub fn encode(self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..4].copy_from_slice(&self.crc.to_le_bytes());
        bytes[4..].copy_from_slice(&self.xxh.to_le_bytes());
        bytes
    }

    /// What [`encode`](Self::encode) gave; `None` for zeroes.
    pub fn decode(bytes: [u8; LENGTH]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = bytes;
        let (crc, xxh) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        ((crc, xxh) != (0, 0)).then_some(Self { crc, xxh })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_survives_its_encoding_and_none_is_zeroes() {
        let sum = Checksum::of(b"sendense");
        assert_eq!(Checksum::decode(sum.encode()), Some(sum));
        assert_eq!(Checksum::of(b"123456789").crc, 0xcbf4_3926, "the check value of CRC-32");
        assert_ne!(sum, Checksum::of(b"sendensE"));
        assert_eq!(Checksum::decode([0; LENGTH]), None);
    }
}
