//! Volumes of every format with patches: opened and walked, as far as that goes.
//!
//! An input is the number of a base, flags, and patches: which block, where in it, how many bytes, and
//! the bytes. Checksums are made right again, as far as that is simple.
#![no_main]

mod disks;

use std::sync::{Arc, LazyLock, Mutex};

use disks::{BLOCK, Sparse, crc, number};
use guest::local::LocalTree;
use guest::tree::Tree;
use guest::{Cursor, FileSystem, FileType, Node, Place, Source};
use libfuzzer_sys::fuzz_target;

/// Volumes that `seeds/bases/make` made.
const PACKED: [&[u8]; 14] = [
    include_bytes!("../seeds/bases/ext2"),
    include_bytes!("../seeds/bases/ext4-inline"),
    include_bytes!("../seeds/bases/ext4-clusters"),
    include_bytes!("../seeds/bases/ext4-journal"),
    include_bytes!("../seeds/bases/ext4-journal-bare"),
    include_bytes!("../seeds/bases/xfs"),
    include_bytes!("../seeds/bases/xfs-log"),
    include_bytes!("../seeds/bases/xfs-4"),
    include_bytes!("../seeds/bases/btrfs"),
    include_bytes!("../seeds/bases/ntfs"),
    include_bytes!("../seeds/bases/fat12"),
    include_bytes!("../seeds/bases/fat16"),
    include_bytes!("../seeds/bases/fat32"),
    include_bytes!("../seeds/bases/exfat"),
];
/// The polynomial of XFS, btrfs and ext4.
const CRC32C: u32 = 0x82f6_3b78;
/// Patches of one input.
const PATCHES: usize = 64;
/// Names that are looked at.
const NAMES: usize = 250;
/// Bytes of a file that are read at once.
const PIECE: usize = 64 << 10;
/// Pieces of a layout that are looked at.
const PIECES: usize = 1000;

static BASES: LazyLock<Vec<Sparse>> = LazyLock::new(|| {
    let unpack = |packed: &&[u8]| {
        let bytes = miniz_oxide::inflate::decompress_to_vec(packed).expect("a base is packed");
        let mut base = Sparse { size: number::<8>(&bytes, 0), ..Sparse::default() };
        for block in bytes[8..].chunks_exact(4 + BLOCK) {
            base.put(number::<4>(block, 0) * BLOCK as u64, &block[4..]);
        }
        let mut stamped = base.clone();
        let places =
            base.blocks.keys().flat_map(|block| (0..8).map(move |n| block * 4096 + n * 512));
        places.for_each(|at| restamp(&mut stamped, at));
        for (number, block) in &base.blocks {
            assert!(stamped.blocks[number] == *block, "checksums are known: block {number}");
        }
        let fs = guest::fs::open(&(Arc::new(base.clone()) as _)).expect("a base can be opened");
        let page = fs.list(fs.root(), Cursor::default(), NAMES).expect("its root can be listed");
        assert!(page.entries.len() > 4, "a base has files");
        base
    };
    PACKED.iter().map(unpack).collect()
});

/// The volume that an input stands for.
fn volume(input: &[u8]) -> Option<Sparse> {
    let ([base, flags], mut rest) = input.split_first_chunk()?;
    let mut volume = BASES[usize::from(*base) % BASES.len()].clone();
    // Blocks with nothing but ones are journals that are empty.
    let full = |block: &[u8; BLOCK]| block.iter().any(|byte| *byte != 0xff);
    let used: Vec<u64> =
        volume.blocks.iter().filter(|(_, block)| full(block)).map(|(number, _)| *number).collect();
    let mut places = Vec::new();
    for _ in 0..PATCHES {
        let Some((head, more)) = rest.split_first_chunk::<5>() else { break };
        let (length, block) = (usize::from(head[4] % 16) + 1, number::<2>(head, 0));
        let block = match head[4] & 0x80 {
            0 => used[block as usize % used.len()],
            _ => block,
        };
        let (bytes, more) = more.split_at_checked(length).unwrap_or((more, &[]));
        let place = block * BLOCK as u64 + number::<2>(head, 2) % BLOCK as u64;
        volume.put(place, bytes);
        places.push(place);
        rest = more;
    }
    if flags & 1 == 0 {
        places.iter().for_each(|place| restamp(&mut volume, *place));
    }
    Some(volume)
}

