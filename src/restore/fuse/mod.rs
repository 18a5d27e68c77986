//! The trees of a mount in a directory of this machine, through FUSE: read-only, for `cp` and `grep`.
//!
//! What must stay true:
//!
//! * Nothing in a guest's tree leads out of its volume's directory: links are rewritten (`links`), devices
//!   and pipes are files that cannot be opened, names are checked.
//! * Set-id bits, devices and programs have no effect: `nosuid`, `nodev`, `noexec`.
//! * Requests have threads of their own. Nobody waits for whoever holds a file open: an unmount takes the
//!   directory away at once, and what is still open fails.
//! * Only whoever runs the hub may look into it.

mod directories;
mod inodes;
mod links;
mod server;
#[cfg(test)]
mod tests;

use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use guest::Tree;
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
use rustix::mount::UnmountFlags;

use self::server::{Server, Shared};

/// How the mounts are told apart from others, in `/proc/self/mountinfo`.
const SOURCE: &str = "sendense-restore";
/// Threads that answer requests of one mount.
const THREADS: usize = 4;
/// KiB that the kernel reads ahead of whoever reads a file in order: several requests of the longest kind.
const READ_AHEAD_KIB: u32 = 4096;

/// Trees that are mounted; unmounted when dropped.
pub struct FuseTree {
    at: PathBuf,
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    /// The directory was made for it.
    made: bool,
}

impl FuseTree {
    /// Mounts `volumes`, each a directory of its name, at `at`: an empty directory, or none yet.
    ///
    /// # Errors
    /// A sentence: where it is no such directory, or FUSE is not there.
    pub fn mount(at: &Path, volumes: Vec<(String, Arc<dyn Tree>)>) -> Result<Self, String> {
        let made = prepare(at)?;
        let shared = Arc::new(Shared::new(volumes)?);
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName(SOURCE.to_owned()),
            MountOption::RO,
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoExec,
            MountOption::NoAtime,
            MountOption::DefaultPermissions,
        ];
        config.acl = SessionACL::Owner;
        config.n_threads = Some(THREADS);
        let session = Session::new(Server::new(Arc::clone(&shared)), at, &config)
            .and_then(Session::spawn)
            .map_err(|error| {
                if made {
                    let _ = fs::remove_dir(at);
                }
                format!("{} cannot be mounted with FUSE: {error}", at.display())
            })?;
        read_ahead(at);
        Ok(Self { at: at.to_owned(), shared, session: Some(session), made })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Requests that are being answered, and files and directories that are open.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight()
    }

    /// When it was used last.
    pub fn last_use(&self) -> Instant {
        self.shared.last_use()
    }

    /// Takes it away, open files or not: those fail from now on. The trees are let go of.
    pub fn unmount(self) {
        drop(self);
    }

    fn end(&mut self) {
        let Some(session) = self.session.take() else { return };
        self.shared.close();
        // The session unmounts the path where its file system still lives, and it lives on below open
        // files: after a detach that would be a second time, and hit whatever was mounted there
        // meanwhile. So the session goes first, and what it could not take away because it is in use,
        // and is still this program's, is detached.
        drop(session);
        if is_mounted(&self.at) {
            detach(&self.at);
        }
        if self.made {
            let _ = fs::remove_dir(&self.at);
        }
    }
}

impl Drop for FuseTree {
    fn drop(&mut self) {
        self.end();
    }
}

/// Lets the kernel read ahead in what is mounted at `at`, as far as this program may say so: by itself it
/// reads one short request after the other.
fn read_ahead(at: &Path) {
    if let Ok(About { device: (major, minor), .. }) = about(at) {
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        let _ = fs::write(path, READ_AHEAD_KIB.to_string());
    }
}

/// Makes sure that `at` is an empty directory, no link, and nothing is mounted there; whether it was
/// made. What is mounted there may be this program's own: it is not asked for anything, for the answer
/// could be waited for for ever.
fn prepare(at: &Path) -> Result<bool, String> {
    let what = |error: std::io::Error| format!("{}: {error}", at.display());
    let parent = at.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = about(parent.unwrap_or(Path::new("."))).map_err(what)?;
    match about(at) {
        Ok(found) if !found.is_directory => Err(format!("{} is no directory", at.display())),
        Ok(found) if found.device != parent.device => {
            Err(format!("something is mounted at {} already", at.display()))
        }
        Ok(_) if fs::read_dir(at).map_err(what)?.next().is_some() => {
            Err(format!("{} is not empty", at.display()))
        }
        Ok(_) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs::DirBuilder::new().mode(0o700).create(at).map_err(what)?;
            Ok(true)
        }
        Err(error) => Err(what(error)),
    }
}

struct About {
    is_directory: bool,
    device: (u32, u32),
}

/// What the kernel knows of a path, without asking whoever serves it.
fn about(path: &Path) -> std::io::Result<About> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE)?;
    Ok(About {
        is_directory: FileType::from_raw_mode(found.stx_mode.into()).is_dir(),
        device: (found.stx_dev_major, found.stx_dev_minor),
    })
}

/// Takes a mount out of the tree of directories; whoever uses it keeps what is left of it.
fn detach(at: &Path) -> bool {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    match rustix::mount::unmount(at, flags) {
        Ok(()) => true,
        Err(rustix::io::Errno::PERM) => {
            let mut command = Command::new("fusermount3");
            command.args(["-u", "-q", "-z", "--"]).arg(at);
            command.status().is_ok_and(|status| status.success())
        }
        Err(_) => false,
    }
}

/// Takes away the mounts below `root` that a hub has left which was killed, and their directories where
/// they are empty. To be called before the first mount. Gives how many there were.
pub fn clear_stale(root: &Path) -> usize {
    let Ok(root) = root.canonicalize() else { return 0 };
    let mut mounts = mounted_below(&root);
    mounts.reverse();
    let mut cleared = 0;
    for at in mounts {
        if detach(&at) {
            let _ = fs::remove_dir(&at);
            cleared += 1;
        } else {
            tracing::warn!(path = %at.display(), "a stale mount cannot be taken away");
        }
    }
    cleared
}

/// Whether this program has something mounted at `at`; where that cannot be told, it has.
fn is_mounted(at: &Path) -> bool {
    let known = at.parent().and_then(|parent| parent.canonicalize().ok()).zip(at.file_name());
    known.is_none_or(|(parent, name)| mounted_below(&parent).contains(&parent.join(name)))
}

/// Mounts of this program below `root`, in the order in which they were made.
fn mounted_below(root: &Path) -> Vec<PathBuf> {
    let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let lines = text.split(|b| *b == b'\n');
    let ours = lines.filter_map(|line| {
        let mut fields = line.split(|b| *b == b' ');
        let at = fields.nth(4)?;
        let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, source) = (fields.next()?, fields.next()?);
        let own = kind.starts_with(b"fuse") && source == SOURCE.as_bytes();
        own.then(|| PathBuf::from(std::ffi::OsString::from_vec(unescape(at))))
    });
    ours.filter(|at| at.starts_with(root) && at != root).collect()
}

/// Undoes the `\NNN` of the kernel's tables.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        let code = (*first == b'\\').then(|| after.get(..3)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => bytes.push(*first),
        }
    }
    bytes
}

/// Who runs the hub, for what has no owner in a guest.
fn owner() -> (u32, u32) {
    fs::metadata("/proc/self").map_or((0, 0), |m| (m.uid(), m.gid()))
}

/// A name's bytes as the kernel's calls take them.
fn os(name: &[u8]) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(name)
}
