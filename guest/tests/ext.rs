//! ext2, ext3 and ext4: images by mke2fs, compared with what the kernel shows of them.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest::source::MemoryDisk;
use guest::{Cursor, Error, ErrorKind, FileSystem, Node, Place, Source, Status};
use support::damage::walk;
use support::{
    Mounted, Wish, assert_same, blank, disk, make_tree, missing, no_root, noise, poke, run,
    truth_of_directory, truth_of_reader,
};

/// Whether tests cannot run here.
fn cannot_run() -> bool {
    no_root() || missing(&["mke2fs", "mount", "debugfs"])
}

/// A new image of `megabytes`, made with `options`.
fn image(dir: &Path, megabytes: u64, options: &[&str]) -> PathBuf {
    let path = dir.join("image");
    blank(&path, megabytes << 20);
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"-q", &"-F"];
    arguments.extend(options.iter().map(|option| option as &dyn AsRef<std::ffi::OsStr>));
    arguments.push(&path);
    run("mke2fs", &arguments);
    path
}

fn open(path: &Path) -> Box<dyn FileSystem> {
    guest::fs::open(&disk(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Fills an image through the kernel, unmounts it, and compares both views of it.
fn compare(options: &[&str], kind: &str, wish: Wish) {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 160, options);
    let at = dir.path().join("mnt");
    {
        let mounted = Mounted::by_kernel(&image, &at, "rw");
        make_tree(&mounted.at, wish);
    }
    let reader = open(&image);
    assert_eq!(reader.about().status, Status::Clean);
    assert_eq!(reader.about().kind, kind);
    let found = truth_of_reader(&*reader, true, 1000);
    let mounted = Mounted::by_kernel(&image, &at, "ro");
    assert_same(&found, &truth_of_directory(&mounted.at, true));
}

const SMALL: Wish = Wish { many: 300, unix: true, huge: false };

#[test]
fn ext4_with_ten_thousand_names_reads_as_the_kernel_shows_it() {
    compare(&["-t", "ext4"], "ext4", Wish { many: 10_500, unix: true, huge: false });
}

#[test]
fn ext3_reads_as_the_kernel_shows_it() {
    compare(&["-t", "ext3"], "ext3", SMALL);
}

#[test]
fn ext2_reads_as_the_kernel_shows_it() {
    compare(&["-t", "ext2"], "ext2", SMALL);
}

#[test]
fn ext2_of_the_first_revision_reads_as_the_kernel_shows_it() {
    compare(&["-t", "ext2", "-r", "0", "-O", "none"], "ext2", SMALL);
}

#[test]
fn blocks_of_1_kib_read_as_the_kernel_shows_them() {
    compare(&["-t", "ext4", "-b", "1024"], "ext4", SMALL);
    compare(&["-t", "ext3", "-b", "1024", "-I", "128"], "ext3", SMALL);
}

#[test]
fn blocks_of_2_kib_without_checksums_read_as_the_kernel_shows_them() {
    compare(&["-t", "ext4", "-b", "2048", "-O", "^metadata_csum,uninit_bg"], "ext4", SMALL);
}

#[test]
fn clusters_and_groups_of_descriptors_read_as_the_kernel_shows_them() {
    compare(&["-t", "ext4", "-O", "bigalloc,^resize_inode", "-C", "65536"], "ext4", SMALL);
    let meta = ["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode,^flex_bg,sparse_super2"];
    compare(&meta, "ext4", SMALL);
}

/// The node at a path.
fn find(reader: &dyn FileSystem, path: &str) -> Option<Node> {
    path.split('/')
        .try_fold(reader.root(), |node, name| reader.lookup(node, name.as_bytes()).unwrap())
}

/// Writes a file so that its journal holds what became of it.
fn put(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

/// Changes a tree that was written back, and leaves the changes to the journal.
fn change(at: &Path) {
    run("sync", &[&"-f", &at]);
    fs::remove_dir_all(at.join("many")).unwrap();
    fs::remove_file(at.join("large.bin")).unwrap();
    fs::rename(at.join("hello.txt"), at.join("renamed")).unwrap();
    fs::rename(at.join("deep/d0"), at.join("moved")).unwrap();
    put(&at.join("text.log"), b"shorter than it was");
    // Takes the blocks of the directory that is gone, whose older copies are revoked.
    put(&at.join("reuse"), &noise(5, 3 << 20));
    fs::create_dir(at.join("after")).unwrap();
    for index in 0..600 {
        fs::write(at.join(format!("after/new {index}")), noise(index, 900)).unwrap();
    }
    // Begins as blocks of the journal do, which must not be taken for one.
    put(&at.join("magic"), &[&[0xc0, 0x3b, 0x39, 0x98][..], &[0; 4092][..]].concat().repeat(3));
    File::open(at.join("after")).unwrap().sync_all().unwrap();
    put(&at.join("last"), b"written last");
}

/// Copies an image while it is mounted and changed, and compares our view of the copy with the
/// kernel's, which recovers it. Pieces of files that are in the journal, and their status, are told.
fn compare_dirty(options: &[&str], mount: &str) -> Option<(Status, usize)> {
    if cannot_run() {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 128, options);
    let (at, copy) = (dir.path().join("mnt"), dir.path().join("copy"));
    {
        let mounted = Mounted::by_kernel(&image, &at, mount);
        make_tree(&mounted.at, SMALL);
        change(&mounted.at);
        run("cp", &[&"--sparse=always", &image, &copy]);
    }
    let stale = run("debugfs", &[&"-R", &"ls -p /", &copy]);
    if stale.contains("/last/") {
        eprintln!("what is in the journal was written back before the copy");
    }
    let reader = open(&copy);
    let found = truth_of_reader(&*reader, true, 100);
    let last = find(&*reader, "last").unwrap();
    let mut text = [0; 100];
    assert_eq!(reader.read_at(last, &mut text, 8).unwrap(), 4);
    assert_eq!(&text[..4], b"last");
    let mut journalled = 0;
    for name in ["magic", "last", "reuse"] {
        let file = find(&*reader, name).unwrap();
        let count = &mut |piece: guest::Piece| {
            journalled += usize::from(piece.place == Place::Elsewhere);
            true
        };
        reader.layout(file, 0, count).unwrap();
    }
    let status = reader.about().status.clone();
    drop(reader);
    let mounted = Mounted::by_kernel(&copy, &at, "rw");
    if !matches!(status, Status::Stale(_)) {
        assert_same(&found, &truth_of_directory(&mounted.at, true));
    }
    Some((status, journalled))
}

#[test]
fn a_dirty_ext4_reads_as_the_kernel_recovers_it() {
    if let Some(found) = compare_dirty(&["-t", "ext4"], "rw,commit=600") {
        assert_eq!(found, (Status::Replayed, 0));
    }
}

#[test]
fn a_dirty_ext3_without_checksums_reads_as_the_kernel_recovers_it() {
    if let Some(found) = compare_dirty(&["-t", "ext3", "-b", "1024"], "rw,commit=600") {
        assert_eq!(found, (Status::Replayed, 0));
    }
}

#[test]
fn files_in_a_journal_of_data_read_as_the_kernel_recovers_them() {
    let options = ["-t", "ext4", "-J", "size=32"];
    if let Some((status, journalled)) = compare_dirty(&options, "rw,commit=600,data=journal") {
        assert_eq!(status, Status::Replayed);
        assert!(journalled > 0, "content in the journal is told to be elsewhere");
    }
}

#[test]
fn fast_commits_that_are_not_replayed_are_told() {
    let options = ["-t", "ext4", "-O", "fast_commit"];
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 64, &options);
    let (at, copy) = (dir.path().join("mnt"), dir.path().join("copy"));
    {
        let mounted = Mounted::by_kernel(&image, &at, "rw,commit=600");
        put(&mounted.at.join("first"), b"by a full commit");
        run("sync", &[&"-f", &at]);
        for index in 0..5 {
            put(&mounted.at.join(format!("fast {index}")), b"by a fast commit");
        }
        run("cp", &[&"--sparse=always", &image, &copy]);
    }
    let reader = open(&copy);
    assert!(find(&*reader, "first").is_some());
    let all = (0..5).all(|index| find(&*reader, &format!("fast {index}")).is_some());
    let told = matches!(&reader.about().status, Status::Stale(why) if why.contains("fast commits"));
    assert!(all || told, "{:?}", reader.about().status);
}

#[test]
fn a_journal_that_is_damaged_is_left_out_and_told() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 64, &["-t", "ext4", "-b", "1024"]);
    let (at, copy) = (dir.path().join("mnt"), dir.path().join("copy"));
    {
        let mounted = Mounted::by_kernel(&image, &at, "rw,commit=600");
        put(&mounted.at.join("file"), b"content");
        run("cp", &[&"--sparse=always", &image, &copy]);
    }
    let told = run("debugfs", &[&"-R", &"bmap <8> 0", &copy]);
    let block: u64 = told.trim().parse().unwrap();
    assert_eq!(open(&copy).about().status, Status::Replayed);
    poke(&copy, block * 1024, &[0; 12]);
    let reader = open(&copy);
    assert!(matches!(&reader.about().status, Status::Stale(why) if why.contains("journal")));
    assert!(find(&*reader, "lost+found").is_some());
}

