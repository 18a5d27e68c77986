//! The CRC-32 of GPT headers and LVM2 metadata.

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

/// Goes on from `state` with `bytes`; neither start nor end is inverted.
pub(crate) fn update(state: u32, bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(state, |state, &byte| state >> 8 ^ TABLE[usize::from((state & 0xff) as u8 ^ byte)])
}

/// The CRC-32 of IEEE 802.3.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !update(!0, bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_value_of_the_polynomial_comes_out() {
        assert_eq!(super::crc32(b"123456789"), 0xcbf4_3926);
    }
}
