//! What hub and worker say to each other.
//!
//! The hub sends [`Disks`] with the descriptors of their files, and gets [`Opened`]. From then on each
//! [`Request`] gets its answer, one at a time: a `Result` of what the request names, and after the
//! answer to [`Request::Read`] the bytes themselves.

use guest::{Cursor, Node, VolumeAbout};
use serde::{Deserialize, Serialize};

use super::sandbox::Sandbox;

/// Longest message in either direction, in bytes; what is read of a file is not part of one.
pub(super) const MESSAGE: usize = 8 << 20;
/// Longest answer about one node, which may be a path; and one of extended attributes.
const SMALL: usize = guest::path::PATH_MAX + (8 << 10);
const XATTRS: usize = 2 << 20;
/// Files of all disks together.
pub(super) const FILES: usize = 1536;
/// Longest sentence of a worker about a failure, or other text for people, in bytes.
pub(super) const SENTENCE: usize = 1024;
/// Most sentences about a machine as a whole.
pub(super) const NOTES: usize = 1000;

/// A file of a disk's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileAbout {
    /// What messages call it.
    pub(super) path: Vec<u8>,
    /// What the image above calls it; empty for the top.
    pub(super) name: String,
    /// Whether a second descriptor follows its own, for reads around the page cache.
    pub(super) direct: bool,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Disk {
    pub(super) number: u32,
    /// Its chain, from the top down.
    pub(super) files: Vec<FileAbout>,
}

/// The machine's disks. The descriptors of all files follow, in the same order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Disks(pub(super) Vec<Disk>);

/// What was found on them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Opened {
    pub(super) sandbox: Sandbox,
    pub(super) volumes: Vec<VolumeAbout>,
    pub(super) notes: Vec<String>,
}

/// A call of [`guest::Tree`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    /// Number of the volume.
    pub(super) volume: u32,
    pub(super) call: Call,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Call {
    /// A `Node`.
    Root,
    /// `Attributes`.
    Stat(Node),
    /// A `Listing`.
    List { directory: Node, cursor: Cursor, limit: u32 },
    /// An `Option<Listed>`.
    Lookup { directory: Node, name: Vec<u8> },
    /// A `Resolved`.
    Resolve { path: Vec<u8>, follow: bool },
    /// A `u32`, and so many bytes.
    Read { file: Node, offset: u64, length: u32 },
    /// The bytes of a link's target.
    ReadLink(Node),
    /// Pairs of name and value.
    Xattrs(Node),
    /// A `Layout`.
    Layout { file: Node, from: u64 },
}

impl Call {
    /// Longest answer, in bytes; what is read of a file is not part of it.
    pub(super) fn most(&self) -> usize {
        match self {
            Self::List { .. } | Self::Layout { .. } => MESSAGE,
            Self::Xattrs(_) => XATTRS,
            Self::Root | Self::Stat(_) | Self::Lookup { .. } | Self::Resolve { .. } => SMALL,
            Self::Read { .. } | Self::ReadLink(_) => SMALL,
        }
    }
}