#[test]
fn an_ext2_that_was_not_unmounted_is_stale() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 16, &["-t", "ext2"]);
    let at = dir.path().join("mnt");
    let mounted = Mounted::by_kernel(&image, &at, "rw");
    fs::write(mounted.at.join("file"), b"content").unwrap();
    run("sync", &[&"-f", &at]);
    assert!(matches!(open(&image).about().status, Status::Stale(_)));
}

/// An image of 1 KiB blocks, with inline data, that mke2fs fills from a directory.
fn filled(dir: &Path, megabytes: u64, options: &[&str], tree: &Path) -> PathBuf {
    let mut all = options.to_vec();
    let tree = tree.to_str().unwrap();
    all.extend(["-d", tree]);
    image(dir, megabytes, &all)
}

#[test]
fn data_in_inodes_reads_as_it_was_put_there() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree, Wish { many: 3, unix: true, huge: false });
    for length in [59, 60, 61, 100, 140, 150, 200] {
        fs::write(tree.join(format!("inline-{length}")), noise(length as u64, length)).unwrap();
        let link = "l".repeat(length);
        std::os::unix::fs::symlink(link, tree.join(format!("inline link {length}"))).unwrap();
    }
    run("setfattr", &[&"-n", &"user.note", &"-v", &"a value", &tree.join("inline-60")]);
    let options = ["-t", "ext4", "-O", "inline_data", "-b", "4096", "-I", "256"];
    let image = filled(dir.path(), 64, &options, &tree);
    let reader = open(&image);
    let found = truth_of_reader(&*reader, true, 3);
    for length in [59, 60, 61, 100, 140, 150, 200] {
        let file = find(&*reader, &format!("inline-{length}")).unwrap();
        let mut content = vec![0; length + 1];
        assert_eq!(reader.read_at(file, &mut content, 0).unwrap(), length);
        assert_eq!(content[..length], noise(length as u64, length));
    }
    let mounted = Mounted::by_kernel(&image, &dir.path().join("mnt"), "ro");
    assert_same(&found, &truth_of_directory(&mounted.at, true));
    let file = find(&*reader, "inline-60").unwrap();
    assert_eq!(reader.xattrs(file).unwrap(), [(b"user.note".to_vec(), b"a value".to_vec())]);
    let mut pieces = Vec::new();
    reader
        .layout(file, 0, &mut |piece| {
            pieces.push(piece.place);
            true
        })
        .unwrap();
    assert_eq!(pieces, [Place::Elsewhere]);
}

