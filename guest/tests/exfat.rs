//! exFAT beside mkfs.exfat and the FUSE file system.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub, missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use guest::{Cursor, FileSystem, FileType, Status};
use support::*;

const TOOLS: &[&str] = &["mkfs.exfat", "mount.exfat-fuse"];

/// An image of `size` bytes with clusters of `cluster`, filled by `fill` over FUSE.
fn make(image: &Path, size: u64, cluster: &str, fill: impl FnOnce(&Path)) -> Truth {
    blank(image, size);
    run("mkfs.exfat", &[&"-L", &"LABEL", &"-c", &cluster, &image]);
    let at = image.with_extension("mount");
    fs::create_dir_all(&at).unwrap();
    // The FUSE program wants a block device, which goes when it is unmounted.
    let device = run("losetup", &[&"-f", &"--show", &image]);
    run("mount.exfat-fuse", &[&device.trim(), &at]);
    run("losetup", &[&"-d", &device.trim()]);
    let mounted = Mounted { at };
    fill(&mounted.at);
    truth_of_directory(&mounted.at, false)
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

/// Walks everything within bounds; what fails, fails.
fn walk(fs: &dyn FileSystem) {
    let mut waiting = vec![fs.root()];
    let (mut left, mut buf) = (3000_u32, vec![0; 65_536]);
    while let Some(node) = waiting.pop() {
        let mut cursor = Cursor::default();
        while let Ok(page) = fs.list(node, cursor, 100) {
            for entry in &page.entries {
                assert!(!entry.name.is_empty() && !entry.name.contains(&b'/'));
                let Some(less) = left.checked_sub(1) else { return };
                left = less;
                let _ = (fs.stat(entry.node), fs.read_at(entry.node, &mut buf, 0));
                let _ = fs.read_at(entry.node, &mut buf, 1 << 20);
                if entry.file_type == Some(FileType::Directory) {
                    waiting.push(entry.node);
                }
            }
            let Some(next) = page.next else { break };
            assert!(next.0 > cursor.0);
            cursor = next;
        }
    }
}

/// Overwrites a few bytes of the image's metadata, `rounds` times anew, and walks what is left.
fn mutate(image: &Path, regions: &[std::ops::Range<u64>], rounds: u64) {
    let whole = fs::read(image).unwrap();
    let disk = disk(image);
    for round in 0..rounds {
        let dice = noise(round + 1, 96);
        let mut places = Vec::new();
        for throw in dice.chunks_exact(12).take(1 + round as usize % 8) {
            let number = u64::from_le_bytes(throw[..8].try_into().unwrap());
            let region = &regions[throw[8] as usize % regions.len()];
            let place = region.start + number % (region.end - region.start - 3);
            poke(image, place, &throw[9..10 + throw[8] as usize % 3]);
            places.push(place);
        }
        if let Ok(fs) = guest::fs::open(&disk) {
            walk(&*fs);
        }
        for place in places {
            poke(image, place, &whole[place as usize..place as usize + 3]);
        }
    }
}
