//! Finding out that a buffer holds nothing but zeroes.

/// Bytes that are looked at together: enough for wide vector instructions.
const BLOCK: usize = 256;

/// Whether every byte is zero. A buffer of data is told from its first bytes; a zero buffer costs
/// one pass at memory speed.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    rest.iter().all(|b| *b == 0)
        && blocks.iter().all(|block| block.iter().fold(0, |seen, b| seen | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_found() {
        let mut bytes = vec![0; 3 * BLOCK + 7];
        assert!(is_zero(&bytes));
        assert!(is_zero(&[]));
        for at in 0..bytes.len() {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
