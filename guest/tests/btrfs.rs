//! btrfs against the kernel.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub)]

mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use guest::{Cursor, ErrorKind, FileSystem, Node, Place, Source, Status};
use support::damage::{Patched, walk_beside};
use support::*;

fn unfit() -> bool {
    missing(&["mkfs.btrfs", "btrfs", "setfattr", "fallocate", "mount"]) || no_root()
}

fn make(image: &Path, options: &[&str]) {
    blank(image, 400 << 20);
    let mut arguments: Vec<&dyn AsRef<OsStr>> = vec![&"-q"];
    arguments.extend(options.iter().map(|option| option as &dyn AsRef<OsStr>));
    arguments.push(&image);
    run("mkfs.btrfs", &arguments);
}

fn open(image: &Path) -> Box<dyn FileSystem> {
    guest::fs::open(&disk(image)).unwrap()
}

/// Files with every kind of extent, shared and moved.
fn make_extents(at: &Path) {
    let scattered = File::create(at.join("scattered")).unwrap();
    for index in 0..300_u64 {
        scattered.write_all_at(&noise(index, 4096), index * 12_288).unwrap();
    }
    run("fallocate", &[&"-l", &"3000000", &at.join("preallocated")]);
    fs::write(at.join("punched"), noise(5, 1 << 20)).unwrap();
    run("fallocate", &[&"-p", &"-o", &"65536", &"-l", &"131072", &at.join("punched")]);
    let text = "words that are repeated, and repeated\n".repeat(30_000);
    fs::write(at.join("packed"), &text).unwrap();
    fs::write(at.join("small"), "s".repeat(1500)).unwrap();
    let file = File::create(at.join("grown")).unwrap();
    file.write_all_at("g".repeat(5000).as_bytes(), 0).unwrap();
    run("sync", &[&"-f", &at]);
    // Behind the end of compressed data, within its last sector, and in the middle of it.
    file.write_all_at(b"more", 5000).unwrap();
    file.set_len(300_000).unwrap();
    File::options()
        .write(true)
        .open(at.join("packed"))
        .unwrap()
        .write_all_at(b"!", 200_000)
        .unwrap();
    for name in ["large.bin", "packed", "small"] {
        let copied = at.join(format!("{name}.shared"));
        run("cp", &[&"--reflink=always", &at.join(name), &copied]);
    }
    let shared = File::options().write(true).open(at.join("large.bin.shared")).unwrap();
    shared.write_all_at(b"no longer shared", 1_000_001).unwrap();
    let value = "v".repeat(3000);
    run("setfattr", &[&"-n", &"user.short", &"-v", &"value", &at.join("hello.txt")]);
    run("setfattr", &[&"-n", &"user.long", &"-v", &value, &at.join("hello.txt")]);
}

#[test]
fn a_large_tree_reads_as_the_kernel_reads_it() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    make(&image, &["-L", "label"]);
    let truth = {
        let _mounted = Mounted::by_kernel(&image, &at, "noatime");
        make_tree(&at, Wish { many: 12_000, unix: true, huge: false });
        truth_of_directory(&at, true)
    };
    let fs = open(&image);
    assert_eq!(fs.about().status, Status::Clean);
    assert_eq!(fs.about().label, "label");
    assert_same(&truth_of_reader(&*fs, true, 1000), &truth);
    let many = fs.lookup(fs.root(), b"many").unwrap().unwrap();
    assert!(fs.lookup(many, b"entry number 011999").unwrap().is_some());
    assert!(fs.lookup(many, b"entry number 012000").unwrap().is_none());
    let file = fs.lookup(fs.root(), b"hello.txt").unwrap().unwrap();
    assert_eq!(fs.list(file, Cursor::default(), 10).unwrap_err().kind, ErrorKind::NotADirectory);
    assert_eq!(fs.read_link(file).unwrap_err().kind, ErrorKind::NotALink);
    assert_eq!(fs.read_at(many, &mut [0; 4], 0).unwrap_err().kind, ErrorKind::NotAFile);
    assert_eq!(fs.read_at(file, &mut [0; 4], u64::MAX).unwrap(), 0);
    assert_eq!(fs.stat(Node(u64::MAX)).unwrap_err().kind, ErrorKind::NotFound);
}

