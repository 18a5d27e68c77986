//! Requests as a server sees them: what is accepted lies inside the export and its bounds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::server::{
    Command, Event, ExportInfo, Handshake, HandshakeConfig, Parsed, Transmission,
};
use nbd_proto::{BASE_ALLOCATION, BlockSizes, TransmissionFlags};

const SIZE: u64 = 1 << 20;
const MAXIMUM: u32 = 64 << 10;

fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The state after a negotiation of the kind that `choice` says.
fn transmission(choice: u8, flags: u16) -> Option<Transmission> {
    let mut input = vec![0, 0, 0, 3];
    match choice % 3 {
        0 => {}
        1 => input.extend(option(8, b"")),
        _ => input.extend(option(11, b"")),
    }
    if choice & 4 != 0 {
        input.extend(option(10, b"\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    input.extend(option(7, b"\0\0\0\x01d\0\0"));
    let mut handshake = Handshake::new(HandshakeConfig::default());
    handshake.handle_input(&input);
    loop {
        match handshake.poll() {
            Event::Lookup { .. } => {
                let info = ExportInfo {
                    name: "d".into(),
                    description: String::new(),
                    size: SIZE,
                    flags: TransmissionFlags(flags),
                    block: BlockSizes { minimum: 1, preferred: 4096, maximum: MAXIMUM },
                    contexts: vec![BASE_ALLOCATION.into()],
                };
                handshake.handle_lookup(Ok(info));
            }
            Event::Transmit(negotiated) => return Some(negotiated.transmission()),
            _ => return None,
        }
    }
}

fn inside(parsed: &Parsed) {
    if let Parsed::Accept(request) = parsed {
        assert!(request.offset.checked_add(request.length).is_some_and(|end| end <= SIZE));
        if matches!(request.command, Command::Write { .. } | Command::Read { whole: true }) {
            assert!(request.length <= u64::from(MAXIMUM));
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some(([choice, high, low], mut rest)) = input.split_first_chunk::<3>() else { return };
    let Some(mut state) = transmission(*choice, u16::from_be_bytes([*high, *low])) else { return };
    if choice & 8 != 0 {
        state.begin_shutdown();
    }
    loop {
        let Ok(parsed) = state.handle_header(rest) else { return };
        let taken = match &parsed {
            Parsed::Incomplete | Parsed::Disconnect => return,
            Parsed::Accept(request) => match request.command {
                Command::Write { .. } => request.length as usize,
                _ => 0,
            },
            Parsed::Reject(rejection) => rejection.skip as usize,
            Parsed::NeedFilter { request, payload } => {
                let Some(bytes) = rest.get(state.header_length()..) else { return };
                let Some(bytes) = bytes.get(..*payload) else { return };
                inside(&state.handle_filter(request.clone(), bytes));
                *payload
            }
        };
        inside(&parsed);
        let Some(next) = rest.get(state.header_length() + taken..) else { return };
        rest = next;
    }
});
