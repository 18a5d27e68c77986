//! File systems behind one thin trait of handles.

mod btrfs;
mod exfat;
mod ext;
mod fat;
mod ntfs;
mod recent;
mod xfs;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// How much a volume's tree can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Status {
    /// It was unmounted, or its journal had nothing to replay.
    Clean,
    /// Its journal was replayed in memory: what is shown is what the machine would see after a reset.
    Replayed,
    /// It is shown as it lies on the disk, without its journal: the newest changes may be missing.
    Stale(String),
    /// It is not shown.
    Refused(String),
}

/// What a file system says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// `ext2`, `ext3`, `ext4`, `xfs`, `btrfs`, `ntfs`, `fat12`, `fat16`, `fat32`, `exfat`.
    pub kind: String,
    /// Its label; empty where it has none. Made UTF-8 as far as it can be.
    pub label: String,
    /// Its UUID or serial number as people write it; empty where it has none.
    pub uuid: String,
    /// Bytes in all.
    pub size: u64,
    /// Bytes that are used, where it says so.
    pub used: Option<u64>,
    /// How much its tree can be trusted.
    pub status: Status,
}

/// Handle of a file, a directory or anything else in one file system: what its format makes of it
/// (an inode number, a place of a directory entry). Any value may be asked for; a wrong one is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Node(pub u64);

/// Where a listing goes on: what [`Page::next`] gave, or the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cursor(pub u64);

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link, or a reparse point that acts as one.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Something whose content cannot be read here; [`Attributes::note`] says why.
    Opaque,
}

/// A point in time: seconds since 1970-01-01 00:00 UTC, which may be negative, and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time {
    /// Seconds.
    pub seconds: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// What it is.
    pub file_type: FileType,
    /// Bytes of a file, or of a link's target; 0 for the rest.
    pub size: u64,
    /// Bytes that it takes on the volume, where that is known.
    pub allocated: Option<u64>,
    /// Permission bits, set-id and sticky bits included (07777). Made up where the format has none.
    pub mode: u32,
    /// Owner; 0 where the format has none.
    pub uid: u32,
    /// Group; 0 where the format has none.
    pub gid: u32,
    /// Names that it has; 1 where the format has no hard links.
    pub links: u32,
    /// When its content changed last.
    pub modified: Option<Time>,
    /// When it was read last.
    pub accessed: Option<Time>,
    /// When its inode changed last.
    pub changed: Option<Time>,
    /// When it was made.
    pub created: Option<Time>,
    /// What people should know of it: why it is opaque, that it is encrypted, and the like.
    pub note: Option<String>,
}

/// A name in a directory. `.` and `..` are never told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The name's bytes: never empty, without `/` and NUL. UTF-8 where the format has a character
    /// set (unpaired surrogates become WTF-8), and any bytes where it has none.
    pub name: Vec<u8>,
    /// What it names.
    pub node: Node,
    /// What that is, as far as the directory tells without asking the node.
    pub file_type: Option<FileType>,
}

/// A part of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Page {
    /// Names, in the order of the file system.
    pub entries: Vec<Entry>,
    /// Where to go on; `None` at the end.
    pub next: Option<Cursor>,
}

/// Where a piece of a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// Nowhere: it reads as zeroes.
    Hole,
    /// At this byte of the volume, as it is.
    Volume(u64),
    /// At this byte of the volume, so many bytes, in another form (compressed).
    Encoded {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Among metadata, or in a replayed journal: it must be read to be known.
    Elsewhere,
}

/// A piece of a file's layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// First byte of the file.
    pub offset: u64,
    /// Length in bytes; never 0.
    pub length: u64,
    /// Where it lies.
    pub place: Place,
}

/// An open file system, read-only.
pub trait FileSystem: Send + Sync {
    /// What it is.
    fn about(&self) -> &About;

    /// Its root directory.
    fn root(&self) -> Node;

    /// What is known of `node`.
    ///
    /// # Errors
    /// `NotFound` where there is no such node; `Corrupt`; `Io`.
    fn stat(&self, node: Node) -> Result<Attributes>;

    /// Finds a name in a directory: byte for byte, or regardless of case where the format does.
    ///
    /// # Errors
    /// `NotADirectory`; `Corrupt`; `Io`.
    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>>;

    /// Lists a directory from `cursor` on: at most `limit` names and at least one where there is one.
    ///
    /// # Errors
    /// `NotADirectory`; `Corrupt` where a part of the directory is damaged; `Io`.
    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page>;

    /// Reads a file from byte `offset`: as much as `buf` takes, less only at the end of the file.
    ///
    /// # Errors
    /// `NotAFile`; `Unsupported` for content that is opaque; `Corrupt`; `Io`.
    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize>;

    /// Where a symbolic link points: its bytes as they are.
    ///
    /// # Errors
    /// `NotALink`; `Corrupt`; `Io`.
    fn read_link(&self, link: Node) -> Result<Vec<u8>>;

    /// Extended attributes, in any order. Formats without them have none.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    fn xattrs(&self, _node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        Ok(Vec::new())
    }

    /// Calls `visit` with the consecutive pieces that cover a file from byte `from` on, in order, until it
    /// returns `false`. The first one may begin before, and there may be more before it.
    ///
    /// # Errors
    /// `NotAFile`; `Corrupt`; `Io`.
    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()>;

    /// Whether reading compares content with checksums that only the file system knows.
    fn checks_content(&self) -> bool {
        false
    }
}

type Recognise = fn(&dyn Source) -> Result<bool>;
type Open = fn(&Arc<dyn Source>) -> Result<Box<dyn FileSystem>>;

/// The readers, those with the strictest signatures first.
const READERS: [(Recognise, Open); 6] = [
    (btrfs::recognise, btrfs::open),
    (xfs::recognise, xfs::open),
    (ext::recognise, ext::open),
    (ntfs::recognise, ntfs::open),
    (exfat::recognise, exfat::open),
    (fat::recognise, fat::open),
];

/// Opens the file system in `source`, whatever it is.
///
/// # Errors
/// `NotFound` where there is none that is read here; `Unsupported` with the feature's name; `Corrupt`;
/// `Io`.
pub fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    for (recognise, open) in READERS {
        if recognise(&**source)? {
            return open(source);
        }
    }
    Err(Error::new(ErrorKind::NotFound, "no file system that is known here"))
}
