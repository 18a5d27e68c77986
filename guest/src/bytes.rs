//! Numbers out of bytes that were read from a disk.

/// `N` bytes at `at`, zeroes where the buffer ends.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let found = at.checked_add(N).and_then(|end| bytes.get(at..end));
    found.and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
}

/// A little-endian number of 2 bytes.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(take(bytes, at))
}

/// A little-endian number of 4 bytes.
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(bytes, at))
}

/// A little-endian number of 8 bytes.
pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(bytes, at))
}
