//! XFS against the kernel.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub)]

mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest::{Cursor, ErrorKind, FileSystem, FileType, Place, Source, Status};
use support::damage::{Patched, walk, walk_beside};
use support::*;

fn unfit() -> bool {
    missing(&["mkfs.xfs", "xfs_db", "setfattr", "mount"]) || no_root()
}

fn make(image: &Path, options: &[&str]) {
    blank(image, 300 << 20);
    let mut arguments: Vec<&dyn AsRef<OsStr>> = vec![&"-q"];
    arguments.extend(options.iter().map(|option| option as &dyn AsRef<OsStr>));
    arguments.push(&image);
    run("mkfs.xfs", &arguments);
}

fn copy(from: &Path, to: &Path) {
    run("cp", &[&"--sparse=always", &from, &to]);
}

fn open(image: &Path) -> Box<dyn FileSystem> {
    guest::fs::open(&disk(image)).unwrap()
}

/// What an image holds by the kernel, which may write to it.
fn truth_by_kernel(image: &Path, at: &Path) -> Truth {
    let _mounted = Mounted::by_kernel(image, at, "nouuid");
    truth_of_directory(at, true)
}

/// An image of a kind that kernels no longer mount: mkfs fills it from a list. What is in it.
fn make_listed(image: &Path, dir: &Path, options: &[&str]) -> Truth {
    let tree = dir.join("tree");
    let many = tree.join("d/many");
    fs::create_dir_all(&many).unwrap();
    fs::write(tree.join("large.bin"), noise(1, 3 << 20)).unwrap();
    let mut list = String::from("/none\n0 0\nd--755 0 0\n");
    let mut add = |path: &Path, name: &str| {
        list.push_str(&format!("{name} ---644 7 8 {}\n", path.display()));
    };
    add(&tree.join("large.bin"), "large.bin");
    for index in 0..300 {
        let path = many.join(format!("file-{index}"));
        fs::write(&path, noise(index, index as usize * 7)).unwrap();
    }
    list.push_str(&format!("link l--777 7 8 {}\nd d--750 7 8\nmany d--755 7 8\n", "t/".repeat(60)));
    for index in 0..300 {
        let path = many.join(format!("file-{index}"));
        list.push_str(&format!("file-{index} ---644 7 8 {}\n", path.display()));
    }
    list.push_str("pipe p--600 7 8\n$\n$\n$\n");
    let proto = dir.join("list");
    fs::write(&proto, list).unwrap();
    let proto = proto.display().to_string();
    make(image, &[&["-p", &proto], options].concat());

    std::os::unix::fs::symlink("t/".repeat(60), tree.join("link")).unwrap();
    run("mkfifo", &[&many.join("pipe")]);
    let truth = truth_of_directory(&tree, false);
    fs::remove_dir_all(tree).unwrap();
    truth
}

#[test]
fn version_4_reads_as_mkfs_filled_it() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let variants: [&[&str]; 2] = [
        &["-m", "crc=0", "-b", "size=512", "-i", "size=256", "-d", "agcount=2"],
        &["-m", "crc=0", "-n", "ftype=0"],
    ];
    for options in variants {
        let truth = make_listed(&image, dir.path(), options);
        let fs = open(&image);
        assert_eq!(fs.about().status, Status::Clean);
        assert_same(&truth_of_reader(&*fs, false, 11), &truth);
    }
}

#[test]
fn names_are_found_regardless_of_case_where_the_volume_says_so() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let truth = make_listed(&image, dir.path(), &["-n", "version=ci"]);
    let fs = open(&image);
    assert_same(&truth_of_reader(&*fs, false, 11), &truth);
    let find = |directory, name: &str| fs.lookup(directory, name.as_bytes()).unwrap();
    let many = find(find(fs.root(), "D").unwrap(), "Many").unwrap();
    assert_eq!(find(many, "FILE-7"), find(many, "file-7"));
    assert!(find(many, "File-299").is_some());
    assert_eq!(find(many, "file-300"), None);
}

