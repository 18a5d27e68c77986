//! XFS, versions 4 and 5.
//!
//! The crate `rust-fs-xfs` gives the structures, their checks and the replay of the log in memory; the
//! paths of data and of listings are ours. The log holds metadata only, so what a file's extents point at
//! is read from the volume itself, straight into the caller's buffer.
//!
//! A log that cannot be replayed is masked: then the tree is told as it lies on the disk, as stale.

mod directory;
mod extents;
mod intents;
mod log;
mod metadata;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use fs_core::BlockRead;
use fs_xfs::inode::{Inode, Timestamp};
use fs_xfs::log::LogState;
use fs_xfs::superblock::Superblock;

use self::extents::Run;
use self::metadata::{Metadata, Replayed};
use super::recent::Recent;
use super::{About, Attributes, Cursor, FileSystem, FileType, Node, Page, Piece, Status, Time};
use crate::adapter::Device;
use crate::bytes::uuid;
use crate::error::{Error, ErrorKind, Result};
use crate::source::{Source, check_range};

/// Runs that are remembered, of all files together, in one generation.
const RUNS: usize = 1 << 18;
/// Bytes of a directory block, at most.
const MAX_DIRECTORY_BLOCK: u64 = 64 << 10;
/// Extents of an attribute fork, at most: more than 64 MiB of attributes are not read.
const MAX_ATTRIBUTE_EXTENTS: u32 = 1 << 14;

/// What is said of a volume whose log leaves changes of mappings open.
const REMAPPED: &str = "the mappings of files were being changed when the disk was copied: \
    ranges of these files may read as zeroes";

/// An open XFS.
struct Xfs {
    source: Arc<dyn Source>,
    fs: fs_xfs::Filesystem,
    sb: Superblock,
    about: About,
    runs: Recent<u64, Arc<[Run]>>,
}

/// Whether `source` holds an XFS, by its signature.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(source: &dyn Source) -> Result<bool> {
    let mut magic = [0; 4];
    if source.size() < 4096 {
        return Ok(false);
    }
    source.read_at(&mut magic, 0)?;
    Ok(&magic == b"XFSB")
}

/// Opens it, and replays its log in memory where that is needed.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    let mut sector = vec![0; 4096];
    source.read_at(&mut sector, 0)?;
    let sb = Superblock::parse(&sector).map_err(error_of)?;
    check_geometry(&sb, source.size())?;
    let Mounted { fs, sb, status } = mount(source, &sb)?;
    let used = sb.dblocks.checked_sub(sb.fdblocks).filter(|_| status == Status::Clean);
    let about = About {
        kind: "xfs".into(),
        label: sb.fname.clone(),
        uuid: uuid(&sb.uuid),
        size: sb.dblocks * u64::from(sb.blocksize),
        used: used.map(|blocks| blocks * u64::from(sb.blocksize)),
        status,
    };
    let xfs = Xfs { source: Arc::clone(source), fs, sb, about, runs: Recent::new(RUNS) };
    match xfs.inode(xfs.root().0)? {
        (root, _) if root.is_dir() => Ok(Box::new(xfs)),
        _ => Err(Error::corrupt("the root of this XFS is no directory")),
    }
}

/// Refuses what would make sizes overflow, and a volume that is longer than its device.
fn check_geometry(sb: &Superblock, size: u64) -> Result<()> {
    let bytes = sb.dblocks.checked_mul(u64::from(sb.blocksize));
    if bytes.is_none_or(|bytes| bytes > size) {
        return Err(Error::corrupt(format!(
            "the XFS has {} blocks of {} bytes, and its volume {size} bytes",
            sb.dblocks, sb.blocksize
        )));
    }
    let groups = u64::from(sb.agcount).saturating_sub(1).saturating_mul(u64::from(sb.agblocks));
    if groups >= sb.dblocks || u32::from(sb.agblklog) + u32::from(sb.inopblog) > 40 {
        return Err(Error::corrupt("the allocation groups of this XFS do not fit it"));
    }
    let directory_block = u64::from(sb.blocksize).checked_shl(u32::from(sb.dirblklog));
    if sb.dirblklog > 7 || directory_block.is_none_or(|bytes| bytes > MAX_DIRECTORY_BLOCK) {
        return Err(Error::corrupt("the directory blocks of this XFS are too large"));
    }
    Ok(())
}

