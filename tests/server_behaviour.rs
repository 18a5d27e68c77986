//! What well-behaved clients may rely on.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/local.rs"]
mod local;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use local::{Door, Hooked, Local, broken, request};
use nbd_proto::client::{Chunk, Reply, decode_reply};
use nbd_proto::{BASE_ALLOCATION, CommandFlags, CommandType, Errno, Mode};
use sendense_hub::block::BlockDevice;
use sendense_hub::export::memory::MemoryDevice;
use sendense_hub::nbd::client::{ClientError, ClientOptions};
use sendense_hub::nbd::limits::Limits;

const MIB: usize = 1 << 20;
const NONE: CommandFlags = CommandFlags::empty();

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[test]
fn requests_of_every_size_and_alignment_come_back_in_every_mode() {
    let device = Arc::new(MemoryDevice::new(80 * MIB, false));
    let local = Local::start(Limits::default(), device);
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut client = local.client_with(&ClientOptions { mode, ..ClientOptions::new("disk") });
        for (offset, length) in [
            (0, 1),
            (511, 4097),
            (3, 65536),
            (1, 65537),
            (512, 3 * MIB + 512),
            (12345, 33 * MIB + 1),
            (0, 64 * MIB),
        ] {
            let bytes = pattern(length);
            client.write(&bytes, offset, NONE).unwrap();
            let mut back = vec![0; length];
            client.read(&mut back, offset).unwrap();
            assert!(back == bytes, "{mode:?} {offset} {length}");
        }
        client.command(CommandType::WriteZeroes, NONE, 100, 5000).unwrap();
        client.command(CommandType::Trim, NONE, 0, 4096).unwrap();
        client.command(CommandType::Cache, NONE, 0, 4096).unwrap();
        client.read(&mut [], 0).unwrap();
        client.disconnect().unwrap();
    }
}

#[test]
fn fua_flushes_before_the_reply_and_only_then() {
    let device = Arc::new(MemoryDevice::new(4 * MIB, false));
    let local = Local::start(Limits::default(), Arc::clone(&device) as Arc<dyn BlockDevice>);
    let mut client = local.client();
    client.write(&[1; 512], 0, NONE).unwrap();
    client.write(&vec![1; 2 * MIB], 0, NONE).unwrap();
    assert_eq!(device.flushes(), 0);
    client.write(&[1; 512], 0, CommandFlags::FUA).unwrap();
    client.write(&vec![1; 2 * MIB], 0, CommandFlags::FUA).unwrap();
    client.command(CommandType::WriteZeroes, CommandFlags::FUA, 0, 4096).unwrap();
    client.command(CommandType::Trim, CommandFlags::FUA, 0, 4096).unwrap();
    assert_eq!(device.flushes(), 4);
    client.flush().unwrap();
    assert_eq!(device.flushes(), 5);
}

#[test]
fn an_error_of_the_medium_reaches_the_client_with_its_byte_and_sentence() {
    let bad = 5 * MIB as u64 + 4096;
    let device = Hooked::new(8 * MIB, move |call, offset, length| {
        let hit = offset <= bad && bad < offset + length as u64;
        if call != "flush" && hit { Err(broken(bad)) } else { Ok(()) }
    });
    let local = Local::start(Limits::default(), device);
    let mut client = local.client();
    for result in [
        client.read(&mut vec![0; 8 * MIB], 0),
        client.read(&mut [0; 512], bad),
        client.write(&vec![0; 4 * MIB], 4 * MIB as u64, NONE),
        client.write(&[0; 512], bad, NONE),
    ] {
        let Err(ClientError::Failed { errno, text, at }) = result else { panic!("{result:?}") };
        assert_eq!((errno, at), (Errno::Io, Some(bad)));
        assert!(text.contains("scratched"), "{text}");
    }
    // The connection lives on.
    client.read(&mut vec![0; MIB], 0).unwrap();
    let simple = ClientOptions { mode: Mode::Simple, ..ClientOptions::new("disk") };
    let mut client = local.client_with(&simple);
    let result = client.read(&mut vec![0; 8 * MIB], 0);
    assert!(matches!(result, Err(ClientError::Failed { errno: Errno::Io, .. })), "{result:?}");
    client.read(&mut vec![0; MIB], 0).unwrap();
}

/// All chunks of one structured reply.
fn chunks(stream: &mut std::net::TcpStream) -> Vec<(bool, Chunk)> {
    let mut input = Vec::new();
    let mut found = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match decode_reply(Mode::Structured, 64 << 20, &input).unwrap() {
            None => {
                let n = stream.read(&mut buffer).unwrap();
                assert!(n > 0, "the server closed");
                input.extend_from_slice(&buffer[..n]);
            }
            Some((reply, length)) => {
                input.drain(..length);
                let Reply::Chunk { done, chunk, .. } = reply else { panic!("{reply:?}") };
                if let Chunk::Data { length, .. } = chunk {
                    let length = usize::try_from(length).unwrap();
                    let here = length.min(input.len());
                    input.drain(..here);
                    stream.read_exact(&mut vec![0; length - here]).unwrap();
                }
                found.push((done, chunk));
                if done {
                    assert!(input.is_empty(), "something comes after the last chunk");
                    return found;
                }
            }
        }
    }
}

