//! NTFS against ntfs-3g: the same trees, however they lie on the disk.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;

use guest::{
    Attributes, Cursor, DiskRange, ErrorKind, FileSystem, FileType, Node, Place, Source, Status,
    fs as guest_fs,
};
use support::{
    Mounted, Wish, assert_same, blank, disk, make_tree, missing, no_root, noise, poke, run,
};

fn unable() -> bool {
    missing(&["mkntfs", "ntfs-3g", "setfattr"]) || no_root()
}

/// A mount by ntfs-3g. The unmounted program still writes for a while: it is done when it gives up its
/// lock of the image.
struct Mount {
    at: PathBuf,
    image: PathBuf,
    mounted: Option<Mounted>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.mounted = None;
        let image = File::options().write(true).open(&self.image).unwrap();
        rustix::fs::fcntl_lock(&image, rustix::fs::FlockOperation::LockExclusive).unwrap();
    }
}

struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    /// A volume of `size` bytes as mkntfs makes it.
    fn new(size: u64, cluster: u32) -> Self {
        let made = Self { dir: tempfile::tempdir().unwrap() };
        blank(&made.image(), size);
        let cluster = cluster.to_string();
        run("mkntfs", &[&"-F", &"-Q", &"-q", &"-L", &"Läbel", &"-c", &cluster, &made.image()]);
        made
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// The volume, mounted by ntfs-3g.
    fn mount(&self, options: &str) -> Mount {
        let at = self.dir.path().join("mount");
        fs::create_dir_all(&at).unwrap();
        run("ntfs-3g", &[&self.image(), &at, &"-o", &options]);
        Mount { at: at.clone(), image: self.image(), mounted: Some(Mounted { at }) }
    }

    fn open(&self) -> Box<dyn FileSystem> {
        guest_fs::open(&disk(&self.image())).unwrap()
    }

    fn assert_as_mounted(&self) {
        let expected = support::truth_of_directory(&self.mount("ro").at, false);
        let fs = self.open();
        assert_same(&support::truth_of_reader(&*fs, false, 1000), &expected);
        assert_eq!(fs.about().status, Status::Clean);
    }
}

fn find(fs: &dyn FileSystem, path: &str) -> Node {
    path.split('/').fold(fs.root(), |node, name| {
        fs.lookup(node, name.as_bytes()).unwrap().unwrap_or_else(|| panic!("{name} of {path}"))
    })
}

fn stat(fs: &dyn FileSystem, path: &str) -> Attributes {
    fs.stat(find(fs, path)).unwrap()
}

fn whole_tree(size: u64, cluster: u32, wish: Wish) {
    if unable() {
        return;
    }
    let made = Made::new(size, cluster);
    make_tree(&made.mount("rw").at, wish);
    made.assert_as_mounted();
}

#[test]
fn a_tree_with_a_large_directory_is_read_as_ntfs_3g_reads_it() {
    whole_tree(400 << 20, 4096, Wish { many: 10_000, unix: false, huge: false });
}

#[test]
fn a_tree_in_clusters_of_one_sector_is_read_as_ntfs_3g_reads_it() {
    whole_tree(128 << 20, 512, Wish { many: 300, unix: false, huge: false });
}

#[test]
fn a_tree_in_clusters_larger_than_index_blocks_loses_no_names() {
    whole_tree(256 << 20, 65_536, Wish { many: 1500, unix: false, huge: false });
}

#[test]
fn a_huge_sparse_file_is_read_where_it_has_bytes_and_where_not() {
    if unable() {
        return;
    }
    let made = Made::new(64 << 20, 4096);
    {
        let mount = made.mount("rw");
        let huge = File::create(mount.at.join("huge")).unwrap();
        huge.write_all_at(b"start", 0).unwrap();
        huge.set_len(5 << 30).unwrap();
        huge.write_all_at(b"middle", (3 << 30) + 5).unwrap();
    }
    let fs = made.open();
    let node = find(&*fs, "huge");
    assert_eq!(fs.stat(node).unwrap().size, 5 << 30);
    let (mut at, mut holes) = (0, 0);
    fs.layout(node, 0, &mut |piece| {
        assert_eq!(piece.offset, at);
        at += piece.length;
        holes += if piece.place == Place::Hole { piece.length } else { 0 };
        true
    })
    .unwrap();
    assert!(at == 5 << 30 && holes > (5 << 30) - (1 << 20), "{at} {holes}");
    for (offset, expected) in
        [(0, &b"start\0"[..]), ((3 << 30) + 4, b"\0middle\0"), ((5 << 30) - 3, b"\0\0\0")]
    {
        let mut buf = vec![9; expected.len()];
        assert_eq!(fs.read_at(node, &mut buf, offset).unwrap(), expected.len());
        assert_eq!(buf, expected);
    }
    assert_eq!(fs.read_at(node, &mut [0; 9], 5 << 30).unwrap(), 0);
    assert_eq!(fs.read_at(node, &mut [0; 9], u64::MAX).unwrap(), 0);
}