#[test]
fn every_compression_and_checksum_reads_as_the_kernel_reads_it() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let variants: [(&[&str], &str); 5] = [
        (&["--csum", "xxhash", "-m", "dup", "-d", "dup"], "compress-force=zlib"),
        (&["--csum", "sha256", "-n", "4096"], "compress-force=lzo"),
        (&["--csum", "blake2", "-n", "65536"], "compress-force=zstd:3"),
        (&["--mixed", "-O", "^no-holes"], "compress=zstd"),
        (&["-m", "single"], "nodatasum"),
    ];
    for (options, mounted) in variants {
        make(&image, options);
        let truth = {
            let _mounted = Mounted::by_kernel(&image, &at, mounted);
            make_tree(&at, Wish { many: 300, unix: true, huge: false });
            make_extents(&at);
            truth_of_directory(&at, true)
        };
        println!("{options:?} {mounted}");
        let fs = open(&image);
        assert_eq!(fs.about().status, Status::Clean);
        assert_same(&truth_of_reader(&*fs, true, 7), &truth);
        let find = |name: &[u8]| fs.lookup(fs.root(), name).unwrap().unwrap();
        let mut xattrs = fs.xattrs(find(b"hello.txt")).unwrap();
        xattrs.sort();
        let long = (b"user.long".to_vec(), vec![b'v'; 3000]);
        assert_eq!(xattrs, [long, (b"user.short".to_vec(), b"value".to_vec())]);
        let mut encoded = 0;
        fs.layout(find(b"packed"), 0, &mut |piece| {
            encoded += usize::from(matches!(piece.place, Place::Encoded { .. }));
            true
        })
        .unwrap();
        assert_eq!(encoded > 0, mounted.starts_with("compress"));
        // Small reads at odd places, of a file that is compressed.
        let file = find(b"packed");
        let whole = "words that are repeated, and repeated\n".repeat(30_000).into_bytes();
        let mut buf = [0; 5001];
        for offset in [1, 131_071, 131_072, 262_000, 1_139_000] {
            let n = fs.read_at(file, &mut buf, offset).unwrap();
            assert_eq!(buf[..n], whole[offset as usize..][..n], "at {offset}");
        }
    }
}

#[test]
fn subvolumes_and_snapshots_are_directories() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    make(&image, &[]);
    let truth = {
        let _mounted = Mounted::by_kernel(&image, &at, "noatime");
        let subvolume = |arguments: &[&dyn AsRef<OsStr>]| {
            run("btrfs", &[&[&"subvolume" as &dyn AsRef<OsStr>], arguments].concat());
        };
        subvolume(&[&"create", &at.join("home")]);
        make_tree(&at.join("home"), Wish { many: 100, unix: true, huge: false });
        subvolume(&[&"create", &at.join("home/inner")]);
        fs::write(at.join("home/inner/file"), b"within").unwrap();
        subvolume(&[&"snapshot", &at.join("home"), &at.join("home/snapshot")]);
        fs::write(at.join("home/hello.txt"), b"changed since").unwrap();
        fs::write(at.join("home/snapshot/large.bin"), b"changed there").unwrap();
        subvolume(&[&"snapshot", &"-r", &at, &at.join("all")]);
        subvolume(&[&"create", &at.join("gone")]);
        subvolume(&[&"delete", &at.join("gone")]);
        run("mv", &[&at.join("home/inner"), &at.join("moved")]);
        subvolume(&[&"set-default", &at.join("home")]);
        truth_of_directory(&at, true)
    };
    let fs = open(&image);
    assert_eq!(fs.about().status, Status::Clean);
    assert_same(&truth_of_reader(&*fs, true, 3), &truth);
    let empty = ["home", "snapshot", "inner"]
        .iter()
        .fold(fs.root(), |node, name| fs.lookup(node, name.as_bytes()).unwrap().unwrap());
    assert!(fs.stat(empty).unwrap().note.is_some());
    assert_eq!(fs.lookup(empty, b"file").unwrap(), None);
    assert_eq!(fs.xattrs(empty).unwrap(), []);
}

#[test]
fn a_log_tree_is_left_alone_and_said_to_be() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let copied = dir.path().join("copied");
    make(&image, &["--csum", "xxhash"]);
    let truth = {
        let _mounted = Mounted::by_kernel(&image, &at, "noatime,commit=300");
        make_tree(&at, Wish { many: 500, unix: true, huge: false });
        run("sync", &[&"-f", &at]);
        let truth = truth_of_directory(&at, true);
        fs::write(at.join("late"), b"synced by itself").unwrap();
        File::open(at.join("late")).unwrap().sync_all().unwrap();
        run("cp", &[&"--sparse=always", &image, &copied]);
        truth
    };
    let fs = open(&copied);
    let status = &fs.about().status;
    assert!(matches!(status, Status::Stale(why) if why.contains("fsynced")), "{status:?}");
    assert_same(&truth_of_reader(&*fs, true, 100), &truth);
}

