//! The server over loopback TCP without a disk: one connection, requests one after the other.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use nbd_proto::CommandFlags;
use sendense_hub::export::NullDevice;
use sendense_hub::nbd::client::{Client, ClientOptions};
use sendense_hub::nbd::exports::Export;
use sendense_hub::nbd::handshake::Pending;
use sendense_hub::nbd::limits::Limits;
use sendense_hub::nbd::listener::Listener;
use sendense_hub::nbd::server::Server;

/// Bytes of the export.
const SIZE: u64 = 1 << 40;

/// Serves an export named `disk` from a thread of its own until the process ends.
fn serve() -> String {
    let limits = Limits::default();
    let server = Server::new(limits.clone()).unwrap();
    let device = Arc::new(NullDevice::new(SIZE, false));
    let export = Export::new("disk".into(), String::new(), device, &limits);
    server.exports.add(export).unwrap();
    let bound = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = bound.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = Listener::from_tcp(bound).unwrap();
            let _serving = listener.serve(server, Arc::new(Pending::default()), None);
            std::future::pending::<()>().await;
        });
    });
    address
}

fn loopback(c: &mut Criterion) {
    let address = serve();
    let mut client = Client::connect_tcp(&address, &ClientOptions::new("disk")).unwrap();
    let mut group = c.benchmark_group("loopback, one at a time");
    group.measurement_time(Duration::from_secs(3)).sample_size(30);
    for length in [512usize, 4 << 10, 64 << 10, 1 << 20, 32 << 20] {
        let data = vec![7; length];
        group.throughput(Throughput::Bytes(length as u64));
        group.bench_function(format!("write {length}"), |b| {
            b.iter(|| client.write(&data, 0, CommandFlags::empty()).unwrap());
        });
    }
    group.bench_function("flush", |b| b.iter(|| client.flush().unwrap()));
    group.finish();
}

criterion_group!(benches, loopback);
criterion_main!(benches);
