//! FAT12, FAT16 and FAT32 beside mkfs.fat and mtools.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub, missing_docs)]

mod support;

use std::fs::{self, File};
use std::path::Path;

use guest::{Cursor, FileSystem, Node, Status};
use support::damage::{mutate, walk};
use support::*;

const TOOLS: &[&str] = &["mkfs.fat", "mcopy", "mdel", "mattrib", "mdir"];

fn format(image: &Path, size: u64, options: &[&str]) {
    blank(image, size);
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
    for option in options {
        arguments.push(option);
    }
    arguments.push(&image);
    run("mkfs.fat", &arguments);
}

fn fill(image: &Path, tree: &Path) {
    let mut names: Vec<_> = fs::read_dir(tree).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"LC_ALL=C.UTF-8", &"TZ=UTC", &"mcopy", &"-s", &"-m", &"-i", &image];
    for name in &names {
        arguments.push(name);
    }
    arguments.push(&"::");
    run("env", &arguments);
}

fn open(image: &Path) -> Box<dyn FileSystem> {
    guest::fs::open(&disk(image)).unwrap()
}

#[test]
fn every_kind_of_fat_shows_the_tree_that_was_copied() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let tree = place.path().join("tree");
    fs::create_dir(&tree).unwrap();
    make_tree(&tree, Wish { many: 200, unix: false, huge: false });
    // mtools leaves out of names what does not fit into 16 bits.
    fs::rename(
        tree.join("ümläut-\u{4e2d}\u{6587}-\u{1f600}.txt"),
        tree.join("ümläut-\u{4e2d}.txt"),
    )
    .unwrap();
    let expected = truth_of_directory(&tree, false);
    let kinds: &[(&str, u64, &[&str])] = &[
        ("fat12", 32 << 20, &["-F", "12", "-s", "32", "-n", "TWELVE"]),
        ("fat16", 64 << 20, &["-F", "16", "-n", "SIXTEEN"]),
        ("fat32", 64 << 20, &["-F", "32", "-s", "1", "-n", "LABEL"]),
        ("fat32", 300 << 20, &["-F", "32", "-s", "1", "-S", "4096"]),
    ];
    for (kind, size, options) in kinds {
        let image = place.path().join("image");
        format(&image, *size, options);
        fill(&image, &tree);
        let fs = open(&image);
        assert_eq!(fs.about().kind, *kind);
        assert_eq!(fs.about().status, Status::Clean);
        assert_same(&truth_of_reader(&*fs, false, 17), &expected);
        fs::remove_file(&image).unwrap();
    }
}

/// A small volume with a few directories and files.
fn small(place: &Path, width: &str) -> std::path::PathBuf {
    let (tree, image) = (place.join("tree"), place.join("image"));
    fs::create_dir_all(tree.join("a/b")).unwrap();
    for index in 0..30_u32 {
        fs::write(tree.join(format!("a/a long name {index}")), noise(9, 3000)).unwrap();
    }
    fs::write(tree.join("file"), noise(3, 100_000)).unwrap();
    // mtools takes a small FAT32 for a FAT16, so it is made small once it is filled.
    let size = if width == "32" { 36 } else { 4 } << 20;
    let sectors = if width == "12" { "4" } else { "1" };
    format(&image, size, &["-F", width, "-s", sectors, "-n", "LABEL"]);
    fill(&image, &tree);
    if width == "32" {
        poke(&image, 32, &8192_u32.to_le_bytes());
        File::options().write(true).open(&image).unwrap().set_len(4 << 20).unwrap();
    }
    image
}

#[test]
fn a_chain_that_loops_or_ends_early_is_told_and_not_read() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    // A FAT32 of a few MiB has fewer clusters than the type would need.
    let image = small(place.path(), "32");
    let fs = open(&image);
    assert_eq!((&*fs.about().kind, &*fs.about().label), ("fat32", "LABEL"));
    let node = fs.lookup(fs.root(), b"FILE").unwrap().unwrap();
    let mut buf = vec![0; 100_000];
    assert_eq!(fs.read_at(node, &mut buf, 0).unwrap(), buf.len());
    assert_eq!(buf, noise(3, 100_000));
    let first = u32::from(first_of(&image, node));
    // The tables begin after 32 reserved sectors.
    let slot = 32 * 512 + u64::from(first + 50) * 4;
    for (next, said) in [
        (first + 3, "comes back"),
        (0x0fff_ffff, "are needed"),
        (0, "is free"),
        (0x0fff_fff7, "is bad"),
        (0x00ff_ffff, "was named"),
    ] {
        poke(&image, slot, &next.to_le_bytes());
        let error = open(&image).read_at(node, &mut buf, 0).unwrap_err();
        assert!(error.message.contains(said), "{error}");
    }
    poke(&image, slot, &(first + 51).to_le_bytes());
    poke(&image, 32 * 512 + 4, &0x07ff_ffff_u32.to_le_bytes());
    assert!(matches!(open(&image).about().status, Status::Stale(_)));
}

