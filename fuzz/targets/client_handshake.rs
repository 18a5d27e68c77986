//! The client's negotiation against a server that says anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::client::{Event, Goal, Handshake, HandshakeConfig};
use nbd_proto::{ALLOCATION_DEPTH, BASE_ALLOCATION, Mode};

fuzz_target!(|input: &[u8]| {
    let Some((choice, input)) = input.split_first() else { return };
    let mode = match choice % 3 {
        0 => Mode::Simple,
        1 => Mode::Structured,
        _ => Mode::Extended,
    };
    let mut handshake = Handshake::new(HandshakeConfig {
        goal: match choice & 20 {
            0 | 16 => Goal::Use("disk".into()),
            4 => Goal::List,
            _ => Goal::Contexts("disk".into()),
        },
        mode,
        contexts: vec![BASE_ALLOCATION.into(), ALLOCATION_DEPTH.into()],
    });
    let piece = if choice & 8 == 0 { input.len().max(1) } else { 1 };
    for part in input.chunks(piece) {
        handshake.handle_input(part);
        loop {
            match handshake.poll() {
                Ok(Event::NeedInput) => break,
                Ok(_) | Err(_) => return,
            }
        }
        // What a client asks does not grow with what it is told.
        assert!(handshake.take_output().len() < 4096);
    }
});
