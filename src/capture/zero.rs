//! Finding zeroes.

/// Bytes that are looked at together.
const LANE: usize = 256;

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let lanes = bytes.chunks_exact(LANE);
    let rest = lanes.remainder();
    // Without a way out inside a lane, so that it becomes a few wide instructions.
    let zero = |lane: &[u8]| lane.iter().fold(0, |all, byte| all | byte) == 0;
    zero(rest) && lanes.into_iter().all(zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_makes_it_data() {
        for length in [0, 1, 255, 256, 257, 1000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
