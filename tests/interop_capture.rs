//! Captures from qemu-nbd, and into images that qemu reads.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use sendense_hub::capture::{CaptureError, Changes, Progress, Source, Summary, Target, copy};
use support::{Hub, check_clean, compare, directory, make_disk, missing, ok, text};

/// A foreign server on a Unix socket; killed when dropped.
struct Server(Child);

impl Server {
    fn start(program: &str, socket: &Path, arguments: &[&str]) -> Self {
        let server = Self(Command::new(program).args(arguments).spawn().unwrap());
        let since = Instant::now();
        while UnixStream::connect(socket).is_err() {
            assert!(since.elapsed() < Duration::from_secs(30), "{program} does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn qemu(socket: &Path, arguments: &[&str]) -> Self {
        let always = ["--persistent", "--read-only", "--socket", text(socket)];
        Self::start("qemu-nbd", socket, &[&always, arguments].concat())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A TCP address that leads to a Unix socket.
fn forward(socket: &Path) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let socket = socket.to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&socket).unwrap());
            let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut from, mut to) = (client, server);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    address
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
    let qemu = Server::qemu(&socket, &["-f", "qcow2", text(&disk)]);
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
    let qemu = Server::qemu(&socket, &arguments);
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

#[test]
fn servers_with_one_connection_large_blocks_and_no_zeroing_are_sources_and_targets() {
    if missing(&["nbdkit", "nbdcopy"]) {
        return;
    }
    let dir = directory();
    let (raw, socket) = (dir.path().join("disk.raw"), dir.path().join("socket"));
    make_disk(&raw, 6 << 20, 33);
    let policy = "blocksize-error-policy=error";
    let blocks = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=512K"];
    let filters = ["--filter=nozero", "--filter=multi-conn", "--filter=blocksize-policy"];
    let arguments = ["--foreground", "--unix", text(&socket), "memory", "6M", policy];
    let arguments = [&filters[..], &arguments, &blocks, &["multi-conn-mode=disable"]].concat();
    let server = Server::start("nbdkit", &socket, &arguments);
    let target = Target::new(&forward(&socket), "");
    let source = Source::open(text(&raw)).unwrap();
    let send = |changes| copy(&source, &target, &changes, &Progress::new()).unwrap();
    let full = send(Changes::Everything);
    assert_eq!((full.bytes_sent, full.bytes_zeroed), (6 << 20, 0));
    let extents = send(Changes::Extents(vec![(5000, 10), (1 << 20, 1)]));
    assert_eq!(extents.bytes_sent, 2 * 4096);

    let remote = Source::open(&uri(&socket)).unwrap();
    let image = dir.path().join("disk.qcow2");
    let hub = Hub::start(&["--create", "6M", &format!("disk={}", text(&image))]);
    capture(&remote, &hub, &Changes::Everything).unwrap();
    capture(&remote, &hub, &Changes::Extents(vec![(70_000, 3), (6 << 20, 0)])).unwrap();
    drop((remote, server));
    hub.stop();
    compare(&raw, &image);
    check_clean(&image);
}
