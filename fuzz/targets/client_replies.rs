//! Replies as a client sees them: decoding makes progress, and data is announced within bounds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::Mode;
use nbd_proto::client::{Chunk, Reply, decode_reply};

const MAXIMUM: u32 = 64 << 10;

fuzz_target!(|input: &[u8]| {
    let Some((choice, mut rest)) = input.split_first() else { return };
    let mode = match choice % 3 {
        0 => Mode::Simple,
        1 => Mode::Structured,
        _ => Mode::Extended,
    };
    while let Ok(Some((reply, length))) = decode_reply(mode, MAXIMUM, rest) {
        assert!(length > 0);
        let data = match reply {
            Reply::Chunk { chunk: Chunk::Data { length, .. }, .. } => {
                assert!(length <= u64::from(MAXIMUM));
                length as usize
            }
            _ => 0,
        };
        let Some(next) = rest.get(length + data..) else { return };
        rest = next;
    }
});
