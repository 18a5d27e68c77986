//! The server's negotiation against bytes written by hand, and against our own client.
#![allow(clippy::unwrap_used, missing_docs)]

use nbd_proto::client;
use nbd_proto::server::{
    CloseReason, Event, ExportInfo, Handshake, HandshakeConfig, Negotiated, Purpose, Refusal,
    TlsPolicy,
};
use nbd_proto::{ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSizes, Mode, TransmissionFlags};

const FIXED: [u8; 4] = [0, 0, 0, 1];
const FIXED_NO_ZEROES: [u8; 4] = [0, 0, 0, 3];

fn export() -> ExportInfo {
    ExportInfo {
        name: "disk".into(),
        description: "a disk".into(),
        size: 1 << 30,
        flags: TransmissionFlags::SEND_FLUSH
            .with(TransmissionFlags::SEND_DF)
            .with(TransmissionFlags::BLOCK_STAT_PAYLOAD),
        block: BlockSizes { minimum: 1, preferred: 65536, maximum: 64 << 20 },
        contexts: vec![BASE_ALLOCATION.into(), ALLOCATION_DEPTH.into()],
    }
}

/// A server with one export, fed and drained by hand.
struct Server {
    handshake: Handshake,
    negotiated: Option<Box<Negotiated>>,
    closed: Option<CloseReason>,
    tls: bool,
}

impl Server {
    fn new(config: HandshakeConfig) -> Self {
        let mut server =
            Self { handshake: Handshake::new(config), negotiated: None, closed: None, tls: false };
        let greeting = server.handshake.take_output();
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
        server
    }

    /// Feeds bytes and answers every event; what the server says.
    fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.handshake.handle_input(bytes);
        let mut said = Vec::new();
        loop {
            let event = self.handshake.poll();
            said.extend(self.handshake.take_output());
            match event {
                Event::NeedInput => return said,
                Event::Lookup { name, purpose: Purpose::Look | Purpose::Use } => {
                    let found = match name.as_str() {
                        "disk" | "" => Ok(export()),
                        other => Err(Refusal::unknown(other)),
                    };
                    if let Some(reason) = self.handshake.handle_lookup(found) {
                        self.closed = Some(reason);
                        return said;
                    }
                }
                Event::ListExports => self.handshake.handle_list([("disk", "a disk"), ("b", "")]),
                Event::StartTls => {
                    self.tls = true;
                    self.handshake.handle_tls();
                }
                Event::Transmit(negotiated) => {
                    self.negotiated = Some(negotiated);
                    return said;
                }
                Event::Close(reason) => {
                    self.closed = Some(reason);
                    return said;
                }
            }
        }
    }
}

fn server() -> Server {
    let mut server = Server::new(HandshakeConfig::default());
    assert_eq!(server.feed(&FIXED_NO_ZEROES), b"");
    server
}