#[test]
fn compressed_files_are_unpacked_in_whole_and_in_parts() {
    if unable() {
        return;
    }
    let made = Made::new(128 << 20, 4096);
    {
        let mount = made.mount("rw,compression");
        let dir = mount.at.join("packed");
        fs::create_dir(&dir).unwrap();
        run("setfattr", &[&"-n", &"system.ntfs_attrib_be", &"-v", &"0x00000800", &dir]);
        make_tree(&dir, Wish { many: 20, unix: false, huge: false });
        let mut mixed = Vec::new();
        for index in 0..40 {
            mixed.extend(noise(index, 30_000));
            mixed.extend(vec![b'a' + index as u8; 50_000]);
        }
        fs::write(dir.join("mixed"), &mixed).unwrap();
    }
    made.assert_as_mounted();
    let fs = made.open();
    let node = find(&*fs, "packed/mixed");
    let mut encoded = 0;
    fs.layout(node, 0, &mut |piece| {
        encoded += u32::from(matches!(piece.place, Place::Encoded { .. }));
        true
    })
    .unwrap();
    assert!(encoded > 5, "{encoded}");
    let size = fs.stat(node).unwrap().size;
    let mut whole = vec![0; size as usize];
    assert_eq!(fs.read_at(node, &mut whole, 0).unwrap(), whole.len());
    for at in (0..whole.len()).step_by(13_337) {
        let mut buf = [0; 4097];
        let read = fs.read_at(node, &mut buf, at as u64).unwrap();
        assert_eq!(buf[..read], whole[at..at + read]);
    }
}

#[test]
fn a_file_in_very_many_runs_is_read_through_its_attribute_list() {
    if unable() {
        return;
    }
    let made = Made::new(24 << 20, 4096);
    {
        let mount = made.mount("rw");
        let [scattered, other] =
            ["scattered", "other"].map(|name| File::create(mount.at.join(name)).unwrap());
        for index in 0..1200 {
            scattered.write_all_at(&noise(index, 4096), index * 8192).unwrap();
            other.write_all_at(&noise(index + 5000, 4096), index * 4096).unwrap();
        }
    }
    made.assert_as_mounted();
    let fs = made.open();
    let mut pieces = 0;
    fs.layout(find(&*fs, "scattered"), 0, &mut |_| {
        pieces += 1;
        true
    })
    .unwrap();
    assert!(pieces > 1000, "{pieces}");
}