#[test]
fn mutated_volumes_never_panic_or_hang() {
    if missing(TOOLS) {
        return;
    }
    for width in ["12", "16", "32"] {
        let place = tempfile::tempdir().unwrap();
        let image = small(place.path(), width);
        mutate(&image, &[0..512, 512..40_000, 40_000..90_000, 550_000..700_000], 120);
    }
}

/// The lower half of the first cluster that a node names.
fn first_of(image: &Path, node: Node) -> u16 {
    let mut first = [0; 2];
    disk(image).read_at(&mut first, node.0 + 26).unwrap();
    u16::from_le_bytes(first)
}

fn find(fs: &dyn FileSystem, path: &str) -> Node {
    let step = |node, name: &str| fs.lookup(node, name.as_bytes()).unwrap().unwrap();
    path.split('/').fold(fs.root(), step)
}

/// First bytes of the first table and of cluster 2.
fn geometry(image: &Path) -> (u64, u64) {
    let mut boot = [0; 512];
    disk(image).read_at(&mut boot, 0).unwrap();
    let table = u64::from(u16::from_le_bytes([boot[14], boot[15]])) * 512;
    let length = u64::from(u32::from_le_bytes(boot[36..40].try_into().unwrap())) * 512;
    (table, table + length * u64::from(boot[16]))
}

/// A short entry, of 2000-01-01.
fn short(name: &[u8], attributes: u8, first: u16, size: u8) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    entry[24..26].copy_from_slice(&(20_u16 << 9 | 1 << 5 | 1).to_le_bytes());
    entry[26..28].copy_from_slice(&first.to_le_bytes());
    entry[28] = size;
    entry
}

/// The slots of an empty file with a long name.
fn long(name: &str, alias: &[u8]) -> Vec<u8> {
    let sum = alias.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let mut units: Vec<u16> = name.encode_utf16().chain([0]).collect();
    units.resize(units.len().next_multiple_of(13), 0xffff);
    let mut slots = Vec::new();
    for (index, part) in units.chunks(13).enumerate().rev() {
        let last = index == units.len() / 13 - 1;
        let bytes: Vec<u8> = part.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        slots.push(index as u8 + 1 + if last { 0x40 } else { 0 });
        slots.extend(&bytes[..10]);
        slots.extend([0x0f, 0, sum]);
        slots.extend(&bytes[10..22]);
        slots.extend([0, 0]);
        slots.extend(&bytes[22..]);
    }
    slots.extend(short(alias, 0x20, 0, 0));
    slots
}

#[test]
fn a_directory_of_10_000_names_lists_in_pages_once_each() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    format(&image, 64 << 20, &["-F", "32", "-s", "1"]);
    // mtools takes minutes to make as many long names, but lists them fast.
    let mut directory =
        [short(b".          ", 0x10, 3, 0), short(b"..         ", 0x10, 0, 0)].concat();
    for index in 0..10_000 {
        let name = format!("entry number {index}");
        directory.extend(long(&name, format!("E{index:07}TXT").as_bytes()));
    }
    let end = 3 + directory.len().div_ceil(512) as u32;
    let chain = (4..end).chain([0x0fff_ffff]).flat_map(u32::to_le_bytes);
    let (table, heap) = geometry(&image);
    poke(&image, table + 3 * 4, &chain.collect::<Vec<_>>());
    poke(&image, heap, &short(b"MANY       ", 0x10, 3, 0));
    poke(&image, heap + 512, &directory);
    let listed = run("mdir", &[&"-b", &"-i", &image, &"::MANY"]);
    let listed: Vec<_> = listed.lines().map(|line| line.strip_prefix("::/").unwrap()).collect();
    let fs = open(&image);
    let mut found = truth_of_reader(&*fs, false, 700);
    assert!(found.remove(&b"MANY"[..]).is_some());
    assert_eq!((found.len(), listed.len()), (10_000, 10_000));
    assert!(listed.iter().all(|path| found.contains_key(path.as_bytes())));
    assert_eq!(find(&*fs, "many/ENTRY number 9999"), find(&*fs, "many/e0009999.txt"));
    assert_eq!(fs.lookup(find(&*fs, "many"), b"entry number 10000").unwrap(), None);
}

