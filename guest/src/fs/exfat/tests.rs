//! Volumes made by hand, for what no program would write.
#![allow(clippy::cast_possible_truncation)]

use super::boot::checksum32;
use super::*;
use crate::source::MemoryDisk;

/// Sectors and clusters of 512 bytes: boot region, table, and so many clusters from here on.
const TABLE: usize = 24 * 512;
const HEAP: usize = 64 * 512;
const CLUSTERS: u32 = 2048;

/// Attributes of a directory; flags of a stream that is allocated, and contiguous or in a chain.
const FOLDER: u16 = 0x10;
const CONTIGUOUS: u8 = 3;
const CHAIN: u8 = 1;

/// What a stream extension says.
#[derive(Clone, Copy)]
struct Stream {
    flags: u8,
    first: u32,
    valid: u64,
    size: u64,
}

/// A contiguous stream that is valid as a whole.
fn stream(first: u32, size: u64) -> Stream {
    Stream { flags: CONTIGUOUS, first, valid: size, size }
}

/// An entry set with its checksum.
fn set(name: &str, attributes: u16, stream: Stream) -> Vec<u8> {
    let units: Vec<u16> = name.encode_utf16().collect();
    let names = units.chunks(15);
    let mut bytes = vec![0; 64];
    (bytes[0], bytes[1]) = (entry::FILE, names.len() as u8 + 1);
    bytes[4..6].copy_from_slice(&attributes.to_le_bytes());
    (bytes[32], bytes[33], bytes[35]) = (entry::STREAM, stream.flags, units.len() as u8);
    bytes[40..48].copy_from_slice(&stream.valid.to_le_bytes());
    bytes[52..56].copy_from_slice(&stream.first.to_le_bytes());
    bytes[56..64].copy_from_slice(&stream.size.to_le_bytes());
    for part in names {
        let mut slot = vec![entry::NAME, 0];
        slot.extend(part.iter().flat_map(|unit| unit.to_le_bytes()));
        slot.resize(32, 0);
        bytes.extend(slot);
    }
    let covered = bytes.iter().enumerate().filter(|(at, _)| !matches!(at, 2 | 3));
    let sum =
        covered.fold(0_u16, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u16::from(*byte)));
    bytes[2..4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// A volume whose root directory is cluster 2.
struct Volume(Vec<u8>);

impl Volume {
    fn new(root: &[Vec<u8>]) -> Self {
        let mut volume = Self(vec![0; HEAP + CLUSTERS as usize * 512]);
        volume.put(3, b"EXFAT   ");
        volume.put(72, &(64 + u64::from(CLUSTERS)).to_le_bytes());
        for (at, value) in [(80, 24), (84, 32), (88, 64), (92, CLUSTERS), (96, 2)] {
            volume.put(at, &value.to_le_bytes());
        }
        volume.put(104, &[0, 1, 0, 0, 9, 0, 1]);
        volume.put(510, &[0x55, 0xaa]);
        let covered = volume.0[..11 * 512].iter().enumerate();
        let fixed = covered.filter(|(at, _)| !matches!(at, 106 | 107 | 112));
        let sum = checksum32(fixed.map(|(_, byte)| *byte));
        volume.put(11 * 512, &sum.to_le_bytes().repeat(128));
        volume.chain(&[2]);
        volume.fill(2, &root.concat());
        volume
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes from the start of a cluster on.
    fn fill(&mut self, cluster: u32, bytes: &[u8]) {
        self.put(HEAP + (cluster as usize - 2) * 512, bytes);
    }

    /// Makes clusters a chain.
    fn chain(&mut self, clusters: &[u32]) {
        let next = clusters[1..].iter().chain([&u32::MAX]);
        for (cluster, next) in clusters.iter().zip(next) {
            self.put(TABLE + *cluster as usize * 4, &next.to_le_bytes());
        }
    }

    fn open(self) -> Box<dyn FileSystem> {
        let source: Arc<dyn Source> = Arc::new(MemoryDisk { bytes: self.0, disk: 0 });
        assert!(recognise(&*source).unwrap());
        open(&source).unwrap()
    }
}

fn find(fs: &dyn FileSystem, name: &str) -> Option<Node> {
    fs.lookup(fs.root(), name.as_bytes()).unwrap()
}

fn layout(fs: &dyn FileSystem, node: Node) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    fs.layout(node, 0, &mut |piece| {
        pieces.push(piece);
        true
    })?;
    Ok(pieces)
}

#[test]
fn a_set_whose_checksum_does_not_fit_fails_the_listing_and_not_the_sets_before() {
    let mut broken = set("second", 0, stream(11, 5));
    broken[70] ^= 1;
    let fs = Volume::new(&[set("first", 0, stream(10, 5)), broken]).open();
    let error = fs.list(fs.root(), Cursor::default(), 10).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt);
    assert!(error.message.contains("checksum"), "{error}");
    assert!(find(&*fs, "first").is_some());
    assert!(fs.lookup(fs.root(), b"third").is_err());
}

