//! What clients that behave see of a connection.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod hub_support;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hub_support::devices::{Accountant, Scripted};
use hub_support::*;
use nbd_proto::{
    BASE_ALLOCATION, CommandFlags, CommandType, Errno, Mode, SENDENSE_DURABLE, STATE_DURABLE,
    TransmissionFlags,
};
use sendense_hub::export::memory::MemoryDevice;
use sendense_hub::nbd::client::{Address, Client, ClientError, ClientOptions};
use sendense_hub::nbd::limits::Limits;

const SIZE: usize = 8 << 20;
const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 31 + i / 256 + seed) % 255).unwrap() + 1).collect()
}

/// A connection whose write of a megabyte of nines is held at the device's gate.
fn held_write(hub: &Hub, device: &Scripted) -> std::net::TcpStream {
    device.open_gate(false);
    let mut stream = hub.transmitting();
    stream.write_all(&request(CommandType::Write, 1, 0, 1 << 20)).unwrap();
    stream.write_all(&[9; 1 << 20]).unwrap();
    hub.wait_until(|_| device.waiting.load(Ordering::SeqCst) > 0);
    stream
}

fn errno(result: Result<(), ClientError>) -> Errno {
    match result {
        Err(ClientError::Failed { errno, .. }) => errno,
        other => panic!("an error was expected, not {other:?}"),
    }
}

#[test]
fn what_is_written_is_read_back_in_every_mode_at_every_size() {
    for mode in MODES {
        let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(64 << 20, false)));
        let mut client = hub.client(mode);
        assert_eq!(client.session().mode, mode);
        for (length, offset) in [
            (1, 0),
            (512, 511),
            (4096, 4096),
            (65535, 7),
            (65536, 65536),
            (65537, 1),
            (1 << 20, 512),
            ((3 << 20) + 513, 1_000_001),
            ((33 << 20) + 1, 12_345),
            (64 << 20, 0),
        ] {
            let data = pattern(length, offset);
            client.write(&data, offset as u64, CommandFlags::empty()).unwrap();
            let mut back = vec![0; length];
            client.read(&mut back, offset as u64).unwrap();
            assert!(back == data, "{mode:?}: {length} bytes at {offset}");
        }
        client.disconnect().unwrap();
    }
}

#[test]
fn zero_length_requests_succeed_and_do_nothing() {
    for mode in MODES {
        let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, false)));
        let mut client = hub.client(mode);
        client.write(&[], 5, CommandFlags::empty()).unwrap();
        client.read(&mut [], SIZE as u64).unwrap();
        for command in [CommandType::Trim, CommandType::WriteZeroes, CommandType::Cache] {
            client.command(command, CommandFlags::empty(), 0, 0).unwrap();
        }
        client.flush().unwrap();
    }
}

#[test]
fn a_write_past_the_end_is_enospc_and_the_connection_lives_on() {
    let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, false)));
    for mode in MODES {
        let mut client = hub.client(mode);
        let large = vec![1; 2 << 20];
        for (data, offset) in
            [(&large[..], SIZE as u64 - 1), (&large[..1], SIZE as u64), (&large[..], u64::MAX - 5)]
        {
            let refused = client.write(data, offset, CommandFlags::empty());
            assert_eq!(errno(refused), Errno::NoSpc);
        }
        assert_eq!(errno(client.read(&mut [0; 2], u64::MAX)), Errno::Inval);
        client.write(b"alive", 0, CommandFlags::empty()).unwrap();
    }
}

#[test]
fn a_payload_above_the_maximum_is_drained_and_refused() {
    let limits = Limits { max_payload: 1 << 20, ..Limits::default() };
    let hub = Hub::with(limits, Arc::new(MemoryDevice::new(SIZE, false)));
    for mode in MODES {
        let mut client = hub.client(mode);
        assert_eq!(client.session().block.maximum, 1 << 20);
        let refused = client.write(&vec![1; (1 << 20) + 1], 0, CommandFlags::empty());
        assert!(matches!(errno(refused), Errno::Inval | Errno::Overflow));
        client.write(b"alive", 0, CommandFlags::empty()).unwrap();
    }
}

