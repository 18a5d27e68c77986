//! Who may have an image open at the same time: we and qemu's programs exclude each other as they
//! exclude themselves.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    unreachable_pub,
    dead_code,
    missing_docs
)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use qcow2::{CreateOptions, ErrorKind, Image, OpenOptions, Repair, check, create};
use support::{missing, run, text};

fn image_in(dir: &Path) -> PathBuf {
    let path = dir.join("disk.qcow2");
    create(&path, &CreateOptions::new(1 << 20)).unwrap();
    path
}

/// qemu-io with an image open, until dropped.
struct QemuIo(Child);

impl QemuIo {
    /// Starts it and waits until the image is open.
    fn open(arguments: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"length\n").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("MiB")));
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn refusal(path: &Path, options: &OpenOptions) -> String {
    let error = Image::open(path, options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    error.to_string()
}

#[test]
fn while_qemu_writes_nobody_here_reads_writes_or_checks() {
    if missing("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path());
    let qemu = QemuIo::open(&[text(&path)]);
    let message = refusal(&path, &OpenOptions::new());
    let holder = format!("process {} (qemu-io), which has it open for writing", qemu.0.id());
    assert!(message.contains(&holder), "{message}");
    refusal(&path, &OpenOptions::new().read_only());
    assert_eq!(check(&path, Repair::None).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(check(&path, Repair::All).unwrap_err().kind(), ErrorKind::Locked);
    drop(qemu);
    Image::open(&path, &OpenOptions::new()).unwrap();
}

#[test]
fn readers_share_with_qemu_and_keep_writers_out() {
    if missing("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path());
    let _qemu = QemuIo::open(&["-r", text(&path)]);
    let ours = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
    check(&path, Repair::None).unwrap();
    let message = refusal(&path, &OpenOptions::new());
    assert!(message.contains("open for reading"), "{message}");
    assert_eq!(check(&path, Repair::Leaks).unwrap_err().kind(), ErrorKind::Locked);
    let read = run("qemu-io", &["-r", "-c", "read 0 512", text(&path)]);
    assert!(read.status.success());
    let write = run("qemu-io", &["-c", "write 0 512", text(&path)]);
    assert!(!write.status.success());
    ours.close().unwrap();
}

#[test]
fn while_we_write_qemu_stays_out_unless_forced() {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path());
    let ours = Image::open(&path, &OpenOptions::new()).unwrap();
    refusal(&path, &OpenOptions::new());
    refusal(&path, &OpenOptions::new().read_only());
    let image = text(&path);
    for refused in [
        &["info", image][..],
        &["check", image],
        &["convert", "-O", "raw", image, "/dev/null"],
        &["snapshot", "-c", "one", image],
    ] {
        assert!(!run("qemu-img", refused).status.success(), "{refused:?}");
    }
    assert!(run("qemu-img", &["info", "-U", image]).status.success());
    ours.close().unwrap();
    assert!(run("qemu-img", &["check", image]).status.success());
}

#[test]
fn a_backing_file_can_be_read_by_others_and_written_by_nobody() {
    if missing("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = image_in(dir.path());
    let top = dir.path().join("top.qcow2");
    let options = CreateOptions::new(1 << 20).backing("disk.qcow2", qcow2::BackingFormat::Qcow2);
    create(&top, &options).unwrap();
    let _ours = Image::open(&top, &OpenOptions::new()).unwrap();
    let image = text(&base);
    assert!(run("qemu-io", &["-r", "-c", "read 0 512", image]).status.success());
    assert!(!run("qemu-io", &["-c", "write 0 512", image]).status.success());
    refusal(&base, &OpenOptions::new());
}

#[test]
fn an_image_that_is_open_without_locks_keeps_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path());
    let mut options = OpenOptions::new().read_only();
    options.lock = false;
    let _ours = Image::open(&path, &options).unwrap();
    Image::open(&path, &OpenOptions::new()).unwrap();
}
