//! Requests and replies: golden bytes, the errno of each refusal, and both halves against each
//! other.
#![allow(clippy::unwrap_used, missing_docs)]

use nbd_proto::client::{Chunk, Reply, decode_reply, encode_request};
use nbd_proto::server::{
    Command, Event, ExportInfo, ExtentList, Handshake, HandshakeConfig, Parsed, ReplyEncoder,
    StatusFilter, Transmission,
};
use nbd_proto::{
    BASE_ALLOCATION, BlockSizes, CommandFlags, CommandType, Errno, Mode, RequestHeader,
    TransmissionFlags,
};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;
const MAX: u32 = 256 << 10;

fn all_flags() -> TransmissionFlags {
    TransmissionFlags(0xffff).without(TransmissionFlags::READ_ONLY)
}

fn transmission_with(mode: Mode, flags: TransmissionFlags, contexts: bool) -> Transmission {
    let option = |code: u32, data: &[u8]| {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(code.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let mut handshake = Handshake::new(HandshakeConfig::default());
    let mut input = vec![0, 0, 0, 3];
    match mode {
        Mode::Simple => {}
        Mode::Structured => input.extend(option(8, b"")),
        Mode::Extended => input.extend(option(11, b"")),
    }
    if contexts {
        input.extend(option(10, b"\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    input.extend(option(7, b"\0\0\0\x01d\0\0"));
    handshake.handle_input(&input);
    loop {
        match handshake.poll() {
            Event::Lookup { .. } => {
                let reason = handshake.handle_lookup(Ok(ExportInfo {
                    name: "d".into(),
                    description: String::new(),
                    size: SIZE,
                    flags,
                    block: BlockSizes { minimum: 1, preferred: 4096, maximum: MAX },
                    contexts: vec![BASE_ALLOCATION.into()],
                }));
                assert_eq!(reason, None);
            }
            Event::Transmit(negotiated) => return negotiated.transmission(),
            event => panic!("{event:?}"),
        }
    }
}

fn transmission(mode: Mode) -> Transmission {
    transmission_with(mode, all_flags(), mode > Mode::Simple)
}

fn judge(
    transmission: &Transmission,
    command: u16,
    flags: CommandFlags,
    offset: u64,
    length: u64,
) -> Parsed {
    let header = RequestHeader { flags, command, cookie: 77, offset, length };
    let mut bytes = Vec::new();
    header.encode(transmission.header_length() == 32, &mut bytes);
    transmission.handle_header(&bytes).unwrap()
}

fn errno(parsed: Parsed) -> (Errno, u64) {
    match parsed {
        Parsed::Reject(rejection) => {
            assert_eq!(rejection.cookie, 77);
            assert!(!rejection.text.is_empty());
            (rejection.errno, rejection.skip)
        }
        other => panic!("{other:?}"),
    }
}

const NONE: CommandFlags = CommandFlags::empty();

#[test]
fn a_compact_write_request_is_read_from_its_bytes() {
    let bytes = [
        0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0x10, 0, 0,
        0, 2, 0,
    ];
    let parsed = transmission(Mode::Simple).handle_header(&bytes).unwrap();
    let Parsed::Accept(request) = parsed else { panic!("{parsed:?}") };
    assert_eq!((request.cookie, request.offset, request.length), (9, 4096, 512));
    assert_eq!(request.command, Command::Write { fua: true });
    for length in 0..28 {
        let part = transmission(Mode::Simple).handle_header(&bytes[..length]);
        assert_eq!(part, Ok(Parsed::Incomplete));
    }
}

#[test]
fn past_the_end_writes_have_no_space_and_reads_are_invalid() {
    let t = transmission(Mode::Structured);
    for (command, wanted, skip) in [
        (0, Errno::Inval, 0),
        (1, Errno::NoSpc, 1024),
        (4, Errno::Inval, 0),
        (5, Errno::Inval, 0),
        (6, Errno::NoSpc, 0),
        (7, Errno::Inval, 0),
    ] {
        for offset in [SIZE, SIZE - 1, u64::MAX, u64::MAX - 1023] {
            assert_eq!(errno(judge(&t, command, NONE, offset, 1024)), (wanted, skip), "{command}");
        }
    }
    let Parsed::Reject(rejection) = judge(&t, 1, NONE, SIZE - 512, 1024) else { panic!() };
    assert_eq!(rejection.at, Some(SIZE));
}

#[test]
fn a_read_only_export_permits_no_change() {
    let flags = all_flags().with(TransmissionFlags::READ_ONLY);
    let t = transmission_with(Mode::Structured, flags, true);
    for command in [1, 4, 6] {
        let skip = if command == 1 { 512 } else { 0 };
        assert_eq!(errno(judge(&t, command, NONE, 0, 512)), (Errno::Perm, skip));
    }
    assert!(matches!(judge(&t, 0, NONE, 0, 512), Parsed::Accept(_)));
    assert!(matches!(judge(&t, 3, NONE, 0, 0), Parsed::Accept(_)));
}

#[test]
fn longer_payloads_than_advertised_are_refused_and_skipped() {
    let t = transmission(Mode::Structured);
    let long = u64::from(MAX) + 1;
    assert_eq!(errno(judge(&t, 1, NONE, 0, long)), (Errno::Inval, long));
    assert_eq!(errno(judge(&t, 0, NONE, 0, long)), (Errno::Inval, 0));
    assert_eq!(errno(judge(&t, 0, CommandFlags::DF, 0, long)), (Errno::Overflow, 0));
    assert!(matches!(judge(&t, 6, NONE, 0, SIZE), Parsed::Accept(_)), "no payload, no bound");
}

#[test]
fn unknown_commands_and_flags_are_invalid() {
    let t = transmission(Mode::Structured);
    for command in [8, 9, 100, u16::MAX] {
        assert_eq!(errno(judge(&t, command, NONE, 0, 512)), (Errno::Inval, 0));
    }
    for (command, flags) in [
        (0, CommandFlags::NO_HOLE),
        (1, CommandFlags::DF),
        (3, CommandFlags::REQ_ONE),
        (6, CommandFlags::PAYLOAD_LEN),
        (1, CommandFlags::PAYLOAD_LEN),
        (7, CommandFlags(1 << 15)),
    ] {
        let skip = if command == 1 { 512 } else { 0 };
        assert_eq!(errno(judge(&t, command, flags, 0, 512)), (Errno::Inval, skip), "{command}");
    }
}

#[test]
fn fua_is_possible_everywhere_once_offered_and_nowhere_else() {
    let t = transmission(Mode::Structured);
    for command in [0, 1, 3, 4, 5, 6, 7] {
        let parsed = judge(&t, command, CommandFlags::FUA, 0, 512);
        assert!(matches!(parsed, Parsed::Accept(_)), "{command}");
    }
    let flags = all_flags().without(TransmissionFlags::SEND_FUA);
    let t = transmission_with(Mode::Structured, flags, true);
    assert_eq!(errno(judge(&t, 1, CommandFlags::FUA, 0, 512)), (Errno::Inval, 512));
}

#[test]
fn what_was_not_offered_or_negotiated_is_invalid() {
    let t = transmission_with(Mode::Simple, TransmissionFlags::HAS_FLAGS, false);
    for command in [3, 4, 5, 6, 7] {
        assert_eq!(errno(judge(&t, command, NONE, 0, 512)), (Errno::Inval, 0), "{command}");
    }
    let t = transmission(Mode::Simple);
    assert_eq!(errno(judge(&t, 0, CommandFlags::DF, 0, 512)), (Errno::Inval, 0));
    let flags = all_flags().without(TransmissionFlags::SEND_FAST_ZERO);
    let t = transmission_with(Mode::Structured, flags, true);
    assert_eq!(errno(judge(&t, 6, CommandFlags::FAST_ZERO, 0, 512)), (Errno::Inval, 0));
}

#[test]
fn requests_of_no_length_are_harmless_where_they_mean_something() {
    let t = transmission(Mode::Structured);
    for command in [0, 1, 4, 5, 6] {
        assert!(matches!(judge(&t, command, NONE, SIZE, 0), Parsed::Accept(_)), "{command}");
    }
    assert_eq!(errno(judge(&t, 7, NONE, 0, 0)), (Errno::Inval, 0));
}

#[test]
fn a_flush_ignores_its_reserved_fields() {
    let t = transmission(Mode::Structured);
    let Parsed::Accept(request) = judge(&t, 3, NONE, u64::MAX, 4096) else { panic!() };
    assert_eq!((request.offset, request.length), (0, 0));
}

#[test]
fn after_a_shutdown_began_requests_are_told_and_disconnecting_works() {
    let mut t = transmission(Mode::Structured);
    t.begin_shutdown();
    for command in [0, 1, 3, 6] {
        let skip = if command == 1 { 512 } else { 0 };
        assert_eq!(errno(judge(&t, command, NONE, 0, 512)), (Errno::Shutdown, skip));
    }
    assert_eq!(judge(&t, 2, NONE, 0, 0), Parsed::Disconnect);
}

#[test]
fn a_wrong_magic_ends_the_connection() {
    for mode in [Mode::Simple, Mode::Extended] {
        assert!(transmission(mode).handle_header(&[0; 32]).is_err());
    }
}

#[test]
fn extended_requests_have_64_bits_of_length_and_name_their_payload() {
    let t = transmission(Mode::Extended);
    assert_eq!(t.header_length(), 32);
    for flags in [NONE, CommandFlags::PAYLOAD_LEN] {
        let Parsed::Accept(request) = judge(&t, 1, flags, 0, 512) else { panic!() };
        assert_eq!(request.command, Command::Write { fua: false });
    }
    // An unknown command's payload can be skipped only if it is announced.
    assert_eq!(errno(judge(&t, 99, CommandFlags::PAYLOAD_LEN, 0, 512)), (Errno::Inval, 512));
    assert_eq!(errno(judge(&t, 99, NONE, 0, 512)), (Errno::Inval, 0));
    assert_eq!(errno(judge(&t, 6, NONE, 0, 1 << 40)), (Errno::NoSpc, 0));
    let header = RequestHeader {
        flags: CommandFlags::PAYLOAD_LEN,
        command: 1,
        cookie: 1,
        offset: 0,
        length: 1 << 40,
    };
    let mut bytes = Vec::new();
    header.encode(true, &mut bytes);
    assert!(t.handle_header(&bytes).is_err(), "a terabyte is not skipped");
}

#[test]
fn a_block_status_filter_selects_contexts_and_is_bounded() {
    let t = transmission(Mode::Extended);
    let Parsed::NeedFilter { request, payload } = judge(&t, 7, CommandFlags::PAYLOAD_LEN, 0, 12)
    else {
        panic!()
    };
    assert_eq!(payload, 12);
    let filter = |length: u64, ids: &[u32]| {
        let mut bytes = length.to_be_bytes().to_vec();
        ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
        bytes
    };
    let Parsed::Accept(good) = t.handle_filter(request.clone(), &filter(65536, &[1])) else {
        panic!()
    };
    assert_eq!(good.length, 65536);
    let wanted = Command::BlockStatus { one: false, filter: StatusFilter::Ids(vec![1]) };
    assert_eq!(good.command, wanted);
    for bad in [filter(512, &[2]), filter(512, &[0]), filter(512, &[1, 1]), filter(SIZE + 1, &[1])]
    {
        assert_eq!(errno(t.handle_filter(request.clone(), &bad)).0, Errno::Inval);
    }
    for length in [0, 8, 13, 1 << 20] {
        let parsed = judge(&t, 7, CommandFlags::PAYLOAD_LEN, 0, length);
        assert_eq!(errno(parsed), (Errno::Inval, length), "{length}");
    }
}

#[test]
fn replies_have_the_bytes_of_the_specification() {
    let encode = |mode, fill: &dyn Fn(ReplyEncoder, &mut Vec<u8>)| {
        let mut out = Vec::new();
        fill(ReplyEncoder::new(mode), &mut out);
        out
    };
    let done = encode(Mode::Simple, &|e, out| e.done(out, (5, 0)));
    assert_eq!(done, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
    let done = encode(Mode::Structured, &|e, out| e.done(out, (5, 0)));
    assert_eq!(done, [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0]);
    let hole = encode(Mode::Structured, &|e, out| e.hole(out, (5, 0), 512, 1024, false));
    assert_eq!(hole[4..8], [0, 0, 0, 2]);
    assert_eq!(hole[16..], [0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0]);
    let error = encode(Mode::Structured, &|e, out| {
        e.error(out, (5, 0), Errno::Io, "bad", Some(4096));
    });
    assert_eq!(error[4..8], [0, 1, 0x80, 2]);
    assert_eq!(
        error[16..],
        [0, 0, 0, 17, 0, 0, 0, 5, 0, 3, b'b', b'a', b'd', 0, 0, 0, 0, 0, 0, 0x10, 0]
    );
    let simple = encode(Mode::Simple, &|e, out| e.error(out, (5, 0), Errno::Io, "bad", None));
    assert_eq!(simple[4..8], [0, 0, 0, 5]);
    let data = encode(Mode::Extended, &|e, out| e.data(out, (5, 512), 512, 100, true));
    assert_eq!(data.len(), 40);
    assert_eq!(data[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 1]);
    assert_eq!(data[16..24], 512u64.to_be_bytes());
    assert_eq!(data[24..32], 108u64.to_be_bytes());
}

#[test]
fn a_compact_block_status_cuts_what_32_bits_cannot_say() {
    let mut list = ExtentList::default();
    assert!(list.push(1 << 31, 0));
    assert!(list.push(1 << 31, 0), "joined");
    assert!(list.push(1 << 20, 3));
    assert_eq!(list.extents(), [(1 << 32, 0), (1 << 20, 3)]);
    let mut out = Vec::new();
    ReplyEncoder::new(Mode::Structured).block_status(&mut out, (1, 0), 7, &list, true);
    let (reply, length) = decode_reply(Mode::Structured, MAX, &out).unwrap().unwrap();
    assert_eq!(length, out.len());
    let Reply::Chunk { chunk: Chunk::Status { context, extents }, .. } = reply else { panic!() };
    assert_eq!((context, &extents[..]), (7, &[(0xffff_0000, 0)][..]));

    let mut out = Vec::new();
    ReplyEncoder::new(Mode::Extended).block_status(&mut out, (1, 0), 7, &list, true);
    let (reply, _) = decode_reply(Mode::Extended, MAX, &out).unwrap().unwrap();
    let Reply::Chunk { chunk: Chunk::Status { extents, .. }, .. } = reply else { panic!() };
    assert_eq!(extents, list.extents());
}

#[test]
fn the_client_refuses_replies_that_would_cost_memory() {
    let mut out = Vec::new();
    ReplyEncoder::new(Mode::Structured).data(&mut out, (1, 0), 0, MAX as usize + 1, true);
    assert!(decode_reply(Mode::Structured, MAX, &out).is_err());
    let mut out = Vec::new();
    ReplyEncoder::new(Mode::Extended).done(&mut out, (1, 0));
    out[24] = 1;
    assert!(decode_reply(Mode::Extended, MAX, &out).is_err());
    assert!(decode_reply(Mode::Simple, MAX, &[0; 16]).is_err());
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Simple), Just(Mode::Structured), Just(Mode::Extended)]
}

proptest! {
    #[test]
    fn any_bytes_are_judged_without_a_panic(mode in mode(), bytes: Vec<u8>, valid: bool) {
        let t = transmission(mode);
        let mut bytes = bytes;
        if valid && bytes.len() >= 4 {
            let magic: u32 = if mode == Mode::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
        }
        let parsed = t.handle_header(&bytes);
        if let Ok(Parsed::Accept(request)) = &parsed {
            prop_assert!(request.offset.checked_add(request.length).unwrap() <= SIZE);
        }
        if let Ok(Parsed::NeedFilter { request, payload }) = parsed {
            prop_assert!(payload <= 1024);
            t.handle_filter(request, &bytes);
        }
        let _ = decode_reply(mode, MAX, &bytes);
    }

    #[test]
    fn a_request_reads_back_as_it_was_written(
        extended: bool, flags: u16, command: u16, cookie: u64, offset: u64, length: u32,
    ) {
        let flags = CommandFlags(flags);
        let header = RequestHeader { flags, command, cookie, offset, length: length.into() };
        let mut bytes = Vec::new();
        header.encode(extended, &mut bytes);
        prop_assert_eq!(RequestHeader::decode(&bytes, extended), Ok(Some(header)));
    }

    #[test]
    fn any_negotiation_bytes_are_taken_without_a_panic(bytes: Vec<u8>, prefix: bool) {
        let mut handshake = Handshake::new(HandshakeConfig::default());
        if prefix {
            handshake.handle_input(b"\0\0\0\x03IHAVEOPT\0\0\0\x07");
        }
        for part in bytes.chunks(5) {
            handshake.handle_input(part);
            let _ = handshake.poll();
        }
    }
}

#[test]
fn the_client_encodes_writes_with_their_payload_announced() {
    let mut out = Vec::new();
    encode_request(Mode::Extended, CommandType::Write, NONE, 3, (0, 512), &mut out);
    let header = RequestHeader::decode(&out, true).unwrap().unwrap();
    assert!(header.flags.contains(CommandFlags::PAYLOAD_LEN));
    let mut out = Vec::new();
    encode_request(Mode::Structured, CommandType::Write, NONE, 3, (0, 512), &mut out);
    assert_eq!(RequestHeader::decode(&out, false).unwrap().unwrap().flags, NONE);
}
