//! Check and repair, with qemu-img as the second opinion.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout
)]
#![allow(unreachable_pub, dead_code, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2::storage::{MemStorage, Storage};
use qcow2::{CreateOptions, ErrorKind, Image, OpenOptions, Repair, check, check_storage, create};
use support::{Random, missing, qemu_img, run, text};

/// What qemu-img check says: (corruptions, leaks).
fn qemu_counts(path: &Path) -> (u64, u64) {
    let output = run("qemu-img", &["check", "--output=json", text(path)]);
    let json = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |key: &str| -> u64 {
        let Some(at) = json.find(&format!("\"{key}\":")) else {
            return 0;
        };
        let digits: String = json[at..]
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().unwrap()
    };
    (number("corruptions"), number("leaks"))
}

fn make(dir: &Path, name: &str, options: &str) -> PathBuf {
    let path = dir.join(name);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        text(&path),
        "8M",
    ]);
    for (offset, pattern) in [("0", "1"), ("3M", "2"), ("5000k", "3")] {
        let write = format!("write -P {pattern} {offset} 200k");
        assert!(
            run("qemu-io", &["-c", &write, text(&path)])
                .status
                .success()
        );
    }
    path
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
        assert!(
            run("qemu-io", &["-c", "write -P 9 1M 1M", text(&path)])
                .status
                .success()
        );
    }
    qemu_img(&["bitmap", "--add", text(&path), "changed"]);
    assert!(
        run("qemu-io", &["-c", "write -P 8 2M 1M", text(&path)])
            .status
            .success()
    );
    let report = check(&path, Repair::None).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);

    for kind in ["zlib", "zstd"] {
        let packed = dir.path().join(kind);
        let option = format!("compression_type={kind}");
        qemu_img(&[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            &option,
            text(&path),
            text(&packed),
        ]);
        let report = check(&packed, Repair::None).unwrap();
        assert!(report.is_clean(), "{kind}: {:?}", report.findings);
        assert!(report.compressed_clusters > 0);
    }
}

fn be64(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// Offsets of the first refcount block, of the L1 table, and of the first L2 table.
fn tables(bytes: &[u8]) -> (usize, usize, usize) {
    let l1 = be64(bytes, 40);
    (
        be64(bytes, be64(bytes, 48)),
        l1,
        be64(bytes, l1) & 0x00ff_ffff_ffff_fe00,
    )
}

fn damaged(dir: &Path, name: &str, damage: impl Fn(&mut Vec<u8>)) -> PathBuf {
    let path = make(dir, name, "cluster_size=4k");
    let mut bytes = std::fs::read(&path).unwrap();
    damage(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn damage_is_told_as_qemu_tells_it_and_repaired_so_that_qemu_is_content() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let intact = dir.path().join("intact.raw");
    let good = make(dir.path(), "good.qcow2", "cluster_size=4k");
    qemu_img(&["convert", "-O", "raw", text(&good), text(&intact)]);
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage, bool); 6] = [
        (
            "leak",
            |b| {
                let (block, ..) = tables(b);
                let end = b.len() / 4096;
                b[block + 2 * end + 1] = 1;
                b.resize((end + 1) * 4096, 0);
            },
            false,
        ),
        (
            "refcount too high",
            |b| {
                let (block, ..) = tables(b);
                b[block + 21] = 2;
            },
            true,
        ),
        (
            "refcount zero",
            |b| {
                let (block, ..) = tables(b);
                b[block + 21] = 0;
            },
            true,
        ),
        (
            "L2 flag lost",
            |b| {
                let (.., l2) = tables(b);
                b[l2] &= 0x7f;
            },
            true,
        ),
        (
            "L1 flag lost",
            |b| {
                let (_, l1, _) = tables(b);
                b[l1] &= 0x7f;
            },
            true,
        ),
        (
            "refcount table empty",
            |b| {
                let at = be64(b, 48);
                b[at..at + 8].fill(0);
            },
            true,
        ),
    ];
    for (name, damage, is_corrupt) in cases {
        let path = damaged(dir.path(), &format!("{name}.qcow2"), damage);
        let report = check(&path, Repair::None).unwrap();
        let (corruptions, leaks) = qemu_counts(&path);
        assert_eq!(
            report.corruptions > 0,
            corruptions > 0,
            "{name}: {:?}",
            report.findings
        );
        assert_eq!(report.leaks > 0, leaks > 0, "{name}: {:?}", report.findings);
        assert_eq!(
            report.corruptions > 0,
            is_corrupt,
            "{name}: {:?}",
            report.findings
        );

        let repaired = check(
            &path,
            if is_corrupt {
                Repair::All
            } else {
                Repair::Leaks
            },
        )
        .unwrap();
        assert!(repaired.is_clean(), "{name}: {:?}", repaired.findings);
        assert_eq!(qemu_counts(&path), (0, 0), "{name}");
        qemu_img(&["compare", text(&path), text(&intact)]);
    }
}

#[test]
fn entries_that_point_outside_the_file_are_reported_and_left() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = damaged(dir.path(), "outside.qcow2", |bytes| {
        let (.., l2) = tables(bytes);
        bytes[l2..l2 + 8].copy_from_slice(&(1u64 << 63 | 1 << 40).to_be_bytes());
    });
    assert!(check(&path, Repair::None).unwrap().corruptions > 0);
    let after = check(&path, Repair::All).unwrap();
    assert!(after.corruptions > 0, "{:?}", after.findings);
    let image = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
    let error = image.read_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(
        (error.kind(), error.offset()),
        (ErrorKind::Corrupt, Some(0))
    );
}

#[test]
fn an_image_that_was_not_closed_cleanly_gets_its_refcounts_back_on_opening() {
    if missing("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lazy.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "lazy_refcounts=on",
        text(&path),
        "8M",
    ]);
    let commands = [
        "-c",
        "write -P 7 0 1M",
        "-c",
        "flush",
        "-c",
        "abort",
        text(&path),
    ];
    assert!(!run("qemu-io", &commands).status.success());
    assert!(!check(&path, Repair::None).unwrap().is_clean());
    let image = Image::open(&path, &OpenOptions::new()).unwrap();
    let mut bytes = vec![0; 1 << 20];
    image.read_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|b| *b == 7));
    image.write_at(&[1; 512], 4 << 20).unwrap();
    image.close().unwrap();
    assert!(check(&path, Repair::None).unwrap().is_clean());
    assert_eq!(qemu_counts(&path), (0, 0));
}

#[test]
fn an_image_marked_corrupt_is_read_only_until_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("marked.qcow2");
    create(&path, &CreateOptions::new(1 << 20)).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[79] |= 2;
    std::fs::write(&path, bytes).unwrap();
    let error = Image::open(&path, &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    Image::open(&path, &OpenOptions::new().read_only()).unwrap();
    assert!(check(&path, Repair::All).unwrap().is_clean());
    Image::open(&path, &OpenOptions::new()).unwrap();
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
        let mut bytes = good.clone();
        for _ in 0..1 + random.below(4) {
            // Mostly the header and the tables, which come first.
            let limit = if random.below(3) == 0 {
                bytes.len() as u64
            } else {
                200
            };
            let at = random.below(limit) as usize;
            bytes[at] = [0, 1, 0x80, 0xff, random.next() as u8][random.below(5) as usize];
        }
        exercise(bytes);
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
    let _ = check_storage(&*storage, Repair::All);
}