/// The volume as the crate opened it, and its superblock.
struct Mounted {
    fs: fs_xfs::Filesystem,
    sb: Superblock,
    status: Status,
}

/// The volume as the crate opens it: with its log, or else without.
fn mount(source: &Arc<dyn Source>, sb: &Superblock) -> Result<Mounted> {
    let reason = match mount_with_log(source, sb) {
        Ok(Some(mounted)) => return Ok(mounted),
        Ok(None) => None,
        Err(reason) => Some(reason),
    };
    let fs = mount_without_log(source, sb)?;
    let stale = |reason| Status::Stale(format!("{reason}: the newest changes may be missing"));
    Ok(Mounted { fs, sb: sb.clone(), status: reason.map_or(Status::Clean, stale) })
}

/// The volume as it lies on the disk.
fn mount_without_log(source: &Arc<dyn Source>, sb: &Superblock) -> Result<fs_xfs::Filesystem> {
    let device = Arc::new(Metadata::masked(Arc::clone(source), sb));
    let fs = fs_xfs::Filesystem::mount_with_cache(device.clone(), 0).map_err(error_of)?;
    if !device.opened() {
        return Err(Error::new(ErrorKind::Io, "a part of this XFS cannot be read"));
    }
    Ok(fs)
}

/// The volume with its log, or why it cannot be replayed; none where the log is clean, and lists inodes
/// that were unlinked while open.
fn mount_with_log(
    source: &Arc<dyn Source>,
    sb: &Superblock,
) -> std::result::Result<Option<Mounted>, String> {
    if !sb.has_internal_log() {
        return Err("the journal is on another device".into());
    }
    let failed = |error: Error| format!("the journal cannot be replayed ({error})");
    let end = match fs_xfs::log::inspect(&Device(Arc::clone(source)), sb) {
        Ok(LogState::NeedsReplay) => log::end(&**source, sb).map_err(failed)?,
        _ => log::End::default(),
    };
    let device = Arc::new(Metadata::new(Arc::clone(source), end.torn));
    // The crate asserts what a log says. Nothing of a replay that panicked is kept.
    let mounted = catch_unwind(AssertUnwindSafe(|| {
        fs_xfs::Filesystem::mount_with_cache(Arc::clone(&device) as Arc<dyn BlockRead>, 0)
    }));
    let Ok(mounted) = mounted else {
        return Err("the journal cannot be replayed (it contradicts itself)".into());
    };
    let fs = match mounted {
        Ok(fs) => fs,
        Err(fs_xfs::Error::DirtyLog) => return Ok(None),
        Err(error) => return Err(failed(error_of(error))),
    };
    if !device.opened() {
        return Err(failed(Error::new(ErrorKind::Io, "a part of this XFS cannot be read")));
    }
    if !fs.was_replayed() {
        return Ok(Some(Mounted { fs, sb: sb.clone(), status: Status::Clean }));
    }
    let (fs, sb) = as_replayed(source, fs, sb).map_err(failed)?;
    let status = match end.open {
        0 => Status::Replayed,
        _ => Status::Stale(REMAPPED.into()),
    };
    Ok(Some(Mounted { fs, sb, status }))
}

