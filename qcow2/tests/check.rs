//! Checking, with qemu-img as the second opinion.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::print_stdout)]
#![allow(unreachable_pub, dead_code, missing_docs)]

mod support;

use std::path::Path;
use std::sync::Arc;

use qcow2::storage::{MemStorage, Storage};
use qcow2::{CheckReport, CreateOptions, Image, OpenOptions, Repair, check, check_storage};
use support::damage::{be64, make, qemu_counts, qemu_numbers, tables};
use support::{Random, missing, qemu_img, run, text};

/// The report's totals are those that qemu-img tells.
fn totals_agree(path: &Path, report: &CheckReport) {
    let keys = [
        "total-clusters",
        "allocated-clusters",
        "compressed-clusters",
        "fragmented-clusters",
        "image-end-offset",
    ];
    let ours = [
        report.total_clusters,
        report.allocated_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        report.image_end_offset,
    ];
    assert_eq!(ours, qemu_numbers(path, keys), "{keys:?} of {path:?}");
}

#[test]
fn every_kind_of_image_that_qemu_makes_is_clean() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (i, options) in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8",
        "refcount_bits=64",
        "extended_l2=on,cluster_size=128k",
        "preallocation=metadata",
        "preallocation=falloc",
    ]
    .into_iter()
    .enumerate()
    {
        let path = make(dir.path(), &format!("{i}.qcow2"), options);
        let report = check(&path, Repair::None).unwrap();
        assert!(report.is_clean(), "{options}: {:?}", report.findings);
        totals_agree(&path, &report);
    }
}

#[test]
fn snapshots_bitmaps_and_compressed_clusters_are_counted() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "a.qcow2", "cluster_size=4k");
    for name in ["one", "two"] {
        qemu_img(&["snapshot", "-c", name, text(&path)]);
        assert!(run("qemu-io", &["-c", "write -P 9 1M 1M", text(&path)]).status.success());
    }
    qemu_img(&["bitmap", "--add", text(&path), "changed"]);
    assert!(run("qemu-io", &["-c", "write -P 8 2M 1M", text(&path)]).status.success());
    let report = check(&path, Repair::None).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    totals_agree(&path, &report);

    for kind in ["zlib", "zstd"] {
        let packed = dir.path().join(kind);
        let option = format!("compression_type={kind}");
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", &option, text(&path), text(&packed)]);
        let report = check(&packed, Repair::None).unwrap();
        assert!(report.is_clean(), "{kind}: {:?}", report.findings);
        assert!(report.compressed_clusters > 0);
        totals_agree(&packed, &report);
    }
}

#[test]
fn reserved_bits_and_flags_on_compressed_clusters_are_corruptions_as_in_qemu() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let plain = make(dir.path(), "plain.qcow2", "cluster_size=4k");
    let packed = dir.path().join("packed.qcow2");
    let convert = ["convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k"];
    qemu_img(&[&convert[..], &[text(&plain), text(&packed)]].concat());
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, &Path, Damage); 4] = [
        ("L1", &plain, |b| {
            let (_, l1, _) = tables(b);
            b[l1 + 7] |= 4;
        }),
        ("L2", &plain, |b| {
            let (.., l2) = tables(b);
            b[l2 + 7] |= 4;
        }),
        ("refcount table", &plain, |b| {
            let at = be64(b, 48);
            b[at + 7] |= 1;
        }),
        ("compressed", &packed, |b| {
            let (.., l2) = tables(b);
            b[l2] |= 0x80;
        }),
    ];
    for (name, image, damage) in cases {
        let path = dir.path().join(format!("{name}.qcow2"));
        let mut bytes = std::fs::read(image).unwrap();
        damage(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        let report = check(&path, Repair::None).unwrap();
        assert!(report.corruptions > 0, "{name}");
        assert!(qemu_counts(&path).0 > 0, "{name}");
    }
    let path = dir.path().join("compressed.qcow2");
    assert!(check(&path, Repair::All).unwrap().is_clean());
    assert_eq!(qemu_counts(&path), (0, 0));
    qemu_img(&["compare", text(&path), text(&plain)]);
}

/// Copies of `good` with a few bytes changed, mostly among the first `metadata` bytes.
fn with_damage(good: &[u8], metadata: u64, random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..1 + random.below(4) {
        let limit = match random.below(6) {
            0 => bytes.len() as u64,
            1 | 2 => metadata,
            _ => 200,
        };
        let at = random.below(limit) as usize;
        bytes[at] = [0, 1, 0x80, 0xff, random.next() as u8][random.below(5) as usize];
    }
    bytes
}

#[test]
fn no_damage_to_metadata_makes_the_engine_panic() {
    let storage = MemStorage::default();
    let options = CreateOptions::new(4 << 20).cluster_size(512);
    qcow2::create_in(&storage, &options).unwrap();
    let storage = Arc::new(storage);
    {
        let gate = qcow2::FileGate { lock: false };
        let image = Image::open_storage(
            Arc::clone(&storage) as _,
            Path::new("memory"),
            &gate,
            &OpenOptions::new(),
        )
        .unwrap();
        image.write_at(&vec![5; 100_000], 1000).unwrap();
        image.close().unwrap();
    }
    let good = storage.snapshot();
    let mut random = Random::new(7);
    for _ in 0..2000 {
        exercise(with_damage(&good, good.len() as u64, &mut random));
    }
}

#[test]
fn no_damage_to_snapshots_bitmaps_and_subclusters_makes_the_engine_panic() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, options) in [
        ("v2", "cluster_size=2k,compat=0.10"),
        ("v3", "cluster_size=2k"),
        ("extended", "cluster_size=16k,extended_l2=on"),
    ] {
        let path = make(dir.path(), name, options);
        for snapshot in ["one", "two"] {
            qemu_img(&["snapshot", "-c", snapshot, text(&path)]);
        }
        if name != "v2" {
            qemu_img(&["bitmap", "--add", text(&path), "changed"]);
        }
        let good = std::fs::read(&path).unwrap();
        let mut random = Random::new(good.len() as u64);
        for _ in 0..150 {
            // Snapshots and bitmaps come last.
            let mut bytes = with_damage(&good, 40_000, &mut random);
            let tail = bytes.len() - 1 - random.below(20_000) as usize;
            bytes[tail] = random.next() as u8;
            exercise(bytes);
        }
    }
}

fn exercise(bytes: Vec<u8>) {
    let storage: Arc<dyn Storage> = Arc::new(MemStorage::new(bytes));
    let _ = check_storage(&*storage, Repair::None);
    let gate = qcow2::FileGate { lock: false };
    let options = OpenOptions::new();
    let path = Path::new("/nowhere/memory");
    if let Ok(image) = Image::open_storage(Arc::clone(&storage), path, &gate, &options) {
        let mut buffer = vec![0; 3000];
        for offset in [0, 50_000, image.size().saturating_sub(3000)] {
            let _ = image.read_at(&mut buffer, offset);
            let _ = image.write_at(&buffer, offset);
            let _ = image.discard(offset, 3000);
        }
        let _ = image.map(0, image.size().min(1 << 30), &mut |_| true);
        let _ = image.close();
    }
    if check_storage(&*storage, Repair::All).is_ok_and(|report| report.corruptions == 0) {
        let again = check_storage(&*storage, Repair::None).unwrap();
        assert_eq!(again.corruptions, 0, "{:?}", again.findings);
    }
}
