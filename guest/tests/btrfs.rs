//! btrfs against the kernel.
#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::OsStr;
use std::path::Path;

use guest::Status;
use support::*;

fn make(image: &Path, options: &[&str]) {
    blank(image, 400 << 20);
    let mut arguments: Vec<&dyn AsRef<OsStr>> = vec![&"-q"];
    arguments.extend(options.iter().map(|option| option as &dyn AsRef<OsStr>));
    arguments.push(&image);
    run("mkfs.btrfs", &arguments);
}

fn unfit() -> bool {
    missing(&["mkfs.btrfs", "btrfs", "mount"]) || no_root()
}

#[test]
fn a_large_tree_reads_as_the_kernel_reads_it() {
    if unfit() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    make(&image, &["-L", "label"]);
    let at = dir.path().join("at");
    let truth = {
        let _mounted = Mounted::by_kernel(&image, &at, "noatime");
        make_tree(&at, Wish { many: 12_000, unix: true, huge: true });
        truth_of_directory(&at, true)
    };
    let fs = guest::fs::open(&disk(&image)).unwrap();
    assert_eq!(fs.about().status, Status::Clean);
    assert_eq!(fs.about().label, "label");
    assert_same(&truth_of_reader(&*fs, true, 1000), &truth);
}