#[test]
fn links_and_reparse_points_are_told_apart() {
    if unable() {
        return;
    }
    let made = Made::new(32 << 20, 4096);
    {
        let mount = made.mount("rw");
        let at = |name: &str| mount.at.join(name);
        fs::write(at("file"), b"content").unwrap();
        fs::hard_link(at("file"), at("hard")).unwrap();
        symlink("file", at("link")).unwrap();
        symlink("../up/and/away", at("up")).unwrap();
        fs::create_dir(at("junction")).unwrap();
        let target: String = r"\??\C:\Users".encode_utf16().fold(String::new(), |hex, unit| {
            let [low, high] = unit.to_le_bytes();
            format!("{hex}{low:02x}{high:02x}")
        });
        let length = target.len() / 2;
        let value = format!(
            "0x030000a0{:02x}00000000 00{length:02x}00{:02x}000000{target}00000000",
            length + 12,
            length + 2
        );
        let value = value.replace(' ', "");
        run("setfattr", &[&"-n", &"system.ntfs_reparse_data", &"-v", &value, &at("junction")]);
        for (name, tag) in [("wof", "17000080"), ("dedup", "13000080"), ("cloud", "1a600090")] {
            fs::write(at(name), b"stub").unwrap();
            let value = format!("0x{tag}0800000000000000000000 00").replace(' ', "");
            run("setfattr", &[&"-n", &"system.ntfs_reparse_data", &"-v", &value, &at(name)]);
        }
    }
    let fs = made.open();
    assert_eq!(stat(&*fs, "file").links, 2);
    assert_eq!(find(&*fs, "file"), find(&*fs, "hard"));
    for (name, target) in [("link", "file"), ("up", "../up/and/away"), ("junction", r"C:\Users")] {
        assert_eq!(stat(&*fs, name).file_type, FileType::Symlink, "{name}");
        assert_eq!(fs.read_link(find(&*fs, name)).unwrap(), target.as_bytes());
    }
    for (name, word) in [("wof", "CompactOS"), ("dedup", "dedup"), ("cloud", "cloud")] {
        let stat = stat(&*fs, name);
        assert_eq!(stat.file_type, FileType::Opaque, "{name}");
        assert!(stat.note.unwrap().contains(word));
        let error = fs.read_at(find(&*fs, name), &mut [0; 4], 0).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
    }
    let error = fs.list(find(&*fs, "junction"), Cursor::default(), 1).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotADirectory);
    let error = fs.read_link(find(&*fs, "file")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotALink);
}

#[test]
fn names_are_found_regardless_of_case_and_handles_grow_old() {
    if unable() {
        return;
    }
    let made = Made::new(32 << 20, 4096);
    {
        let mount = made.mount("rw");
        for name in ["Both", "BOTH", "ÄÖÜ.txt", "gone"] {
            fs::write(mount.at.join(name), name).unwrap();
        }
    }
    let fs = made.open();
    assert_eq!((fs.about().kind.as_str(), fs.about().label.as_str()), ("ntfs", "Läbel"));
    let serial = run("blkid", &[&"-p", &"-o", &"value", &"-s", &"UUID", &made.image()]);
    assert_eq!(fs.about().uuid, serial.trim());
    assert!(fs.about().used.is_some_and(|used| used > 0 && used < 32 << 20));
    assert_ne!(find(&*fs, "Both"), find(&*fs, "BOTH"));
    assert_eq!(find(&*fs, "äöü.TXT"), find(&*fs, "ÄÖÜ.txt"));
    assert!(fs.lookup(fs.root(), b"both").unwrap().is_some());
    for hidden in [&b"$MFT"[..], b"$Extend", b".", b"nothing", b"\xff"] {
        assert_eq!(fs.lookup(fs.root(), hidden).unwrap(), None);
    }
    let page = fs.list(fs.root(), Cursor::default(), 100).unwrap();
    assert_eq!((page.entries.len(), page.next), (4, None));
    let first = fs.list(fs.root(), Cursor::default(), 4).unwrap();
    assert_eq!((first.entries.len(), first.next), (4, None));
    let file = find(&*fs, "Both");
    assert_eq!(fs.list(file, Cursor::default(), 1).unwrap_err().kind, ErrorKind::NotADirectory);
    assert_eq!(fs.read_at(fs.root(), &mut [0; 1], 0).unwrap_err().kind, ErrorKind::NotAFile);
    let gone = find(&*fs, "gone");
    fs::remove_file(made.mount("rw").at.join("gone")).unwrap();
    let fs = made.open();
    for node in [gone, Node(u64::MAX), Node(file.0 ^ 1 << 48), Node(1 << 40)] {
        assert_eq!(fs.stat(node).unwrap_err().kind, ErrorKind::NotFound, "{node:?}");
    }
}

/// Where a file of the format's own lies: its first piece.
fn place_of(made: &Made, record: u64, sequence: u64) -> u64 {
    let mut place = None;
    made.open()
        .layout(Node(record | sequence << 48), 0, &mut |piece| {
            if let Place::Volume(at) = piece.place {
                place = place.or(Some(at));
            }
            true
        })
        .unwrap();
    place.unwrap()
}

#[track_caller]
fn assert_stale(made: &Made, word: &str) {
    let fs = made.open();
    match &fs.about().status {
        Status::Stale(why) if why.contains(word) => {}
        other => panic!("{other:?}"),
    }
    assert!(fs.lookup(fs.root(), b"file").unwrap().is_some());
}

