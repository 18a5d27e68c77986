//! Peers that are slow, silent, greedy or gone: none of them harms another.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/local.rs"]
mod local;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use local::{Door, Hooked, Local, request};
use nbd_proto::{CommandFlags, Mode};
use sendense_hub::block::BlockDevice;
use sendense_hub::export::memory::MemoryDevice;
use sendense_hub::nbd::client::{Client, ClientError, ClientOptions};
use sendense_hub::nbd::limits::Limits;

const MIB: usize = 1 << 20;

fn memory(megabytes: usize) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(megabytes * MIB, false))
}

/// Reads until the peer closes; how many bytes came.
fn drain(stream: &mut TcpStream) -> usize {
    let mut buffer = vec![0; MIB];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return total,
            Ok(n) => total += n,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return total,
            Err(e) => panic!("the server does not close: {e}"),
        }
    }
}

#[test]
fn the_whole_negotiation_has_a_deadline_that_trickling_bytes_do_not_move() {
    let limits = Limits { handshake: Duration::from_millis(400), ..Limits::default() };
    let local = Local::start(limits, memory(1));
    let mut stream = local.raw();
    let mut trickle = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let options = [&[0, 0, 0, 3][..], &b"IHAVEOPT\0\0\0\x63\0\0\0\0".repeat(100)].concat();
        for byte in options {
            if trickle.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    drain(&mut stream);
    drop(stream);
    writer.join().unwrap();
    local.client().read(&mut [0; 512], 0).unwrap();
}

#[test]
fn fifteen_hundred_silent_connections_do_not_lock_a_client_out() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let local = Local::start(Limits::default(), memory(1));
    let silent: Vec<TcpStream> =
        (0..1500).map(|_| TcpStream::connect(local.address).unwrap()).collect();
    let mut client = local.client();
    client.write(&[7; 512], 0, CommandFlags::empty()).unwrap();
    assert!(local.pending.len() <= Limits::default().handshakes_per_source);
    drop(silent);
}

#[test]
fn half_a_request_and_then_silence_ends_that_connection_alone() {
    let limits = Limits { stall: Duration::from_millis(300), ..Limits::default() };
    let local = Local::start(limits, memory(4));
    let mut client = local.client();
    let mut header = local.transmitting(false);
    header.write_all(&request(0, 0, 1, 0, 512)[..20]).unwrap();
    let mut payload = local.transmitting(false);
    payload.write_all(&request(1, 0, 1, 0, 2 << 20)).unwrap();
    payload.write_all(&vec![1; MIB + 1]).unwrap();
    assert_eq!(drain(&mut header), 0);
    assert_eq!(drain(&mut payload), 0, "a write that did not come whole is never acknowledged");
    // The idle client was not dropped in the same time.
    client.read(&mut [0; 512], 0).unwrap();
}

fn unread_replies_stay_inside_the_budget(structured: bool) {
    let limits = Limits::default();
    let budget = limits.buffered;
    let local = Local::start(limits, memory(64));
    let greedy: Vec<TcpStream> = (0..3)
        .map(|_| {
            let mut stream = local.transmitting(structured);
            for cookie in 0..64 {
                stream.write_all(&request(0, 0, cookie, 0, 32 << 20)).unwrap();
            }
            stream
        })
        .collect();
    // Another client is served meanwhile, in both directions.
    let mut client = local.client_with(&ClientOptions {
        mode: if structured { Mode::Structured } else { Mode::Simple },
        ..ClientOptions::new("disk")
    });
    let mut bytes = vec![0; 4 * MIB];
    for round in 0..5 {
        client.write(&vec![round; 4 * MIB], 0, CommandFlags::empty()).unwrap();
        client.read(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|b| *b == round));
    }
    let (reads, writes) = local.server.peak_memory();
    assert!(reads + writes <= budget, "{reads} + {writes}");
    assert!(reads > 0);
    drop(greedy);
}

#[test]
fn unread_simple_replies_stay_inside_the_budget_and_hold_up_nobody() {
    unread_replies_stay_inside_the_budget(false);
}

#[test]
fn unread_structured_replies_stay_inside_the_budget_and_hold_up_nobody() {
    unread_replies_stay_inside_the_budget(true);
}

