//! A disk that fails: errors reach the caller, and nothing that was acknowledged and flushed is lost.
#![cfg(feature = "test-util")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    unreachable_pub,
    dead_code,
    missing_docs
)]

#[path = "support/replay.rs"]
mod replay;
mod support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2::storage::fault::{Call, Fault, FaultStorage};
use qcow2::storage::{MemStorage, Storage};
use qcow2::{CreateOptions, ErrorKind, Image, Repair, ZeroMode, check_storage};
use replay::{
    Change, Disk, Flushed, History, MemGate, crashes, events, open, prepared, recording, tick,
    whole,
};
use support::Random;

/// Counts the failures that the engine gets to see; those of growing it may work around.
struct Seen {
    inner: FaultStorage,
    failures: AtomicU64,
}

impl Seen {
    fn count<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
        result
    }

    fn failures(&self) -> u64 {
        self.failures.load(Ordering::SeqCst)
    }
}

impl Storage for Seen {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.count(self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.count(self.inner.write_at(buf, offset))
    }

    fn flush(&self) -> io::Result<()> {
        self.count(self.inner.flush())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.reserve(offset, length)
    }
}

fn faulty(inner: Arc<dyn Storage>) -> Arc<Seen> {
    Arc::new(Seen { inner: FaultStorage::new(inner), failures: AtomicU64::new(0) })
}

fn random_fault(random: &mut Random, calls: &[Call]) -> Fault {
    let call = calls[random.below(calls.len() as u64) as usize];
    Fault {
        call,
        after: random.below(12),
        count: [1, 3, u64::MAX][random.below(3) as usize],
        error: match call {
            Call::Grow => io::ErrorKind::StorageFull,
            _ if random.below(3) == 0 => io::ErrorKind::StorageFull,
            _ => io::ErrorKind::Other,
        },
        // Disks write whole sectors.
        short: random.below(6) as usize * 512,
    }
}

/// Bytes of the disk that an L2 table of 512 bytes maps.
const TABLE_SPAN: u64 = 64 * 512;

/// What an operation was meant to do.
enum Wish {
    Change(u64, Vec<u8>),
    Read,
    Flush,
}

/// One operation, and how it ended.
fn step(image: &Image, random: &mut Random) -> (Wish, qcow2::Result<()>) {
    let size = image.size();
    let offset = match random.below(3) {
        // Across the border of two L2 tables.
        0 => (1 + random.below(size / TABLE_SPAN - 1)) * TABLE_SPAN - random.below(3000),
        _ => random.below(size),
    };
    let length = (1 + random.below(9000)).min(size - offset);
    let filled = |byte: u8| vec![byte; length as usize];
    match random.below(10) {
        0..=4 => {
            let bytes = filled(1 + random.below(255) as u8);
            let result = image.write_at(&bytes, offset);
            (Wish::Change(offset, bytes), result)
        }
        5 => {
            let result = image.write_zeroes(offset, length, ZeroMode::Unmap);
            (Wish::Change(offset, filled(0)), result)
        }
        6 => {
            let result = image.write_zeroes(offset, length, ZeroMode::KeepAllocated);
            (Wish::Change(offset, filled(0)), result)
        }
        7 => {
            let mut bytes = filled(0);
            (Wish::Read, image.read_at(&mut bytes, offset))
        }
        _ => (Wish::Flush, image.flush()),
    }
}

fn try_faults(seed: u64, calls: &[Call], layers: u32) {
    let mut options = CreateOptions::new(6 * TABLE_SPAN).cluster_size(512);
    options.refcount_bits = [16, 64][seed as usize % 2];
    let (start, gate, content) = prepared(&options, layers, seed);
    let (recorder, log) = recording(&start);
    let storage = faulty(recorder);
    let image = open(Arc::clone(&storage) as _, &gate).unwrap();
    let mut random = Random::new(seed ^ 0xfau64);
    let mut history = History::default();
    for number in 0..80 {
        if number % 16 == 5 {
            storage.inner.plan(random_fault(&mut random, calls));
        }
        if number % 16 == 15 {
            storage.inner.heal();
        }
        let before = storage.failures();
        let (begun_at, begun) = (events(&log), tick());
        let (wish, result) = step(&image, &mut random);
        let saw_failure = storage.failures() > before;
        assert!(
            !saw_failure || result.is_err(),
            "seed {seed}, operation {number}: a failure was kept from the caller"
        );
        if let Err(error) = &result {
            let kind = error.kind();
            assert!(
                matches!(kind, ErrorKind::Io | ErrorKind::NoSpace),
                "seed {seed}, operation {number}: {error}"
            );
        }
        match wish {
            Wish::Change(offset, bytes) => history.changes.push(Change {
                offset,
                bytes,
                begun: begun_at,
                done: result.is_ok().then(tick),
            }),
            Wish::Flush if result.is_ok() => {
                let done = events(&log);
                history.flushes.push(Flushed { begun, done });
            }
            Wish::Flush | Wish::Read => {}
        }
    }
    storage.inner.heal();
    // What the live image shows is what it acknowledged.
    if let Err(message) = history.allows_live(&content, &whole(&image)) {
        panic!("seed {seed}: {message}");
    }
    let begun = tick();
    if image.close().is_ok() {
        let done = events(&log);
        history.flushes.push(Flushed { begun, done });
    }
    let events = &log.lock().unwrap()[..];
    let disk = Disk { start: &start, content: &content, gate: &gate, events, history: &history };
    crashes(&disk, (0..=events.len()).step_by(11), 2, seed);
}

