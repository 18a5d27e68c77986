//! Every crash point: whatever of the writes since the last flush reached the disk, the image opens,
//! its metadata is sound, and what was flushed is there.
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

use std::sync::Arc;

use qcow2::storage::record::Event;
use qcow2::storage::{MemStorage, Storage};
use qcow2::{CreateOptions, Image, Repair, ZeroMode, check_storage};
use replay::{
    Change, Disk, Flushed, History, MemGate, crashed, crashes, events, open, prepared, recording,
    survives, tick, whole,
};
use support::{Random, missing, qemu_img, text};

struct Plan {
    cluster_size: u32,
    refcount_bits: u32,
    size: u64,
    layers: u32,
    operations: usize,
    longest: u64,
    seed: u64,
}

/// Random work on a recorded disk; every operation must succeed.
fn work(image: &Image, random: &mut Random, plan: &Plan, now: impl Fn() -> usize) -> History {
    let mut history = History::default();
    let size = image.size();
    for _ in 0..plan.operations {
        let offset = random.below(size);
        let length = (1 + random.below(plan.longest)).min(size - offset);
        let begun = now();
        let kind = random.below(12);
        let filled = |byte: u8| vec![byte; length as usize];
        let (offset, bytes) = match kind {
            0..=5 => {
                let bytes = filled(1 + random.below(255) as u8);
                image.write_at(&bytes, offset).unwrap();
                (offset, bytes)
            }
            6 => {
                image.write_zeroes(offset, length, ZeroMode::Unmap).unwrap();
                (offset, filled(0))
            }
            7 => {
                image.write_zeroes(offset, length, ZeroMode::KeepAllocated).unwrap();
                (offset, filled(0))
            }
            8 | 9 => {
                image.discard(offset, length).unwrap();
                let mut bytes = filled(0xee);
                image.read_at(&mut bytes, offset).unwrap();
                (offset, bytes)
            }
            _ => {
                let begun = tick();
                image.flush().unwrap();
                history.flushes.push(Flushed { begun, done: now() });
                continue;
            }
        };
        history.changes.push(Change { offset, bytes, begun, done: Some(tick()) });
    }
    let begun = tick();
    image.close().unwrap();
    history.flushes.push(Flushed { begun, done: now() });
    history
}

/// Tries a crash after each event for which `near` returns `true`.
fn try_crashes(plan: &Plan, near: impl Fn(usize, &[Event]) -> bool) {
    let mut options = CreateOptions::new(plan.size).cluster_size(plan.cluster_size);
    options.refcount_bits = plan.refcount_bits;
    let (start, gate, content) = prepared(&options, plan.layers, plan.seed);
    try_crashes_of(plan, &start, &gate, &content, near);
}

/// The same with an image that is there already.
fn try_crashes_of(
    plan: &Plan,
    start: &[u8],
    gate: &MemGate,
    content: &[u8],
    near: impl Fn(usize, &[Event]) -> bool,
) {
    let (storage, log) = recording(start);
    let image = open(Arc::clone(&storage) as _, gate).unwrap();
    let mut random = Random::new(plan.seed ^ 0x5eed);
    let history = work(&image, &mut random, plan, || events(&log));
    let events = &log.lock().unwrap()[..];
    let disk = Disk { start, content, gate, events, history: &history };
    let cuts = (0..=events.len()).filter(|cut| near(*cut, events));
    crashes(&disk, cuts, 3, plan.seed);
}

#[test]
fn every_crash_of_an_image_with_the_smallest_clusters_is_survived() {
    for seed in 1..=6 {
        let plan = Plan {
            cluster_size: 512,
            refcount_bits: 16,
            size: 128 << 10,
            layers: 1,
            operations: 60,
            longest: 9000,
            seed,
        };
        try_crashes(&plan, |_, _| true);
    }
}

#[test]
fn every_crash_of_an_overlay_of_three_is_survived() {
    for seed in 11..=16 {
        let plan = Plan {
            cluster_size: [512, 1024, 4096][seed as usize % 3],
            refcount_bits: [1, 8, 64][seed as usize % 3],
            size: 150_016,
            layers: 3,
            operations: 50,
            longest: 12_000,
            seed,
        };
        try_crashes(&plan, |_, _| true);
    }
}

/// Around each write of the header's pointer to the refcount table, and now and then.
fn beside_a_move(cut: usize, events: &[Event]) -> bool {
    let beside = cut.saturating_sub(6)..events.len().min(cut + 6);
    cut.is_multiple_of(101)
        || events[beside].iter().any(|e| matches!(e, Event::Write { offset: 48, .. }))
}

#[test]
fn a_crash_while_the_refcount_table_moves_is_survived() {
    // 512-byte clusters with 64-bit refcounts: a table of one cluster counts 2 MiB of file.
    for seed in 21..=22 {
        let plan = Plan {
            cluster_size: 512,
            refcount_bits: 64,
            size: 5 << 20,
            layers: 1,
            operations: 50,
            longest: 400_000,
            seed,
        };
        try_crashes(&plan, beside_a_move);
    }
}

