//! FAT12, FAT16 and FAT32 beside mkfs.fat and mtools.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub, missing_docs)]

mod support;

use std::fs::{self, File};
use std::path::Path;

use guest::{FileSystem, Status};
use support::damage::mutate;
use support::*;

const TOOLS: &[&str] = &["mkfs.fat", "mcopy", "mdel", "mattrib", "mtype"];

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
        vec![&"LC_ALL=C.UTF-8", &"mcopy", &"-s", &"-m", &"-i", &image];
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
    format(&image, size, &["-F", width, "-s", "1", "-n", "LABEL"]);
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
    let mut entry = [0; 32];
    disk(&image).read_at(&mut entry, node.0).unwrap();
    let first = u32::from(u16::from_le_bytes([entry[26], entry[27]]));
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
    for width in ["16", "32"] {
        let place = tempfile::tempdir().unwrap();
        let image = small(place.path(), width);
        mutate(&image, &[0..512, 512..40_000, 40_000..90_000, 550_000..700_000], 150);
    }
}