/// The volume by the superblock that the replay left, which is another where the volume was grown lately.
/// The crate goes on with the one from before, and so opens it once more where the geometry is another.
fn as_replayed(
    source: &Arc<dyn Source>,
    fs: fs_xfs::Filesystem,
    before: &Superblock,
) -> Result<(fs_xfs::Filesystem, Superblock)> {
    let mut sector = vec![0; 4096];
    fs.device().read_at(0, &mut sector).map_err(|e| Error::new(ErrorKind::Io, e.to_string()))?;
    let sb = Superblock::parse(&sector).map_err(error_of)?;
    check_geometry(&sb, source.size())?;
    if (sb.dblocks, sb.agcount) == (before.dblocks, before.agcount) {
        return Ok((fs, sb));
    }
    if (sb.blocksize, sb.agblocks, sb.logstart)
        != (before.blocksize, before.agblocks, before.logstart)
    {
        return Err(Error::corrupt("it changes the size of blocks or of allocation groups"));
    }
    let replayed: Arc<dyn Source> = Arc::new(Replayed::new(Arc::clone(source), fs));
    Ok((mount_without_log(&replayed, &sb)?, sb))
}

impl Xfs {
    /// Reads metadata, as the log left it.
    fn read_metadata(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.source.size(), offset, buf.len())?;
        self.fs.device().read_at(offset, buf).map_err(|e| Error::new(ErrorKind::Io, e.to_string()))
    }

    /// An inode that is in use, and its bytes.
    fn inode(&self, ino: u64) -> Result<(Inode, Vec<u8>)> {
        let sb = &self.sb;
        let none = || Error::not_found(format!("this XFS has no inode {ino}"));
        let group = ino >> (u32::from(sb.agblklog) + u32::from(sb.inopblog));
        let (_, block, index) = sb.split_ino(ino);
        let first = group.saturating_mul(u64::from(sb.agblocks));
        let length = sb.dblocks.saturating_sub(first).min(u64::from(sb.agblocks));
        if group >= u64::from(sb.agcount) || u64::from(block) >= length {
            return Err(none());
        }
        let at = (first + u64::from(block)) * u64::from(sb.blocksize)
            + u64::from(index) * u64::from(sb.inodesize);
        let mut raw = vec![0; usize::from(sb.inodesize)];
        self.read_metadata(&mut raw, at)?;
        let inode = Inode::parse(&raw, sb, ino).map_err(error_of)?;
        if inode.mode == 0 {
            return Err(none());
        }
        Ok((inode, raw))
    }

    /// Where the data fork of `inode` lies.
    fn runs(&self, inode: &Inode, raw: &[u8]) -> Result<Arc<[Run]>> {
        if let Some(runs) = self.runs.get(&inode.ino) {
            return Ok(runs);
        }
        let runs = extents::runs(&self.sb, inode, raw, |block| {
            let mut buf = vec![0; self.sb.blocksize as usize];
            self.fs.device().read_at(self.sb.fsblock_offset(block), &mut buf)?;
            Ok(buf)
        })?;
        self.runs.put(inode.ino, Arc::clone(&runs), runs.len() + 1);
        Ok(runs)
    }

    /// The runs of a regular file that can be read.
    fn file(&self, node: Node) -> Result<(Inode, Arc<[Run]>)> {
        let (inode, raw) = self.inode(node.0)?;
        if !inode.is_regular_file() {
            return Err(not_a(ErrorKind::NotAFile, node.0, "regular file"));
        }
        if inode.is_realtime() {
            return Err(Error::unsupported(format!("inode {}: {REALTIME}", node.0)));
        }
        let runs = self.runs(&inode, &raw)?;
        Ok((inode, runs))
    }
}

/// What is said of files on the real-time device.
const REALTIME: &str = "its data is on the real-time device of this XFS";

