//! What tests of readers share: trees, foreign mounts, and the truth about both.
#![allow(dead_code, unreachable_pub, missing_docs)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::print_stdout)]

pub mod damage;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use guest::{Cursor, FileSystem, FileType, Node, Piece, Place, Source, source::RawDisk};
use sha2::{Digest, Sha256};

/// Whether one of `programs` is missing: then the test says so and ends, but not on CI.
pub fn missing(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let places: Vec<PathBuf> = places.collect();
    let gone: Vec<_> =
        programs.iter().filter(|p| !places.iter().any(|dir| dir.join(p).exists())).collect();
    if gone.is_empty() {
        return false;
    }
    assert!(std::env::var_os("CI").is_none(), "missing on CI: {gone:?}");
    println!("SKIPPED: missing {gone:?}");
    true
}

/// Whether mounting is impossible here: then the test says so and ends, but not on CI.
pub fn no_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return false;
    }
    assert!(std::env::var_os("CI").is_none(), "CI runs as root");
    println!("SKIPPED: needs root");
    true
}

/// Runs a program to its end; what it printed.
#[track_caller]
pub fn run(program: &str, arguments: &[&dyn AsRef<OsStr>]) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("MTOOLS_SKIP_CHECK", "1");
    for argument in arguments {
        command.arg(argument.as_ref());
    }
    let out = command.output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// A sparse file of `size` bytes.