#[test]
fn the_last_chunk_of_a_read_comes_last_whatever_piece_is_slow() {
    for slow in 0..4u64 {
        let device = Hooked::new(4 * MIB, move |call, offset, _| {
            if call == "read" && offset == slow * MIB as u64 {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        let local = Local::start(Limits::default(), device);
        let mut stream = local.transmitting(true);
        for cookie in 0..20 {
            stream.write_all(&request(0, 0, cookie, 0, 4 << 20)).unwrap();
            let found = chunks(&mut stream);
            let data: u64 = found
                .iter()
                .map(|(_, chunk)| match chunk {
                    Chunk::Data { length, .. } => *length,
                    _ => 0,
                })
                .sum();
            assert_eq!(data, 4 << 20);
        }
    }
}

#[test]
fn what_was_read_before_an_error_is_delivered_and_the_error_comes_last() {
    let bad = 2 * MIB as u64;
    let device = Hooked::new(
        4 * MIB,
        move |_, offset, _| {
            if offset == bad { Err(broken(bad)) } else { Ok(()) }
        },
    );
    let local = Local::start(Limits::default(), device);
    let mut stream = local.transmitting(true);
    stream.write_all(&request(0, 0, 1, 0, 4 << 20)).unwrap();
    let found = chunks(&mut stream);
    assert_eq!(found.len(), 4);
    let Some((true, Chunk::Error { errno: Errno::Io, at: Some(at), .. })) = found.last() else {
        panic!("{found:?}")
    };
    assert_eq!(*at, bad);
    // In one chunk there is all or nothing.
    stream.write_all(&request(0, 4, 2, 0, 4 << 20)).unwrap();
    assert_eq!(chunks(&mut stream).len(), 1);
}

#[test]
fn zeroes_are_read_as_holes_and_told_in_the_block_status() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2::create(&path, &qcow2::CreateOptions::new(16 << 20)).unwrap();
    let device = sendense_hub::export::Qcow2Device::open(&path, false).unwrap();
    let local = Local::start(Limits::default(), Arc::new(device));
    let options =
        ClientOptions { contexts: vec![BASE_ALLOCATION.into()], ..ClientOptions::new("disk") };
    let mut client = local.client_with(&options);
    client.write(&pattern(65536), 8 << 20, NONE).unwrap();
    let status = client.block_status(0, 16 << 20).unwrap();
    assert_eq!(status[0].1, [(8 << 20, 3), (65536, 0), ((8 << 20) - 65536, 3)]);
    let mut stream = local.transmitting(true);
    stream.write_all(&request(0, 0, 1, 0, 16 << 20)).unwrap();
    let found = chunks(&mut stream);
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn a_shutdown_finishes_what_was_accepted_and_tells_the_rest() {
    let door = Arc::new(Door::default());
    let gate = Arc::clone(&door);
    let started = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&started);
    let device = Hooked::new(8 * MIB, move |call, _, _| {
        if call == "write" {
            counter.fetch_add(1, Ordering::SeqCst);
            gate.pass();
        }
        Ok(())
    });
    let local = Local::start(Limits::default(), Arc::clone(&device) as Arc<dyn BlockDevice>);
    let mut writer = local.client();
    let mut other = local.client();
    let write = std::thread::spawn(move || writer.write(&vec![5; 2 * MIB], 0, NONE));
    while started.load(Ordering::SeqCst) < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    local.server.exports.begin_shutdown();
    let result = other.read(&mut [0; 512], 0);
    let Err(ClientError::Failed { errno: Errno::Shutdown, .. }) = result else {
        panic!("{result:?}")
    };
    let export = local.server.exports.remove("disk").unwrap();
    let closer = std::thread::spawn(move || {
        export.close(Duration::from_millis(100), Duration::from_secs(20))
    });
    assert!(!device.memory.is_closed());
    door.open();
    write.join().unwrap().unwrap();
    closer.join().unwrap().unwrap();
    assert!(device.memory.is_closed());
    assert!(device.memory.snapshot()[..2 * MIB].iter().all(|b| *b == 5));
}

#[test]
fn a_device_that_does_not_come_back_cannot_hold_the_shutdown_for_ever() {
    let door = Arc::new(Door::default());
    let gate = Arc::clone(&door);
    let device = Hooked::new(8 * MIB, move |call, _, _| {
        if call == "write" {
            gate.pass();
        }
        Ok(())
    });
    let local = Local::start(Limits::default(), device);
    let mut stream = local.transmitting(false);
    stream.write_all(&request(1, 0, 1, 0, 2 << 20)).unwrap();
    stream.write_all(&vec![1; 2 * MIB]).unwrap();
    let export = local.server.exports.remove("disk").unwrap();
    let since = Instant::now();
    let error = export.close(Duration::from_millis(50), Duration::from_millis(300)).unwrap_err();
    assert!(error.message.contains("cut off"), "{error}");
    assert!(since.elapsed() < Duration::from_secs(20));
    door.open();
}

#[test]
fn many_connections_write_one_image_and_a_flush_on_one_covers_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2::create(&path, &qcow2::CreateOptions::new(64 << 20)).unwrap();
    let device = sendense_hub::export::Qcow2Device::open(&path, false).unwrap();
    let local = Local::start(Limits::default(), Arc::new(device));
    let bytes = pattern(300_000);
    std::thread::scope(|scope| {
        for number in 0..8u64 {
            let (local, bytes) = (&local, &bytes);
            scope.spawn(move || {
                let mut client = local.client();
                for round in 0..10 {
                    // Neighbours share clusters.
                    let offset = (round * 8 + number) * 300_000;
                    client.write(bytes, offset, NONE).unwrap();
                }
            });
        }
    });
    local.client().flush().unwrap();
    // Without closing: what a crash now would leave.
    let copy = dir.path().join("crashed.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let image = qcow2::Image::open(&copy, &qcow2::OpenOptions::new().read_only()).unwrap();
    let mut back = vec![0; 80 * 300_000];
    image.read_at(&mut back, 0).unwrap();
    assert!(back.chunks(300_000).all(|part| part == bytes));
}
