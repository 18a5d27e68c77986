//! NTFS against ntfs-3g: the same trees, however they lie on the disk.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use guest::{
    Attributes, Cursor, ErrorKind, FileSystem, FileType, Node, Place, Status, fs as guest_fs,
};
use support::{
    Mounted, Wish, assert_same, blank, disk, make_tree, missing, no_root, noise, poke, run,
};

fn unable() -> bool {
    missing(&["mkntfs", "ntfs-3g", "setfattr"]) || no_root()
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
    fn mount(&self, options: &str) -> Mounted {
        let at = self.dir.path().join("mount");
        fs::create_dir_all(&at).unwrap();
        run("ntfs-3g", &[&self.image(), &at, &"-o", &options]);
        Mounted { at }
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
fn a_tree_with_a_huge_file_is_read_as_ntfs_3g_reads_it() {
    whole_tree(400 << 20, 4096, Wish { many: 10_000, unix: false, huge: true });
}

#[test]
fn a_tree_in_clusters_of_one_sector_is_read_as_ntfs_3g_reads_it() {
    whole_tree(128 << 20, 512, Wish { many: 1500, unix: false, huge: false });
}

#[test]
fn a_tree_in_clusters_larger_than_index_blocks_loses_no_names() {
    whole_tree(256 << 20, 65_536, Wish { many: 3000, unix: false, huge: false });
}