#[test]
fn blocks_of_64_kib_read_as_they_were_filled() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree, Wish { many: 800, unix: true, huge: false });
    // mke2fs forgets the hole at the end of a file.
    fs::remove_file(tree.join("holey")).unwrap();
    let image = filled(dir.path(), 256, &["-t", "ext4", "-b", "65536"], &tree);
    let mut found = truth_of_reader(&*open(&image), true, 100);
    assert!(found.remove(&b"lost+found"[..]).is_some());
    assert_same(&found, &truth_of_directory(&tree, true));
}

#[test]
fn attributes_of_all_sizes_and_access_lists_are_read() {
    if cannot_run() || missing(&["setfattr"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 32, &["-t", "ext4", "-O", "ea_inode"]);
    let at = dir.path().join("mnt");
    let acl: Vec<u8> = {
        let mut acl = 2u32.to_le_bytes().to_vec();
        for (tag, id) in [(1u16, !0u32), (2, 1234), (4, !0), (0x10, !0), (0x20, !0)] {
            acl.extend(tag.to_le_bytes());
            acl.extend(4u16.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        acl
    };
    let mut expected = BTreeSet::new();
    {
        let mounted = Mounted::by_kernel(&image, &at, "rw");
        let path = mounted.at.join("file");
        fs::write(&path, b"x").unwrap();
        let mut set = |name: &str, value: Vec<u8>| {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(&path, name, &value, flags).unwrap();
            expected.insert((name.as_bytes().to_vec(), value));
        };
        set("user.small", b"1".to_vec());
        set("user.empty", Vec::new());
        set("trusted.middle", noise(1, 1500));
        set("security.large", noise(2, 30_000));
        set("system.posix_acl_access", acl);
    }
    let reader = open(&image);
    let file = find(&*reader, "file").unwrap();
    assert_eq!(reader.xattrs(file).unwrap().into_iter().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn a_sparse_file_of_5_gib_is_read_where_it_has_something() {
    if cannot_run() {
        return;
    }
    for kind in ["ext4", "ext3"] {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path(), 32, &["-t", kind, "-b", "4096"]);
        let at = dir.path().join("mnt");
        let middle = (3 << 30) + 5;
        {
            let mounted = Mounted::by_kernel(&image, &at, "rw");
            let huge = File::create(mounted.at.join("huge")).unwrap();
            huge.write_all_at(b"middle", middle).unwrap();
            huge.set_len(5 << 30).unwrap();
        }
        let reader = open(&image);
        let huge = find(&*reader, "huge").unwrap();
        let mut text = [1; 16];
        assert_eq!(reader.read_at(huge, &mut text, middle - 5).unwrap(), 16);
        assert_eq!(&text, b"\0\0\0\0\0middle\0\0\0\0\0");
        let (mut holes, mut held) = (0, 0);
        reader
            .layout(huge, 0, &mut |piece| {
                let count = if piece.place == Place::Hole { &mut holes } else { &mut held };
                *count += piece.length;
                true
            })
            .unwrap();
        assert_eq!((holes + held, held), (5 << 30, 4096));
    }
}

#[test]
fn times_before_1970_and_after_2038_keep_their_nanoseconds() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 16, &["-t", "ext4"]);
    let at = dir.path().join("mnt");
    let wanted = [0, 1_700_000_000, 5_000_000_000, 15_000_000_000];
    {
        let mounted = Mounted::by_kernel(&image, &at, "rw");
        fs::write(mounted.at.join("old"), b"").unwrap();
        run("touch", &[&"-d", &"@-1000000000.25", &mounted.at.join("old")]);
        for seconds in wanted {
            let path = mounted.at.join(format!("at {seconds}"));
            fs::write(&path, b"").unwrap();
            run("touch", &[&"-d", &format!("@{seconds}.123456789"), &path]);
        }
    }
    let reader = open(&image);
    let old = reader.stat(find(&*reader, "old").unwrap()).unwrap().modified.unwrap();
    assert_eq!((old.seconds, old.nanoseconds), (-1_000_000_001, 750_000_000));
    for seconds in wanted {
        let stat = reader.stat(find(&*reader, &format!("at {seconds}")).unwrap()).unwrap();
        let time = stat.modified.unwrap();
        assert_eq!((time.seconds, time.nanoseconds), (seconds, 123_456_789));
        assert!(stat.created.unwrap().seconds > 1_700_000_000);
    }
}

#[test]
fn a_directory_of_50_000_names_lists_in_pages_once_each() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), 64, &["-t", "ext4", "-N", "1000"]);
    let at = dir.path().join("mnt");
    {
        let mounted = Mounted::by_kernel(&image, &at, "rw");
        let first = mounted.at.join("first");
        fs::write(&first, b"").unwrap();
        for index in 0..50_000 {
            fs::hard_link(&first, mounted.at.join(format!("name {index}"))).unwrap();
        }
    }
    let reader = open(&image);
    let (mut names, mut cursor, mut pages) = (BTreeSet::new(), Cursor::default(), 0);
    loop {
        let page = reader.list(reader.root(), cursor, 700).unwrap();
        assert!(page.entries.len() <= 700);
        pages += 1;
        for entry in page.entries {
            assert!(names.insert(entry.name), "every name is listed once");
        }
        match page.next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    assert_eq!((names.len(), pages), (50_002, 50_002_usize.div_ceil(700)));
    let links = reader.stat(find(&*reader, "name 49999").unwrap()).unwrap().links;
    assert_eq!(links, 50_001);
}