/// Files with every kind of extent.
fn make_extents(at: &Path, reflink: bool) {
    let scattered = File::create(at.join("scattered")).unwrap();
    for index in 0..900_u64 {
        scattered.write_all_at(&noise(index, 4096), index * 12_288).unwrap();
    }
    let fallocate = |arguments: &[&str], name: &str| {
        let mut all: Vec<&dyn AsRef<OsStr>> =
            arguments.iter().map(|argument| argument as &dyn AsRef<OsStr>).collect();
        let path = at.join(name);
        all.push(&path);
        run("fallocate", &all);
    };
    fallocate(&["-l", "3000000"], "preallocated");
    File::options().write(true).open(at.join("preallocated")).unwrap();
    fs::write(at.join("punched"), noise(5, 1 << 20)).unwrap();
    fallocate(&["-p", "-o", "65536", "-l", "131072"], "punched");
    fs::write(at.join("half"), noise(6, 40_000)).unwrap();
    fallocate(&["-n", "-o", "0", "-l", "900000"], "half");
    if reflink {
        run("cp", &[&"--reflink=always", &at.join("large.bin"), &at.join("shared.bin")]);
        let shared = File::options().write(true).open(at.join("shared.bin")).unwrap();
        shared.write_all_at(b"no longer shared", 1_000_000).unwrap();
    }
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
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
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
    let mut buf = [0; 4];
    assert_eq!(fs.read_at(many, &mut buf, 0).unwrap_err().kind, ErrorKind::NotAFile);
    assert_eq!(fs.read_at(file, &mut buf, u64::MAX).unwrap(), 0);
}

#[test]
fn every_layout_that_mkfs_makes_reads_as_the_kernel_reads_it() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let variants: [(&[&str], bool); 3] = [
        (&["-b", "size=1024", "-m", "rmapbt=1"], true),
        (&["-i", "nrext64=1,size=1024", "-n", "size=16384"], true),
        (&["-m", "bigtime=0,finobt=0,reflink=0"], false),
    ];
    for (options, reflink) in variants {
        make(&image, options);
        let truth = {
            let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
            make_tree(&at, Wish { many: 700, unix: true, huge: false });
            make_extents(&at, reflink);
            truth_of_directory(&at, true)
        };
        println!("{options:?}");
        let fs = open(&image);
        assert_eq!(fs.about().status, Status::Clean);
        assert_same(&truth_of_reader(&*fs, true, 7), &truth);
        let file = fs.lookup(fs.root(), b"hello.txt").unwrap().unwrap();
        let mut xattrs = fs.xattrs(file).unwrap();
        xattrs.sort();
        let long = (b"user.long".to_vec(), vec![b'v'; 3000]);
        assert_eq!(xattrs, [long, (b"user.short".to_vec(), b"value".to_vec())]);
        let file = fs.lookup(fs.root(), b"preallocated").unwrap().unwrap();
        fs.layout(file, 0, &mut |piece| {
            assert_eq!(piece.place, Place::Hole);
            true
        })
        .unwrap();
    }
}

#[test]
fn a_log_is_replayed_as_the_kernel_replays_it_torn_or_not() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    make(&image, &["-m", "rmapbt=1"]);
    {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 1500, unix: true, huge: false });
        make_extents(&at, false);
        run("sync", &[&"-f", &at]);
        change(&at);
        copy(&image, &ours);
    }
    for back in 0..2 {
        copy(&ours, &theirs);
        let fs = open(&ours);
        assert_eq!(fs.about().status, Status::Replayed);
        assert_same(&truth_of_reader(&*fs, true, 100), &truth_by_kernel(&theirs, &at));
        let record = record_of_log(&ours, back);
        poke(&ours, record + 1024 + 100, &noise(back as u64, 8));
    }
}

#[test]
fn a_volume_that_was_just_grown_reads_as_the_kernel_reads_it() {
    if unfit() || missing(&["xfs_growfs", "losetup"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    make(&image, &[]);
    {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 450, unix: true, huge: false });
        File::options().write(true).open(&image).unwrap().set_len(900 << 20).unwrap();
        let device = run("findmnt", &[&"-no", &"SOURCE", &at]);
        run("losetup", &[&"-c", &device.trim()]);
        run("sync", &[&"-f", &at]);
        run("xfs_growfs", &[&"-d", &at]);
        // In groups that were there before: the crate refuses inodes that the log makes in new ones.
        for index in 0..50 {
            fs::write(at.join(format!("many/grown-{index}")), noise(index, 40_000)).unwrap();
            File::open(at.join(format!("many/grown-{index}"))).unwrap().sync_all().unwrap();
        }
        copy(&image, &ours);
    }
    let mut sector = vec![0; 4096];
    disk(&ours).read_at(&mut sector, 0).unwrap();
    let before = fs_xfs::Superblock::parse(&sector).unwrap();
    copy(&ours, &theirs);
    let fs = open(&ours);
    assert_eq!(fs.about().status, Status::Replayed);
    assert_eq!(fs.about().size, 900 << 20);
    if before.dblocks * u64::from(before.blocksize) == 900 << 20 {
        eprintln!("the new size was written back before the copy");
    }
    assert_same(&truth_of_reader(&*fs, true, 100), &truth_by_kernel(&theirs, &at));
}

#[test]
fn a_replayed_volume_is_read_for_as_long_as_one_likes() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let copied = dir.path().join("copied");
    make(&image, &[]);
    {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 10, unix: true, huge: false });
        run("sync", &[&"-f", &at]);
        copy(&image, &copied);
    }
    let fs = open(&copied);
    assert_eq!(fs.about().status, Status::Replayed);
    // More than a replay may read.
    for _ in 0..(1 << 19) + 10 {
        fs.stat(fs.root()).unwrap();
    }
}