#[test]
fn a_read_only_export_refuses_every_change_with_eperm() {
    let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, true)));
    let mut client = hub.client(Mode::Structured);
    assert!(client.session().flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(errno(client.write(&[1; 70_000], 0, CommandFlags::empty())), Errno::Perm);
    for command in [CommandType::Trim, CommandType::WriteZeroes] {
        let refused = client.command(command, CommandFlags::empty(), 0, 512);
        assert_eq!(errno(refused), Errno::Perm, "{command:?}");
    }
    client.read(&mut [0; 512], 0).unwrap();
}

#[test]
fn a_flush_on_one_connection_reaches_the_device_that_all_share() {
    let device = Arc::new(MemoryDevice::new(SIZE, false));
    let hub = Hub::with(Limits::default(), device.clone());
    let (mut writer, mut flusher) = (hub.client(Mode::Simple), hub.client(Mode::Simple));
    assert!(writer.session().flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    writer.write(&[7; 4096], 0, CommandFlags::empty()).unwrap();
    assert_eq!(device.flushes(), 0);
    flusher.flush().unwrap();
    assert_eq!(device.flushes(), 1);
    let mut seen = [0; 4096];
    flusher.read(&mut seen, 0).unwrap();
    assert_eq!(seen, [7; 4096]);
}

#[test]
fn fua_makes_each_change_durable_before_its_reply() {
    let device = Arc::new(MemoryDevice::new(SIZE, false));
    let hub = Hub::with(Limits::default(), device.clone());
    let mut client = hub.client(Mode::Structured);
    client.write(&[1; 512], 0, CommandFlags::FUA).unwrap();
    assert_eq!(device.flushes(), 1, "a small write");
    client.write(&vec![1; 3 << 20], 0, CommandFlags::FUA).unwrap();
    assert_eq!(device.flushes(), 2, "a write in pieces");
    client.command(CommandType::WriteZeroes, CommandFlags::FUA, 0, 512).unwrap();
    client.command(CommandType::Trim, CommandFlags::FUA, 0, 512).unwrap();
    assert_eq!(device.flushes(), 4);
}

#[test]
fn a_failed_flush_fails_the_write_that_asked_for_it() {
    let device = Arc::new(Scripted::new(SIZE));
    device.broken_flush.store(true, Ordering::SeqCst);
    let hub = Hub::with(Limits::default(), device.clone());
    let mut client = hub.client(Mode::Structured);
    for length in [512, 2 << 20] {
        let result = client.write(&vec![1; length], 0, CommandFlags::FUA);
        assert_eq!(errno(result), Errno::Io);
    }
    assert_eq!(errno(client.flush()), Errno::Io);
    client.write(&[1; 512], 0, CommandFlags::empty()).unwrap();
}

#[test]
fn a_bad_byte_fails_the_read_at_its_offset_and_the_rest_can_be_read() {
    let mut device = Scripted::new(SIZE);
    let bad = (3 << 20) + 77;
    device.bad = Some(bad);
    let hub = Hub::with(Limits::default(), Arc::new(device));
    for mode in MODES {
        let mut client = hub.client(mode);
        for (offset, length) in [(bad - 5, 10), (0, 5 << 20)] {
            match client.read(&mut vec![0; length], offset) {
                Err(ClientError::Failed { errno: Errno::Io, at, text }) if mode != Mode::Simple => {
                    assert_eq!(at, Some(bad));
                    assert!(text.contains("scratched"), "{text}");
                }
                Err(ClientError::Failed { errno: Errno::Io, .. }) => {}
                other => panic!("{mode:?}: {other:?}"),
            }
        }
        client.read(&mut vec![0; 2 << 20], 0).unwrap();
    }
}

#[test]
fn holes_are_sent_without_reading_them() {
    let mut device = Scripted::new(SIZE);
    device.hole = 1 << 20..7 << 20;
    let device = Arc::new(device);
    let hub = Hub::with(Limits::default(), device.clone());
    let mut client = hub.client(Mode::Structured);
    let mut data = vec![1; 4 << 20];
    client.read(&mut data, 2 << 20).unwrap();
    assert!(data.iter().all(|byte| *byte == 0));
    assert_eq!(device.reads.load(Ordering::SeqCst), 0);
}

#[test]
fn block_status_tells_holes_from_data() {
    let mut device = Scripted::new(SIZE);
    device.hole = 1 << 20..3 << 20;
    let hub = Hub::with(Limits::default(), Arc::new(device));
    for mode in [Mode::Structured, Mode::Extended] {
        let contexts = vec![BASE_ALLOCATION.to_owned()];
        let mut client =
            hub.connect(&ClientOptions { mode, contexts, ..ClientOptions::new("disk") });
        let status = client.block_status(0, SIZE as u64).unwrap();
        let mib = 1 << 20;
        assert_eq!(status, [(1, vec![(mib, 0), (2 * mib, 3), (5 * mib, 0)])]);
    }
}

#[test]
fn a_client_with_several_requests_in_flight_hears_of_each() {
    let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, false)));
    for mode in MODES {
        let mut client = hub.client(mode);
        let mut waiting = std::collections::BTreeMap::new();
        for number in 0..10u8 {
            // The last one reaches past the end.
            let offset = u64::from(number) * (SIZE as u64 - 1) / 9;
            let length = if number % 2 == 0 { 100_000 } else { 100 };
            let range = (offset.min(SIZE as u64 - 100_000), length);
            let range = if number == 9 { (SIZE as u64 - 1, 100) } else { range };
            let bytes = vec![number + 1; usize::try_from(length).unwrap()];
            let flags = CommandFlags::empty();
            let cookie = client.submit(CommandType::Write, flags, range, &bytes).unwrap();
            waiting.insert(cookie, (number, range));
        }
        let flush = client.submit(CommandType::Flush, CommandFlags::empty(), (0, 0), &[]).unwrap();
        assert_eq!(client.in_flight(), 11);
        let mut flushed = false;
        while client.in_flight() > 0 {
            let (cookie, result) = client.complete().unwrap();
            flushed |= cookie == flush;
            match waiting.remove(&cookie) {
                Some((9, _)) => assert_eq!(errno(result), Errno::NoSpc),
                _ => result.unwrap(),
            }
        }
        assert!(flushed && waiting.is_empty());
        let mut seen = [0; 100];
        client.read(&mut seen, 0).unwrap();
        assert_eq!(seen, [1; 100]);
    }
}