/// A small image without checksums, so that damage is seen by what it contradicts.
fn fragile(dir: &Path, options: &[&str]) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("sub/deeper")).unwrap();
    fs::write(tree.join("file"), noise(1, 300_000)).unwrap();
    fs::write(tree.join("sub/other"), noise(2, 5000)).unwrap();
    for index in 0..40 {
        fs::write(tree.join(format!("sub/deeper/{index}")), b"x").unwrap();
    }
    let mut all = vec!["-b", "1024", "-O", "^metadata_csum,^metadata_csum_seed,^has_journal"];
    all.extend(options);
    filled(dir, 2, &all, &tree)
}

/// Changes fields of an inode by debugfs.
fn set(image: &Path, path: &str, field: &str, value: &str) {
    let command = format!("set_inode_field {path} {field} {value}");
    run("debugfs", &[&"-w", &"-R", &command, &image]);
}

#[test]
fn damaged_superblocks_are_refused() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = fragile(dir.path(), &["-t", "ext4"]);
    let whole = fs::read(&image).unwrap();
    let open_with = |at: usize, bytes: &[u8]| {
        let mut bytes_of = whole.clone();
        bytes_of[1024 + at..1024 + at + bytes.len()].copy_from_slice(bytes);
        let source: Arc<dyn Source> = Arc::new(MemoryDisk { bytes: bytes_of, disk: 0 });
        guest::fs::open(&source).err().map(|e| e.kind)
    };
    assert_eq!(open_with(0x38, &[0, 0]), Some(ErrorKind::NotFound), "magic");
    for (at, what) in [(0x18, "block size"), (0x28, "inodes of a group")] {
        assert_eq!(open_with(at, &[0xff; 4]), Some(ErrorKind::Corrupt), "{what}");
    }
    for (at, what) in [(0x20, "blocks of a group"), (0x28, "inodes of a group"), (0x4, "blocks")] {
        assert_eq!(open_with(at, &[0; 4]), Some(ErrorKind::Corrupt), "{what}");
    }
    assert_eq!(open_with(0x58, &[3, 0]), Some(ErrorKind::Corrupt), "size of an inode");
    assert_eq!(open_with(0x60 + 3, &[0x80]), Some(ErrorKind::Unsupported), "a feature");
}

