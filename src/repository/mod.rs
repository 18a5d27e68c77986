//! A directory of backups that explains itself: layout, manifests, checksums, space.
//!
//! ```text
//! {repo}/.sendense-repo.json                          identity, format version
//! {repo}/{vm id}/disk-{N}/{backup id}.qcow2           plain QCOW2 v3
//! {repo}/{vm id}/disk-{N}/{backup id}.json            manifest
//! {repo}/{vm id}/disk-{N}/{backup id}.crc             checksum per cluster
//! ```
//!
//! What is not finished has `.partial` at the end of its names. A file without it is never changed.

mod checksums;
mod layout;
mod manifest;
mod publish;
mod scan;
mod verify;

pub use checksums::Checksums;
pub use layout::{DiskFiles, Identity, Root, Space};
pub use manifest::{DiskOf, ImageOf, Manifest, ParentOf, VmOf};
pub use publish::{publish, remove, remove_unfinished, sync_directory};
pub use scan::{Finding, FoundBackup, scan};
pub use verify::{complete_checksums, verify_image};

use std::io;
use std::path::{Path, PathBuf};

/// Why something in a repository failed.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// A file or directory failed.
    #[error("{what} '{}': {source}", path.display())]
    Io {
        /// What was tried, such as "cannot create".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("'{}' {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// An image failed.
    #[error("{0}")]
    Image(#[from] qcow2::Error),
}

/// Result of a repository call.
pub type Result<T> = std::result::Result<T, RepositoryError>;

impl RepositoryError {
    /// Whether this says that a file is not what was written, rather than that it could not be read.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Image(error) => error.kind() == qcow2::ErrorKind::Corrupt,
            Self::Invalid { .. } => true,
        }
    }

    /// Whether the file system is full.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Image(error) => error.kind() == qcow2::ErrorKind::NoSpace,
            Self::Invalid { .. } => false,
        }
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RepositoryError {
    let path = path.to_owned();
    move |source| RepositoryError::Io { what, path, source }
}

fn invalid(path: &Path, reason: impl Into<String>) -> RepositoryError {
    RepositoryError::Invalid { path: path.to_owned(), reason: reason.into() }
}
