//! Many threads on one image.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    unreachable_pub,
    dead_code,
    missing_docs
)]

mod support;

use std::path::Path;
use std::sync::{Arc, Barrier, mpsc};

use qcow2::storage::{MemStorage, Storage};
use qcow2::{
    BackingFormat, CreateOptions, ErrorKind, FileGate, Image, OpenOptions, Repair, ZeroMode, check,
    check_storage, create, create_in,
};
use support::Random;

fn whole(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Closes, checks, and reads what a new handle sees.
fn settled(image: Image, path: &Path) -> Vec<u8> {
    image.close().unwrap();
    drop(image);
    let report = check(path, Repair::None).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    whole(&Image::open(path, &OpenOptions::new().read_only()).unwrap())
}

/// An overlay over a base full of `0xbb`.
fn overlay(dir: &Path, size: u64, cluster_size: u32) -> Image {
    let base = dir.join("base.qcow2");
    create(&base, &CreateOptions::new(size)).unwrap();
    let image = Image::open(&base, &OpenOptions::new()).unwrap();
    image.write_at(&vec![0xbb; size as usize], 0).unwrap();
    image.close().unwrap();
    let top = dir.join("top.qcow2");
    let options = CreateOptions::new(size)
        .cluster_size(cluster_size)
        .backing("base.qcow2", BackingFormat::Qcow2);
    create(&top, &options).unwrap();
    Image::open(&top, &OpenOptions::new()).unwrap()
}

#[test]
fn two_writes_into_one_unallocated_cluster_are_both_kept() {
    const ROUNDS: u64 = 64;
    const CLUSTER: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let image = overlay(dir.path(), ROUNDS * CLUSTER, CLUSTER as u32);
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        for (byte, inside) in [(1, 100), (2, 2100)] {
            let (image, start) = (&image, &start);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    start.wait();
                    image.write_at(&[byte; 1000], round * CLUSTER + inside).unwrap();
                }
            });
        }
    });
    let mut cluster = vec![0xbb; CLUSTER as usize];
    cluster[100..1100].fill(1);
    cluster[2100..3100].fill(2);
    let wanted = cluster.repeat(ROUNDS as usize);
    assert!(whole(&image) == wanted);
    assert!(settled(image, &dir.path().join("top.qcow2")) == wanted);
}

