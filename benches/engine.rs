//! What the image engine costs above its storage: images in memory, so that no disk is measured.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use qcow2::storage::MemStorage;
use qcow2::{CreateOptions, FileGate, Image, OpenOptions, create_in};

/// Bytes of the disk in these benchmarks.
const SIZE: u64 = 64 << 20;
/// Bytes of one request.
const PIECE: usize = 64 << 10;

fn new_image() -> Image {
    let storage = Arc::new(MemStorage::default());
    create_in(&*storage, &CreateOptions::new(SIZE)).unwrap();
    let gate = FileGate { lock: false };
    Image::open_storage(storage, Path::new("memory"), &gate, &OpenOptions::new()).unwrap()
}

fn pieces() -> impl Iterator<Item = u64> {
    (0..SIZE).step_by(PIECE)
}

fn filled() -> Image {
    let image = new_image();
    pieces().for_each(|at| image.write_at(&[7; PIECE], at).unwrap());
    image
}

fn whole_disk(c: &mut Criterion) {
    let mut group = c.benchmark_group("64 MiB in 64 KiB requests");
    group.throughput(Throughput::Bytes(SIZE));
    group.sample_size(20);
    let data = vec![7; PIECE];
    let zeroes = vec![0; PIECE];
    group.bench_function("write, allocating", |b| {
        b.iter_batched_ref(
            new_image,
            |image| pieces().for_each(|at| image.write_at(&data, at).unwrap()),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("write zeroes that are found to be zeroes", |b| {
        b.iter_batched_ref(
            new_image,
            |image| pieces().for_each(|at| image.write_at(&zeroes, at).unwrap()),
            BatchSize::PerIteration,
        );
    });
    let image = filled();
    group.bench_function("write, in place", |b| {
        b.iter(|| pieces().for_each(|at| image.write_at(&data, at).unwrap()));
    });
    let mut back = vec![0; PIECE];
    group.bench_function("read", |b| {
        b.iter(|| pieces().for_each(|at| image.read_at(&mut back, at).unwrap()));
    });
    // The limit: the same bytes copied once.
    let mut memory = vec![1; usize::try_from(SIZE).unwrap()];
    group.bench_function("memory copy", |b| {
        b.iter(|| memory.chunks_mut(PIECE).for_each(|chunk| chunk.copy_from_slice(&data)));
    });
    group.finish();
}

fn small(c: &mut Criterion) {
    let mut group = c.benchmark_group("one request");
    let image = filled();
    let mut buf = [0; 512];
    let mut at = 0;
    let mut next = || {
        at = (at + 7 * 65536 + 512) % (SIZE - 512);
        at
    };
    group.bench_function("read 512 bytes", |b| {
        b.iter(|| image.read_at(&mut buf, next()).unwrap());
    });
    group.bench_function("write 512 bytes in place", |b| {
        b.iter(|| image.write_at(&[1; 512], next()).unwrap());
    });
    group.bench_function("map 64 MiB", |b| {
        b.iter(|| image.map(0, SIZE, &mut |_| true).unwrap());
    });
    group.finish();
}

fn checksums(c: &mut Criterion) {
    let cluster: Vec<u8> = (0..64_u32 << 10).flat_map(|i| (i * 7919).to_le_bytes()).collect();
    let cluster = &cluster[..64 << 10];
    let mut group = c.benchmark_group("a cluster of 64 KiB");
    group.throughput(Throughput::Bytes(64 << 10));
    group.bench_function("checksum (CRC-32 and XXH3)", |b| {
        b.iter(|| sendense_hub::checksum::Checksum::of(std::hint::black_box(cluster)));
    });
    group.bench_function("CRC-32 alone", |b| {
        b.iter(|| crc32fast::hash(std::hint::black_box(cluster)));
    });
    group.bench_function("memory comparison", |b| {
        let other = cluster.to_vec();
        b.iter(|| std::hint::black_box(cluster) == std::hint::black_box(other.as_slice()));
    });
    group.finish();
}

criterion_group!(benches, whole_disk, small, checksums);
criterion_main!(benches);