/// Changes that the log has, and that are not yet where they belong.
fn change(at: &Path) {
    for round in 0..3 {
        for index in 0..150 {
            let name = at.join(format!("many/entry number {:06}", round * 150 + index));
            match index % 3 {
                0 => fs::remove_file(name).unwrap(),
                1 => fs::rename(name, at.join(format!("renamed-{round}-{index}"))).unwrap(),
                _ => fs::write(name, noise(index, 3000)).unwrap(),
            }
        }
        fs::create_dir(at.join(format!("new-{round}"))).unwrap();
        fs::write(at.join(format!("new-{round}/file")), noise(7, 70_000)).unwrap();
        fs::remove_file(at.join("size-4097")).or_else(|_| fs::remove_file(at.join("size-59"))).ok();
        File::open(at.join(format!("new-{round}/file"))).unwrap().sync_all().unwrap();
    }
}

/// Where the record of the log begins that is `back` records before the last one.
fn record_of_log(image: &Path, back: usize) -> u64 {
    let file = File::open(image).unwrap();
    let mut sector = vec![0; 4096];
    file.read_exact_at(&mut sector, 0).unwrap();
    let sb = fs_xfs::Superblock::parse(&sector).unwrap();
    let start = sb.fsblock_offset(sb.logstart);
    let mut log = vec![0; sb.logblocks as usize * sb.blocksize as usize];
    file.read_exact_at(&mut log, start).unwrap();
    let mut records: Vec<(u64, u64)> = log
        .chunks_exact(512)
        .enumerate()
        .filter(|(_, block)| block.starts_with(&[0xfe, 0xed, 0xba, 0xbe]))
        .map(|(index, block)| {
            let lsn = u64::from_be_bytes(block[16..24].try_into().unwrap());
            (lsn, start + index as u64 * 512)
        })
        .collect();
    records.sort_unstable();
    records[records.len() - 1 - back].1
}

#[test]
fn a_log_elsewhere_or_without_a_whole_record_gives_a_stale_tree() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, log) = (dir.path().join("image"), dir.path().join("log"));
    blank(&log, 100 << 20);
    make(&image, &["-l", &format!("logdev={},size=64m", log.display())]);
    let fs = open(&image);
    assert!(
        matches!(&fs.about().status, Status::Stale(reason) if reason.contains("another device"))
    );
    assert_eq!(fs.list(fs.root(), Cursor::default(), 10).unwrap().entries, []);

    let at = dir.path().join("at");
    make(&image, &[]);
    let copied = dir.path().join("copied");
    {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 10, unix: false, huge: false });
        run("sync", &[&"-f", &at]);
        copy(&image, &copied);
    }
    let newest = record_of_log(&copied, 0);
    poke(&copied, record_of_log(&copied, 1), &[0; 4]);
    poke(&copied, newest + 600, &noise(1, 64));
    let fs = open(&copied);
    assert!(matches!(&fs.about().status, Status::Stale(_)), "{:?}", fs.about().status);
    fs.list(fs.root(), Cursor::default(), 10).unwrap();
}

#[test]
fn a_realtime_file_and_a_truncated_volume_are_refused_by_name() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    make(&image, &[]);
    {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        fs::write(at.join("file"), b"some data").unwrap();
    }
    let fs = open(&image);
    let file = fs.lookup(fs.root(), b"file").unwrap().unwrap();
    let inode = format!("inode {}", file.0);
    run("xfs_db", &[&"-x", &"-c", &inode, &"-c", &"write core.realtime 1", &image]);
    let fs = open(&image);
    let stat = fs.stat(file).unwrap();
    assert_eq!(stat.file_type, FileType::Opaque);
    assert!(stat.note.unwrap().contains("real-time"));
    let error = fs.read_at(file, &mut [0; 4], 0).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unsupported);

    File::options().write(true).open(&image).unwrap().set_len(200 << 20).unwrap();
    let error = guest::fs::open(&disk(&image)).err().unwrap();
    assert_eq!(error.kind, ErrorKind::Corrupt);
}

#[test]
fn inodes_that_were_unlinked_while_open_leave_a_clean_volume_clean() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    make(&image, &[]);
    let truth = {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 100, unix: true, huge: false });
        truth_of_directory(&at, true)
    };
    run("xfs_db", &[&"-x", &"-c", &"agi 0", &"-c", &"write unlinked[5] 133", &image]);
    let fs = open(&image);
    assert_eq!(fs.about().status, Status::Clean);
    assert_same(&truth_of_reader(&*fs, true, 100), &truth);
}