#[test]
fn failed_writes_are_reported_and_lose_nothing() {
    for seed in 1..=24 {
        try_faults(seed, &[Call::Write], 1 + seed as u32 % 2);
    }
}

#[test]
fn failed_reads_are_reported_and_lose_nothing() {
    for seed in 101..=116 {
        try_faults(seed, &[Call::Read], 1 + seed as u32 % 2);
    }
}

#[test]
fn a_full_disk_is_reported_and_loses_nothing() {
    for seed in 201..=216 {
        try_faults(seed, &[Call::Grow], 1 + seed as u32 % 2);
    }
}

#[test]
fn failures_of_all_kinds_are_reported_and_lose_nothing() {
    for seed in 301..=340 {
        let calls = [Call::Read, Call::Write, Call::Grow, Call::Flush];
        try_faults(seed, &calls, 1 + seed as u32 % 2);
    }
}

fn small_image() -> (Arc<MemStorage>, Arc<Seen>, Image) {
    let (start, gate, _) = prepared(&CreateOptions::new(1 << 20).cluster_size(4096), 1, 9);
    let memory = Arc::new(MemStorage::new(start));
    let storage = faulty(Arc::clone(&memory) as _);
    let image = open(Arc::clone(&storage) as _, &gate).unwrap();
    (memory, storage, image)
}

fn fail(call: Call, error: io::ErrorKind, count: u64) -> Fault {
    Fault { call, after: 0, count, error, short: 512 }
}

#[test]
fn after_a_failed_flush_of_the_disk_no_write_is_acknowledged_any_more() {
    let (_, storage, image) = small_image();
    image.write_at(&[1; 4096], 0).unwrap();
    storage.inner.plan(fail(Call::Flush, io::ErrorKind::Other, 1));
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Io);
    // The disk works again, but what it dropped is unknown.
    assert_eq!(image.flush().unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(image.write_at(&[2; 512], 0).unwrap_err().kind(), ErrorKind::Io);
    let zeroes = image.write_zeroes(0, 4096, ZeroMode::Unmap);
    assert_eq!(zeroes.unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(image.discard(0, 4096).unwrap_err().kind(), ErrorKind::Io);
    let mut bytes = [0; 512];
    image.read_at(&mut bytes, 0).unwrap();
    assert!(image.close().is_err());
}

#[test]
fn writing_goes_on_once_a_full_disk_has_room_again() {
    let (memory, storage, image) = small_image();
    storage.inner.plan(fail(Call::Grow, io::ErrorKind::StorageFull, u64::MAX));
    storage.inner.plan(fail(Call::Write, io::ErrorKind::StorageFull, u64::MAX));
    let mut refused = None;
    for at in (0..1 << 20).step_by(4096) {
        if let Err(error) = image.write_at(&[3; 4096], at) {
            refused = Some(error.kind());
            break;
        }
    }
    assert_eq!(refused, Some(ErrorKind::NoSpace));
    storage.inner.heal();
    image.write_at(&vec![4; 1 << 20], 0).unwrap();
    image.close().unwrap();
    let report = check_storage(&*memory, Repair::None).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    let image = open(memory, &MemGate::default()).unwrap();
    assert!(whole(&image).iter().all(|b| *b == 4));
}

#[test]
fn a_failed_read_names_the_first_byte_that_failed() {
    let (_, storage, image) = small_image();
    image.write_at(&[1; 8192], 8192).unwrap();
    image.flush().unwrap();
    storage.inner.plan(fail(Call::Read, io::ErrorKind::Other, u64::MAX));
    let error = image.read_at(&mut [0; 4096], 8192).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(8192)));
    storage.inner.heal();
    let mut bytes = [0; 4096];
    image.read_at(&mut bytes, 8192).unwrap();
    assert_eq!(bytes, [1; 4096]);
}