/// Makes the checksum right that covers the byte at `place`.
fn restamp(volume: &mut Sparse, place: u64) {
    let start = volume.get(0, 512);
    match () {
        () if start.starts_with(b"XFSB") && start[101] & 15 == 5 => restamp_xfs(volume, place),
        () if start[3..].starts_with(b"EXFAT") => restamp_exfat(volume, place),
        () if volume.get(65_600, 8) == *b"_BHRfS_M" => restamp_btrfs(volume, place),
        () if volume.get(1080, 2) == *b"\x53\xef" && volume.get(1125, 1)[0] & 4 != 0 => {
            let sum = crc(CRC32C, !0, &volume.get(1024, 1020));
            volume.put(2044, &sum.to_le_bytes());
        }
        () => {}
    }
}

fn restamp_btrfs(volume: &mut Sparse, place: u64) {
    let at = place / BLOCK as u64 * BLOCK as u64;
    let block = volume.get(at, BLOCK);
    if block[32..48] == volume.get(65_568, 16) {
        volume.put(at, &(!crc(CRC32C, !0, &block[32..])).to_le_bytes());
    }
}

fn restamp_xfs(volume: &mut Sparse, place: u64) {
    for back in 0..65 {
        let Some(at) = (place / 512).checked_sub(back) else { break };
        let at = at * 512;
        let head = volume.get(at, 512);
        let (length, field) = match (&head[..4], &head[8..10]) {
            (b"XFSB", _) => (512, 224),
            (b"XAGF", _) => (512, 216),
            (b"XAGI", _) => (512, 312),
            (b"XAFL", _) => (512, 32),
            ([b'I', b'N', ..], _) => (512, 100),
            (b"XDB3" | b"XDD3", _) => (4096, 4),
            (b"XSLM" | b"XARM", _) => (1024, 12),
            (b"BMA3", _) => (1024, 64),
            (b"IAB3" | b"FIB3" | b"AB3B" | b"AB3C", _) => (1024, 52),
            (_, [0x3d, 0xf1 | 0xff]) => (4096, 12),
            (_, [0x3b, 0xee]) => (1024, 12),
            // A record of the log: its header of 328 bytes, and what follows. mkfs sums none up.
            ([0xfe, 0xed, 0xba, 0xbe], _) => {
                let length = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
                if length > 256 << 10 || head[32..36] == [0; 4] {
                    continue;
                }
                let mut bytes = head[..328].to_vec();
                bytes[32..36].fill(0);
                bytes.extend(volume.get(at + 512, length as usize));
                volume.put(at + 32, &(!crc(CRC32C, !0, &bytes)).to_le_bytes());
                continue;
            }
            _ => continue,
        };
        if place < at + length {
            let mut bytes = volume.get(at, length as usize);
            bytes[field..field + 4].fill(0);
            volume.put(at + field as u64, &(!crc(CRC32C, !0, &bytes)).to_le_bytes());
        }
    }
}

fn restamp_exfat(volume: &mut Sparse, place: u64) {
    if place < 11 * 512 {
        let boot = volume.get(0, 11 * 512);
        let counted = boot.iter().enumerate().filter(|(at, _)| ![106, 107, 112].contains(at));
        let sum = counted
            .fold(0_u32, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u32::from(*byte)));
        volume.put(11 * 512, &sum.to_le_bytes().repeat(128));
        return;
    }
    for back in 0..19 {
        let Some(at) = (place / 32).checked_sub(back) else { break };
        let head = volume.get(at * 32, 32);
        if head[0] == 0x85 && u64::from(head[1]) >= back && head[1] < 19 {
            let set = volume.get(at * 32, (usize::from(head[1]) + 1) * 32);
            let counted = set.iter().enumerate().filter(|(at, _)| ![2, 3].contains(at));
            let sum = counted
                .fold(0_u16, |sum, (_, byte)| sum.rotate_right(1).wrapping_add(u16::from(*byte)));
            volume.put(at * 32 + 2, &sum.to_le_bytes());
            break;
        }
    }
}