#[test]
fn a_file_among_many_gaps_is_read_piece_by_piece() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    for (width, sectors) in [("12", "4"), ("16", "1")] {
        let (tree, image) = (place.path().join(width), place.path().join("image"));
        fs::create_dir(&tree).unwrap();
        for index in 10..50 {
            fs::write(tree.join(format!("part-{index}")), noise(index, 50_000)).unwrap();
        }
        format(&image, 4 << 20, &["-F", width, "-s", sectors]);
        fill(&image, &tree);
        let gone: Vec<String> = (10..50).step_by(2).map(|at| format!("::part-{at}")).collect();
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"-i", &image];
        for name in &gone {
            fs::remove_file(tree.join(&name[2..])).unwrap();
            arguments.push(name);
        }
        run("mdel", &arguments);
        fs::write(tree.join("large"), noise(7, 2_800_000)).unwrap();
        run("mcopy", &[&"-i", &image, &tree.join("large"), &"::"]);
        let fs = open(&image);
        assert!(pieces(&*fs, find(&*fs, "large")) > 10);
        assert_same(&truth_of_reader(&*fs, false, 17), &truth_of_directory(&tree, false));
        fs::remove_file(&image).unwrap();
    }
}

#[test]
fn attributes_times_and_hidden_short_names_are_those_of_the_entry() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let (tree, image) = (place.path().join("tree"), place.path().join("image"));
    fs::create_dir(&tree).unwrap();
    let path = tree.join("A long name.text");
    fs::write(&path, b"read only").unwrap();
    fs::write(tree.join("plain"), b"").unwrap();
    run("touch", &[&"-d", &"@1700000000", &path]);
    format(&image, 1 << 20, &["-F", "12"]);
    fill(&image, &tree);
    run("mattrib", &[&"-i", &image, &"+r", &"::A long name.text"]);
    let fs = open(&image);
    let node = find(&*fs, "a LONG name.text");
    let stat = fs.stat(node).unwrap();
    assert_eq!((stat.mode, stat.size), (0o444, 9));
    assert_eq!(stat.modified.map(|time| time.seconds), Some(1_700_000_000));
    assert_eq!(fs.stat(find(&*fs, "plain")).unwrap().mode, 0o644);
    assert_eq!(find(&*fs, "ALONGN~1.TEX"), node);
    assert_eq!(find(&*fs, "alongn~1.tex"), node);
    assert_eq!(fs.lookup(fs.root(), b"ALONGN~2.TEX").unwrap(), None);
}

#[test]
fn a_fat32_with_fewer_clusters_than_the_type_wants_is_still_one() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("image");
    format(&image, 4 << 20, &["-F", "32", "-s", "1", "-n", "TINY"]);
    // mtools takes it for a FAT16, so the file in cluster 3 is put there by hand.
    let (table, heap) = geometry(&image);
    poke(&image, table + 3 * 4, &0x0fff_ffff_u32.to_le_bytes());
    poke(&image, heap + 32, &short(b"FILE    TXT", 0x20, 3, 5));
    poke(&image, heap + 512, b"hello");
    let fs = open(&image);
    assert_eq!((&*fs.about().kind, &*fs.about().label), ("fat32", "TINY"));
    let mut buf = [0; 9];
    assert_eq!(fs.read_at(find(&*fs, "file.txt"), &mut buf, 0).unwrap(), 5);
    assert_eq!(buf[..5], *b"hello");
}

#[test]
fn a_directory_in_itself_is_the_same_node_again() {
    if missing(TOOLS) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let image = small(place.path(), "16");
    let fs = open(&image);
    let (outer, inner) = (find(&*fs, "a"), find(&*fs, "a/b"));
    let first = first_of(&image, outer);
    poke(&image, inner.0 + 26, &first.to_le_bytes());
    let fs = open(&image);
    assert_eq!(find(&*fs, "a/b/b/b"), inner);
    let names = |node| fs.list(node, Cursor::default(), 100).unwrap();
    assert_eq!(names(inner), names(outer));
    walk(&*fs);
    // What claims to be in the clusters of a file is none.
    let file = first_of(&image, find(&*fs, "file"));
    poke(&image, inner.0 + 26, &file.to_le_bytes());
    let error = open(&image).list(inner, Cursor::default(), 9).unwrap_err();
    assert!(error.message.contains("does not begin with itself"), "{error}");
}
