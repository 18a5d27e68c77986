//! Answers to the kernel's requests.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, Request,
};
use guest::tree::{Listed, Origin};
use guest::{Attributes, Error, ErrorKind, FileType, Time, Tree};

use super::super::files::{DEPTH, proper};
use super::directories::OpenDirectory;
use super::inodes::{Inodes, Place, ROOT};
use super::{links, os, owner};
use crate::pages::PageBuffer;

/// How long the kernel may keep what it was told: nothing changes.
const TTL: Duration = Duration::from_secs(3600);
/// Most files and directories open at a time.
const OPEN: usize = 4096;
const GENERATION: Generation = Generation(0);
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

type Answer<T> = Result<T, Errno>;

/// What a handle stands for.
enum Open {
    /// A file of that length.
    File(u64),
    Directory(Arc<Mutex<OpenDirectory>>),
}

/// What the server and its owner share.
pub(super) struct Shared {
    names: Vec<String>,
    /// Empty once it was closed.
    trees: RwLock<Vec<Arc<dyn Tree>>>,
    pub(super) inodes: Inodes,
    open: Mutex<HashMap<u64, Open>>,
    last_handle: AtomicU64,
    requests: AtomicUsize,
    last_use: Mutex<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(volumes: Vec<(String, Arc<dyn Tree>)>) -> Result<Self, String> {
        let (names, trees): (Vec<String>, Vec<_>) = volumes.into_iter().unzip();
        for (at, name) in names.iter().enumerate() {
            if !proper(name.as_bytes()) || names.iter().take(at).any(|other| other == name) {
                return Err(format!("{name:?} cannot be the name of a volume's directory"));
            }
        }
        Ok(Self {
            names,
            trees: RwLock::new(trees),
            inodes: Inodes::default(),
            open: Mutex::default(),
            last_handle: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            last_use: Mutex::new(Instant::now()),
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.requests.load(Ordering::Relaxed) + lock(&self.open).len()
    }

    pub(super) fn last_use(&self) -> Instant {
        *lock(&self.last_use)
    }

    /// Lets go of the trees: what is asked from now on fails.
    pub(super) fn close(&self) {
        self.trees.write().unwrap_or_else(PoisonError::into_inner).clear();
        lock(&self.open).clear();
    }

    /// Counts a request while it lives.
    fn request(&self) -> InRequest<'_> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        InRequest(self)
    }

    fn tree(&self, volume: usize) -> Answer<Arc<dyn Tree>> {
        let trees = self.trees.read().unwrap_or_else(PoisonError::into_inner);
        trees.get(volume).cloned().ok_or(Errno::ENODEV)
    }

    fn place(&self, ino: INodeNo) -> Answer<(Arc<dyn Tree>, Place)> {
        let place = self.inodes.place(ino.0).ok_or(Errno::ESTALE)?;
        Ok((self.tree(place.volume)?, place))
    }

    fn keep(&self, open: Open) -> Answer<FileHandle> {
        let mut table = lock(&self.open);
        if table.len() >= OPEN {
            return Err(Errno::ENFILE);
        }
        let handle = self.last_handle.fetch_add(1, Ordering::Relaxed) + 1;
        table.insert(handle, open);
        Ok(FileHandle(handle))
    }

    fn look_up(&self, parent: INodeNo, name: &OsStr) -> Answer<FileAttr> {
        let name = name.as_bytes();
        if parent.0 == ROOT {
            let volume =
                self.names.iter().position(|n| n.as_bytes() == name).ok_or(Errno::ENOENT)?;
            return self.volume(volume);
        }
        let (tree, place) = self.place(parent)?;
        if !proper(name) {
            return Err(Errno::ENOENT);
        }
        let listed = tree.lookup(place.node, name).map_err(errno)?.ok_or(Errno::ENOENT)?;
        let attributes = listed.attributes.as_ref().map_err(|error| errno(error.clone()))?;
        self.known(parent.0, place, &listed, attributes)
    }

    /// A volume's root.
    fn volume(&self, volume: usize) -> Answer<FileAttr> {
        let tree = self.tree(volume)?;
        let node = tree.root().map_err(errno)?;
        let attributes = tree.stat(node).map_err(errno)?;
        let place = Place { volume, node, parent: ROOT, depth: 0 };
        let number = self.inodes.look_up(place).ok_or(Errno::ENFILE)?;
        Ok(attr(number, &attributes, None))
    }

    /// What is in a directory, with a number that the kernel knows once more.
    fn known(
        &self,
        parent: u64,
        directory: Place,
        listed: &Listed,
        attributes: &Attributes,
    ) -> Answer<FileAttr> {
        // The root has depth 0, and so has what is in it; for links that is the directory's depth.
        let (own, depth) = match attributes.file_type {
            FileType::Directory => (true, directory.depth + 1),
            FileType::Symlink => (true, directory.depth),
            _ => (false, 0),
        };
        if depth > DEPTH {
            return Err(Errno::ELOOP);
        }
        let parent = if own { parent } else { 0 };
        let place = Place { volume: directory.volume, node: listed.node, parent, depth };
        let number = self.inodes.look_up(place).ok_or(Errno::ENFILE)?;
        let target = listed.target.as_ref().map(|target| links::inside(target, depth));
        Ok(attr(number, attributes, target.map(|t| t.len() as u64)))
    }

    fn attributes(&self, ino: INodeNo) -> Answer<FileAttr> {
        if ino.0 == ROOT {
            return Ok(root());
        }
        let (tree, place) = self.place(ino)?;
        let attributes = tree.stat(place.node).map_err(errno)?;
        let target = match attributes.file_type {
            FileType::Symlink => tree.read_link(place.node).ok(),
            _ => None,
        };
        let target = target.map(|target| links::inside(&target, place.depth).len() as u64);
        Ok(attr(ino.0, &attributes, target))
    }

    fn target(&self, ino: INodeNo) -> Answer<Vec<u8>> {
        let (tree, place) = self.place(ino)?;
        let target = tree.read_link(place.node).map_err(errno)?;
        Ok(links::inside(&target, place.depth))
    }

    fn open_file(&self, ino: INodeNo, flags: OpenFlags) -> Answer<FileHandle> {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return Err(Errno::EROFS);
        }
        let (tree, place) = self.place(ino)?;
        let attributes = tree.stat(place.node).map_err(errno)?;
        match attributes.file_type {
            FileType::File => self.keep(Open::File(attributes.size)),
            FileType::Directory => Err(Errno::EISDIR),
            FileType::Opaque => Err(Errno::EOPNOTSUPP),
            _ => Err(Errno::ENXIO),
        }
    }