pub fn blank(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// The image at `path` as disk 0.
pub fn disk(path: &Path) -> Arc<dyn Source> {
    Arc::new(RawDisk::new(File::open(path).unwrap(), 0).unwrap())
}

/// A mount by somebody else, which ends with it.
pub struct Mounted {
    pub at: PathBuf,
}

impl Mounted {
    /// Mounts the image at `image` at `at`, by the kernel over a loop device.
    #[track_caller]
    pub fn by_kernel(image: &Path, at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        run("mount", &[&"-o", &format!("loop,{options}"), &image, &at]);
        Self { at: at.to_owned() }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A program that another test starts just now may hold files of this one for a moment.
        for _ in 0..100 {
            let ended = Command::new("umount").arg("-q").arg(&self.at).output();
            if ended.is_ok_and(|ended| ended.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Bytes that cannot be compressed and are the same for the same `seed`.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; length];
    for byte in &mut bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    bytes
}

/// What a tree shall have besides files and directories.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Names in the one large directory.
    pub many: usize,
    /// Symbolic links, hard links, devices, pipes, names that are no UTF-8, modes.
    pub unix: bool,
    /// A sparse file of 5 GiB.
    pub huge: bool,
}

/// Fills the directory `at`: small and large files, deep and large directories, holes.
pub fn make_tree(at: &Path, wish: Wish) {
    let put = |name: &str, bytes: &[u8]| fs::write(at.join(name), bytes).unwrap();
    put("empty", b"");
    put("hello.txt", b"hello, world\n");
    for (index, size) in [1, 59, 60, 61, 511, 512, 513, 4095, 4096, 4097, 65_537].iter().enumerate()
    {
        put(&format!("size-{size}"), &noise(index as u64, *size));
    }
    put("large.bin", &noise(99, 9 << 20));
    put("text.log", "a line that repeats itself\n".repeat(40_000).as_bytes());
    put("ümläut-\u{4e2d}\u{6587}-\u{1f600}.txt", "ünïcode".as_bytes());
    put(&"n".repeat(200), b"a long name");
    let holey = File::create(at.join("holey")).unwrap();
    for index in 0..40 {
        holey.write_all_at(&noise(index, 5000), index * 150_000 + 777).unwrap();
    }
    holey.set_len(8 << 20).unwrap();
    if wish.huge {
        let huge = File::create(at.join("huge")).unwrap();
        huge.write_all_at(b"start", 0).unwrap();
        huge.write_all_at(b"middle", (3 << 30) + 5).unwrap();
        huge.set_len(5 << 30).unwrap();
    }
    let mut deep = at.join("deep");
    for level in 0..40 {
        deep.push(format!("d{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), b"down here").unwrap();
    fs::create_dir(at.join("empty-dir")).unwrap();
    let many = at.join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..wish.many {
        let bytes: &[u8] = if index % 7 == 0 { b"seven" } else { b"" };
        fs::write(many.join(format!("entry number {index:06}")), bytes).unwrap();
    }
    if wish.unix {
        symlink("hello.txt", at.join("link")).unwrap();
        symlink("/absolute/somewhere", at.join("absolute")).unwrap();
        symlink("../../../../etc/passwd", at.join("escaping")).unwrap();
        symlink("loop-b", at.join("loop-a")).unwrap();
        symlink("loop-a", at.join("loop-b")).unwrap();
        symlink("x/".repeat(300), at.join("long-link")).unwrap();
        fs::hard_link(at.join("hello.txt"), at.join("hard")).unwrap();
        fs::write(at.join(OsStr::from_bytes(b"not-\xff-utf8")), b"bytes").unwrap();
        run("mkfifo", &[&at.join("pipe")]);
        run("chmod", &[&"4755", &at.join("size-60")]);
        if rustix::process::geteuid().is_root() {
            run("mknod", &[&at.join("null"), &"c", &"1", &"3"]);
            run("mknod", &[&at.join("disk"), &"b", &"7", &"0"]);
            run("chown", &[&"1234:5678", &at.join("size-61")]);
        }
    }
}

/// What a path holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub file_type: FileType,
    pub size: u64,
    /// SHA-256 of a file's content, or a link's target.
    pub content: Vec<u8>,
    /// Permission bits, owner, group; zeroes where they are not compared.
    pub access: (u32, u32, u32),
}

/// Everything in a tree, by path.
pub type Truth = BTreeMap<Vec<u8>, Item>;

fn kind_of(meta: &fs::Metadata) -> FileType {
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => FileType::Directory,
        () if kind.is_symlink() => FileType::Symlink,
        () if kind.is_char_device() => FileType::CharDevice,
        () if kind.is_block_device() => FileType::BlockDevice,
        () if kind.is_fifo() => FileType::Fifo,
        () if kind.is_socket() => FileType::Socket,
        () => FileType::File,
    }
}

/// What a mounted directory holds, by the host's own calls.
pub fn truth_of_directory(root: &Path, access: bool) -> Truth {
    let mut truth = Truth::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(root.join(&directory)).unwrap() {
            let name = entry.unwrap().file_name();
            let path = directory.join(&name);
            let meta = fs::symlink_metadata(root.join(&path)).unwrap();
            let file_type = kind_of(&meta);
            let (size, content) = match file_type {
                FileType::File => {
                    let mut hasher = Sha256::new();
                    let mut file = File::open(root.join(&path)).unwrap();
                    let mut buf = vec![0; 1 << 20];
                    loop {
                        let n = file.read(&mut buf).unwrap();
                        if n == 0 {
                            break;
                        }
                        hasher.update(&buf[..n]);
                    }
                    (meta.len(), hasher.finalize().to_vec())
                }
                FileType::Symlink => {
                    let target: OsString = fs::read_link(root.join(&path)).unwrap().into();
                    (meta.len(), target.into_vec())
                }
                _ => (0, Vec::new()),
            };
            if file_type == FileType::Directory {
                waiting.push(path.clone());
            }
            let access =
                if access { (meta.mode() & 0o7777, meta.uid(), meta.gid()) } else { (0, 0, 0) };
            let item = Item { file_type, size, content, access };
            truth.insert(path.into_os_string().into_vec(), item);
        }
    }
    truth
}

/// The same, as a reader sees it; pages of `limit` names.
pub fn truth_of_reader(fs: &dyn FileSystem, access: bool, limit: usize) -> Truth {
    let mut truth = Truth::new();
    let mut waiting = vec![(Vec::new(), fs.root())];
    while let Some((directory, node)) = waiting.pop() {
        let mut cursor = Cursor::default();
        loop {
            let page = fs.list(node, cursor, limit).unwrap();
            assert!(page.entries.len() <= limit);
            for entry in page.entries {
                let mut path = directory.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend(&entry.name);
                let shown = String::from_utf8_lossy(&path).into_owned();
                let stat = fs.stat(entry.node).unwrap_or_else(|e| panic!("{shown}: {e}"));
                let file_type = stat.file_type;
                assert!(entry.file_type.is_none_or(|told| told == file_type), "{shown}");
                let (size, content) = match file_type {
                    FileType::File => (stat.size, hash_of(fs, entry.node, stat.size, &shown)),
                    FileType::Symlink => {
                        let target = fs.read_link(entry.node).unwrap();
                        (target.len() as u64, target)
                    }
                    _ => (0, Vec::new()),
                };
                if file_type == FileType::Directory {
                    waiting.push((path.clone(), entry.node));
                }
                let access = if access { (stat.mode, stat.uid, stat.gid) } else { (0, 0, 0) };
                let item = Item { file_type, size, content, access };
                assert!(truth.insert(path, item).is_none(), "{shown} is there twice");
            }
            match page.next {
                Some(next) => cursor = next,
                None => break,
            }
        }
    }
    truth
}

fn layout_of(fs: &dyn FileSystem, node: Node, from: u64, shown: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    fs.layout(node, from, &mut |piece| {
        pieces.push(piece);
        true
    })
    .unwrap_or_else(|e| panic!("{shown}: {e}"));
    pieces
}

/// Where a byte of a file is, by its layout.
fn place_of(pieces: &[Piece], byte: u64) -> Option<Place> {
    let has = |piece: &&Piece| piece.offset <= byte && byte - piece.offset < piece.length;
    pieces.iter().find(has).map(|piece| match piece.place {
        Place::Volume(at) => Place::Volume(at + (byte - piece.offset)),
        place => place,
    })
}

/// SHA-256 of a file; its layout must cover it, and be the same from wherever it is asked for.
fn hash_of(fs: &dyn FileSystem, node: Node, size: u64, shown: &str) -> Vec<u8> {
    let whole = layout_of(fs, node, 0, shown);
    let mut at = 0;
    for piece in &whole {
        assert_eq!(piece.offset, at, "{shown}: pieces follow each other");
        assert!(piece.length > 0);
        at += piece.length;
    }
    assert_eq!(at, size, "{shown}: the pieces cover the file");
    for from in [1, size / 2, size.saturating_sub(1), size, size.saturating_add(1)] {
        let tail = layout_of(fs, node, from, shown);
        let bytes = tail.iter().flat_map(|piece| [piece.offset, piece.offset + piece.length - 1]);
        for byte in bytes.take(200).chain([from, size / 4 * 3]).filter(|byte| *byte >= from) {
            let places = (place_of(&tail, byte), place_of(&whole, byte));
            assert_eq!(places.0, places.1, "{shown}: byte {byte}, from {from} on");
        }
    }
    let mut hasher = Sha256::new();
    let mut buf = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        let n = fs.read_at(node, &mut buf, offset).unwrap_or_else(|e| panic!("{shown}: {e}"));
        if n == 0 {
            break;
        }
        hasher.update(&buf[..n]);
        offset += n as u64;
    }
    assert_eq!(offset, size, "{shown}: as much is read as it is long");
    hasher.finalize().to_vec()
}

/// Compares two trees, and names what differs.
#[track_caller]
pub fn assert_same(found: &Truth, expected: &Truth) {
    let name = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    let lost: Vec<_> = expected.keys().filter(|path| !found.contains_key(*path)).collect();
    let made: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), name(lost[0]));
    assert!(made.is_empty(), "{} made up: {:?}", made.len(), name(made[0]));
    for (path, item) in expected {
        assert_eq!(&found[path], item, "{}", name(path));
    }
}

/// Writes `bytes` at `offset` of the file at `path`: damage.
pub fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    let mut file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.flush().unwrap();
}

/// A loop device for an image. It goes when this ends, or later when nobody uses it any more.
pub struct LoopDevice {
    pub device: String,
}

impl LoopDevice {
    /// Attaches `image`.
    #[track_caller]
    pub fn attach(image: &Path) -> Self {
        Self { device: run("losetup", &[&"-f", &"--show", &image]).trim().to_owned() }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// Waits until no loop device has `image` any more; whether that came to be.
pub fn detached(image: &Path) -> bool {
    (0..200).any(|_| {
        let free = run("losetup", &[&"-j", &image]).trim().is_empty();
        if !free {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        free
    })
}

/// How many pieces a file lies in.
pub fn pieces(fs: &dyn FileSystem, node: Node) -> usize {
    let mut count = 0;
    fs.layout(node, 0, &mut |_| {
        count += 1;
        true
    })
    .unwrap();
    count
}