#[test]
fn peers_that_hold_all_memory_and_read_nothing_are_dropped_when_others_wait() {
    let limits = Limits {
        stall_under_pressure: Duration::from_millis(200),
        buffered: 128 << 20,
        max_payload: 32 << 20,
        ..Limits::default()
    };
    let local = Local::start(limits, memory(32));
    let greedy: Vec<TcpStream> = (0..6)
        .map(|_| {
            let mut stream = local.transmitting(false);
            stream.write_all(&request(0, 0, 1, 0, 32 << 20)).unwrap();
            stream
        })
        .collect();
    let options = ClientOptions { mode: Mode::Simple, ..ClientOptions::new("disk") };
    let mut client = local.client_with(&options);
    client.read(&mut vec![0; 32 * MIB], 0).unwrap();
    drop(greedy);
}

#[test]
fn a_reset_with_replies_in_flight_is_nobodys_problem() {
    let local = Local::start(Limits::default(), memory(16));
    for _ in 0..20 {
        let mut stream = local.transmitting(true);
        for cookie in 0..8 {
            stream.write_all(&request(0, 0, cookie, 0, 8 << 20)).unwrap();
        }
        // Closing with unread data resets the connection.
        let mut some = [0; 1000];
        stream.read_exact(&mut some).unwrap();
        drop(stream);
    }
    local.client().read(&mut vec![0; MIB], 0).unwrap();
    let export = local.export();
    let since = Instant::now();
    while export.connections().0 > 0 {
        assert!(since.elapsed() < Duration::from_secs(20), "connections stay behind");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn goodbye_with_writes_pending_sends_all_replies_and_closes_at_once() {
    let door = Arc::new(Door::default());
    let gate = Arc::clone(&door);
    let device = Hooked::new(16 * MIB, move |call, _, _| {
        if call == "write" {
            gate.pass();
        }
        Ok(())
    });
    let local = Local::start(Limits::default(), Arc::clone(&device) as Arc<dyn BlockDevice>);
    let mut stream = local.transmitting(false);
    for cookie in 0..4 {
        stream.write_all(&request(1, 0, cookie, cookie * MIB as u64, MIB as u32)).unwrap();
        stream.write_all(&vec![9; MIB]).unwrap();
    }
    stream.write_all(&request(2, 0, 99, 0, 0)).unwrap();
    door.open();
    assert_eq!(drain(&mut stream), 4 * 16);
    assert!(device.memory.snapshot()[..4 * MIB].iter().all(|b| *b == 9));
}

#[test]
fn writes_received_before_the_peer_vanished_are_finished() {
    let device = memory(8);
    let local = Local::start(Limits::default(), Arc::clone(&device) as Arc<dyn BlockDevice>);
    let mut stream = local.transmitting(false);
    stream.write_all(&request(1, 0, 1, 0, 4 << 20)).unwrap();
    stream.write_all(&vec![3; 4 * MIB]).unwrap();
    drop(stream);
    let export = local.export();
    let since = Instant::now();
    while export.connections() != (0, 1) {
        assert!(since.elapsed() < Duration::from_secs(20), "the connection stays behind");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(device.snapshot()[..4 * MIB].iter().all(|b| *b == 3));
}

#[test]
fn connections_above_the_exports_maximum_are_refused_with_the_number() {
    let limits = Limits { connections_per_export: 2, ..Limits::default() };
    let local = Local::start(limits, memory(1));
    let (first, _second) = (local.client(), local.client());
    let options = ClientOptions::new("disk");
    let third = Client::connect_tcp(&local.address.to_string(), &options);
    let Err(ClientError::Refused(text)) = third else { panic!("not refused") };
    assert!(text.contains("2 connections"), "{text}");
    first.disconnect().unwrap();
    let since = Instant::now();
    while Client::connect_tcp(&local.address.to_string(), &options).is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "the place is not free again");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn nonsense_instead_of_requests_ends_the_connection() {
    let local = Local::start(Limits::default(), memory(1));
    let mut stream = local.transmitting(false);
    stream.write_all(&[0xab; 100]).unwrap();
    drain(&mut stream);
    let mut stream = local.raw();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    drain(&mut stream);
    local.client().read(&mut [0; 512], 0).unwrap();
}
