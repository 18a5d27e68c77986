//! btrfs on one device.
//!
//! The crate `rust-fs-btrfs` gives the structures, their checks, the chunk map and decompression; the
//! walk through trees and the path of data are ours. Nodes and data are taken only with their checksums.
//!
//! The root is the top level (subvolume 5); subvolumes and snapshots are directories in it. A log tree of
//! just synced files is not replayed: the tree is that of the last commit then, and told as stale.

mod checksums;
mod directory;
mod extents;
mod subvolumes;
mod volume;

use std::sync::Arc;

use fs_btrfs::csum::CSUM_TREE_OBJECTID;
use fs_btrfs::dir::XATTR_ITEM_KEY;
use fs_btrfs::fs::{MAX_SYMLINK_TARGET, ROOT_ITEM_KEY};
use fs_btrfs::inode::{INODE_ITEM_KEY, INODE_NODATASUM, Inode, Timestamp};
use fs_btrfs::superblock::{BTRFS_MAGIC, SUPER_INFO_OFFSET, SUPER_INFO_SIZE, Superblock, offsets};

use self::checksums::Checked;
use self::directory::Directory;
use self::extents::{DECOMPRESSED, Decompressed, File};
use self::subvolumes::{Subvolume, Subvolumes, parse_root};
use self::volume::{Root, Volume, key};
use super::recent::Recent;
use super::{About, Attributes, Cursor, FileSystem, FileType, Node, Page, Piece, Status, Time};
use crate::adapter::Device;
use crate::bytes::uuid;
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// What is said of a file system that spans devices.
const SEVERAL: &str = "btrfs on several devices";
/// The inode that stands for a subvolume within a snapshot (`BTRFS_EMPTY_SUBVOL_DIR_OBJECTID`).
const EMPTY_DIRECTORY: u64 = 2;
/// Bytes of the extended attributes of a node, at most.
const MAX_ATTRIBUTE_BYTES: usize = 16 << 20;

/// An open btrfs.
struct Btrfs {
    volume: Volume,
    subvolumes: Subvolumes,
    checksums: Root,
    about: About,
    decompressed: Decompressed,
}

/// Whether `source` holds a btrfs, by its signature.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(source: &dyn Source) -> Result<bool> {
    let mut magic = [0; 8];
    if source.size() < SUPER_INFO_OFFSET + SUPER_INFO_SIZE as u64 {
        return Ok(false);
    }
    source.read_at(&mut magic, SUPER_INFO_OFFSET + offsets::MAGIC as u64)?;
    Ok(magic == BTRFS_MAGIC)
}

/// Opens it.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    let (sb, status) = superblock(source)?;
    if sb.num_devices != 1 {
        return Err(Error::unsupported(SEVERAL));
    }
    if sb.is_metadump() {
        return Err(Error::unsupported("a dump of the metadata of a btrfs, without its data"));
    }
    let about = About {
        kind: "btrfs".into(),
        label: sb.label.clone(),
        uuid: uuid(&sb.fsid),
        size: sb.total_bytes,
        used: Some(sb.bytes_used),
        status,
    };
    let root_tree = Root { address: sb.root, level: sb.root_level, generation: sb.generation };
    let volume = Volume::open(Arc::clone(source), sb)?;
    let subvolumes = Subvolumes::read(&volume, root_tree)?;
    let item = key(CSUM_TREE_OBJECTID, ROOT_ITEM_KEY, 0);
    let checksums = volume.find(root_tree, item, |data| Ok(parse_root(data)?.0))?;
    let checksums =
        checksums.ok_or_else(|| Error::corrupt("btrfs: there is no tree of checksums"))?;
    let decompressed = Recent::new(DECOMPRESSED);
    let btrfs = Btrfs { volume, subvolumes, checksums, about, decompressed };
    btrfs.directory(btrfs.root())?;
    Ok(Box::new(btrfs))
}

/// The superblock, or where it is damaged its newest copy.
fn superblock(source: &Arc<dyn Source>) -> Result<(Superblock, Status)> {
    let mut bytes = vec![0; SUPER_INFO_SIZE];
    source.read_at(&mut bytes, SUPER_INFO_OFFSET)?;
    match Superblock::parse_at(&bytes, SUPER_INFO_OFFSET) {
        Ok(sb) if sb.has_dirty_log() => {
            let reason = "its log tree is not replayed: the newest fsynced files may be missing";
            Ok((sb, Status::Stale(reason.into())))
        }
        Ok(sb) => Ok((sb, Status::Clean)),
        Err(error @ fs_btrfs::Error::UnsupportedFeature(_)) => Err(error_of(error)),
        Err(error) => {
            let device = Device(Arc::clone(source));
            match fs_btrfs::superblock::read_superblock(&device) {
                Ok((sb, _)) => Ok((
                    sb,
                    Status::Stale(
                        "its superblock is damaged, and a copy was taken: \
                         the newest changes may be missing"
                            .into(),
                    ),
                )),
                Err(_) => Err(error_of(error)),
            }
        }
    }
}

impl Btrfs {
    fn inode(&self, node: Node) -> Result<(usize, Subvolume, Inode)> {
        let (index, subvolume, ino) = self.subvolumes.resolve(node)?;
        let item = key(ino, INODE_ITEM_KEY, 0);
        let parse = |data: &[u8]| Inode::parse(data, ino).map_err(error_of);
        match self.volume.find(subvolume.root, item, parse)? {
            Some(inode) => Ok((index, subvolume, inode)),
            None => Err(Error::not_found(format!(
                "this btrfs has no inode {ino} in subvolume {}",
                subvolume.id
            ))),
        }
    }