    /// Fills `buf`, less only at the end of the file: the kernel would take what is missing for zeroes.
    fn read(&self, ino: INodeNo, fh: FileHandle, offset: u64, buf: &mut [u8]) -> Answer<usize> {
        let (tree, place) = self.place(ino)?;
        let size = match lock(&self.open).get(&fh.0) {
            Some(Open::File(size)) => *size,
            _ => return Err(Errno::EBADF),
        };
        let wanted = size.saturating_sub(offset).min(buf.len() as u64);
        let wanted = usize::try_from(wanted).unwrap_or(buf.len());
        let mut done = 0;
        while done < wanted {
            let part = buf.get_mut(done..wanted).unwrap_or_default();
            match tree.read_at(place.node, part, offset + done as u64).map_err(errno)? {
                0 => return Err(Errno::EIO),
                read => done += read.min(wanted - done),
            }
        }
        Ok(done)
    }

    /// Where data or a hole begins, at `offset` or after it.
    fn seek(&self, ino: INodeNo, offset: i64, whence: i32) -> Answer<i64> {
        let (tree, place) = self.place(ino)?;
        let size = tree.stat(place.node).map_err(errno)?.size;
        let start = u64::try_from(offset).ok().filter(|o| *o < size).ok_or(Errno::ENXIO)?;
        let wants_hole = match whence {
            SEEK_DATA => false,
            SEEK_HOLE => true,
            _ => return Err(Errno::EINVAL),
        };
        let signed = |place: u64| i64::try_from(place).map_err(|_| Errno::EOVERFLOW);
        let mut from = start;
        loop {
            let layout = tree.layout(place.node, from).map_err(errno)?;
            for piece in layout.pieces {
                let end = piece.offset.saturating_add(piece.length);
                if end > start
                    && (piece.origin == Origin::Hole) == wants_hole
                    && piece.offset < size
                {
                    return signed(piece.offset.max(start));
                }
            }
            match layout.next {
                Some(next) if next > from => from = next,
                // The end of a file is a hole.
                _ if wants_hole => return signed(size),
                _ => return Err(Errno::ENXIO),
            }
        }
    }

