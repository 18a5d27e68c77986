//! Check and repair, with qemu-img as the second opinion.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::print_stdout)]
#![allow(unreachable_pub, dead_code, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2::storage::{MemStorage, Storage};
use qcow2::{
    CheckReport, CreateOptions, ErrorKind, Image, OpenOptions, Repair, check, check_storage, create,
};
use support::{Random, missing, qemu_img, run, text};

/// Numbers that qemu-img check tells; what it leaves out is 0.
fn qemu_numbers<const N: usize>(path: &Path, keys: [&str; N]) -> [u64; N] {
    let output = run("qemu-img", &["check", "--output=json", text(path)]);
    let json = String::from_utf8_lossy(&output.stdout).into_owned();
    keys.map(|key| {
        let Some(at) = json.find(&format!("\"{key}\":")) else {
            return 0;
        };
        let digits: String = json[at..]
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().unwrap()
    })
}

/// What qemu-img check says: (corruptions, leaks).
fn qemu_counts(path: &Path) -> (u64, u64) {
    let [corruptions, leaks] = qemu_numbers(path, ["corruptions", "leaks"]);
    (corruptions, leaks)
}

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

fn make(dir: &Path, name: &str, options: &str) -> PathBuf {
    let path = dir.join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "8M"]);
    for (offset, pattern) in [("0", "1"), ("3M", "2"), ("5000k", "3")] {
        let write = format!("write -P {pattern} {offset} 200k");
        assert!(run("qemu-io", &["-c", &write, text(&path)]).status.success());
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

fn be64(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// Offsets of the first refcount block, of the L1 table, and of the first L2 table.
fn tables(bytes: &[u8]) -> (usize, usize, usize) {
    let l1 = be64(bytes, 40);
    (be64(bytes, be64(bytes, 48)), l1, be64(bytes, l1) & 0x00ff_ffff_ffff_fe00)
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
        assert_eq!(report.corruptions > 0, corruptions > 0, "{name}: {:?}", report.findings);
        assert_eq!(report.leaks > 0, leaks > 0, "{name}: {:?}", report.findings);
        assert_eq!(report.corruptions > 0, is_corrupt, "{name}: {:?}", report.findings);

        let repaired = check(&path, if is_corrupt { Repair::All } else { Repair::Leaks }).unwrap();
        assert!(repaired.is_clean(), "{name}: {:?}", repaired.findings);
        assert_eq!(qemu_counts(&path), (0, 0), "{name}");
        qemu_img(&["compare", text(&path), text(&intact)]);
    }
}

#[test]
fn refcounts_of_every_width_are_rebuilt() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let options = format!("cluster_size=2k,refcount_bits={bits}");
        let path = make(dir.path(), &format!("{bits}.qcow2"), &options);
        let raw = dir.path().join(format!("{bits}.raw"));
        qemu_img(&["convert", "-O", "raw", text(&path), text(&raw)]);
        let mut bytes = std::fs::read(&path).unwrap();
        let (block, ..) = tables(&bytes);
        bytes[block..block + 2048].fill(0);
        std::fs::write(&path, bytes).unwrap();
        let report = check(&path, Repair::All).unwrap();
        assert!(report.is_clean() && report.corruptions_fixed > 0, "{bits}");
        assert_eq!(qemu_counts(&path), (0, 0), "{bits}");
        qemu_img(&["compare", text(&path), text(&raw)]);
    }
}

#[test]
fn images_with_snapshots_bitmaps_and_subclusters_survive_a_rebuild() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, options) in [
        ("v2", "cluster_size=4k,compat=0.10"),
        ("v3", "cluster_size=4k"),
        ("extended", "cluster_size=16k,extended_l2=on"),
    ] {
        let path = make(dir.path(), name, options);
        qemu_img(&["snapshot", "-c", "one", text(&path)]);
        let write = ["-c", "write -P 9 1M 1M", text(&path)];
        assert!(run("qemu-io", &write).status.success());
        if name != "v2" {
            qemu_img(&["bitmap", "--add", text(&path), "changed"]);
        }
        let now = dir.path().join("now.raw");
        let then = dir.path().join("then.raw");
        let image = text(&path);
        qemu_img(&["convert", "-O", "raw", image, text(&now)]);
        qemu_img(&["convert", "-l", "one", "-O", "raw", image, text(&then)]);
        let mut bytes = std::fs::read(&path).unwrap();
        let table = be64(&bytes, 48);
        bytes[table..table + 64].fill(0);
        std::fs::write(&path, bytes).unwrap();
        assert!(check(&path, Repair::All).unwrap().is_clean(), "{name}");
        assert_eq!(qemu_counts(&path), (0, 0), "{name}");
        qemu_img(&["compare", image, text(&now)]);
        let again = dir.path().join("again.raw");
        qemu_img(&["convert", "-l", "one", "-O", "raw", image, text(&again)]);
        assert!(std::fs::read(&then).unwrap() == std::fs::read(&again).unwrap());
    }
}