#[test]
fn several_threads_read_the_same_files() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    make(&image, &[]);
    let truth = {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 100, unix: true, huge: false });
        truth_of_directory(&at, true)
    };
    let fs = open(&image);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_same(&truth_of_reader(&*fs, true, 10), &truth));
        }
    });
}

/// Blocks of 512 bytes with metadata: where they are, and where their checksum is.
fn metadata(image: &Path, v5: bool) -> Vec<(u64, Option<usize>)> {
    let file = File::open(image).unwrap();
    let mut found = Vec::new();
    let mut block = vec![0; 1 << 20];
    for at in (0..300 << 20).step_by(1 << 20) {
        file.read_exact_at(&mut block, at).unwrap();
        for (index, bytes) in block.chunks_exact(512).enumerate() {
            let sum = match &bytes[..4] {
                b"XFSB" => Some(224),
                b"XAGI" => Some(312),
                [b'I', b'N', mode, _] if *mode != 0 => Some(100),
                b"XDB3" | b"XDD3" | b"BMA3" | b"XSLM" | b"XD2B" | b"XD2D" | b"BMAP" => None,
                _ => continue,
            };
            found.push((at + index as u64 * 512, sum.filter(|_| v5)));
        }
    }
    found
}

#[test]
fn damage_is_found_by_checksums_and_what_has_none_does_no_harm() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at): (PathBuf, PathBuf) = (dir.path().join("image"), dir.path().join("at"));
    for v5 in [true, false] {
        let truth = if v5 {
            make(&image, &["-b", "size=1024"]);
            let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
            make_tree(&at, Wish { many: 60, unix: true, huge: false });
            make_extents(&at, false);
            truth_of_directory(&at, true)
        } else {
            make_listed(&image, dir.path(), &["-m", "crc=0", "-b", "size=1024", "-d", "agcount=2"])
        };
        let blocks = metadata(&image, v5);
        let source = disk(&image);
        let mut random = noise(2026, 4096 * 16).into_iter().cycle();
        let mut next = move || {
            random.by_ref().take(8).fold(0_usize, |value, byte| value << 8 | usize::from(byte))
        };
        for round in 0..160 {
            let (block, sum) = blocks[next() % blocks.len()];
            let mut bytes = vec![0; 512];
            source.read_at(&mut bytes, block).unwrap();
            for _ in 0..=next() % 4 {
                bytes[next() % 400] = next() as u8;
            }
            // Half of them with a checksum that is right: damage that only sense can find.
            let restamped = round % 2 == 1 && sum.is_some();
            if let Some(sum) = sum.filter(|_| restamped) {
                fs_xfs::group_write::restamp_crc(&mut bytes, sum);
            }
            let patched: Arc<dyn Source> =
                Arc::new(Patched { inner: source.clone(), at: block, bytes });
            if let Ok(fs) = guest::fs::open(&patched) {
                walk_beside(&*fs, (v5 && !restamped).then_some(&truth));
            }
        }
    }
}

#[test]
fn a_log_whose_records_make_no_sense_does_no_harm() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("at"));
    let copied = dir.path().join("copied");
    make(&image, &[]);
    {
        let _mounted = Mounted::by_kernel(&image, &at, "nouuid");
        make_tree(&at, Wish { many: 450, unix: true, huge: false });
        run("sync", &[&"-f", &at]);
        change(&at);
        copy(&image, &copied);
    }
    let source = disk(&copied);
    let records: Vec<u64> = (0..5).map(|back| record_of_log(&copied, back)).collect();
    let mut random = noise(77, 8 * 2048).into_iter().cycle();
    let mut next =
        move || random.by_ref().take(8).fold(0_usize, |value, byte| value << 8 | usize::from(byte));
    let mut opened = 0;
    for _ in 0..80 {
        let record = records[next() % records.len()];
        let mut bytes = vec![0; 512];
        source.read_at(&mut bytes, record).unwrap();
        let length = u32::from_be_bytes(bytes[12..16].try_into().unwrap()) as usize;
        if length == 0 || length > 32 << 10 {
            continue;
        }
        bytes.resize(512 + length, 0);
        source.read_at(&mut bytes, record).unwrap();
        for _ in 0..=next() % 6 {
            // The beginnings of items, or anything.
            let within = if next() % 2 == 0 { length.min(700) } else { length };
            bytes[512 + next() % within] = next() as u8;
        }
        let (header, data) = bytes.split_at(512);
        let sum = fs_xfs::log::record_checksum(header, data);
        bytes[32..36].copy_from_slice(&sum.to_le_bytes());
        let patched: Arc<dyn Source> =
            Arc::new(Patched { inner: source.clone(), at: record, bytes });
        if let Ok(fs) = guest::fs::open(&patched) {
            opened += 1;
            walk(&*fs);
        }
    }
    assert!(opened > 0);
}
