//! exFAT beside mkfs.exfat and the FUSE file system.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub, missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use guest::{FileSystem, Status};
use support::damage::mutate;
use support::*;

const TOOLS: &[&str] = &["mkfs.exfat", "mount.exfat-fuse"];

/// Mounts an image at `at` over FUSE.
fn mount(image: &Path, at: &Path) -> Mounted {
    fs::create_dir_all(at).unwrap();
    // The FUSE program wants a block device. Once detached, it stays for as long as it is mounted.
    let attached = LoopDevice::attach(image);
    run("mount.exfat-fuse", &[&attached.device, &at]);
    Mounted { at: at.to_owned() }
}

/// An image of `size` bytes with clusters of `cluster`, filled by `fill` over FUSE.
fn make(image: &Path, size: u64, cluster: &str, fill: impl FnOnce(&Path)) -> Truth {
    blank(image, size);
    run("mkfs.exfat", &[&"-L", &"LABEL", &"-c", &cluster, &image]);
    let mounted = mount(image, &image.with_extension("mount"));
    fill(&mounted.at);
    let truth = truth_of_directory(&mounted.at, false);
    drop(mounted);
    assert!(detached(image));
    truth
}

fn open(image: &Path) -> Box<dyn FileSystem> {
    guest::fs::open(&disk(image)).unwrap()
}

/// Leaves holes of a few clusters, and fills them with one file.
fn fragment(at: &Path) {
    for index in 0..60 {
        fs::write(at.join(format!("part-{index}")), noise(index, 20_000)).unwrap();
    }
    for index in (0..60).step_by(2) {
        fs::remove_file(at.join(format!("part-{index}"))).unwrap();
    }
    fs::write(at.join("fragments"), noise(7, 3 << 20)).unwrap();
}

#[test]
fn every_size_of_clusters_shows_what_fuse_shows() {
    if missing(TOOLS) || no_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    for (cluster, many) in [("512", 200), ("4096", 800), ("1M", 20)] {
        let image = place.path().join(format!("image-{cluster}"));
        let expected = make(&image, 256 << 20, cluster, |at| {
            make_tree(at, Wish { many, unix: false, huge: false });
            fragment(at);
        });
        let fs = open(&image);
        assert_eq!((&*fs.about().kind, &*fs.about().label), ("exfat", "LABEL"));
        assert_eq!(fs.about().status, Status::Clean);
        assert!(fs.about().used.is_some_and(|used| used > 9 << 20));
        assert_same(&truth_of_reader(&*fs, false, 17), &expected);
        let root = fs.root();
        let fragments = fs.lookup(root, b"fragments").unwrap().unwrap();
        assert!(cluster == "1M" || pieces(&*fs, fragments) > 3);
        assert!(fs.lookup(root, "ÜMLÄUT-中文-😀.TXT".as_bytes()).unwrap().is_some());
    }
}

#[test]
fn mutated_volumes_never_panic_or_hang() {
    if missing(TOOLS) || no_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    make(&image, 4 << 20, "512", |at| {
        fs::create_dir_all(at.join("a/b")).unwrap();
        for index in 0..30 {
            fs::write(at.join(format!("a/a long name {index}")), noise(9, 3000)).unwrap();
        }
    });
    let mut boot = [0; 512];
    disk(&image).read_at(&mut boot, 0).unwrap();
    let sector =
        |at: usize| u64::from(u32::from_le_bytes(boot[at..at + 4].try_into().unwrap())) * 512;
    let (table, heap) = (sector(80), sector(88));
    mutate(&image, &[106..110, table..table + 3000, heap..heap + 60_000], 300);
}

#[test]
fn times_are_those_that_were_set() {
    if missing(TOOLS) || no_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    make(&image, 4 << 20, "512", |at| {
        run("touch", &[&"-d", &"@1700000000", &at.join("file")]);
    });
    let fs = open(&image);
    let node = fs.lookup(fs.root(), b"file").unwrap().unwrap();
    let stat = fs.stat(node).unwrap();
    assert_eq!(stat.modified.map(|time| time.seconds), Some(1_700_000_000));
    assert_eq!(stat.mode, 0o644);
}

#[test]
fn a_mount_that_fails_leaves_no_loop_device() {
    if missing(TOOLS) || no_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    blank(&image, 1 << 20);
    let at = place.path().join("mount");
    assert!(std::panic::catch_unwind(|| mount(&image, &at)).is_err());
    assert!(detached(&image));
}