#[test]
fn damaged_files_are_errors_and_the_rest_is_still_read() {
    if cannot_run() {
        return;
    }
    for kind in ["ext4", "ext2"] {
        let dir = tempfile::tempdir().unwrap();
        let image = fragile(dir.path(), &["-t", kind]);
        let whole = fs::read(&image).unwrap();
        let mut damages = vec![("i_size", "0xffffffffffff"), ("i_mode", "0")];
        if kind == "ext4" {
            // Magic, number of entries, depth, and length and place of the first extent.
            damages.extend([("block[0]", "0"), ("block[0]", "0xffff_f30a")]);
            damages.extend([
                ("block[1]", "0x00010004"),
                ("block[4]", "0"),
                ("block[5]", "0x7fffffff"),
            ]);
        } else {
            damages.extend([("block[0]", "0x7fffffff"), ("block[IND]", "0x7fffffff")]);
        }
        for (field, value) in damages {
            fs::write(&image, &whole).unwrap();
            set(&image, "/file", field, &value.replace('_', ""));
            let reader = open(&image);
            let file = find(&*reader, "file").unwrap();
            let read = reader.read_at(file, &mut vec![0; 400_000], 0);
            let kinds = [ErrorKind::Corrupt, ErrorKind::NotFound];
            assert!(read.is_err_and(|e| kinds.contains(&e.kind)), "{kind} {field} {value}");
            let other = find(&*reader, "sub/other").unwrap();
            assert_eq!(reader.read_at(other, &mut [0; 6000], 0).unwrap(), 5000);
        }
    }
}

