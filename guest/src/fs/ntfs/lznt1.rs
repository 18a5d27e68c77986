//! LZNT1, the compression of NTFS: chunks that become 4 KiB each, of literal bytes and of copies from
//! within the chunk.

use super::bytes::{part, u16_at};
use crate::error::{Error, Result};

const CHUNK: usize = 4096;

/// Fills `out` with what `packed` says; what it leaves out is zeroes.
///
/// # Errors
/// `Corrupt`.
pub(super) fn decompress(packed: &[u8], out: &mut [u8]) -> Result<()> {
    let mut at = 0;
    for chunk in out.chunks_mut(CHUNK) {
        let header = if at + 2 <= packed.len() { u16_at(packed, at)? } else { 0 };
        if header == 0 {
            // The end: all later chunks are zeroes as well, since `at` stays where it is.
            chunk.fill(0);
            continue;
        }
        if header >> 12 & 7 != 3 {
            return Err(Error::corrupt(format!(
                "a compressed chunk with the header {header:#06x}"
            )));
        }
        let body = part(packed, at + 2, usize::from(header & 0xfff) + 1)?;
        at += 2 + body.len();
        let length = if header & 0x8000 != 0 {
            unpack(body, chunk)?
        } else {
            let length = body.len().min(chunk.len());
            chunk[..length].copy_from_slice(&body[..length]);
            length
        };
        chunk[length..].fill(0);
    }
    Ok(())
}

/// Unpacks one chunk; how many bytes it has.
fn unpack(body: &[u8], out: &mut [u8]) -> Result<usize> {
    let mut rest = body;
    let mut at = 0;
    while let Some((&flags, tail)) = rest.split_first() {
        rest = tail;
        for bit in 0..8 {
            if rest.is_empty() || at == out.len() {
                break;
            }
            if flags & 1 << bit == 0 {
                out[at] = rest[0];
                at += 1;
                rest = &rest[1..];
                continue;
            }
            let token = usize::from(u16_at(rest, 0)?);
            rest = &rest[2..];
            // The further into the chunk, the more bits tell how far back, and the fewer how long.
            let back_bits = at.saturating_sub(1).checked_ilog2().map_or(4, |log| (log + 1).max(4));
            let length_bits = 16 - back_bits;
            let back = (token >> length_bits) + 1;
            let length = (token & ((1 << length_bits) - 1)) + 3;
            if back > at || length > out.len() - at {
                return Err(Error::corrupt(format!(
                    "a copy of {length} bytes from {back} before byte {at} of a compressed chunk"
                )));
            }
            if back >= length {
                out.copy_within(at - back..at - back + length, at);
            } else {
                for index in at..at + length {
                    out[index] = out[index - back];
                }
            }
            at += length;
        }
        if at == out.len() {
            break;
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(body: &[u8], compressed: bool) -> Vec<u8> {
        let header =
            0x3000 | u16::try_from(body.len() - 1).unwrap() | if compressed { 0x8000 } else { 0 };
        [&header.to_le_bytes(), body].concat()
    }

    #[test]
    fn copies_may_overlap_what_they_make() {
        let packed = chunk(&[0b10, b'A', 4, 0], true);
        let mut out = [9; 20];
        decompress(&packed, &mut out).unwrap();
        assert_eq!(&out, b"AAAAAAAA\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn every_chunk_starts_at_its_place() {
        let packed = [chunk(b"first", false), chunk(&[0, b'2'], true), vec![0, 0, 1, 2]].concat();
        let mut out = vec![9; 3 * CHUNK];
        decompress(&packed, &mut out).unwrap();
        assert_eq!((&out[..6], &out[CHUNK..CHUNK + 2]), (&b"first\0"[..], &b"2\0"[..]));
        assert!(out[CHUNK + 1..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn nonsense_is_refused() {
        let mut out = vec![0; CHUNK];
        for packed in [
            vec![1, 0x80, 0, 0],
            vec![0xff, 0xbf, 0],
            chunk(&[1, 0, 0], true),
            chunk(&[0b10, b'A', 0xff, 0x0f], true),
            chunk(&[0b10, b'A', 0], true),
        ] {
            assert!(decompress(&packed, &mut out).is_err(), "{packed:?}");
        }
    }
}
