//! What clients that do not behave can do to the server: nothing that others notice.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod hub_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hub_support::*;
use nbd_proto::{CommandFlags, CommandType, Mode};
use sendense_hub::export::memory::MemoryDevice;
use sendense_hub::nbd::client::{Client, ClientError, ClientOptions};
use sendense_hub::nbd::limits::Limits;

const SIZE: usize = 64 << 20;

fn hub(limits: Limits) -> Hub {
    Hub::with(limits, Arc::new(MemoryDevice::new(SIZE, false)))
}

fn impatient() -> Limits {
    Limits { stall: SHORT, ..Limits::default() }
}

/// A well-behaved client gets through now.
fn others_are_served(hub: &Hub) {
    let mut client = hub.client(Mode::Structured);
    client.write(&vec![1; 1 << 20], 512, CommandFlags::empty()).unwrap();
    client.read(&mut vec![0; 1 << 20], 512).unwrap();
    client.disconnect().unwrap();
}

fn sessions(hub: &Hub) -> usize {
    hub.server.exports.all().iter().map(|export| export.connections().0).sum()
}

#[test]
fn a_port_probe_leaves_nothing_behind() {
    let hub = hub(Limits::default());
    for _ in 0..20 {
        drop(hub.raw());
    }
    hub.wait_until(|hub| hub.pending.is_empty());
    others_are_served(&hub);
}

#[test]
fn the_whole_negotiation_has_a_deadline_that_dripping_does_not_move() {
    let hub = hub(Limits { handshake: SHORT, ..impatient() });
    let mut stream = hub.raw();
    greet(&mut stream);
    let start = Instant::now();
    let bytes = option(0x1234, &[0; 4000]);
    let mut sent = 0;
    while stream.write_all(&bytes[sent..=sent]).is_ok() {
        sent = (sent + 1) % bytes.len();
        std::thread::sleep(Duration::from_millis(10));
        assert!(start.elapsed() < GUARD, "the server waits for ever");
    }
    hub.wait_until(|hub| hub.pending.is_empty());
}

#[test]
fn silent_negotiations_give_way_to_a_real_client() {
    let hub = hub(Limits { handshakes_per_source: 8, ..Limits::default() });
    let mut silent: Vec<TcpStream> = (0..40).map(|_| hub.raw()).collect();
    hub.wait_until(|hub| hub.pending.len() == 8);
    others_are_served(&hub);
    // The oldest went first.
    assert!(is_closed(&mut silent[0]));
}

#[test]
fn fifteen_hundred_silent_connections_lock_nobody_out() {
    let hub = hub(Limits::default());
    let silent: Vec<TcpStream> = (0..1500).map(|_| hub.raw()).collect();
    others_are_served(&hub);
    assert!(hub.pending.len() <= hub.server.limits.handshakes_per_source);
    drop(silent);
}

#[test]
fn one_connection_too_many_is_refused_with_the_number() {
    let hub = hub(Limits { connections_per_export: 2, ..Limits::default() });
    let held = [hub.client(Mode::Simple), hub.client(Mode::Simple)];
    let address = hub.address.to_string();
    match Client::connect_tcp(&address, &ClientOptions::new("disk")) {
        Err(ClientError::Refused(text)) => assert!(text.contains('2'), "{text}"),
        other => panic!("{:?}", other.map(drop)),
    }
    drop(held);
    hub.wait_until(|hub| sessions(hub) == 0);
    others_are_served(&hub);
}

#[test]
fn one_connection_too_many_in_all_is_refused_with_an_error() {
    let hub = hub(Limits { connections: 1, ..Limits::default() });
    let _held = hub.client(Mode::Simple);
    let address = hub.address.to_string();
    match Client::connect_tcp(&address, &ClientOptions::new("disk")) {
        Err(ClientError::Refused(text)) => assert!(text.contains('1'), "{text}"),
        other => panic!("{:?}", other.map(drop)),
    }
}