#[test]
fn directories_with_holes_and_huge_sizes_are_errors() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = fragile(dir.path(), &["-t", "ext4"]);
    set(&image, "/sub", "i_size", "0x7ffffc00");
    let reader = open(&image);
    let sub = find(&*reader, "sub").unwrap();
    let listed = reader.list(sub, Cursor::default(), usize::MAX).unwrap_err();
    assert_eq!(listed.kind, ErrorKind::Corrupt);
    for wrong in [0, 1, 8, 10, 1 << 20, u64::MAX] {
        assert_eq!(reader.stat(Node(wrong)).unwrap_err().kind, ErrorKind::NotFound);
    }
    let file = find(&*reader, "file").unwrap();
    let kind = |e: Error| e.kind;
    assert_eq!(reader.lookup(file, b"x").map_err(kind), Err(ErrorKind::NotADirectory));
    assert_eq!(reader.read_link(file).map_err(kind), Err(ErrorKind::NotALink));
    assert_eq!(reader.read_at(sub, &mut [0], 0).map_err(kind), Err(ErrorKind::NotAFile));
    assert_eq!(reader.lookup(reader.root(), b"nothing"), Ok(None));
}

#[test]
fn a_directory_without_case_finds_names_by_other_letters() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    for name in ["folded/Straße.TXT", "folded/Two", "folded/tWO", "plain/Name"] {
        fs::create_dir_all(tree.join(name).parent().unwrap()).unwrap();
        fs::write(tree.join(name), name).unwrap();
    }
    let tree = tree.display().to_string();
    let image = image(dir.path(), 16, &["-t", "ext4", "-O", "casefold", "-d", &tree]);
    let flags = "set_inode_field folded flags 0x40080000";
    run("debugfs", &[&"-w", &"-R", &flags, &image]);
    let reader = open(&image);
    let exact = find(&*reader, "folded/Straße.TXT");
    assert!(exact.is_some());
    assert_eq!(find(&*reader, "folded/sTRAßE.txt"), exact);
    assert!(find(&*reader, "folded/Two").is_some());
    assert_ne!(find(&*reader, "folded/Two"), find(&*reader, "folded/tWO"));
    // Which of the two is not for us to say.
    assert_eq!(find(&*reader, "folded/two"), None);
    assert_eq!(find(&*reader, "folded/other"), None);
    assert_eq!(find(&*reader, "plain/name"), None);
}

