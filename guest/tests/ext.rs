//! ext2, ext3 and ext4: images by mke2fs, compared with what the kernel shows of them.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use guest::{ErrorKind, FileSystem, Status};
use support::{
    Mounted, Wish, assert_same, blank, disk, make_tree, missing, no_root, run, truth_of_directory,
    truth_of_reader,
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

#[test]
fn a_dirty_image_reads_as_the_kernel_recovers_it() {
    let _ = ErrorKind::Corrupt;
    let _ = fs::read_dir("/");
}