fn option(code: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// (option, reply type) of each reply.
fn kinds(mut said: &[u8]) -> Vec<(u32, u32)> {
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let mut kinds = Vec::new();
    while !said.is_empty() {
        kinds.push((word(&said[8..12]), word(&said[12..16])));
        said = &said[20 + word(&said[16..20]) as usize..];
    }
    kinds
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    infos.iter().for_each(|info| data.extend(info.to_be_bytes()));
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let string = |text: &str| {
        let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    };
    let mut data = string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

const ERR: u32 = 0x8000_0000;
const ACK: u32 = 1;

#[test]
fn export_name_answers_size_flags_and_padding_unless_the_client_wants_none() {
    let mut padded = Server::new(HandshakeConfig::default());
    padded.feed(&FIXED);
    let said = padded.feed(&option(1, b"disk"));
    assert_eq!(said.len(), 8 + 2 + 124);
    assert_eq!(said[..8], (1u64 << 30).to_be_bytes());
    // HAS_FLAGS and SEND_FLUSH; SEND_DF needs structured replies.
    assert_eq!(said[8..10], [0, 0b101]);
    assert!(padded.negotiated.is_some());
    assert_eq!(server().feed(&option(1, b"disk")).len(), 10);
}

#[test]
fn export_name_of_an_unknown_export_closes() {
    let mut server = server();
    assert_eq!(server.feed(&option(1, b"nobody")), b"");
    assert!(matches!(server.closed, Some(CloseReason::Refused(_))));
}

#[test]
fn go_answers_export_and_what_was_asked_for_byte_by_byte() {
    let mut server = server();
    let said = server.feed(&option(7, &go("disk", &[3, 1, 2, 99])));
    let mut expected = reply(7, 3, &[0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0b101]);
    expected.extend(reply(7, 3, b"\0\x01disk"));
    expected.extend(reply(7, 3, b"\0\x02a disk"));
    expected.extend(reply(7, 3, &[0, 3, 0, 0, 0, 1, 0, 1, 0, 0, 4, 0, 0, 0]));
    expected.extend(reply(7, ACK, b""));
    assert_eq!(said, expected);
    assert_eq!(server.negotiated.unwrap().mode, Mode::Simple);
}

#[test]
fn info_leaves_the_negotiation_open_and_unknown_exports_are_told() {
    let mut server = server();
    assert_eq!(kinds(&server.feed(&option(6, &go("disk", &[])))), [(6, 3), (6, ACK)]);
    assert_eq!(kinds(&server.feed(&option(7, &go("nobody", &[])))), [(7, ERR + 6)]);
    assert_eq!(kinds(&server.feed(&option(7, &go("", &[])))), [(7, 3), (7, ACK)]);
}

#[test]
fn list_names_every_export_with_its_description() {
    let mut expected = reply(3, 2, b"\0\0\0\x04diska disk");
    expected.extend(reply(3, 2, b"\0\0\0\x01b"));
    expected.extend(reply(3, ACK, b""));
    assert_eq!(server().feed(&option(3, b"")), expected);
    assert_eq!(kinds(&server().feed(&option(3, b"data"))), [(3, ERR + 3)]);
}

#[test]
fn abort_is_acknowledged_whatever_data_it_has() {
    let mut server = server();
    assert_eq!(server.feed(&option(2, b"bye")), reply(2, ACK, b""));
    assert_eq!(server.closed, Some(CloseReason::Aborted));
}

#[test]
fn unknown_options_are_unsupported_and_their_data_is_skipped() {
    let mut server = server();
    for code in [0, 4, 12, 99, u32::MAX] {
        assert_eq!(kinds(&server.feed(&option(code, b"some data"))), [(code, ERR + 1)]);
    }
    assert_eq!(kinds(&server.feed(&option(3, b""))).last(), Some(&(3, ACK)));
}

#[test]
fn structured_replies_are_negotiated_once() {
    let mut server = server();
    assert_eq!(kinds(&server.feed(&option(8, b"x"))), [(8, ERR + 3)]);
    assert_eq!(server.feed(&option(8, b"")), reply(8, ACK, b""));
    assert_eq!(kinds(&server.feed(&option(8, b""))), [(8, ERR + 3)]);
    server.feed(&option(7, &go("disk", &[])));
    let negotiated = server.negotiated.unwrap();
    assert_eq!(negotiated.mode, Mode::Structured);
    assert!(negotiated.export.flags.contains(TransmissionFlags::SEND_DF));
    assert!(!negotiated.export.flags.contains(TransmissionFlags::BLOCK_STAT_PAYLOAD));
}

#[test]
fn extended_headers_include_structured_replies() {
    let mut server = server();
    assert_eq!(server.feed(&option(11, b"")), reply(11, ACK, b""));
    assert_eq!(kinds(&server.feed(&option(11, b""))), [(11, ERR + 3)]);
    assert_eq!(kinds(&server.feed(&option(8, b""))), [(8, ERR + 10)]);
    assert_eq!(
        kinds(&server.feed(&option(10, &meta("disk", &["base:allocation"])))),
        [(10, 4), (10, ACK)]
    );
    server.feed(&option(7, &go("disk", &[])));
    assert_eq!(server.negotiated.unwrap().mode, Mode::Extended);
}

#[test]
fn metadata_contexts_need_structured_replies_first() {
    for code in [9, 10] {
        let said = server().feed(&option(code, &meta("disk", &["base:allocation"])));
        assert_eq!(kinds(&said), [(code, ERR + 3)]);
    }
}

fn structured() -> Server {
    let mut server = server();
    server.feed(&option(8, b""));
    server
}

#[test]
fn contexts_are_listed_by_name_by_namespace_and_all_at_once() {
    for (queries, count) in [
        (&[][..], 2),
        (&["base:"], 1),
        (&["qemu:"], 1),
        (&["base:allocation", "qemu:"], 2),
        (&["x-unknown:what"], 0),
        (&["base:alloc"], 0),
    ] {
        let said = kinds(&structured().feed(&option(9, &meta("disk", queries))));
        assert_eq!(said.len(), count + 1, "{queries:?}");
        assert_eq!(said.last(), Some(&(9, ACK)));
    }
}

#[test]
fn contexts_are_set_by_their_full_names_and_count_for_their_export_alone() {
    let mut server = structured();
    let said = server.feed(&option(10, &meta("disk", &["base:", "qemu:allocation-depth"])));
    let mut expected = reply(10, 4, b"\0\0\0\x01qemu:allocation-depth");
    expected.extend(reply(10, ACK, b""));
    assert_eq!(said, expected);
    server.feed(&option(7, &go("disk", &[])));
    assert_eq!(server.negotiated.unwrap().contexts, [ALLOCATION_DEPTH]);

    // The same export under another name is another name.
    let mut server = structured();
    server.feed(&option(10, &meta("disk", &["base:allocation"])));
    server.feed(&option(7, &go("", &[])));
    assert!(server.negotiated.unwrap().contexts.is_empty());
}

#[test]
fn a_failing_selection_forgets_the_one_before() {
    let mut server = structured();
    server.feed(&option(10, &meta("disk", &["base:allocation"])));
    let said = server.feed(&option(10, &meta("disk", &["nonsense"])));
    assert_eq!(kinds(&said), [(10, ERR + 3)]);
    server.feed(&option(7, &go("disk", &[])));
    assert!(server.negotiated.unwrap().contexts.is_empty());
}

#[test]
fn four_billion_announced_queries_cost_nothing() {
    let mut data = meta("disk", &[]);
    let count = data.len() - 4;
    data[count..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(kinds(&structured().feed(&option(10, &data))), [(10, ERR + 3)]);
    assert_eq!(kinds(&structured().feed(&option(9, &data))), [(9, ERR + 3)]);
}

#[test]
fn lengths_that_contradict_each_other_are_invalid() {
    let mut beyond = go("disk", &[]);
    beyond[3] = 200;
    let mut infos = go("disk", &[]);
    infos[9] = 7;
    let mut wild = go("disk", &[]);
    wild[0] = 0xff;
    for data in [&beyond[..], &infos, &wild, b"", &[0; 5], &[go("disk", &[]), vec![0]].concat()] {
        assert_eq!(kinds(&server().feed(&option(7, data))), [(7, ERR + 3)], "{data:?}");
    }
}

#[test]
fn overlong_names_and_options_are_too_big_and_the_negotiation_goes_on() {
    let long = "x".repeat(5000);
    assert_eq!(kinds(&server().feed(&option(7, &go(&long, &[])))), [(7, ERR + 9)]);
    let mut server = server();
    let said = server.feed(&option(7, &vec![0; 1 << 20]));
    assert_eq!(kinds(&said), [(7, ERR + 9)]);
    assert_eq!(kinds(&server.feed(&option(6, &go("disk", &[])))), [(6, 3), (6, ACK)]);
}

#[test]
fn absurd_option_lengths_and_wrong_magics_close() {
    let mut huge = option(7, b"");
    huge[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    for bytes in [&huge[..], b"IHAVEOPX\0\0\0\x07\0\0\0\0"] {
        let mut server = server();
        server.feed(bytes);
        assert!(matches!(server.closed, Some(CloseReason::Protocol(_))));
    }
}

#[test]
fn unknown_client_flags_close() {
    let mut server = Server::new(HandshakeConfig::default());
    server.feed(&[0, 0, 0, 7]);
    assert!(matches!(server.closed, Some(CloseReason::Protocol(_))));
}

#[test]
fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    let mut old = Server::new(HandshakeConfig::default());
    old.feed(&[0; 4]);
    assert_eq!(old.feed(&option(1, b"disk")).len(), 134);
    let mut old = Server::new(HandshakeConfig::default());
    old.feed(&[0; 4]);
    old.feed(&option(3, b""));
    assert!(matches!(old.closed, Some(CloseReason::Protocol(_))));
}

#[test]
fn the_number_of_options_is_bounded() {
    let mut server = Server::new(HandshakeConfig { max_options: 10, ..HandshakeConfig::default() });
    server.feed(&FIXED);
    for _ in 0..10 {
        server.feed(&option(99, b""));
        assert_eq!(server.closed, None);
    }
    server.feed(&option(99, b""));
    assert!(matches!(server.closed, Some(CloseReason::Protocol(_))));
}

#[test]
fn after_a_shutdown_began_every_option_but_abort_is_told() {
    let mut server = structured();
    server.handshake.begin_shutdown();
    for code in [3, 6, 7, 8, 9, 10, 99] {
        assert_eq!(kinds(&server.feed(&option(code, b""))), [(code, ERR + 7)]);
    }
    assert_eq!(server.feed(&option(2, b"")), reply(2, ACK, b""));
}

fn with_tls(tls: TlsPolicy) -> Server {
    let mut server = Server::new(HandshakeConfig { tls, ..HandshakeConfig::default() });
    server.feed(&FIXED);
    server
}

#[test]
fn tls_is_unsupported_forbidden_or_invalid_with_data() {
    assert_eq!(kinds(&with_tls(TlsPolicy::Unsupported).feed(&option(5, b""))), [(5, ERR + 1)]);
    assert_eq!(kinds(&with_tls(TlsPolicy::Forbidden).feed(&option(5, b""))), [(5, ERR + 2)]);
    assert_eq!(kinds(&with_tls(TlsPolicy::Offered).feed(&option(5, b"x"))), [(5, ERR + 3)]);
}

#[test]
fn required_tls_comes_before_everything_else() {
    let mut server = with_tls(TlsPolicy::Required);
    for code in [3, 6, 7, 8, 9, 99] {
        assert_eq!(kinds(&server.feed(&option(code, b""))), [(code, ERR + 5)]);
    }
    assert_eq!(server.feed(&option(5, b"")), reply(5, ACK, b""));
    assert!(server.tls);
    assert_eq!(kinds(&server.feed(&option(5, b""))), [(5, ERR + 3)]);
    assert_eq!(kinds(&server.feed(&option(3, b""))).last(), Some(&(3, ACK)));
    let mut hasty = with_tls(TlsPolicy::Required);
    hasty.feed(&option(1, b"disk"));
    assert!(matches!(hasty.closed, Some(CloseReason::Refused(_))));
}

#[test]
fn starting_tls_forgets_what_was_negotiated_before() {
    let mut server = with_tls(TlsPolicy::Offered);
    server.feed(&option(8, b""));
    server.feed(&option(10, &meta("disk", &["base:allocation"])));
    server.feed(&option(5, b""));
    server.feed(&option(7, &go("disk", &[])));
    let negotiated = server.negotiated.unwrap();
    assert_eq!((negotiated.mode, negotiated.contexts.len()), (Mode::Simple, 0));
}

#[test]
fn plaintext_behind_the_start_of_tls_is_refused() {
    let mut server = with_tls(TlsPolicy::Offered);
    server.feed(&[option(5, b""), option(8, b"")].concat());
    assert!(matches!(server.closed, Some(CloseReason::Protocol(_))));
    assert!(!server.tls);
}

/// Our client against our server, with both streams cut into parts of `step` bytes.
fn pair(config: client::HandshakeConfig, step: usize) -> Result<client::Event, String> {
    let mut server = Server::new(HandshakeConfig::default());
    let mut client = client::Handshake::new(config);
    let mut to_client = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    loop {
        let event = client.poll().map_err(|e| e.to_string())?;
        let to_server = client.take_output();
        for part in to_server.chunks(step) {
            to_client.extend(server.feed(part));
        }
        if event != client::Event::NeedInput {
            return Ok(event);
        }
        if to_client.is_empty() {
            return Err(format!("stuck: {:?}", server.closed));
        }
        let part: Vec<u8> = to_client.drain(..step.min(to_client.len())).collect();
        client.handle_input(&part);
    }
}

#[test]
fn client_and_server_agree_however_the_stream_is_cut() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        for step in [1, 2, 3, 7, 19, 4096] {
            let config = client::HandshakeConfig {
                goal: client::Goal::Use("disk".into()),
                mode,
                contexts: vec![BASE_ALLOCATION.into()],
            };
            let client::Event::Transmit(session) = pair(config, step).unwrap() else { panic!() };
            assert_eq!(session.mode, mode);
            assert_eq!(session.size, 1 << 30);
            assert_eq!(session.block.maximum, 64 << 20);
            let expected = usize::from(mode > Mode::Simple);
            assert_eq!(session.contexts.len(), expected);
        }
    }
}

#[test]
fn the_client_lists_exports_and_hears_refusals() {
    let list = client::HandshakeConfig {
        goal: client::Goal::List,
        mode: Mode::Simple,
        contexts: Vec::new(),
    };
    let client::Event::Listed(exports) = pair(list.clone(), 5).unwrap() else { panic!() };
    assert_eq!(exports[0], ("disk".to_owned(), "a disk".to_owned()));
    let unknown = client::HandshakeConfig { goal: client::Goal::Use("no".into()), ..list };
    let client::Event::Refused(kind, text) = pair(unknown, 5).unwrap() else { panic!() };
    assert_eq!(kind, nbd_proto::OptionReply::ErrUnknown);
    assert!(text.contains("'no'"), "{text}");
}

#[test]
fn the_client_lists_the_contexts_of_an_export() {
    let namespace = client::HandshakeConfig {
        goal: client::Goal::Contexts("disk".into()),
        mode: Mode::Simple,
        contexts: vec!["qemu:".into()],
    };
    let client::Event::Contexts(names) = pair(namespace.clone(), 5).unwrap() else { panic!() };
    assert_eq!(names, [ALLOCATION_DEPTH]);
    let unknown =
        client::HandshakeConfig { goal: client::Goal::Contexts("no".into()), ..namespace };
    let client::Event::Refused(kind, _) = pair(unknown, 5).unwrap() else { panic!() };
    assert_eq!(kind, nbd_proto::OptionReply::ErrUnknown);
}

#[test]
fn bytes_behind_go_belong_to_the_transmission_phase() {
    let mut server = server();
    server.feed(&[option(7, &go("disk", &[])), b"request".to_vec()].concat());
    assert_eq!(&server.negotiated.unwrap().rest[..], b"request");
}