#[test]
fn a_directory_of_endless_blocks_is_refused() {
    if cannot_run() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("d")).unwrap();
    fs::write(tree.join("d/name"), b"").unwrap();
    let tree = tree.display().to_string();
    let image = image(dir.path(), 1200, &["-t", "ext2", "-b", "1024", "-d", &tree]);
    // An empty block, and three levels of pointers to it and nothing else.
    let empty = 1_100_000_u32;
    poke(&image, u64::from(empty) << 10, &[0, 0, 0, 0, 0, 4, 0, 0]);
    let mut fields = vec![];
    for (index, level) in (0..).zip(["IND", "DIND", "TIND"]) {
        let pointers = (empty + index).to_le_bytes().repeat(256);
        poke(&image, u64::from(empty + index + 1) << 10, &pointers);
        fields.push(format!("block[{level}] {}", empty + index + 1));
    }
    fields.extend((1..12).map(|index| format!("block[{index}] {empty}")));
    let limits = |blocks: u64| {
        for field in fields.iter().chain([&format!("size {}", blocks << 10)]) {
            run("debugfs", &[&"-w", &"-R", &format!("set_inode_field d {field}"), &image]);
        }
        let reader = open(&image);
        let node = find(&*reader, "d").unwrap();
        let listed = reader.list(node, Cursor::default(), 10).map(|page| page.entries.len());
        assert_eq!(reader.lookup(node, b"none").is_ok(), listed.is_ok());
        listed.map_err(|error| error.kind)
    };
    assert_eq!(limits(1_000_000), Ok(1));
    assert_eq!(limits(1_100_000), Err(ErrorKind::Limit));
    assert_eq!(limits(1_300_000), Err(ErrorKind::Corrupt));
}

#[test]
fn random_damage_never_panics_or_loops() {
    if cannot_run() {
        return;
    }
    for options in [["-t", "ext4"], ["-t", "ext2"]] {
        let dir = tempfile::tempdir().unwrap();
        let whole = fs::read(fragile(dir.path(), &options)).unwrap();
        let used: Vec<usize> = (1024..whole.len())
            .step_by(16)
            .filter(|at| *at < 400 << 10 && whole[*at..at + 16].iter().any(|byte| *byte != 0))
            .collect();
        for seed in 0..300 {
            let mut bytes = whole.clone();
            for choice in noise(seed, 24 * 4).chunks(4) {
                let number = u32::from_le_bytes(choice.try_into().unwrap()) as usize;
                let at = used[number % used.len()] + (number >> 20) % 16;
                bytes[at] = if number.is_multiple_of(3) { 0xff } else { (number >> 24) as u8 };
            }
            let source: Arc<dyn Source> = Arc::new(MemoryDisk { bytes, disk: 0 });
            if let Ok(reader) = guest::fs::open(&source) {
                walk(&*reader);
            }
        }
    }
}

#[test]
fn random_damage_of_a_journal_never_panics_or_loops() {
    if cannot_run() {
        return;
    }
    for kind in ["ext4", "ext3"] {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path(), 8, &["-t", kind, "-b", "1024", "-J", "size=1"]);
        let (at, copy) = (dir.path().join("mnt"), dir.path().join("copy"));
        // Asked for before anything is written: programs refuse a copy that was made meanwhile.
        let told = run("debugfs", &[&"-R", &"bmap <8> 0", &image]);
        let journal = told.trim().parse::<usize>().unwrap() * 1024;
        {
            let mounted = Mounted::by_kernel(&image, &at, "rw,commit=600");
            for index in 0..30 {
                put(&mounted.at.join(format!("file {index}")), b"content");
            }
            fs::remove_file(mounted.at.join("file 7")).unwrap();
            put(&mounted.at.join("last"), b"content");
            run("cp", &[&image, &copy]);
        }
        let whole = fs::read(&copy).unwrap();
        assert_eq!(open(&copy).about().status, Status::Replayed);
        let area = &whole[journal..journal + (200 << 10)];
        // Its superblock, and what begins each of its blocks.
        let used: Vec<usize> =
            (0..area.len()).filter(|at| area[*at] != 0 && (*at < 1024 || at % 1024 < 64)).collect();
        let mut replayed = 0;
        for seed in 0..300 {
            let mut bytes = whole.clone();
            for choice in noise(seed, 4).chunks(4) {
                let number = u32::from_le_bytes(choice.try_into().unwrap()) as usize;
                bytes[journal + used[number % used.len()]] = (number >> 24) as u8;
            }
            let source: Arc<dyn Source> = Arc::new(MemoryDisk { bytes, disk: 0 });
            if let Ok(reader) = guest::fs::open(&source) {
                replayed += usize::from(reader.about().status == Status::Replayed);
                walk(&*reader);
            }
        }
        assert!(replayed > 0, "{kind}");
    }
}
