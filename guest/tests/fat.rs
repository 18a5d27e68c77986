//! FAT12, FAT16 and FAT32 beside mkfs.fat and mtools.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use guest::{FileSystem, Status};
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
    let expected = truth_of_directory(&tree, false);
    let kinds: &[(&str, u64, &[&str])] = &[
        ("fat12", 32 << 20, &["-F", "12", "-s", "32", "-n", "TWELVE"]),
        ("fat16", 64 << 20, &["-F", "16", "-n", "SIXTEEN"]),
        ("fat32", 64 << 20, &["-F", "32", "-s", "1", "-n", "LABEL"]),
        ("fat32", 40 << 20, &["-F", "32", "-s", "8", "-S", "4096"]),
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