#[test]
fn volumes_say_whether_their_newest_changes_may_be_missing() {
    if unable() {
        return;
    }
    let made = Made::new(32 << 20, 4096);
    fs::write(made.mount("rw").at.join("file"), b"x").unwrap();
    assert_eq!(made.open().about().status, Status::Clean);
    // The dirty flag, in the value of $VOLUME_INFORMATION.
    let record_at = place_of(&made, 0, 1) + 3 * 1024;
    let mut record = [0; 1024];
    File::open(made.image()).unwrap().read_exact_at(&mut record, record_at).unwrap();
    let mut at = usize::from(record[0x14]);
    while record[at] != 0x70 {
        at += usize::from(u16::from_le_bytes([record[at + 4], record[at + 5]]));
    }
    let flags = record_at + at as u64 + u64::from(record[at + 0x14]) + 10;
    poke(&made.image(), flags, &[1]);
    assert_stale(&made, "marked to be checked");
    poke(&made.image(), flags, &[0]);
    // A log that holds who knows what.
    let log = place_of(&made, 2, 2);
    poke(&made.image(), log, &noise(1, 64 << 10));
    assert_stale(&made, "could not be replayed");
    let mut page = noise(2, 64 << 10);
    page[..8].copy_from_slice(b"RSTR\x1e\0\x09\0");
    page[0x10..0x18].copy_from_slice(&[0, 0x10, 0, 0, 0, 0x10, 0, 0]);
    poke(&made.image(), log, &page);
    assert_stale(&made, "could not be replayed");
    poke(&made.image(), log, &vec![0xff; 64 << 10]);
    assert_eq!(made.open().about().status, Status::Clean);
    // Hibernated, woken again.
    let hibernate = |head: &[u8]| {
        let mut bytes = vec![0; 8192];
        bytes[..head.len()].copy_from_slice(head);
        fs::write(made.mount("rw,remove_hiberfile").at.join("hiberfil.sys"), bytes).unwrap();
    };
    hibernate(b"HIBR");
    assert_stale(&made, "hibernated");
    poke(&made.image(), log, &noise(1, 64 << 10));
    assert_stale(&made, "hibernated");
    poke(&made.image(), log, &vec![0xff; 64 << 10]);
    hibernate(b"wake");
    assert_eq!(made.open().about().status, Status::Clean);
}

#[test]
fn a_value_whose_first_part_is_not_listed_is_an_error_and_no_empty_file() {
    if unable() {
        return;
    }
    let made = Made::new(8 << 20, 1024);
    let target = "y/".repeat(200);
    symlink(&target, made.mount("rw").at.join("long")).unwrap();
    let fs = made.open();
    let node = find(&*fs, "long");
    assert_eq!(fs.read_link(node).unwrap(), target.as_bytes());
    let record_at = place_of(&made, 0, 1) + (node.0 & 0xffff_ffff) * 1024;
    let image = fs::read(made.image()).unwrap();
    let record = &image[record_at as usize..][..1024];
    let word = |at: usize| usize::from(u16::from_le_bytes([record[at], record[at + 1]]));
    let mut at = word(0x14);
    while word(at) != 0x20 {
        at += word(at + 4);
    }
    // In the list of attributes, the entry of the content, and in that the first cluster.
    let mut entry = at + word(at + 0x14);
    while word(entry) != 0x80 {
        entry += word(entry + 4);
    }
    poke(&made.image(), record_at + entry as u64 + 8, &[5]);
    let fs = made.open();
    for error in [fs.stat(node).unwrap_err(), fs.read_at(node, &mut [0; 4], 0).unwrap_err()] {
        assert_eq!(error.kind, ErrorKind::Corrupt);
        assert!(error.message.contains("the first extent of a value is missing"), "{error}");
    }
}

/// Places of the image where records and index blocks begin.
fn metadata(image: &[u8]) -> Vec<usize> {
    (0..image.len() / 1024)
        .map(|block| block * 1024)
        .filter(|at| [&b"FILE"[..], b"INDX"].contains(&&image[*at..at + 4]))
        .collect()
}