#[test]
fn the_client_lists_the_contexts_that_an_export_offers() {
    let hub = Hub::with(Limits::default(), Arc::new(Accountant::new(SIZE, true)));
    let address = Address::Tcp(hub.address.to_string());
    let list = |export, query| Client::list_contexts(&address, export, query);
    assert_eq!(list("disk", "sendense:").unwrap(), [SENDENSE_DURABLE]);
    assert_eq!(list("disk", "qemu:").unwrap(), [""; 0]);
    assert!(matches!(list("none", "qemu:"), Err(ClientError::Refused(_))));
}

#[test]
fn what_a_flush_covers_is_told_as_durable() {
    let hub = Hub::with(Limits::default(), Arc::new(Accountant::new(SIZE, true)));
    for mode in [Mode::Structured, Mode::Extended] {
        let contexts = vec![BASE_ALLOCATION.to_owned(), SENDENSE_DURABLE.to_owned()];
        let mut client =
            hub.connect(&ClientOptions { mode, contexts, ..ClientOptions::new("disk") });
        let id = |name: &str| {
            let contexts = &client.session().contexts;
            contexts.iter().find(|(_, found)| found == name).unwrap().0
        };
        let (allocation, durable) = (id(BASE_ALLOCATION), id(SENDENSE_DURABLE));
        let at = if mode == Mode::Structured { 1 << 20 } else { 4 << 20 };
        client.write(&vec![7; 1 << 20], at, CommandFlags::empty()).unwrap();
        let before = client.block_status(at, 2 << 20).unwrap();
        assert_eq!(before, [(allocation, vec![(2 << 20, 0)]), (durable, vec![(2 << 20, 0)])]);
        client.flush().unwrap();
        client.write(&vec![8; 1 << 20], at + (1 << 20), CommandFlags::empty()).unwrap();
        let after = client.block_status(at, 2 << 20).unwrap();
        let parts = vec![(1 << 20, STATE_DURABLE), (1 << 20, 0)];
        assert_eq!(after, [(allocation, vec![(2 << 20, 0)]), (durable, parts)]);
    }
}