#[test]
fn a_refcount_that_comes_down_to_one_gets_its_copied_flag_back() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // As if a snapshot's last reference had been dropped and the refcount write lost.
    let path = damaged(dir.path(), "late.qcow2", |bytes| {
        let (block, _, l2) = tables(bytes);
        let cluster = (be64(bytes, l2) & 0x00ff_ffff_ffff_fe00) / 4096;
        bytes[block + 2 * cluster + 1] = 2;
        bytes[l2] &= 0x7f;
    });
    let before = check(&path, Repair::None).unwrap();
    assert_eq!((before.corruptions, before.leaks), (0, 1));
    let after = check(&path, Repair::Leaks).unwrap();
    assert!(after.is_clean() && after.leaks_fixed == 1);
    assert_eq!(qemu_counts(&path), (0, 0));
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

#[test]
fn guest_data_over_metadata_stays_a_corruption_and_the_metadata_is_not_touched() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    type Target = fn(&[u8]) -> usize;
    let targets: [(&str, Target); 4] = [
        ("header", |_| 0x1000),
        ("L1", |b| tables(b).1),
        ("L2", |b| tables(b).2),
        ("refcount table", |b| be64(b, 48)),
    ];
    for (name, target) in targets {
        let path = damaged(dir.path(), &format!("{name}.qcow2"), |bytes| {
            let (.., l2) = tables(bytes);
            let word = 1u64 << 63 | target(bytes) as u64;
            bytes[l2..l2 + 8].copy_from_slice(&word.to_be_bytes());
        });
        let report = check(&path, Repair::None).unwrap();
        assert!(report.corruptions > 0, "{name}");
        check(&path, Repair::All).unwrap();
        // All but the first cluster is as it was.
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let mut rest = vec![0; (200 << 10) - 4096];
        image.read_at(&mut rest, 4096).unwrap();
        assert!(rest.iter().all(|b| *b == 1), "{name}");
        image.write_at(&[9; 8192], 0).unwrap();
        image.close().unwrap();
        let image = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
        let mut rest = vec![0; (200 << 10) - 8192];
        image.read_at(&mut rest, 8192).unwrap();
        assert!(rest.iter().all(|b| *b == 1), "{name}");
    }
}

#[test]
fn what_a_broken_reference_led_to_is_not_given_away_by_a_repair() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), "broken.qcow2", "cluster_size=4k");
    let mut bytes = std::fs::read(&path).unwrap();
    let (_, l1, _) = tables(&bytes);
    // Off its cluster: the table, and all it names, is lost from sight.
    bytes[l1 + 6] ^= 2;
    std::fs::write(&path, &bytes).unwrap();
    let report = check(&path, Repair::All).unwrap();
    assert!(report.corruptions > 0);

    let image = Image::open(&path, &OpenOptions::new()).unwrap();
    image.write_at(&vec![7; 1 << 20], 6 << 20).unwrap();
    image.close().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[l1 + 6] ^= 2;
    std::fs::write(&path, &bytes).unwrap();
    assert!(check(&path, Repair::All).unwrap().is_clean());
    let image = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
    let mut first = vec![0; 200 << 10];
    image.read_at(&mut first, 0).unwrap();
    assert!(first.iter().all(|b| *b == 1));
}

#[test]
fn a_file_beyond_the_longest_refcount_table_is_refused_before_memory_runs_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.qcow2");
    let mut options = CreateOptions::new(1 << 20).cluster_size(512);
    options.refcount_bits = 64;
    create(&path, &options).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::write_all_at(&file, &[2], 79).unwrap();
    let error = check(&path, Repair::All).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    // Nothing changed.
    let file = std::fs::File::open(&path).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 72).unwrap();
    assert_eq!(bytes[7], 2);
}

#[test]
fn a_truncated_file_is_a_corruption_and_repair_keeps_what_is_left() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = damaged(dir.path(), "cut.qcow2", |bytes| {
        let cut = bytes.len() - (100 << 10);
        bytes.truncate(cut);
    });
    assert!(check(&path, Repair::None).unwrap().corruptions > 0);
    assert!(qemu_counts(&path).0 > 0);
    assert!(check(&path, Repair::All).unwrap().corruptions > 0);
    let image = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
    let mut first = vec![0; 200 << 10];
    image.read_at(&mut first, 0).unwrap();
    assert!(first.iter().all(|b| *b == 1));
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
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(0)));
}

#[test]
fn an_image_that_was_not_closed_cleanly_gets_its_refcounts_back_on_opening() {
    if missing("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lazy.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", text(&path), "8M"]);
    let commands = ["-c", "write -P 7 0 1M", "-c", "flush", "-c", "abort", text(&path)];
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
            let limit = if random.below(3) == 0 { bytes.len() as u64 } else { 200 };
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
