//! The chunks of structured replies: their order, and what they say of errors and holes.
#![allow(clippy::unwrap_used, missing_docs)]

mod hub_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use hub_support::devices::Scripted;
use hub_support::*;
use nbd_proto::client::{Chunk, Reply, decode_reply};
use nbd_proto::{CommandFlags, CommandType, Errno, Mode};
use sendense_hub::block::BlockDevice;
use sendense_hub::nbd::limits::Limits;

const MIB: usize = 1 << 20;
const READ: CommandType = CommandType::Read;

/// Receives what is there, at least a byte.
fn receive(stream: &mut TcpStream, input: &mut Vec<u8>) {
    let mut buffer = [0; 64 << 10];
    let n = stream.read(&mut buffer).unwrap();
    assert!(n > 0, "the server closed");
    input.extend_from_slice(&buffer[..n]);
}

/// All chunks of one structured reply.
fn chunks(stream: &mut TcpStream) -> Vec<(bool, Chunk)> {
    let mut input = Vec::new();
    let mut found = Vec::new();
    loop {
        match decode_reply(Mode::Structured, 64 << 20, &input).unwrap() {
            None => receive(stream, &mut input),
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
    for slow in 0..4 {
        let mut device = Scripted::new(4 * MIB);
        device.slow = Some(slow << 20);
        let hub = Hub::with(Limits::default(), Arc::new(device));
        let mut stream = hub.transmitting_structured();
        for cookie in 0..20 {
            stream.write_all(&request(READ, cookie, 0, 4 << 20)).unwrap();
            let data = |(_, chunk): &(bool, Chunk)| match chunk {
                Chunk::Data { length, .. } => *length,
                _ => 0,
            };
            assert_eq!(chunks(&mut stream).iter().map(data).sum::<u64>(), 4 << 20);
        }
    }
}

#[test]
fn what_was_read_before_an_error_is_delivered_and_the_error_comes_last() {
    let bad = 2 * MIB as u64;
    let mut device = Scripted::new(4 * MIB);
    device.bad = Some(bad);
    let hub = Hub::with(Limits::default(), Arc::new(device));
    let mut stream = hub.transmitting_structured();
    stream.write_all(&request(READ, 1, 0, 4 << 20)).unwrap();
    let found = chunks(&mut stream);
    assert_eq!(found.len(), 4);
    let Some((true, Chunk::Error { errno: Errno::Io, at: Some(at), .. })) = found.last() else {
        panic!("{found:?}")
    };
    assert_eq!(*at, bad);
    // In one chunk there is all or nothing.
    let one = request_with(READ.code(), CommandFlags::DF, 2, 0, 4 << 20);
    stream.write_all(&one).unwrap();
    assert_eq!(chunks(&mut stream).len(), 1);
}

#[test]
fn what_an_image_does_not_hold_is_sent_as_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qcow2::create(&path, &qcow2::CreateOptions::new(16 << 20)).unwrap();
    let device = sendense_hub::export::Qcow2Device::open(&path, false).unwrap();
    let hub = Hub::with(Limits::default(), Arc::new(device));
    let mut client = hub.client(Mode::Simple);
    client.write(&[7; 65536], 8 << 20, CommandFlags::empty()).unwrap();
    let mut stream = hub.transmitting_structured();
    stream.write_all(&request(READ, 1, 0, 16 << 20)).unwrap();
    let found = chunks(&mut stream);
    assert_eq!(found.len(), 3, "{found:?}");
    let holes = found.iter().filter(|(_, chunk)| matches!(chunk, Chunk::Hole { .. }));
    assert_eq!(holes.count(), 2, "{found:?}");
}

/// Four bytes at each multiple of four tell where they are.
fn positions(offset: u64, length: usize) -> Vec<u8> {
    let first = u32::try_from(offset / 4).unwrap();
    (first..).flat_map(u32::to_be_bytes).take(length).collect()
}

#[test]
fn small_and_large_replies_keep_apart_when_the_peer_takes_them_late() {
    let device = Scripted::new(16 * MIB);
    device.memory.write(&positions(0, 16 * MIB), 0).unwrap();
    let hub = Hub::with(Limits::default(), Arc::new(device));
    let mut stream = hub.transmitting_structured();
    let mut bytes = Vec::new();
    let count = 400;
    for cookie in 0..count {
        let offset = cookie * 37_000 / 4 * 4;
        bytes.extend(match cookie % 4 {
            0 => request(READ, cookie, offset, 700_000),
            1 => request(READ, cookie, offset, 512),
            2 => request(CommandType::Flush, cookie, 0, 0),
            _ => request(READ, cookie, u64::MAX, 1),
        });
    }
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    // The socket is full by then, and replies wait in the queue.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let mut input = Vec::new();
    let mut done = 0;
    while done < count {
        let Some((reply, header)) = decode_reply(Mode::Structured, 64 << 20, &input).unwrap()
        else {
            receive(&mut stream, &mut input);
            continue;
        };
        let Reply::Chunk { done: last, chunk, .. } = reply else { panic!("{reply:?}") };
        input.drain(..header);
        if let Chunk::Data { offset, length } = chunk {
            let length = usize::try_from(length).unwrap();
            while input.len() < length {
                receive(&mut stream, &mut input);
            }
            assert!(input[..length] == positions(offset, length), "damage at {offset}");
            input.drain(..length);
        }
        done += u64::from(last);
    }
    sender.join().unwrap();
}