#[test]
fn half_a_header_and_then_silence_is_dropped() {
    let hub = hub(impatient());
    let mut stream = hub.transmitting();
    stream.write_all(&request(CommandType::Read, 1, 0, 512)[..13]).unwrap();
    assert!(is_closed(&mut stream));
}

#[test]
fn half_a_payload_and_then_silence_is_dropped() {
    let hub = hub(impatient());
    for length in [60_000, 3 << 20] {
        let mut stream = hub.transmitting();
        stream.write_all(&request(CommandType::Write, 1, 0, length)).unwrap();
        stream.write_all(&[1; 1000]).unwrap();
        assert!(is_closed(&mut stream), "{length}");
    }
}

#[test]
fn an_idle_connection_between_requests_is_never_dropped() {
    let hub = hub(impatient());
    let mut client = hub.client(Mode::Simple);
    client.write(&[3; 512], 0, CommandFlags::empty()).unwrap();
    std::thread::sleep(3 * SHORT);
    let mut back = [0; 512];
    client.read(&mut back, 0).unwrap();
    assert_eq!(back, [3; 512]);
}

#[test]
fn a_wrong_magic_ends_the_connection() {
    let hub = hub(Limits::default());
    let mut stream = hub.transmitting();
    stream.write_all(&[0xee; 28]).unwrap();
    assert!(is_closed(&mut stream));
    others_are_served(&hub);
}

#[test]
fn unknown_commands_and_flags_are_refused_and_the_connection_lives_on() {
    let hub = hub(Limits::default());
    let mut stream = hub.transmitting();
    for (command, flags) in [(99, 0), (0, 0x8000), (3, 0x4000), (7, 0)] {
        let bytes = request_with(command, CommandFlags(flags), 5, 0, 512);
        stream.write_all(&bytes).unwrap();
        assert_eq!(simple_reply(&mut stream), (22, 5), "command {command}, flags {flags:#x}");
    }
    stream.write_all(&request(CommandType::Flush, 6, 0, 0)).unwrap();
    assert_eq!(simple_reply(&mut stream), (0, 6));
}

#[test]
fn pipelined_refused_writes_do_not_lose_the_thread() {
    let hub = hub(Limits::default());
    let mut stream = hub.transmitting();
    let mut bytes = Vec::new();
    for cookie in 0..50 {
        let (offset, length) = if cookie % 2 == 0 { (u64::MAX, 70_000) } else { (0, 100) };
        bytes.extend(request(CommandType::Write, cookie, offset, length));
        bytes.resize(bytes.len() + length as usize, 0x25);
    }
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let mut answers: Vec<_> = (0..50).map(|_| simple_reply(&mut stream)).collect();
    answers.sort_unstable_by_key(|(_, cookie)| *cookie);
    let expected: Vec<_> = (0..50).map(|c| (if c % 2 == 0 { 28 } else { 0 }, c)).collect();
    assert_eq!(answers, expected);
    sender.join().unwrap();
}

#[test]
fn a_reset_with_replies_in_flight_hurts_nobody() {
    let hub = hub(Limits::default());
    for _ in 0..5 {
        let mut stream = hub.transmitting();
        for cookie in 0..32 {
            stream.write_all(&request(CommandType::Read, cookie, 0, 4 << 20)).unwrap();
        }
        let mut some = [0; 1000];
        stream.read_exact(&mut some).unwrap();
        // Unread data makes this a reset.
        drop(stream);
    }
    hub.wait_until(|hub| sessions(hub) == 0);
    others_are_served(&hub);
}

#[test]
fn a_web_browser_is_shown_the_door() {
    let hub = hub(Limits::default());
    let mut stream = hub.raw();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(is_closed(&mut stream));
    others_are_served(&hub);
}

/// A connection that asks for `count` reads of `length` bytes and takes nothing.
fn never_reads(hub: &Hub, count: u64, length: u32) -> TcpStream {
    asks_and_takes_nothing(hub.transmitting(), count, length)
}