    fn directory(&self, node: Node) -> Result<Directory> {
        let (index, subvolume, inode) = self.inode(node)?;
        if !inode.is_dir() {
            return Err(not_a(ErrorKind::NotADirectory, inode.ino, "directory"));
        }
        Ok(Directory { index, subvolume, ino: inode.ino })
    }

    /// The data of a regular file or of a link.
    fn data(&self, subvolume: &Subvolume, inode: &Inode) -> File<'_> {
        let summed = inode.flags & INODE_NODATASUM == 0;
        let data = Checked { volume: &self.volume, tree: summed.then_some(self.checksums) };
        File {
            tree: subvolume.root,
            ino: inode.ino,
            size: inode.size,
            data,
            decompressed: &self.decompressed,
        }
    }

    fn file(&self, node: Node) -> Result<File<'_>> {
        let (_, subvolume, inode) = self.inode(node)?;
        if !inode.is_regular_file() {
            return Err(not_a(ErrorKind::NotAFile, inode.ino, "regular file"));
        }
        Ok(self.data(&subvolume, &inode))
    }

    /// Whether `node` stands for a subvolume that is not there.
    fn is_empty_directory(&self, node: Node) -> Result<bool> {
        Ok(self.subvolumes.resolve(node)?.2 == EMPTY_DIRECTORY)
    }
}

impl FileSystem for Btrfs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        self.subvolumes.root()
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        if self.is_empty_directory(node)? {
            return Ok(empty_directory());
        }
        let (_, _, inode) = self.inode(node)?;
        let file_type = inode.file_type().map(type_of).ok_or_else(|| {
            Error::corrupt(format!("btrfs: inode {} has the mode {:o}", inode.ino, inode.mode))
        })?;
        let sized = matches!(file_type, FileType::File | FileType::Symlink);
        Ok(Attributes {
            file_type,
            size: if sized { inode.size } else { 0 },
            allocated: Some(inode.nbytes),
            mode: inode.mode & 0o7777,
            uid: inode.uid,
            gid: inode.gid,
            links: inode.nlink,
            modified: time(inode.mtime),
            accessed: time(inode.atime),
            changed: time(inode.ctime),
            created: time(inode.otime),
            note: None,
        })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        if self.is_empty_directory(directory)? {
            return Ok(None);
        }
        directory::lookup(self, &self.directory(directory)?, name)
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        if self.is_empty_directory(directory)? {
            return Ok(Page::default());
        }
        directory::list(self, &self.directory(directory)?, cursor, limit)
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let file = self.file(file)?;
        let left = file.size.saturating_sub(offset);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        if length > 0 {
            file.read(&mut buf[..length], offset)?;
        }
        Ok(length)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        let (_, subvolume, inode) = self.inode(link)?;
        if !inode.is_symlink() {
            return Err(not_a(ErrorKind::NotALink, inode.ino, "symbolic link"));
        }
        let length = usize::try_from(inode.size).unwrap_or(usize::MAX);
        if inode.size == 0 || inode.size > MAX_SYMLINK_TARGET {
            return Err(Error::corrupt(format!("btrfs: the target of link {} is bad", inode.ino)));
        }
        let mut target = vec![0; length];
        self.data(&subvolume, &inode).read(&mut target, 0)?;
        Ok(target)
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        if self.is_empty_directory(node)? {
            return Ok(Vec::new());
        }
        let (_, subvolume, inode) = self.inode(node)?;
        let ino = inode.ino;
        let mut found = Vec::new();
        let mut bytes = 0;
        self.volume.for_each(subvolume.root, key(ino, XATTR_ITEM_KEY, 0), &mut |key, data| {
            if (key.objectid, key.key_type) != (ino, XATTR_ITEM_KEY) {
                return Ok(false);
            }
            bytes += data.len();
            if bytes > MAX_ATTRIBUTE_BYTES {
                return Err(Error::limit(format!("inode {ino} has too many attributes")));
            }
            let entries = fs_btrfs::xattr::parse_xattr_items(data).map_err(error_of)?;
            found.extend(entries.into_iter().map(|entry| (entry.name, entry.value)));
            Ok(true)
        })?;
        Ok(found)
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        self.file(file)?.layout(from, visit)
    }

    fn checks_content(&self) -> bool {
        true
    }
}

/// What stands for a subvolume within a snapshot: nobody can put anything there.
fn empty_directory() -> Attributes {
    Attributes {
        file_type: FileType::Directory,
        size: 0,
        allocated: None,
        mode: 0o755,
        uid: 0,
        gid: 0,
        links: 1,
        modified: None,
        accessed: None,
        changed: None,
        created: None,
        note: Some("a subvolume was here, which a snapshot does not take".into()),
    }
}

fn not_a(kind: ErrorKind, ino: u64, what: &str) -> Error {
    Error::new(kind, format!("inode {ino} is no {what}"))
}

fn type_of(kind: fs_btrfs::inode::FileType) -> FileType {
    use fs_btrfs::inode::FileType as Kind;
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
fn error_of(error: fs_btrfs::Error) -> Error {
    use fs_btrfs::Error as E;
    let kind = match error {
        E::Io(_) => ErrorKind::Io,
        E::UnsupportedFeature(_) | E::UnsupportedChecksum(_) | E::UnsupportedProfile(_) => {
            ErrorKind::Unsupported
        }
        _ => ErrorKind::Corrupt,
    };
    Error::new(kind, format!("btrfs: {error}"))
}