    /// Fills a part of a listing: `.` and `..` are 0 and 1.
    fn fill(
        &self,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: &mut ReplyDirectoryPlus,
    ) -> Answer<()> {
        let directory = match lock(&self.open).get(&fh.0) {
            Some(Open::Directory(directory)) => Arc::clone(directory),
            _ => return Err(Errno::EBADF),
        };
        let mut directory = lock(&directory);
        let mut at = offset;
        loop {
            let (added, ttl) = match at {
                0 | 1 => {
                    let mut attr = root();
                    let above = || self.inodes.place(ino.0).map_or(ROOT, |place| place.parent);
                    attr.ino = if at == 0 { ino } else { INodeNo(above()) };
                    let name = if at == 0 { "." } else { ".." };
                    (Ok(Some((name.as_bytes().to_vec(), attr, false))), TTL)
                }
                _ => match self.entry(ino, &mut directory, at - 2) {
                    Ok(Some((name, Some(attr)))) => (Ok(Some((name, attr, true))), TTL),
                    // What cannot be known is asked for, and fails, when somebody wants to know it.
                    Ok(Some((name, None))) => (Ok(Some((name, unknown(), false))), Duration::ZERO),
                    Ok(None) => (Ok(None), TTL),
                    Err(error) => (Err(error), TTL),
                },
            };
            let (name, attr, counted) = match added {
                Ok(Some(added)) => added,
                Ok(None) => return Ok(()),
                // What is there already is told first; the next request fails.
                Err(_) if at > offset => return Ok(()),
                Err(error) => return Err(error),
            };
            if reply.add(attr.ino, at + 1, os(&name), &ttl, &attr, GENERATION) {
                if counted {
                    self.inodes.forget(attr.ino.0, 1);
                }
                return Ok(());
            }
            at += 1;
        }
    }

    /// A name of a directory with what the kernel may know of it.
    fn entry(
        &self,
        ino: INodeNo,
        directory: &mut OpenDirectory,
        number: u64,
    ) -> Answer<Option<(Vec<u8>, Option<FileAttr>)>> {
        if ino.0 == ROOT {
            let volume = usize::try_from(number).unwrap_or(usize::MAX);
            let Some(name) = self.names.get(volume) else { return Ok(None) };
            return Ok(Some((name.as_bytes().to_vec(), self.volume(volume).ok())));
        }
        let (tree, place) = self.place(ino)?;
        let listed = match directory.name(&*tree, place.node, number).map_err(errno)? {
            Some(listed) => listed,
            None => return Ok(None),
        };
        let attr = match &listed.attributes {
            Ok(attributes) => self.known(ino.0, place, listed, attributes).ok(),
            Err(_) => None,
        };
        Ok(Some((listed.name.clone(), attr)))
    }
}

/// A request that is being answered.
struct InRequest<'s>(&'s Shared);