fn asks_and_takes_nothing(mut stream: TcpStream, count: u64, length: u32) -> TcpStream {
    // At once: an impatient server may be gone before the last of many writes.
    let requests = (0..count).flat_map(|cookie| request(CommandType::Read, cookie, 0, length));
    stream.write_all(&requests.collect::<Vec<u8>>()).unwrap();
    stream
}

#[test]
fn unread_reads_stay_within_the_budget_and_stall_nobody_else() {
    let limits = Limits::default();
    let reads = limits.buffered_reads();
    let hub = hub(limits);
    let mut stalled: Vec<TcpStream> = (0..3).map(|_| never_reads(&hub, 64, 32 << 20)).collect();
    for _ in 0..10 {
        others_are_served(&hub);
    }
    assert!(hub.server.peak_memory().0 <= reads);
    // They were only slow: what they asked for comes when they want it.
    let mut data = vec![0; 32 << 20];
    assert_eq!(simple_reply(&mut stalled[0]).0, 0);
    stalled[0].read_exact(&mut data).unwrap();
}

#[test]
fn unread_structured_reads_stay_within_the_budget_and_stall_nobody_else() {
    let limits = Limits::default();
    let reads = limits.buffered_reads();
    let hub = hub(limits);
    let greedy = || asks_and_takes_nothing(hub.transmitting_structured(), 64, 32 << 20);
    let _stalled: Vec<TcpStream> = (0..3).map(|_| greedy()).collect();
    for _ in 0..10 {
        others_are_served(&hub);
    }
    assert!(hub.server.peak_memory().0 <= reads);
}

#[test]
fn readers_that_take_nothing_cannot_keep_the_memory_from_others() {
    let limits = Limits {
        max_payload: 4 << 20,
        buffered: 24 << 20,
        buffered_per_connection: 4 << 20,
        stall_under_pressure: SHORT,
        ..Limits::default()
    };
    let hub = hub(limits);
    let _stalled: Vec<TcpStream> = (0..20).map(|_| never_reads(&hub, 8, 4 << 20)).collect();
    others_are_served(&hub);
}

#[test]
fn writers_that_send_half_cannot_keep_the_memory_from_others() {
    let limits = Limits {
        max_payload: 1 << 20,
        buffered: 12 << 20,
        stall_under_pressure: SHORT,
        ..Limits::default()
    };
    let hub = hub(limits);
    let stalled: Vec<TcpStream> = (0..10)
        .map(|_| {
            let mut stream = hub.transmitting();
            stream.write_all(&request(CommandType::Write, 1, 0, 1 << 20)).unwrap();
            stream.write_all(&[1; 1000]).unwrap();
            stream
        })
        .collect();
    let start = Instant::now();
    others_are_served(&hub);
    assert!(start.elapsed() < hub.server.limits.stall, "others waited for the stalled ones");
    drop(stalled);
}

#[test]
fn a_peer_that_does_not_take_its_replies_is_dropped_in_the_end() {
    let hub = hub(impatient());
    let _stream = never_reads(&hub, 64, 32 << 20);
    hub.wait_until(|hub| hub.server.exports.all()[0].connections().1 == 1);
    hub.wait_until(|hub| sessions(hub) == 0);
}

#[test]
fn thousands_of_queries_that_are_not_there_cost_nothing() {
    let hub = hub(Limits::default());
    let mut stream = hub.raw();
    greet(&mut stream);
    stream.write_all(&option(8, &[])).unwrap();
    assert_eq!(option_reply(&mut stream).0, 1);
    let mut data = 4u32.to_be_bytes().to_vec();
    data.extend_from_slice(b"disk");
    data.extend_from_slice(&u32::MAX.to_be_bytes());
    stream.write_all(&option(10, &data)).unwrap();
    assert_eq!(option_reply(&mut stream).0, 0x8000_0003);
    stream.write_all(&go("disk")).unwrap();
    while option_reply(&mut stream).0 != 1 {}
}