/// Walks everything within bounds.
fn walk(fs: &dyn FileSystem, source: &dyn Source) {
    let tree = LocalTree::over(fs, source);
    let mut waiting = vec![fs.root()];
    let mut left = NAMES;
    while let Some(directory) = waiting.pop() {
        let mut cursor = Cursor::default();
        let few = tree.list(directory, cursor, 7);
        if let (Ok(few), Ok(more)) = (few, tree.list(directory, cursor, 40)) {
            let same = few.entries.len().min(more.entries.len());
            assert!(few.entries[..same] == more.entries[..same], "pages are of one list");
        }
        while let Ok(page) = tree.list(directory, cursor, 40) {
            assert!(page.entries.len() <= 40 && (page.next.is_none() || !page.entries.is_empty()));
            for entry in page.entries {
                let Some(less) = left.checked_sub(1) else { return };
                left = less;
                let _ = tree.lookup(directory, &entry.name);
                let _ = tree.xattrs(entry.node);
                let _ = tree.read_link(entry.node);
                match entry.attributes.map(|attributes| (attributes.file_type, attributes.size)) {
                    Ok((FileType::Directory, _)) => waiting.push(entry.node),
                    Ok((FileType::File, size)) => look(fs, source, entry.node, size),
                    _ => {}
                }
            }
            let Some(next) = page.next else { break };
            assert_ne!(next, cursor);
            cursor = next;
        }
    }
    for path in ["/directory/below/deep/bottom", "/link", "/directory/up/name 001", "/x/y"] {
        let _ = tree.resolve(path.as_bytes(), true);
    }
    for node in [0, 1, 2, 5, 64, 131, 1 << 32, u64::MAX] {
        let _ = (tree.stat(Node(node)), tree.list(Node(node), Cursor(1), 5));
        let _ = tree.read_at(Node(node), &mut [0; 100], 5);
    }
}

/// Reads a file, which must be the same in other pieces, and where its layout says.
fn look(fs: &dyn FileSystem, source: &dyn Source, file: Node, size: u64) {
    let tree = LocalTree::over(fs, source);
    let mut buf = vec![0; PIECE];
    let _ = fs.read_at(file, &mut buf, size.saturating_sub(5000));
    let read = fs.read_at(file, &mut buf, 0);
    let _ = tree.layout(file, 0);
    let Ok(read) = read else { return };
    assert_eq!(read as u64, size.min(PIECE as u64), "no less is read than there is");
    let mut part = vec![0; 3000];
    if let Ok(again) = fs.read_at(file, &mut part, 1001) {
        assert_eq!(again, read.saturating_sub(1001).min(3000));
        assert!(again == 0 || part[..again] == buf[1001..1001 + again]);
    }
    let (mut end, mut left) = (0, PIECES);
    let _ = fs.layout(file, 0, &mut |piece| {
        assert_eq!(piece.offset, end, "pieces follow each other");
        assert!(piece.length > 0);
        end = piece.offset.checked_add(piece.length).expect("files are no longer");
        let length = piece.length.min((read as u64).saturating_sub(piece.offset)) as usize;
        if length > 0 {
            let found = &buf[piece.offset as usize..][..length];
            let mut raw = vec![0; length];
            match piece.place {
                Place::Hole => assert!(raw == found, "holes are zeroes"),
                Place::Volume(at) if source.read_at(&mut raw, at).is_ok() => {
                    assert!(raw == found, "it lies where its layout says");
                }
                _ => {}
            }
        }
        left -= 1;
        left > 0
    });
}

/// What the last panic said.
static SAID: Mutex<String> = Mutex::new(String::new());

/// Panics that a reader catches on purpose are none of this target's: only others end it. The engine's
/// hook would end it for all.
fn only_panics_that_nobody_catches() {
    std::panic::set_hook(Box::new(|info| *SAID.lock().expect("not poisoned") = info.to_string()));
}

fuzz_target!(init: only_panics_that_nobody_catches(), |input: &[u8]| {
    // Without the guard of a whole machine, which would hide all panics.
    let ended = std::panic::catch_unwind(|| {
        let Some(volume) = volume(input) else { return };
        let source: Arc<dyn Source> = Arc::new(volume);
        if let Ok(fs) = guest::fs::open(&source) {
            walk(&*fs, &*source);
        }
    });
    if ended.is_err() {
        eprintln!("{}", SAID.lock().expect("not poisoned"));
        std::process::abort();
    }
});
