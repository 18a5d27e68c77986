//! The server's negotiation: never a panic, bounded answers, and the same answers however the
//! bytes are cut into packets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::server::{Event, ExportInfo, Handshake, HandshakeConfig, Refusal};
use nbd_proto::{ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSizes, TransmissionFlags};

/// Bytes of answer that one byte of question may cost at most, and what comes without asking.
const ANSWER_PER_BYTE: usize = 64;
const UNASKED: usize = 4096;

fn export() -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: "a disk".into(),
        size: 1 << 30,
        flags: TransmissionFlags(0x3fff),
        block: BlockSizes { minimum: 1, preferred: 65536, maximum: 64 << 20 },
        contexts: vec![BASE_ALLOCATION.into(), ALLOCATION_DEPTH.into()],
    }
}

/// Feeds `input` in pieces of `piece` bytes; all that the server says, and how it ended.
fn negotiate(input: &[u8], piece: usize) -> (Vec<u8>, String) {
    let mut handshake = Handshake::new(HandshakeConfig::default());
    let mut said = Vec::new();
    for part in input.chunks(piece) {
        handshake.handle_input(part);
        loop {
            match handshake.poll() {
                Event::NeedInput => break,
                Event::Lookup { name, .. } => {
                    let found = match name.as_str() {
                        "disk" | "" => Ok(export()),
                        other => Err(Refusal::unknown(other)),
                    };
                    if let Some(reason) = handshake.handle_lookup(found) {
                        said.extend(handshake.take_output());
                        return (said, format!("{reason:?}"));
                    }
                }
                Event::ListExports => handshake.handle_list([("disk", "a disk"), ("other", "")]),
                Event::StartTls => handshake.handle_tls(),
                end @ (Event::Close(_) | Event::Transmit(_)) => {
                    said.extend(handshake.take_output());
                    return (said, format!("{end:?}"));
                }
            }
        }
        said.extend(handshake.take_output());
    }
    (said, "waits".into())
}

fuzz_target!(|input: &[u8]| {
    let (said, end) = negotiate(input, input.len().max(1));
    assert!(said.len() <= UNASKED + input.len() * ANSWER_PER_BYTE);
    // What follows the end of the negotiation is the next phase's, so only the end may differ in
    // the bytes that were fed with it.
    let (slowly, slow_end) = negotiate(input, 1);
    assert_eq!(said, slowly);
    assert_eq!(end.split('{').next(), slow_end.split('{').next());
});
