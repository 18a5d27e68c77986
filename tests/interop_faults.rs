//! What happens when the disk is full, the file is cut, or the server is killed.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};

use support::{Hub, Random, both, check_clean, directory, hub, missing, not_root, ok, run, text};

/// A small ext4 file system in a file; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(dir: &Path, megabytes: u64) -> Self {
        let (file, point) = (dir.join("small.ext4"), dir.join("mnt"));
        File::create(&file).unwrap().set_len(megabytes << 20).unwrap();
        ok("mkfs.ext4", &["-q", "-F", "-m", "0", text(&file)]);
        std::fs::create_dir(&point).unwrap();
        ok("mount", &["-o", "loop", text(&file), text(&point)]);
        Self(point)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run("umount", &["-l", text(&self.0)]);
    }
}

#[test]
fn a_full_file_system_is_told_to_the_client_and_costs_nothing_that_was_there() {
    if missing(&["mkfs.ext4", "mount", "qemu-io", "qemu-img"]) || not_root() {
        return;
    }
    let dir = directory();
    let small = SmallDisk::mount(dir.path(), 48);
    let image = small.0.join("a.qcow2");
    let export = format!("disk={}", text(&image));
    let server = Hub::start(&["--create", "1G", &export]);
    ok("qemu-io", &["-f", "raw", "-c", "write -P 5 0 8M", "-c", "flush", server.uri()]);
    let output = run("qemu-io", &["-f", "raw", "-c", "write -P 6 16M 32M", server.uri()]);
    let more = run("qemu-io", &["-f", "raw", "-c", "write -P 6 64M 32M", server.uri()]);
    let said = both(&output) + &both(&more);
    assert!(said.contains("No space left"), "{said}");
    // The server lives, and what was there is still there.
    ok("qemu-io", &["-f", "raw", "-c", "read -P 5 0 8M", server.uri()]);
    ok("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 64k", "-c", "flush", server.uri()]);
    server.stop();
    let checked = hub(&["image", "check", text(&image)]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{}", both(&checked));
    ok("qemu-io", &["-c", "read -P 5 0 1M", "-c", "read -P 7 1M 64k", text(&image)]);
}

#[test]
fn killed_in_the_middle_the_server_has_kept_what_was_flushed() {
    if missing(&["qemu-io", "qemu-img"]) {
        return;
    }
    let mut random = Random::new(21);
    for round in 0..4 {
        let dir = directory();
        let image = dir.path().join("a.qcow2");
        let export = format!("disk={}", text(&image));
        let server = Hub::start(&["--create", "4G", &export]);
        let flushed = ["-c", "write -P 1 0 8M", "-c", "write -P 2 100M 3M", "-c", "flush"];
        ok("qemu-io", &[&["-f", "raw"], &flushed[..], &[server.uri()]].concat());
        let mut writer = std::process::Command::new("qemu-img")
            .args(["bench", "-f", "raw", "-w", "-c", "60000", "-d", "8", "-s", "64k"])
            .args(["-o", "128M", "--flush-interval", "50", server.uri()])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30 + random.below(300)));
        server.kill();
        // It ends with an error, as its server is gone.
        let _ = writer.kill();
        let _ = writer.wait();

        let checked = hub(&["image", "check", text(&image)]);
        let code = checked.status.code();
        assert!(matches!(code, Some(0 | 3)), "round {round}: {}", both(&checked));
        let server = Hub::start(&[&export]);
        let reads = ["-c", "read -P 1 0 8M", "-c", "read -P 2 100M 3M", "-c", "write -P 3 0 1M"];
        ok("qemu-io", &[&["-f", "raw"], &reads[..], &[server.uri()]].concat());
        server.stop();
        ok("qemu-io", &["-c", "read -P 3 0 1M", "-c", "read -P 1 1M 7M", text(&image)]);
        let repaired = hub(&["image", "check", "--repair", "leaks", text(&image)]);
        assert!(repaired.status.success(), "round {round}: {}", both(&repaired));
        check_clean(&image);
    }
}

#[test]
fn a_truncated_image_answers_with_errors_and_not_with_zeroes() {
    if missing(&["qemu-io"]) {
        return;
    }
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let export = format!("disk={}", text(&image));
    let server = Hub::start(&["--create", "16M", &export]);
    // What is written with one request lies in any order.
    for part in ["write -P 1 0 1M", "write -P 1 1M 6M", "write -P 1 7M 1M"] {
        ok("qemu-io", &["-f", "raw", "-c", part, server.uri()]);
    }
    server.stop();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(4 << 20).unwrap();
    let server = Hub::start(&["--read-only", &export]);
    ok("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 0 1M", server.uri()]);
    let output = run("qemu-io", &["-r", "-f", "raw", "-c", "read 7M 1M", server.uri()]);
    assert!(both(&output).contains("Input/output error"), "{}", both(&output));
    let log = server.stop();
    assert!(log.contains("truncated"), "{log}");
}