#[test]
fn a_damaged_block_of_a_directory_is_an_error_for_the_whole_listing() {
    if unable() {
        return;
    }
    let made = Made::new(32 << 20, 4096);
    {
        let mount = made.mount("rw");
        let dir = mount.at.join("dir");
        fs::create_dir(&dir).unwrap();
        for index in 0..500 {
            fs::write(dir.join(format!("name {index:04}")), b"").unwrap();
        }
    }
    let image = fs::read(made.image()).unwrap();
    let needle: Vec<u8> = "name 02".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut found = 0;
    for at in metadata(&image) {
        let block = &image[at..at + 4096];
        if !block.starts_with(b"INDX") || !block.windows(needle.len()).any(|name| name == needle) {
            continue;
        }
        found += 1;
        for (offset, byte) in [(0, b'X'), (510, !block[510]), (0x10, 99), (0x1d, 0xff)] {
            poke(&made.image(), (at + offset) as u64, &[byte]);
            let fs = made.open();
            let error = fs.list(find(&*fs, "dir"), Cursor::default(), 1000).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Corrupt, "{offset}: {error}");
            poke(&made.image(), (at + offset) as u64, &[block[offset]]);
        }
    }
    assert!(found > 0);
}

/// An image with other bytes at a few places.
struct Mutant {
    image: Arc<Vec<u8>>,
    changes: Vec<(usize, u8)>,
}