impl FileSystem for Xfs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node(self.sb.rootino)
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        let (inode, raw) = self.inode(node.0)?;
        let file_type = inode.file_type().map(type_of).ok_or_else(|| {
            Error::corrupt(format!("inode {} has the mode {:o}", node.0, inode.mode))
        })?;
        let opaque = inode.is_realtime() && file_type == FileType::File;
        let sized = matches!(file_type, FileType::File | FileType::Symlink);
        // Version 1 keeps the number of links in a field of 16 bits.
        let links = match (inode.version, raw.get(6..8)) {
            (1, Some(&[high, low])) => u32::from(u16::from_be_bytes([high, low])),
            _ => inode.nlink,
        };
        Ok(Attributes {
            file_type: if opaque { FileType::Opaque } else { file_type },
            size: if sized { inode.size } else { 0 },
            allocated: inode.nblocks.checked_mul(u64::from(self.sb.blocksize)),
            mode: u32::from(inode.permissions()),
            uid: inode.uid,
            gid: inode.gid,
            links,
            modified: time(inode.mtime),
            accessed: time(inode.atime),
            changed: time(inode.ctime),
            created: time(inode.crtime).filter(|_| inode.version == 3),
            note: opaque.then(|| REALTIME.into()),
        })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let (inode, raw) = self.inode(directory.0)?;
        if !inode.is_dir() {
            return Err(not_a(ErrorKind::NotADirectory, directory.0, "directory"));
        }
        if name.is_empty() || matches!(name, b"." | b"..") || name.contains(&b'/') {
            return Ok(None);
        }
        // The crate takes names as they are, also where their hashes are those of small letters.
        if self.sb.has_case_insensitive_dirs() {
            return directory::scan(self, &inode, &raw, |other| other.eq_ignore_ascii_case(name));
        }
        match self.fs.lookup(&inode, &raw, name) {
            // An index of more levels than the crate walks.
            Err(fs_xfs::Error::UnsupportedFeature(_)) => {
                directory::scan(self, &inode, &raw, |other| other == name)
            }
            Ok(found) => Ok(Some(Node(found.ino))),
            Err(fs_xfs::Error::NotFound) => Ok(None),
            Err(error) => Err(error_of(error)),
        }
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        let (inode, raw) = self.inode(directory.0)?;
        directory::list(self, &inode, &raw, cursor, limit)
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let (inode, runs) = self.file(file)?;
        let left = inode.size.saturating_sub(offset);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        extents::read(&*self.source, &runs, &mut buf[..length], offset)?;
        Ok(length)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        let (inode, raw) = self.inode(link.0)?;
        if !inode.is_symlink() {
            return Err(not_a(ErrorKind::NotALink, link.0, "symbolic link"));
        }
        self.fs.read_link(&inode, &raw).map_err(error_of)
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let (inode, raw) = self.inode(node.0)?;
        if inode.anextents > MAX_ATTRIBUTE_EXTENTS {
            return Err(Error::limit(format!("inode {} has too many attributes", node.0)));
        }
        let found = self.fs.list_xattrs(&inode, &raw).map_err(error_of)?;
        Ok(found.into_iter().map(|xattr| (xattr.name, xattr.value)).collect())
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let (inode, runs) = self.file(file)?;
        extents::layout(&runs, inode.size, from, visit);
        Ok(())
    }
}

fn not_a(kind: ErrorKind, ino: u64, what: &str) -> Error {
    Error::new(kind, format!("inode {ino} is no {what}"))
}

fn type_of(kind: fs_xfs::inode::FileType) -> FileType {
    use fs_xfs::inode::FileType as Kind;
    match kind {
        Kind::Regular => FileType::File,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
        Kind::Socket => FileType::Socket,
    }
}

fn time(stamp: Timestamp) -> Option<Time> {
    (stamp.nsec < 1_000_000_000).then_some(Time { seconds: stamp.sec, nanoseconds: stamp.nsec })
}

/// The crate's failures as ours.
fn error_of(error: fs_xfs::Error) -> Error {
    use fs_xfs::Error as E;
    let kind = match error {
        E::Io(_) => ErrorKind::Io,
        E::UnsupportedFeature(_) | E::RealtimeDeviceAbsent { .. } => ErrorKind::Unsupported,
        E::NotFound => ErrorKind::NotFound,
        E::NotADirectory => ErrorKind::NotADirectory,
        E::NotAFile => ErrorKind::NotAFile,
        _ => ErrorKind::Corrupt,
    };
    Error::new(kind, format!("XFS: {error}"))
}
