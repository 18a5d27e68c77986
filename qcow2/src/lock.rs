//! Image locks that qemu's programs take and respect: open-file-description locks on single bytes.
//!
//! qemu shares an image through two sets of bytes: a lock on byte 100 + *n* says "I use permission
//! *n*", one on byte 200 + *n* says "I share permission *n* with nobody". Both are read locks, so
//! that holders do not hinder each other; whoever comes tests the opposite byte for a lock of
//! another. (qemu's `block/file-posix.c` defines the bytes.)

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::error::{Error, ErrorKind, Result};

/// Every byte that may carry a lock.
const PERMISSION_BYTES: std::ops::Range<i64> = USED..300;
/// First byte of the permissions in use.
const USED: i64 = 100;
/// First byte of the permissions that are not shared.
const UNSHARED: i64 = 200;
/// Permission to read and rely on what was read.
const CONSISTENT_READ: i64 = 0;
/// Permission to write.
const WRITE: i64 = 1;
/// Permission to change the length.
const RESIZE: i64 = 3;

/// What the holder does with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Reads; other readers are welcome, writers are not.
    Read,
    /// Writes; readers are welcome in principle, but those that rely on what they read stay away by
    /// themselves.
    Write,
}

impl Mode {
    fn used(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// Permissions that no other may use.
    const UNSHARED: &[i64] = &[WRITE, RESIZE];
}

fn flock(kind: i32, byte: i64) -> libc::flock {
    #[allow(clippy::cast_possible_truncation, reason = "the constants of fcntl(2) are small")]
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// File systems that know no such locks: the image is used without.
fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS)
}

/// Takes the locks of `mode` on `file`; they last until [`unlock`] or until the file is closed.
///
/// # Errors
/// `Locked`, with the holder where it can be told; `Io`.
pub(crate) fn lock(file: &File, path: &Path, mode: Mode) -> Result<()> {
    let result = try_lock(file, path, mode);
    if result.is_err() {
        unlock(file);
    }
    result
}

fn try_lock(file: &File, path: &Path, mode: Mode) -> Result<()> {
    let used = mode.used().iter().map(|n| USED + n);
    let unshared = Mode::UNSHARED.iter().map(|n| UNSHARED + n);
    for byte in used.chain(unshared) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&flock(libc::F_RDLCK, byte))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(held(file, path, mode)),
            Err(errno) if is_unsupported(errno) => return Ok(()),
            Err(errno) => return Err(Error::io("cannot lock the image", errno.into())),
        }
    }
    let against_us = mode.used().iter().map(|n| UNSHARED + n);
    let against_them = Mode::UNSHARED.iter().map(|n| USED + n);
    for byte in against_us.chain(against_them) {
        // Would a write lock collide with anybody else's lock?
        let mut probe = flock(libc::F_WRLCK, byte);
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)) {
            Ok(_) if i32::from(probe.l_type) == libc::F_UNLCK => {}
            Ok(_) => return Err(held(file, path, mode)),
            Err(errno) if is_unsupported(errno) => return Ok(()),
            Err(errno) => return Err(Error::io("cannot test the image's locks", errno.into())),
        }
    }
    Ok(())
}

/// Releases every lock of this open file.
pub(crate) fn unlock(file: &File) {
    let mut everything = flock(libc::F_UNLCK, 0);
    everything.l_len = 0;
    // Fails only where there are no such locks at all.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&everything));
}

fn held(file: &File, path: &Path, mode: Mode) -> Error {
    let wish = match mode {
        Mode::Read => "reading",
        Mode::Write => "writing",
    };
    let holder = holder_of(file).map_or_else(
        || "another process (which one cannot be told from here)".to_owned(),
        |holder| {
            let Holder { pid, name, writes } = holder;
            let how = if writes { "writing" } else { "reading" };
            format!("process {pid} ({name}), which has it open for {how}")
        },
    );
    Error::new(
        ErrorKind::Locked,
        format!("cannot lock the image for {wish}: it is in use by {holder}; close it there first"),
    )
    .in_file(path)
}

/// Who has an image open.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
    writes: bool,
}

/// A process that holds image locks on the same file, found through /proc as far as that can be
/// read; one that writes if there is one.
fn holder_of(file: &File) -> Option<Holder> {
    let meta = file.metadata().ok()?;
    let device = meta.dev();
    let inode = format!(
        "{:02x}:{:02x}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device),
        meta.ino()
    );
    let ours = (std::process::id(), file.as_raw_fd().to_string());
    let mut reader = None;
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(files) = std::fs::read_dir(process.path().join("fdinfo")) else {
            continue;
        };
        for info in files.flatten() {
            // Our own descriptor has those locks that it got so far.
            if pid == ours.0 && info.file_name().to_str() == Some(&*ours.1) {
                continue;
            }
            let text = std::fs::read_to_string(info.path()).unwrap_or_default();
            let Some(writes) = use_in(&text, &inode) else {
                continue;
            };
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            let name = name.trim_end().to_owned();
            let holder = Holder { pid, name, writes };
            if writes {
                return Some(holder);
            }
            reader = Some(holder);
        }
    }
    reader
}

/// Whether an open file, told by its `fdinfo` text, has image locks on `inode`, and if so whether
/// it has those of a writer.
fn use_in(fdinfo: &str, inode: &str) -> Option<bool> {
    let bytes: Vec<i64> = fdinfo
        .lines()
        .filter_map(|line| {
            // lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101
            let mut fields = line.strip_prefix("lock:")?.split_whitespace().skip(1);
            let kind = fields.next()?;
            let place = fields.nth(3)?;
            let first = fields.next()?.parse::<i64>().ok()?;
            let last = fields.next()?.parse::<i64>().ok()?;
            (kind == "OFDLCK" && place == inode).then_some(first..=last)
        })
        .flat_map(|range| PERMISSION_BYTES.filter(move |byte| range.contains(byte)))
        .collect();
    (!bytes.is_empty()).then(|| bytes.contains(&(USED + WRITE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn readers_share_and_a_writer_excludes_everybody() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (open(file.path()), open(file.path()), open(file.path()));
        lock(&a, file.path(), Mode::Read).unwrap();
        lock(&b, file.path(), Mode::Read).unwrap();
        let error = lock(&c, file.path(), Mode::Write).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        unlock(&a);
        drop(b);
        lock(&c, file.path(), Mode::Write).unwrap();
        for mode in [Mode::Read, Mode::Write] {
            let error = lock(&a, file.path(), mode).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked);
        }
        unlock(&c);
        lock(&a, file.path(), Mode::Write).unwrap();
    }

    #[test]
    fn a_refusal_names_the_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(file.path()), open(file.path()));
        lock(&a, file.path(), Mode::Write).unwrap();
        let error = lock(&b, file.path(), Mode::Write).unwrap_err().to_string();
        let holder = format!("process {} (", std::process::id());
        assert!(error.contains(&holder), "{error}");
        assert!(error.contains("open for writing"), "{error}");
    }

    #[test]
    fn a_holder_is_told_by_its_inode_and_its_bytes() {
        let text = "pos:\t0\nlock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101\n\
                    lock:\t2: OFDLCK  ADVISORY  READ -1 fe:00:1234 201 201\n";
        assert_eq!(use_in(text, "fe:00:1234"), Some(true));
        assert_eq!(use_in(text, "fe:00:123"), None);
        assert_eq!(use_in(&text.replace("100 101", "100 100"), "fe:00:1234"), Some(false));
        assert_eq!(use_in("lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1 5 9", "fe:00:1"), None);
        assert_eq!(use_in("lock: broken\nlock:", "fe:00:1"), None);
    }
}