#[test]
fn a_device_that_does_not_tell_what_is_durable_does_not_offer_to() {
    let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, false)));
    let contexts = vec![SENDENSE_DURABLE.to_owned()];
    let client = hub.connect(&ClientOptions { contexts, ..ClientOptions::new("disk") });
    assert_eq!(client.session().contexts, []);
}

#[test]
fn the_only_export_is_the_default_one() {
    let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, false)));
    assert_eq!(hub.connect(&ClientOptions::new("")).size(), SIZE as u64);
    hub.add("other", Arc::new(MemoryDevice::new(512, false)));
    let refused = Client::connect_tcp(&hub.address.to_string(), &ClientOptions::new(""));
    assert!(matches!(refused, Err(ClientError::Refused(_))));
}

#[test]
fn disc_with_writes_pending_gets_every_reply_and_then_the_end() {
    let device = Arc::new(Scripted::new(SIZE));
    let hub = Hub::with(Limits::default(), device.clone());
    device.open_gate(false);
    let mut stream = hub.transmitting();
    let length = 256 << 10;
    let mut bytes = Vec::new();
    for cookie in 0..8 {
        bytes.extend(request(CommandType::Write, cookie, cookie * length, 256 << 10));
        bytes.extend(pattern(256 << 10, 3));
    }
    bytes.extend(request(CommandType::Disc, 99, 0, 0));
    stream.write_all(&bytes).unwrap();
    hub.wait_until(|_| device.waiting.load(Ordering::SeqCst) > 0);
    device.open_gate(true);
    let mut answered: Vec<u64> = (0..8)
        .map(|_| {
            let (error, cookie) = simple_reply(&mut stream);
            assert_eq!(error, 0);
            cookie
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert!(is_closed(&mut stream));
    assert!(
        device.memory.snapshot()[..8 * (256 << 10)]
            .chunks(256 << 10)
            .all(|c| c == pattern(256 << 10, 3))
    );
}

#[test]
fn a_client_that_leaves_without_a_word_has_its_writes_finished() {
    let device = Arc::new(Scripted::new(SIZE));
    let hub = Hub::with(Limits::default(), device.clone());
    let stream = held_write(&hub, &device);
    drop(stream);
    device.open_gate(true);
    hub.wait_until(|hub| hub.server.exports.all()[0].connections().0 == 0);
    assert!(device.memory.snapshot()[..1 << 20].iter().all(|byte| *byte == 9));
}

#[test]
fn small_requests_are_answered_while_a_large_one_waits_for_the_disk() {
    let device = Arc::new(Scripted::new(SIZE));
    let hub = Hub::with(Limits::default(), device.clone());
    device.open_gate(false);
    let mut stream = hub.transmitting();
    stream.write_all(&request(CommandType::Write, 1, 0, 1 << 20)).unwrap();
    stream.write_all(&[9; 1 << 20]).unwrap();
    stream.write_all(&request(CommandType::Flush, 2, 0, 0)).unwrap();
    assert_eq!(simple_reply(&mut stream), (0, 2));
    device.open_gate(true);
    assert_eq!(simple_reply(&mut stream), (0, 1));
}

#[test]
fn closing_an_export_answers_what_is_in_flight_and_then_refuses() {
    let device = Arc::new(Scripted::new(SIZE));
    let hub = Hub::with(Limits::default(), device.clone());
    let mut stream = held_write(&hub, &device);
    let export = hub.server.exports.remove("disk").unwrap();
    let closing = std::thread::spawn(move || export.close(GUARD / 2, 2 * GUARD));
    let mut cookie = 2;
    loop {
        stream.write_all(&request(CommandType::Flush, cookie, 0, 0)).unwrap();
        let (error, answered) = simple_reply(&mut stream);
        assert_eq!(answered, cookie);
        if error == Errno::Shutdown.code() {
            break;
        }
        cookie += 1;
    }
    device.open_gate(true);
    assert_eq!(simple_reply(&mut stream), (0, 1));
    // The notice is long, so that the refusal comes within it; nobody waits for its end.
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(is_closed(&mut stream));
    closing.join().unwrap().unwrap();
    assert!(device.memory.is_closed());
}

#[test]
fn a_write_that_is_still_coming_in_when_the_export_closes_is_finished() {
    let device = Arc::new(MemoryDevice::new(SIZE, false));
    let hub = Hub::with(Limits::default(), device.clone());
    let mut stream = hub.transmitting();
    stream.write_all(&request(CommandType::Write, 1, 0, 2 << 20)).unwrap();
    stream.write_all(&[9; 1 << 20]).unwrap();
    hub.wait_until(|_| device.snapshot()[(1 << 20) - 1] == 9);
    let export = hub.server.exports.remove("disk").unwrap();
    let closing = std::thread::spawn(move || export.close(Duration::from_millis(50), GUARD));
    // Longer than the notice, so that idle connections are closed by now.
    std::thread::sleep(Duration::from_millis(200));
    stream.write_all(&[9; 1 << 20]).unwrap();
    assert_eq!(simple_reply(&mut stream), (0, 1));
    assert!(is_closed(&mut stream));
    closing.join().unwrap().unwrap();
    assert!(device.snapshot()[..2 << 20].iter().all(|byte| *byte == 9));
}

#[test]
fn a_device_that_does_not_come_back_cannot_hold_the_shutdown_for_ever() {
    let device = Arc::new(Scripted::new(SIZE));
    let hub = Hub::with(Limits::default(), device.clone());
    let _stream = held_write(&hub, &device);
    let export = hub.server.exports.remove("disk").unwrap();
    let error = export.close(Duration::from_millis(50), SHORT).unwrap_err();
    assert!(error.message.contains("cut off"), "{error}");
    device.open_gate(true);
}

#[test]
fn many_connections_write_one_image_and_a_flush_on_one_covers_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2::create(&path, &qcow2::CreateOptions::new(64 << 20)).unwrap();
    let device = sendense_hub::export::Qcow2Device::open(&path, false).unwrap();
    let hub = Hub::with(Limits::default(), Arc::new(device));
    let bytes = pattern(300_000, 0);
    std::thread::scope(|scope| {
        for number in 0..8u64 {
            let (hub, bytes) = (&hub, &bytes);
            scope.spawn(move || {
                let mut client = hub.client(Mode::Structured);
                for round in 0..10 {
                    // Neighbours share clusters.
                    let offset = (round * 8 + number) * 300_000;
                    client.write(bytes, offset, CommandFlags::empty()).unwrap();
                }
            });
        }
    });
    hub.client(Mode::Simple).flush().unwrap();
    // Without closing: what a crash now would leave.
    let copy = dir.path().join("crashed.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let image = qcow2::Image::open(&copy, &qcow2::OpenOptions::new().read_only()).unwrap();
    let mut back = vec![0; 80 * 300_000];
    image.read_at(&mut back, 0).unwrap();
    assert!(back.chunks(300_000).all(|part| part == bytes));
}

#[test]
fn a_device_that_does_not_close_cleanly_is_told_of() {
    let device = Arc::new(Scripted::new(SIZE));
    device.broken_flush.store(true, Ordering::SeqCst);
    let hub = Hub::with(Limits::default(), device);
    let export = hub.server.exports.remove("disk").unwrap();
    assert!(export.close(Duration::ZERO, GUARD).is_err());
}

#[test]
fn counters_tell_what_clients_did() {
    let hub = Hub::with(Limits::default(), Arc::new(MemoryDevice::new(SIZE, false)));
    let mut client = hub.client(Mode::Structured);
    client.write(&vec![1; 3 << 20], 0, CommandFlags::empty()).unwrap();
    client.read(&mut [0; 512], 0).unwrap();
    client.flush().unwrap();
    client.command(CommandType::WriteZeroes, CommandFlags::empty(), 0, 4096).unwrap();
    assert_eq!(errno(client.read(&mut [0; 2], u64::MAX)), Errno::Inval);
    let export = hub.server.exports.get("disk").unwrap();
    let stats = export.stats.snapshot();
    assert_eq!((stats.writes, stats.bytes_written), (1, 3 << 20));
    assert_eq!((stats.reads, stats.bytes_read, stats.errors), (1, 512, 1));
    assert_eq!((stats.flushes, stats.zeroes, stats.bytes_zeroed), (1, 1, 4096));
    assert_eq!(export.connections(), (1, 1));
}