#[test]
fn sets_that_are_cut_off_or_of_a_wrong_length_fail_the_listing() {
    let whole = set("a name of more than 15 units", 0, stream(10, 5));
    let mut short = whole.clone();
    short[1] = 1;
    let mut followed = whole[..64].to_vec();
    followed.extend(set("x", 0, stream(10, 5)));
    for wrong in [whole[..96].to_vec(), short, followed] {
        let fs = Volume::new(&[wrong]).open();
        let error = fs.list(fs.root(), Cursor::default(), 10).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn bytes_that_are_not_valid_read_as_zeroes_whatever_lies_there() {
    let part = Stream { valid: 700, ..stream(10, 2000) };
    let none = Stream { valid: 0, ..stream(10, 2000) };
    let broken = Stream { valid: 2001, ..stream(10, 2000) };
    let mut volume = Volume::new(&[set("part", 1, part), set("none", 0, none)]);
    volume.fill(10, &[0xaa; 2048]);
    let fs = volume.open();
    let node = find(&*fs, "part").unwrap();
    let mut buf = [1; 3000];
    assert_eq!(fs.read_at(node, &mut buf, 0).unwrap(), 2000);
    assert!(buf[..700].iter().all(|byte| *byte == 0xaa));
    assert!(buf[700..2000].iter().all(|byte| *byte == 0));
    assert_eq!(fs.read_at(node, &mut buf, 1990).unwrap(), 10);
    assert_eq!(buf[..10], [0; 10]);
    assert_eq!(fs.read_at(node, &mut buf, u64::MAX).unwrap(), 0);
    let data = Place::Volume(HEAP as u64 + 8 * 512);
    assert_eq!(
        layout(&*fs, node).unwrap(),
        [
            Piece { offset: 0, length: 700, place: data },
            Piece { offset: 700, length: 1300, place: Place::Hole }
        ]
    );
    let stat = fs.stat(node).unwrap();
    assert_eq!((stat.size, stat.allocated, stat.mode), (2000, Some(2048), 0o444));
    let pieces = layout(&*fs, find(&*fs, "none").unwrap()).unwrap();
    assert_eq!(pieces, [Piece { offset: 0, length: 2000, place: Place::Hole }]);

    let fs = Volume::new(&[set("broken", 0, broken)]).open();
    assert!(fs.list(fs.root(), Cursor::default(), 10).is_err());
}

#[test]
fn a_contiguous_file_may_end_with_the_heap_and_not_after_it() {
    let last = CLUSTERS + 1;
    let fs = Volume::new(&[
        set("fits", 0, stream(last - 1, 1024)),
        set("leaves", 0, stream(last - 1, 1025)),
        set("before", 0, stream(1, 5)),
        set("huge", 0, stream(10, u64::MAX)),
    ])
    .open();
    assert_eq!(fs.read_at(find(&*fs, "fits").unwrap(), &mut [0; 2000], 0).unwrap(), 1024);
    for name in ["leaves", "before", "huge"] {
        let node = find(&*fs, name).unwrap();
        assert_eq!(fs.read_at(node, &mut [0; 8], 0).unwrap_err().kind, ErrorKind::Corrupt);
        assert_eq!(layout(&*fs, node).unwrap_err().kind, ErrorKind::Corrupt);
        assert!(fs.stat(node).is_ok());
    }
}

#[test]
fn names_are_found_by_the_volumes_own_table_and_by_unicode_where_it_is_broken() {
    // a becomes A, x becomes Q, and all others stay as they are.
    let table: Vec<u8> =
        [SAME, 0x61, 0x41, SAME, 0x16, 0x51].iter().flat_map(|unit| unit.to_le_bytes()).collect();
    for whole in [true, false] {
        let mut slot = vec![0; 32];
        slot[0] = entry::UPCASE;
        let sum = checksum32(table.iter().copied()) ^ u32::from(!whole);
        slot[4..8].copy_from_slice(&sum.to_le_bytes());
        slot[20..24].copy_from_slice(&9_u32.to_le_bytes());
        slot[24..32].copy_from_slice(&(table.len() as u64).to_le_bytes());
        let mut volume = Volume::new(&[slot, set("xab", 0, stream(0, 0))]);
        volume.chain(&[9]);
        volume.fill(9, &table);
        let fs = volume.open();
        let found = |name| find(&*fs, name).is_some();
        assert!(found("xab"));
        assert_eq!([found("QAb"), found("QAB")], [whole, false]);
        assert_eq!([found("XAb"), found("XAB")], [!whole; 2]);
    }
}

/// As in an up-case table.
const SAME: u16 = 0xffff;

#[test]
fn a_directory_in_itself_is_the_same_node_again_and_the_root_is_refused() {
    let mut volume =
        Volume::new(&[set("outer", FOLDER, stream(10, 512)), set("root", FOLDER, stream(2, 512))]);
    volume.fill(10, &set("inner", FOLDER, stream(10, 512)));
    let fs = volume.open();
    let inner = fs.lookup(find(&*fs, "outer").unwrap(), b"inner").unwrap().unwrap();
    let again = fs.list(inner, Cursor::default(), 10).unwrap();
    assert_eq!(again.entries.len(), 1);
    assert_eq!(again.entries[0].node, inner);
    let error = fs.list(find(&*fs, "root").unwrap(), Cursor::default(), 10).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt);
}

#[test]
fn files_that_share_clusters_are_read_each_by_itself() {
    let chained = Stream { flags: CHAIN, ..stream(20, 1024) };
    let mut volume = Volume::new(&[set("one", 0, stream(10, 1024)), set("two", 0, chained)]);
    volume.chain(&[20, 11]);
    for cluster in [10, 11, 20] {
        volume.fill(cluster, &[cluster as u8; 512]);
    }
    let fs = volume.open();
    for (name, content) in [("one", [10, 11]), ("two", [20, 11])] {
        let mut buf = [0; 2048];
        let n = fs.read_at(find(&*fs, name).unwrap(), &mut buf, 0).unwrap();
        assert_eq!((n, [buf[0], buf[1023]]), (1024, content));
    }
}

#[test]
fn a_directory_of_10_000_names_lists_in_pages_once_each() {
    let names: Vec<_> = (0..10_000).map(|index| format!("entry {index}")).collect();
    let sets: Vec<u8> = names.iter().flat_map(|name| set(name, 0, stream(0, 0))).collect();
    let clusters = sets.len().div_ceil(512) as u32;
    for flags in [CONTIGUOUS, CHAIN] {
        let many = Stream { flags, ..stream(10, u64::from(clusters) * 512) };
        let mut volume = Volume::new(&[set("many", FOLDER, many)]);
        volume.chain(&(10..10 + clusters).collect::<Vec<_>>());
        volume.fill(10, &sets);
        let fs = volume.open();
        let many = find(&*fs, "many").unwrap();
        let (mut found, mut next) = (Vec::new(), Some(Cursor::default()));
        while let Some(cursor) = next {
            let page = fs.list(many, cursor, 700).unwrap();
            assert!((1..=700).contains(&page.entries.len()));
            found.extend(page.entries);
            next = page.next;
        }
        assert!(found.iter().map(|entry| &*entry.name).eq(names.iter().map(String::as_bytes)));
        assert_eq!(fs.lookup(many, b"ENTRY 9999").unwrap(), Some(found[9999].node));
        assert!(found.iter().all(|entry| fs.stat(entry.node).is_ok()));
    }
}

/// Directories and files at random, with tables at random, but right checksums.
fn random(seed: u64) -> Volume {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut dice = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut sets = || {
        let mut bytes = Vec::new();
        for index in 0..5 {
            let size = match dice(8) {
                0 => dice(u64::MAX),
                1 => dice(512 * u64::from(CLUSTERS)),
                _ => 512 * dice(5),
            };
            let valid = if dice(4) == 0 { size / 2 } else { size };
            let flags = if dice(2) == 0 { CHAIN } else { CONTIGUOUS };
            let stream = Stream { flags, first: dice(14) as u32, valid, size };
            bytes.extend(set(&format!("name {index}"), FOLDER * dice(2) as u16, stream));
        }
        bytes
    };
    let mut volume = Volume::new(&[sets()]);
    for cluster in 3..12 {
        let content = sets();
        volume.fill(cluster, &content);
    }
    for cluster in 3..14 {
        let next = if dice(3) == 0 { u32::MAX } else { dice(14) as u32 };
        volume.put(TABLE + cluster * 4, &next.to_le_bytes());
    }
    volume
}

#[test]
fn random_trees_with_right_checksums_never_panic_or_hang() {
    let (mut entries, mut read, mut refused) = (0, 0, 0);
    for seed in 0..300 {
        let fs = random(seed).open();
        let (mut waiting, mut left) = (vec![fs.root()], 300);
        while let Some(directory) = waiting.pop() {
            let Ok(page) = fs.list(directory, Cursor::default(), 1000) else {
                refused += 1;
                continue;
            };
            for entry in page.entries.into_iter().take(left) {
                (left, entries) = (left - 1, entries + 1);
                let stat = fs.stat(entry.node).unwrap();
                if stat.file_type == FileType::Directory {
                    waiting.push(entry.node);
                    continue;
                }
                let mut buf = [0; 2000];
                let whole = fs.read_at(entry.node, &mut buf, 0);
                assert_eq!(whole.is_ok(), layout(&*fs, entry.node).is_ok());
                match whole {
                    Ok(n) => {
                        assert_eq!(n as u64, stat.size.min(2000));
                        read += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
            if left == 0 {
                break;
            }
        }
    }
    assert!(entries > 1000 && read > 300 && refused > 300, "{entries} {read} {refused}");
}
