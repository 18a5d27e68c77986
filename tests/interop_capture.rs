//! Captures from qemu-nbd, and into images that qemu reads.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use sendense_hub::capture::{CaptureError, Changes, Progress, Source, Summary, Target, copy};
use support::{Hub, check_clean, compare, directory, make_disk, missing, ok, text};

/// A qemu-nbd; killed when dropped.
struct Qemu(Child);

impl Qemu {
    fn start(socket: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--read-only", "--socket", text(socket)]).args(arguments);
        let qemu = Self(command.spawn().unwrap());
        let since = Instant::now();
        while !socket.exists() {
            assert!(since.elapsed() < Duration::from_secs(30), "qemu-nbd does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        qemu
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", text(socket))
}

fn capture(source: &Source, hub: &Hub, changes: &Changes) -> Result<Summary, CaptureError> {
    copy(source, &Target::new(hub.address(), "disk"), changes, &Progress::new())
}

#[test]
fn what_a_dirty_bitmap_of_qemu_tells_is_all_that_an_incremental_needs() {
    if missing(&["qemu-img", "qemu-io", "qemu-nbd"]) {
        return;
    }
    let dir = directory();
    let path = |name: &str| dir.path().join(name);
    let (raw, disk, socket) = (path("disk.raw"), path("disk.qcow2"), path("socket"));
    let (full, overlay) = (path("full.qcow2"), path("overlay.qcow2"));
    make_disk(&raw, 32 << 20, 31);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&disk)]);

    // One connection at a time is all that qemu-nbd allows if not told otherwise.
    let qemu = Qemu::start(&socket, &["-f", "qcow2", text(&disk)]);
    let hub = Hub::start(&["--create", "32M", &format!("disk={}", text(&full))]);
    let source = Source::open(&uri(&socket)).unwrap();
    assert!(source.changed_extents(None).is_err());
    let summary = capture(&source, &hub, &Changes::Everything).unwrap();
    assert!(summary.bytes_zeroed > 0, "{summary:?}");
    drop((source, qemu));
    hub.stop();
    compare(&raw, &full);
    check_clean(&full);

    ok("qemu-img", &["bitmap", "--add", text(&disk), "since-full"]);
    for write in ["write -P 7 3M 1M", "write -z 9M 2M", "write -P 8 20000000 512"] {
        ok("qemu-io", &["-f", "qcow2", "-c", write, text(&disk)]);
    }
    ok("qemu-img", &["bitmap", "--disable", text(&disk), "since-full"]);
    std::fs::remove_file(&socket).unwrap();
    let arguments = ["-f", "qcow2", "--shared", "8", "--bitmap", "since-full", text(&disk)];
    let qemu = Qemu::start(&socket, &arguments);
    let create = ["--create", "0", "--backing", text(&full), &format!("disk={}", text(&overlay))];
    let hub = Hub::start(&create);
    let source = Source::open(&uri(&socket)).unwrap();
    assert_eq!(source.bitmaps(), ["since-full"]);
    let changed = source.changed_extents(None).unwrap();
    assert_eq!(changed, source.changed_extents(Some("since-full")).unwrap());
    let other = source.changed_extents(Some("other")).unwrap_err().to_string();
    assert!(other.contains("it offers since-full"), "{other}");
    let length: u64 = changed.iter().map(|(_, length)| length).sum();
    assert!((3 << 20..4 << 20).contains(&length), "{changed:?}");
    let summary = capture(&source, &hub, &Changes::Extents(changed)).unwrap();
    assert_eq!(summary.bytes_sent + summary.bytes_zeroed, length);
    assert!(summary.bytes_zeroed >= 2 << 20, "{summary:?}");
    drop((source, qemu));
    hub.stop();
    check_clean(&overlay);
    ok("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", text(&disk), text(&overlay)]);
}

#[test]
fn a_raw_file_becomes_an_image_that_qemu_finds_equal() {
    if missing(&["qemu-img"]) {
        return;
    }
    let dir = directory();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    make_disk(&raw, (48 << 20) + 512, 32);
    let size = ((48 << 20) + 512).to_string();
    let hub = Hub::start(&["--create", &size, &format!("disk={}", text(&image))]);
    let target = Target { reads_as_zeroes: true, ..Target::new(hub.address(), "disk") };
    let source = Source::open(text(&raw)).unwrap();
    let summary = copy(&source, &target, &Changes::Everything, &Progress::new()).unwrap();
    assert_eq!(summary.bytes_zeroed, 0);
    hub.stop();
    compare(&raw, &image);
    check_clean(&image);
}