impl Drop for InRequest<'_> {
    fn drop(&mut self) {
        *lock(&self.0.last_use) = Instant::now();
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

fn errno(error: Error) -> Errno {
    tracing::debug!(%error, "a request through FUSE failed");
    match error.kind {
        ErrorKind::NotFound => Errno::ENOENT,
        ErrorKind::NotADirectory => Errno::ENOTDIR,
        ErrorKind::NotAFile | ErrorKind::NotALink => Errno::EINVAL,
        ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        ErrorKind::Limit => Errno::EOVERFLOW,
        ErrorKind::Io | ErrorKind::Corrupt => Errno::EIO,
    }
}

fn time(time: Option<Time>) -> SystemTime {
    let Some(time) = time else { return UNIX_EPOCH };
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    let nanoseconds = Duration::from_nanos(u64::from(time.nanoseconds));
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

/// What the kernel is told of a node. `target` is the length of a link's target as it is shown.
fn attr(number: u64, attributes: &Attributes, target: Option<u64>) -> FileAttr {
    let (kind, size, mode) = match attributes.file_type {
        FileType::File | FileType::Opaque => {
            (fuser::FileType::RegularFile, attributes.size, attributes.mode)
        }
        FileType::Directory => (fuser::FileType::Directory, 0, attributes.mode),
        FileType::Symlink => (fuser::FileType::Symlink, target.unwrap_or(attributes.size), 0o777),
        _ => (fuser::FileType::RegularFile, 0, 0),
    };
    let directory = kind == fuser::FileType::Directory;
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: attributes.allocated.unwrap_or(size).div_ceil(512),
        atime: time(attributes.accessed.or(attributes.modified)),
        mtime: time(attributes.modified),
        ctime: time(attributes.changed.or(attributes.modified)),
        crtime: time(attributes.created),
        kind,
        perm: u16::try_from(mode & 0o777).unwrap_or(0),
        nlink: if directory { 1 } else { attributes.links.max(1) },
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: 0,
        blksize: 1 << 16,
        flags: 0,
    }
}

fn made_up(number: u64, kind: fuser::FileType, perm: u16) -> FileAttr {
    let (uid, gid) = owner();
    FileAttr {
        ino: INodeNo(number),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The directory of volumes.
fn root() -> FileAttr {
    made_up(ROOT, fuser::FileType::Directory, 0o555)
}

/// Something whose attributes cannot be read: a number that stands for nothing.
fn unknown() -> FileAttr {
    made_up(u64::MAX, fuser::FileType::RegularFile, 0)
}

/// What the kernel talks to.
pub(super) struct Server(Arc<Shared>);

impl Server {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }
}

impl Filesystem for Server {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for wish in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ] {
            // A kernel that has it not does without; but for `DO_READDIRPLUS` all that matter have it.
            let _ = config.add_capabilities(wish);
        }
        if let Err(most) = config.set_max_readahead(1 << 20) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(32);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _request = self.0.request();
        match self.0.look_up(parent, name) {
            Ok(attr) => reply.entry(&TTL, &attr, GENERATION),
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.0.inodes.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _request = self.0.request();
        match self.0.attributes(ino) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let _request = self.0.request();
        match self.0.target(ino) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _request = self.0.request();
        match self.0.open_file(ino, flags) {
            Ok(handle) => {
                reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _request = self.0.request();
        let mut buffer = PageBuffer::new(offset, usize::try_from(size).unwrap_or(0));
        match self.0.read(ino, fh, offset, &mut buffer) {
            Ok(read) => reply.data(buffer.get(..read).unwrap_or_default()),
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _request = self.0.request();
        lock(&self.0.open).remove(&fh.0);
        reply.ok();
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _request = self.0.request();
        let directory = Arc::new(Mutex::new(OpenDirectory::new()));
        match self.0.keep(Open::Directory(directory)) {
            Ok(handle) => {
                reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _request = self.0.request();
        match self.0.fill(ino, fh, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _request = self.0.request();
        lock(&self.0.open).remove(&fh.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, 1024, 4096);
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _request = self.0.request();
        match self.0.seek(ino, offset, whence) {
            Ok(place) => reply.offset(place),
            Err(error) => reply.error(error),
        }
    }
}