#[test]
fn a_crash_under_several_writers_keeps_what_any_of_them_saw_flushed() {
    const WRITERS: u64 = 4;
    for seed in 31..=33 {
        let options = CreateOptions::new(256 << 10).cluster_size(1024);
        let (start, gate, content) = prepared(&options, 2, seed);
        let (storage, log) = recording(&start);
        let image = open(Arc::clone(&storage) as _, &gate).unwrap();
        let region = image.size() / WRITERS;
        let histories: Vec<History> = std::thread::scope(|scope| {
            let writer = |number: u64| {
                let (image, log) = (&image, &log);
                move || {
                    let mut random = Random::new(seed * 100 + number);
                    let mut history = History::default();
                    for _ in 0..25 {
                        let begun = events(log);
                        if random.below(6) == 0 {
                            let begun = tick();
                            image.flush().unwrap();
                            let done = events(log);
                            history.flushes.push(Flushed { begun, done });
                            continue;
                        }
                        // Regions meet inside clusters of neighbours.
                        let offset = random.below(region - 300);
                        let length = (1 + random.below(5000)).min(region - offset);
                        let bytes = vec![1 + random.below(255) as u8; length as usize];
                        let offset = number * region + offset;
                        image.write_at(&bytes, offset).unwrap();
                        let done = Some(tick());
                        history.changes.push(Change { offset, bytes, begun, done });
                    }
                    history
                }
            };
            let threads: Vec<_> = (0..WRITERS).map(|n| scope.spawn(writer(n))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let begun = tick();
        image.close().unwrap();
        let mut all = History::default();
        for history in histories {
            all.changes.extend(history.changes);
            all.flushes.extend(history.flushes);
        }
        // Another thread's later beginning is no later writing: regions are apart.
        all.flushes.sort_by_key(|flush| flush.begun);
        let done = events(&log);
        all.flushes.push(Flushed { begun, done });
        let events = &log.lock().unwrap()[..];
        let disk = Disk { start: &start, content: &content, gate: &gate, events, history: &all };
        crashes(&disk, (0..=events.len()).step_by(2), 2, seed);
    }
}

#[test]
fn every_crash_of_overwriting_what_qemu_compressed_is_survived() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    // Compresses to pieces of sectors, many to a cluster.
    let content: Vec<u8> = (0..128u32 << 10).map(|i| (i / 700) as u8 ^ (i % 13) as u8).collect();
    std::fs::write(&raw, &content).unwrap();
    for (seed, options) in [
        (71, "cluster_size=4k"),
        (72, "cluster_size=2k,compat=0.10"),
        (73, "cluster_size=4k,compression_type=zstd,refcount_bits=8"),
    ] {
        let path = dir.path().join("packed.qcow2");
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        qemu_img(&[&convert[..], &[text(&raw), text(&path)]].concat());
        let start = std::fs::read(&path).unwrap();
        let plan = Plan {
            cluster_size: 0,
            refcount_bits: 0,
            size: content.len() as u64,
            layers: 1,
            operations: 60,
            longest: 9000,
            seed,
        };
        try_crashes_of(&plan, &start, &MemGate::default(), &content, |_, _| true);
    }
}

/// A wrong refcount in an image whose header already points to rebuilt refcounts.
fn unfounded(start: &[u8], crashed: &[u8]) -> Option<String> {
    let pointer = 48..60;
    if start[pointer.clone()] == crashed[pointer] {
        return None;
    }
    let storage = MemStorage::new(crashed.to_vec());
    let report = check_storage(&storage, Repair::None).unwrap();
    report.findings.into_iter().find(|f| f.contains("refcount"))
}

#[test]
fn every_crash_of_a_repair_leaves_the_disk_as_it_was() {
    let options = CreateOptions::new(128 << 10).cluster_size(512);
    let (good, gate, content) = prepared(&options, 2, 41);
    let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let table = be64(48);
    let block = be64(table);
    let l1 = (be64(40)..).step_by(8).find(|at| be64(*at) != 0).unwrap();
    let first_table = be64(l1) & 0x00ff_ffff_ffff_fe00;
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let damages: [(&str, Repair, Damage); 4] = [
        (
            "leak",
            Repair::Leaks,
            Box::new(move |b| {
                b[block + 500..block + 512].fill(1);
                let length = b.len().max(256 * 512);
                b.resize(length, 0);
            }),
        ),
        ("no refcounts", Repair::All, Box::new(move |b| b[table..table + 64].fill(0))),
        ("wrong refcounts", Repair::All, Box::new(move |b| b[block..block + 300].fill(2))),
        (
            "lost flags",
            Repair::All,
            Box::new(move |b| {
                b[l1] &= 0x7f;
                b[first_table] &= 0x7f;
            }),
        ),
    ];
    for (name, repair, damage) in damages {
        let mut start = good.clone();
        damage(&mut start);
        let (storage, log) = recording(&start);
        let report = check_storage(&*storage, repair).unwrap();
        assert!(report.is_clean(), "{name}: {:?}", report.findings);
        let log = log.lock().unwrap();
        assert!(!log.is_empty(), "{name}");
        let mut random = Random::new(5);
        for cut in 0..=log.len() {
            for _ in 0..6 {
                let bytes = crashed(&start, &log, cut, || random.below(2) > 0);
                let image = open(Arc::new(MemStorage::new(bytes.clone())), &gate);
                assert!(whole(&image.unwrap()) == content, "{name}, cut {cut}");
                assert_eq!(unfounded(&start, &bytes), None, "{name}, cut {cut}");
                // A second run finishes the work.
                let again = Arc::new(MemStorage::new(bytes));
                assert!(check_storage(&*again, repair).unwrap().is_clean(), "{name}, cut {cut}");
                let same = |got: &[u8]| match got == content {
                    true => Ok(()),
                    false => Err("the content changed".to_owned()),
                };
                survives(again.snapshot(), &gate, same).unwrap();
            }
        }
    }
}

#[test]
fn every_crash_of_the_rebuild_that_opening_a_dirty_image_makes_leaves_it_dirty_or_right() {
    let options = CreateOptions::new(128 << 10).cluster_size(512);
    let (mut start, gate, content) = prepared(&options, 1, 51);
    let table = u64::from_be_bytes(start[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(start[table..table + 8].try_into().unwrap()) as usize;
    start[79] |= 1;
    start[block + 20..block + 200].fill(0);
    let (storage, log) = recording(&start);
    drop(open(Arc::clone(&storage) as _, &gate).unwrap());
    assert_eq!(storage.len().unwrap() % 512, 0);
    let log = log.lock().unwrap();
    let mut random = Random::new(6);
    for cut in 0..=log.len() {
        for _ in 0..6 {
            let bytes = crashed(&start, &log, cut, || random.below(2) > 0);
            assert_eq!(unfounded(&start, &bytes), None, "cut {cut}");
            let storage = Arc::new(MemStorage::new(bytes));
            let image = open(Arc::clone(&storage) as _, &gate).unwrap();
            assert!(whole(&image) == content, "cut {cut}");
            image.write_at(&[1; 5000], 60_000).unwrap();
            image.close().unwrap();
            let report = check_storage(&*storage, Repair::None).unwrap();
            assert_eq!(report.corruptions, 0, "cut {cut}: {:?}", report.findings);
            let image = open(Arc::clone(&storage) as _, &gate).unwrap();
            let mut wanted = content.clone();
            wanted[60_000..65_000].fill(1);
            assert!(whole(&image) == wanted, "cut {cut}");
        }
    }
}

#[test]
fn a_file_of_any_length_can_be_written_on() {
    // A crash leaves room that was reserved ahead, to any cluster of any refcount block's range.
    let mut options = CreateOptions::new(64 << 10).cluster_size(512);
    options.refcount_bits = 64;
    let (start, gate, content) = prepared(&options, 1, 61);
    for clusters in 400..=530 {
        let storage = Arc::new(MemStorage::new(start.clone()));
        storage.set_len(clusters * 512).unwrap();
        let image = open(Arc::clone(&storage) as _, &gate).unwrap();
        let mut wanted = content.clone();
        for round in 1..=40u8 {
            let at = usize::from(round) * 1500;
            image.write_at(&[round; 700], at as u64).unwrap();
            wanted[at..at + 700].fill(round);
        }
        assert!(whole(&image) == wanted, "{clusters} clusters");
        image.close().unwrap();
        let report = check_storage(&*storage, Repair::None).unwrap();
        assert!(report.is_clean(), "{clusters}: {:?}", report.findings);
    }
}

/// The model itself: it must tell what is lost from what is there.
#[test]
fn the_model_of_a_crash_refuses_lost_and_invented_bytes() {
    let change =
        |bytes: &[u8], begun, done| Change { offset: 1, bytes: bytes.to_vec(), begun, done };
    let history = History {
        changes: vec![
            change(&[5, 5], 0, Some(10)),
            change(&[6], 4, Some(12)),
            change(&[7], 6, None),
        ],
        flushes: vec![Flushed { begun: 11, done: 4 }],
    };
    let start = [0; 4];
    let allows = |cut, got: [u8; 4]| history.allows(&start, cut, &got).is_ok();
    assert!(allows(2, [0, 0, 5, 0]), "torn, not flushed");
    assert!(!allows(4, [0, 0, 5, 0]), "lost after the flush");
    assert!(allows(5, [0, 6, 5, 0]) && allows(5, [0, 5, 5, 0]));
    assert!(!allows(5, [0, 7, 5, 0]), "not begun yet");
    assert!(allows(9, [0, 7, 5, 0]));
    assert!(!allows(9, [1, 5, 5, 0]), "nobody wrote it");
}
