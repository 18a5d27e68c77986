//! What a request costs the protocol code alone, without sockets or disks.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nbd_proto::client::{decode_reply, encode_request};
use nbd_proto::server::{
    Event, ExportInfo, Handshake, HandshakeConfig, ReplyEncoder, Transmission,
};
use nbd_proto::{BlockSizes, CommandFlags, CommandType, Mode, TransmissionFlags};

const MODES: [(Mode, &str); 2] = [(Mode::Structured, "structured"), (Mode::Extended, "extended")];

/// A whole negotiation: greeting to transmission.
fn negotiate(mode: Mode) -> Transmission {
    let mut input = vec![0, 0, 0, 3];
    let option: u32 = if mode == Mode::Extended { 11 } else { 8 };
    input.extend_from_slice(b"IHAVEOPT");
    input.extend_from_slice(&option.to_be_bytes());
    input.extend_from_slice(b"\0\0\0\0IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0");
    let mut handshake = Handshake::new(HandshakeConfig::default());
    handshake.handle_input(&input);
    loop {
        match handshake.poll() {
            Event::Lookup { name, .. } => {
                let found = ExportInfo {
                    name,
                    description: String::new(),
                    size: 1 << 40,
                    flags: TransmissionFlags::SEND_FLUSH.with(TransmissionFlags::SEND_FUA),
                    block: BlockSizes { minimum: 1, preferred: 65536, maximum: 64 << 20 },
                    contexts: Vec::new(),
                };
                assert!(handshake.handle_lookup(Ok(found)).is_none());
            }
            Event::Transmit(negotiated) => return negotiated.transmission(),
            event => panic!("{event:?}"),
        }
    }
}

fn negotiation(c: &mut Criterion) {
    c.bench_function("negotiation", |b| b.iter(|| negotiate(black_box(Mode::Extended))));
}

fn requests(c: &mut Criterion) {
    let mut group = c.benchmark_group("request");
    group.throughput(Throughput::Elements(1));
    for (mode, name) in MODES {
        let state = negotiate(mode);
        let mut bytes = Vec::new();
        let range = (4096, 65536);
        encode_request(mode, CommandType::Write, CommandFlags::FUA, 7, range, &mut bytes);
        group.bench_function(format!("parse and judge, {name}"), |b| {
            b.iter(|| state.handle_header(black_box(&bytes)).unwrap());
        });
    }
    group.finish();
}

fn replies(c: &mut Criterion) {
    let mut group = c.benchmark_group("reply");
    group.throughput(Throughput::Elements(1));
    for (mode, name) in MODES {
        let encoder = ReplyEncoder::new(mode);
        let mut bytes = Vec::with_capacity(64);
        group.bench_function(format!("encode, {name}"), |b| {
            b.iter(|| {
                bytes.clear();
                encoder.data(&mut bytes, black_box((7, 4096)), 4096, 65536, true);
            });
        });
        group.bench_function(format!("decode, {name}"), |b| {
            b.iter(|| decode_reply(mode, 64 << 20, black_box(&bytes)).unwrap().unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, negotiation, requests, replies);
criterion_main!(benches);
