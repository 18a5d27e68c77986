//! Integers in fixed places of structures whose length was checked before.

/// The 16 bits at `at`, little-endian; 0 past the end.
pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

/// The 32 bits at `at`, little-endian; 0 past the end.
pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// The 32 bits at `at`, big-endian, as the journal has them; 0 past the end.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    le32(bytes, at).swap_bytes()
}

/// The 16 bits at `at`, big-endian, as the journal has them; 0 past the end.
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    le16(bytes, at).swap_bytes()
}

/// Two halves of 32 bits as one number.
pub(super) fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// CRC-32C as this format chains it: without the final inversion.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