#[test]
fn several_devices_are_refused_by_name() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, second) = (dir.path().join("image"), dir.path().join("second"));
    blank(&second, 400 << 20);
    make(&image, &["-d", "raid1", "-m", "raid1", &second.display().to_string()]);
    let error = guest::fs::open(&disk(&image)).err().unwrap();
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert_eq!(error.message, "btrfs on several devices");
}

#[test]
fn a_copy_of_a_damaged_superblock_is_taken_and_said_to_be() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    make(&image, &["-L", "label"]);
    poke(&image, 65_536 + 0x12b, b"other");
    let fs = open(&image);
    assert!(matches!(&fs.about().status, Status::Stale(why) if why.contains("superblock")));
    assert_eq!(fs.about().label, "label");
    assert_eq!(fs.list(fs.root(), Cursor::default(), 10).unwrap().entries, []);
    poke(&image, 65_536 + 0x40, b"_NOTHING");
    assert_eq!(guest::fs::open(&disk(&image)).err().unwrap().kind, ErrorKind::NotFound);
}

/// Nodes of trees: where they are on the volume.
fn nodes(image: &Path, size: usize) -> Vec<u64> {
    let file = File::open(image).unwrap();
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, 65_536).unwrap();
    let fsid = bytes[0x20..0x30].to_vec();
    let mut found = Vec::new();
    let mut block = vec![0; 1 << 20];
    for at in (1 << 20..400 << 20).step_by(1 << 20) {
        file.read_exact_at(&mut block, at).unwrap();
        for (index, bytes) in block.chunks_exact(size).enumerate() {
            if bytes[0x20..0x30] == fsid {
                found.push(at + (index * size) as u64);
            }
        }
    }
    found
}

#[test]
fn damage_is_found_by_checksums_and_a_copy_is_taken_where_there_is_one() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    for double in [true, false] {
        let profile = if double { "dup" } else { "single" };
        make(&image, &["-m", profile, "-d", profile, "-n", "4096"]);
        let (truth, data) = {
            let _mounted = Mounted::by_kernel(&image, &at, "noatime");
            make_tree(&at, Wish { many: 60, unix: true, huge: false });
            make_extents(&at);
            (truth_of_directory(&at, true), "large.bin")
        };
        let source = disk(&image);
        let fs = guest::fs::open(&source).unwrap();
        let file = fs.lookup(fs.root(), data.as_bytes()).unwrap().unwrap();
        let mut place = 0;
        fs.layout(file, 0, &mut |piece| {
            if let Place::Volume(at) = piece.place {
                place = at;
            }
            place == 0
        })
        .unwrap();
        let damaged: Arc<dyn Source> =
            Arc::new(Patched { inner: source.clone(), at: place + 5000, bytes: vec![0; 3] });
        let fs = guest::fs::open(&damaged).unwrap();
        let failures = walk_beside(&*fs, Some(&truth));
        assert_eq!(failures > 0, !double, "{failures} files cannot be read");

        let nodes = nodes(&image, 4096);
        let mut random = noise(2026, 8 * 2048).into_iter().cycle();
        let mut next = move || {
            random.by_ref().take(8).fold(0_usize, |value, byte| value << 8 | usize::from(byte))
        };
        for round in 0..120 {
            let node = nodes[next() % nodes.len()];
            let mut bytes = vec![0; 4096];
            source.read_at(&mut bytes, node).unwrap();
            for _ in 0..=next() % 4 {
                // The header and the first items, or anything.
                let within = if round % 3 == 0 { 4096 - 32 } else { 300 };
                bytes[32 + next() % within] = next() as u8;
            }
            // Half of them with a checksum that is right: damage that only sense can find.
            let restamped = round % 2 == 1;
            if restamped {
                let kind = fs_btrfs::superblock::ChecksumType::Crc32c;
                let sum = kind.digest(&bytes[32..]);
                bytes[..32].copy_from_slice(&sum);
            }
            let patched: Arc<dyn Source> =
                Arc::new(Patched { inner: source.clone(), at: node, bytes });
            match guest::fs::open(&patched) {
                Ok(fs) => {
                    let failures = walk_beside(&*fs, (!restamped).then_some(&truth));
                    assert!(restamped || !double || failures == 0);
                }
                Err(error) => assert!(restamped || !double, "{error}"),
            }
        }
    }
}
