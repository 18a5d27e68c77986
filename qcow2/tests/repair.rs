//! Repairing damaged images: qemu-img is content with the result, and no data is lost.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::print_stdout)]
#![allow(unreachable_pub, dead_code, missing_docs)]

mod support;

use qcow2::{CreateOptions, ErrorKind, Image, OpenOptions, Repair, check, create};
use support::damage::{be64, damaged, make, qemu_counts, tables};
use support::{missing, qemu_img, run, text};

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