/// Each thread owns every n-th piece of the disk; pieces are no whole clusters.
fn pieces_of_all_sizes(cluster_size: u32, piece: u64, seed: u64) {
    const THREADS: u64 = 6;
    const SIZE: u64 = 3 << 20;
    let dir = tempfile::tempdir().unwrap();
    let image = overlay(dir.path(), SIZE, cluster_size);
    let pieces = SIZE / piece;
    let models: Vec<Vec<(u64, Vec<u8>)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let image = &image;
                scope.spawn(move || {
                    let mut random = Random::new(seed * 10 + thread);
                    let mut own: Vec<(u64, Vec<u8>)> = (thread..pieces)
                        .step_by(THREADS as usize)
                        .map(|number| (number * piece, vec![0xbb; piece as usize]))
                        .collect();
                    for _ in 0..300 {
                        let which = random.below(own.len() as u64) as usize;
                        let (at, model) = &mut own[which];
                        let from = random.below(piece);
                        let length = 1 + random.below(piece - from);
                        let range = from as usize..(from + length) as usize;
                        match random.below(10) {
                            0 => {
                                let keep = random.below(2) == 0;
                                let mode =
                                    if keep { ZeroMode::KeepAllocated } else { ZeroMode::Unmap };
                                image.write_zeroes(*at + from, length, mode).unwrap();
                                model[range].fill(0);
                            }
                            1 => {
                                image.discard(*at + from, length).unwrap();
                                image.read_at(&mut model[range], *at + from).unwrap();
                            }
                            2 => image.flush().unwrap(),
                            3 => {
                                let mut got = vec![0; piece as usize];
                                image.read_at(&mut got, *at).unwrap();
                                assert!(got == *model, "thread {thread}, piece at {at}");
                            }
                            _ => {
                                let bytes = vec![random.next() as u8; length as usize];
                                image.write_at(&bytes, *at + from).unwrap();
                                model[range].copy_from_slice(&bytes);
                            }
                        }
                    }
                    own
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut wanted = vec![0xbb; SIZE as usize];
    for (at, bytes) in models.into_iter().flatten() {
        wanted[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    assert!(whole(&image) == wanted);
    assert!(settled(image, &dir.path().join("top.qcow2")) == wanted);
}

#[test]
fn threads_that_share_clusters_do_not_disturb_each_other() {
    pieces_of_all_sizes(512, 777, 1);
    pieces_of_all_sizes(4096, 777, 2);
    pieces_of_all_sizes(65536, 5000, 3);
}

#[test]
fn threads_that_share_pages_of_large_writes_do_not_disturb_each_other() {
    // Large enough for writes around the page cache, with edges inside pages.
    pieces_of_all_sizes(65536, 262_144 + 512, 4);
    pieces_of_all_sizes(4096, 131_072 + 100, 5);
}

#[test]
fn of_overlapping_writes_each_sector_is_from_one() {
    const SIZE: u64 = 256 << 10;
    let dir = tempfile::tempdir().unwrap();
    let image = overlay(dir.path(), SIZE, 4096);
    std::thread::scope(|scope| {
        for thread in 1..=6u8 {
            let image = &image;
            scope.spawn(move || {
                let mut random = Random::new(u64::from(thread));
                for _ in 0..200 {
                    let sectors = 1 + random.below(60);
                    let at = random.below(SIZE / 512 - sectors);
                    let bytes = vec![thread; (sectors * 512) as usize];
                    image.write_at(&bytes, at * 512).unwrap();
                }
            });
        }
    });
    let got = whole(&image);
    for (number, sector) in got.chunks(512).enumerate() {
        assert!(
            sector.iter().all(|b| *b == sector[0]) && (sector[0] <= 6 || sector[0] == 0xbb),
            "sector {number} is torn"
        );
    }
    assert!(settled(image, &dir.path().join("top.qcow2")) == got);
}

#[test]
fn flushes_of_many_threads_all_return() {
    let dir = tempfile::tempdir().unwrap();
    let image = overlay(dir.path(), 1 << 20, 512);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..20 {
                    let at = (round * 8 + thread) * 4096 % (1 << 20);
                    image.write_at(&[7; 4096], at).unwrap();
                    image.flush().unwrap();
                }
            });
        }
    });
    let got = whole(&image);
    assert!(settled(image, &dir.path().join("top.qcow2")) == got);
}

#[test]
fn once_close_has_returned_nothing_reaches_the_file_any_more() {
    // Whoever opens the image next must not be disturbed by a write that was under way.
    for round in 0..150u64 {
        let storage = Arc::new(MemStorage::default());
        create_in(&*storage, &CreateOptions::new(4 << 20).cluster_size(4096)).unwrap();
        let gate = FileGate { lock: false };
        let shared: Arc<dyn Storage> = Arc::clone(&storage) as _;
        let image = Image::open_storage(shared, Path::new("memory"), &gate, &OpenOptions::new());
        let image = image.unwrap();
        let (started, running) = mpsc::channel();
        let closed = std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let (image, started) = (&image, started.clone());
                scope.spawn(move || {
                    let mut random = Random::new(round * 3 + thread);
                    let error = loop {
                        let at = random.below((4 << 20) - 20_000);
                        let result = match thread {
                            2 => image.write_zeroes(at, 20_000, ZeroMode::KeepAllocated),
                            _ => image.write_at(&[1; 10_000], at),
                        };
                        // The receiver goes once it has seen enough.
                        let _ = started.send(());
                        if let Err(error) = result {
                            break error;
                        }
                    };
                    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
                });
            }
            assert_eq!(running.iter().take(20).count(), 20);
            image.close().unwrap();
            let closed = storage.snapshot();
            let report = check_storage(&MemStorage::new(closed.clone()), Repair::None).unwrap();
            assert!(report.is_clean(), "round {round}: {:?}", report.findings);
            closed
        });
        assert!(storage.snapshot() == closed, "round {round}");
    }
}
