//! A volume's tree as those see it who hand files out: names with what they name, paths, and places on
//! the machine's disks. One implementation asks a file system, another asks a worker that does.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fs::{Attributes, Cursor, Node};
use crate::source::DiskRange;

/// Most names of a [`Listing`].
pub const LISTING: usize = 1024;
/// Most bytes of one [`Tree::read_at`].
pub const READ: usize = 1 << 20;
/// Most pieces of a [`Layout`].
pub const PIECES: usize = 4096;

/// A name in a directory, and what it names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The name's bytes: never empty, `.` or `..`, without `/` and NUL.
    pub name: Vec<u8>,
    /// What it names.
    pub node: Node,
    /// What is known of that; or why nothing is: damage of one file hides no other.
    pub attributes: std::result::Result<Attributes, Error>,
    /// Where a symbolic link points, as far as it could be read.
    pub target: Option<Vec<u8>>,
}

/// A part of a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// Names, in the order of the file system.
    pub entries: Vec<Listed>,
    /// Where to go on; `None` at the end.
    pub next: Option<Cursor>,
}

/// What a path stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The node.
    pub node: Node,
    /// The same path without links, `.` and repeated slashes; begins with `/`.
    pub path: Vec<u8>,
}

/// Where a piece of a file comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// Nowhere: it reads as zeroes.
    Hole,
    /// These ranges of disks, one after the other, byte for byte.
    Plain(Vec<DiskRange>),
    /// These ranges of disks in another form: as long as they and the layout are the same, the piece is.
    Encoded(Vec<DiskRange>),
    /// It must be read to be known.
    Unknown,
}

impl Origin {
    /// The ranges of disks.
    pub fn ranges(&self) -> &[DiskRange] {
        match self {
            Self::Plain(ranges) | Self::Encoded(ranges) => ranges,
            Self::Hole | Self::Unknown => &[],
        }
    }
}

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// First byte of the file.
    pub offset: u64,
    /// Length in bytes; never 0.
    pub length: u64,
    /// Where it comes from.
    pub origin: Origin,
}

/// A part of a file's layout.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Consecutive pieces.
    pub pieces: Vec<Placed>,
    /// The byte of the file where to go on; `None` at the end.
    pub next: Option<u64>,
    /// Reading compares the content with checksums, which the pieces do not tell.
    pub checked: bool,
}

/// One volume's tree, read-only. Errors are those of [`FileSystem`](crate::FileSystem).
pub trait Tree: Send + Sync {
    /// Its root directory.
    fn root(&self) -> Result<Node>;

    /// What is known of a node.
    fn stat(&self, node: Node) -> Result<Attributes>;

    /// Lists a directory from `cursor` on: at most `limit` names ([`LISTING`] at most), and fewer than
    /// that before the end where they are large; at least one.
    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Listing>;

    /// Finds one name in a directory.
    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Listed>>;

    /// Finds what a path stands for, from the root; links are followed inside the volume only, the
    /// last one too where `follow` is set.
    fn resolve(&self, path: &[u8], follow: bool) -> Result<Resolved>;

    /// Reads a file from `offset` on: as much as `buf` takes ([`READ`] at most), less only at the end.
    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize>;

    /// Where a symbolic link points.
    fn read_link(&self, link: Node) -> Result<Vec<u8>>;

    /// Extended attributes.
    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>>;

    /// Where a file lies, from byte `from` on: at most [`PIECES`] pieces.
    fn layout(&self, file: Node, from: u64) -> Result<Layout>;
}