impl Source for Mutant {
    fn size(&self) -> u64 {
        self.image.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> guest::Result<()> {
        guest::source::check_range(self.size(), offset, buf.len())?;
        let offset = offset as usize;
        buf.copy_from_slice(&self.image[offset..offset + buf.len()]);
        for (at, byte) in &self.changes {
            if let Some(place) = at.checked_sub(offset).and_then(|at| buf.get_mut(at)) {
                *place = *byte;
            }
        }
        Ok(())
    }

    fn trace(&self, _: u64, _: u64, _: &mut dyn FnMut(DiskRange)) {}
}

/// Walks and reads what can be, up to a bound; how much could be.
fn survive(fs: &dyn FileSystem) -> usize {
    let mut waiting = vec![(fs.root(), 0)];
    let mut seen = 0;
    let mut buf = vec![0; 1 << 16];
    while let Some((node, depth)) = waiting.pop() {
        let Ok(page) = fs.list(node, Cursor::default(), 200) else { continue };
        for entry in page.entries {
            seen += 1;
            let Ok(stat) = fs.stat(entry.node) else { continue };
            match stat.file_type {
                FileType::Directory if depth < 6 && seen < 2000 => {
                    waiting.push((entry.node, depth + 1));
                }
                FileType::File => {
                    for offset in [0, stat.size / 2, stat.size.saturating_sub(9)] {
                        let _ = fs.read_at(entry.node, &mut buf, offset);
                    }
                    let mut left = 1000;
                    let _ = fs.layout(entry.node, 0, &mut |_| {
                        left -= 1;
                        left > 0
                    });
                }
                FileType::Symlink => drop(fs.read_link(entry.node)),
                _ => {}
            }
        }
    }
    seen
}

#[test]
fn damaged_volumes_never_make_the_reader_panic_or_go_on_for_ever() {
    if unable() {
        return;
    }
    let made = Made::new(16 << 20, 4096);
    {
        let mount = made.mount("rw,compression");
        let dir = mount.at.join("packed");
        fs::create_dir(&dir).unwrap();
        run("setfattr", &[&"-n", &"system.ntfs_attrib_be", &"-v", &"0x00000800", &dir]);
        fs::write(dir.join("text"), "again and again ".repeat(20_000)).unwrap();
        fs::write(dir.join("noise"), noise(1, 100_000)).unwrap();
        symlink("file", mount.at.join("link")).unwrap();
        let many = mount.at.join("many");
        fs::create_dir(&many).unwrap();
        for index in 0..60 {
            fs::write(many.join(format!("name {index}")), noise(index, 700)).unwrap();
        }
    }
    let image = Arc::new(fs::read(made.image()).unwrap());
    let places: Vec<usize> = [0].into_iter().chain(metadata(&image)).collect();
    let mut seen = 0;
    for seed in 0..400 {
        let random = noise(seed + 1000, 64);
        let changes = random[1..]
            .chunks_exact(8)
            .take(1 + usize::from(random[0] % 6))
            .map(|r| {
                let number = u32::from_le_bytes([r[0], r[1], r[2], r[3]]) as usize;
                let at = usize::from(u16::from_le_bytes([r[4], r[5]])) % 1024;
                // Headers are changed more often than the rest.
                let at = if r[7] & 1 == 0 { at % 256 } else { at };
                (places[number % places.len()] + at, r[6])
            })
            .collect();
        let source: Arc<dyn Source> = Arc::new(Mutant { image: Arc::clone(&image), changes });
        if let Ok(fs) = guest_fs::open(&source) {
            seen += survive(&*fs);
        }
    }
    assert!(seen > 5000, "{seen}");
}

/// Puts `value` at byte `at`, little-endian.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Protects a page of a log: the last word of every 512 bytes moves into the array at `array`.
fn protect(page: &mut [u8], magic: &[u8; 4], array: usize) {
    put(page, 0, magic);
    put(page, 4, &(array as u16).to_le_bytes());
    put(page, 6, &(page.len() as u16 / 512 + 1).to_le_bytes());
    put(page, array, &[7, 0]);
    for block in 0..page.len() / 512 {
        let end = block * 512 + 510;
        page.copy_within(end..end + 2, array + 2 + 2 * block);
        put(page, end, &[7, 0]);
    }
}

const SEQUENCE_BITS: u32 = 45;

/// A log of one lap: a checkpoint, and `records` (operation, transaction, client data) behind it.
fn log_of(size: usize, records: &[(u32, Vec<u8>)]) -> Vec<u8> {
    const PAGE: usize = 4096;
    let home = 4 * PAGE;
    let mut log = vec![0xff; size];
    let mut page = vec![0; PAGE];
    let lsn = |at: usize| 1_u64 << (64 - SEQUENCE_BITS) | (home + at) as u64 >> 3;
    let mut checkpoint = vec![0; 0x40];
    checkpoint[0] = 1;
    let all = [(2_u32, 0, checkpoint)]
        .into_iter()
        .chain(records.iter().map(|(transaction, data)| (1, *transaction, data.clone())));
    let (mut at, mut last) = (0x40, 0);
    for (kind, transaction, data) in all {
        last = at;
        put(&mut page, at, &lsn(at).to_le_bytes());
        put(&mut page, at + 0x18, &(data.len() as u32).to_le_bytes());
        put(&mut page, at + 0x20, &kind.to_le_bytes());
        put(&mut page, at + 0x24, &transaction.to_le_bytes());
        put(&mut page, at + 0x30, &data);
        at = (at + 0x30 + data.len()).next_multiple_of(8);
    }
    put(&mut page, 8, &lsn(last).to_le_bytes());
    put(&mut page, 0x10, &[1, 0, 0, 0, 1, 0, 1, 0]);
    put(&mut page, 0x18, &(at as u16).to_le_bytes());
    put(&mut page, 0x20, &lsn(last).to_le_bytes());
    protect(&mut page, b"RCRD", 0x28);
    put(&mut log, home, &page);
    let mut restart = vec![0; PAGE];
    put(&mut restart, 0x10, &(PAGE as u32).to_le_bytes());
    put(&mut restart, 0x14, &(PAGE as u32).to_le_bytes());
    put(&mut restart, 0x18, &[0x30, 0, 0, 0, 2, 0]);
    put(&mut restart, 0x30, &lsn(0x40).to_le_bytes());
    put(&mut restart, 0x38, &[1, 0, 0xff, 0xff, 0, 0, 0, 0]);
    put(&mut restart, 0x40, &SEQUENCE_BITS.to_le_bytes());
    put(&mut restart, 0x44, &[0xe0, 0, 0x40, 0]);
    put(&mut restart, 0x48, &(size as u64).to_le_bytes());
    put(&mut restart, 0x54, &[0x30, 0, 0x40, 0]);
    put(&mut restart, 0x70, &lsn(0x40).to_le_bytes());
    put(&mut restart, 0x78, &lsn(0x40).to_le_bytes());
    protect(&mut restart, b"RSTR", 0x1e);
    put(&mut log, 0, &restart);
    put(&mut log, PAGE, &restart);
    log
}

/// Client data of a record of the log: operations, what it changes, and how.
fn change(
    redo: u16,
    undo: u16,
    place: [u16; 4],
    vcn: u64,
    lcn: Option<u64>,
    bytes: [&[u8]; 2],
) -> Vec<u8> {
    let mut data = vec![0; 0x28];
    put(&mut data, 0, &redo.to_le_bytes());
    put(&mut data, 2, &undo.to_le_bytes());
    let redo_at = 0x28_u16;
    let undo_at = redo_at + (bytes[0].len() as u16).next_multiple_of(8);
    for (index, value) in [
        redo_at,
        bytes[0].len() as u16,
        undo_at,
        bytes[1].len() as u16,
        0x18,
        u16::from(lcn.is_some()),
    ]
    .into_iter()
    .chain(place)
    .enumerate()
    {
        put(&mut data, 4 + 2 * index, &value.to_le_bytes());
    }
    put(&mut data, 0x18, &vcn.to_le_bytes());
    put(&mut data, 0x20, &lcn.unwrap_or(0).to_le_bytes());
    data.extend(bytes[0]);
    data.resize(usize::from(undo_at), 0);
    data.extend(bytes[1]);
    data
}

#[test]
fn a_change_that_waits_in_the_log_is_replayed_in_memory() {
    if unable() {
        return;
    }
    let made = Made::new(32 << 20, 4096);
    fs::write(made.mount("rw").at.join("file"), b"before the replay").unwrap();
    let before = made.open();
    let number = find(&*before, "file").0 & 0xffff_ffff_ffff;
    let (mft, log_at) = (place_of(&made, 0, 1), place_of(&made, 2, 2));
    let log_size = before.stat(Node(2 | 2 << 48)).unwrap().size as usize;
    let image = fs::read(made.image()).unwrap();
    let record = (mft + number * 1024) as usize;
    // The value of the file, in its record.
    let mut at = record + usize::from(image[record + 0x14]);
    while image[at] != 0x80 {
        at += usize::from(image[at + 4]);
    }
    let value = u16::from(image[at + 0x14]);
    assert_eq!(image[at + usize::from(value)..][..6], *b"before");
    let byte = number * 1024;
    let place = [(at - record) as u16, value, ((byte % 4096) / 512) as u16, 2];
    let lcn = (mft + byte) / 4096;
    let mut opened = [0; 0x28];
    put(&mut opened, 8, &[0x80, 0, 0, 0]);
    let records = |lcn: u64| {
        vec![
            (0, change(0x1c, 0, [0; 4], 0, None, [&opened, &[]])),
            (0x18, change(7, 7, place, byte / 4096, Some(lcn), [b"behind", b"before"])),
            (0x18, change(0x1b, 0, [0; 4], 0, None, [&[], &[]])),
        ]
    };
    poke(&made.image(), log_at, &log_of(log_size, &records(lcn)));
    let unchanged = fs::read(made.image()).unwrap();
    let fs = made.open();
    assert_eq!(fs.about().status, Status::Replayed);
    let mut buf = [0; 17];
    assert_eq!(fs.read_at(find(&*fs, "file"), &mut buf, 0).unwrap(), 17);
    assert_eq!(&buf, b"behind the replay");
    // The log of another volume: its records lie elsewhere.
    poke(&made.image(), log_at, &log_of(log_size, &records(lcn + 1)));
    assert_stale(&made, "could not be replayed");
    poke(&made.image(), log_at, &unchanged[log_at as usize..log_at as usize + log_size]);
    assert!(std::fs::read(made.image()).unwrap() == unchanged, "nothing is written");
    // Nonsense in the log: something is shown all the same.
    let image = Arc::new(unchanged);
    for seed in 0..150 {
        let random = noise(seed, 32);
        let changes = random
            .chunks_exact(4)
            .take(2)
            .map(|r| {
                let at = 0x28 + usize::from(u16::from_le_bytes([r[0], r[1]])) % 0x220;
                (log_at as usize + usize::from(r[2] % 3) / 2 * 4096 * 4 + at, r[3])
            })
            .collect();
        let source: Arc<dyn Source> = Arc::new(Mutant { image: Arc::clone(&image), changes });
        let fs = guest_fs::open(&source).unwrap();
        assert!(fs.lookup(fs.root(), b"file").is_ok());
    }
}
