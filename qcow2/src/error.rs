//! One error type: a kind for code, a sentence with path and offset for the operator.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// The class of a failure: what a caller decides on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The storage failed (EIO and its like), or failed earlier and cannot be trusted since.
    Io,
    /// The file system, the quota or the format has no room left.
    NoSpace,
    /// The image was opened read-only, or must not be written.
    ReadOnly,
    /// The range reaches past the virtual disk.
    OutOfBounds,
    /// The file is not a QCOW2 image.
    NotQcow2,
    /// The image's metadata contradicts the specification or itself.
    Corrupt,
    /// A feature of the format that this engine does not serve.
    Unsupported,
    /// Another process (or this one) holds the file.
    Locked,
    /// The backing chain cannot be opened: missing file, missing format, loop, too deep.
    Chain,
    /// The image was closed.
    Closed,
    /// A parameter outside its range.
    InvalidArgument,
}

/// A failure of the engine.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<io::Error>,
}

/// Result of an engine call.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure of `kind`, told by `message`: the cause and, where there is one, the next step.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), path: None, offset: None, source: None }
    }

    /// A failed storage call; the kind follows from the system's error.
    pub fn io(action: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => ErrorKind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        Self { kind, message: action.into(), path: None, offset: None, source: Some(source) }
    }

    /// Metadata that contradicts the specification.
    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// A feature that is refused.
    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// The same failure, in the file at `path`; an earlier path is kept.
    #[must_use]
    pub fn in_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.path.get_or_insert_with(|| path.into());
        self
    }

    /// The same failure, at byte `offset` of the virtual disk; an earlier offset is kept.
    #[must_use]
    pub fn at_guest(mut self, offset: u64) -> Self {
        self.offset.get_or_insert(offset);
        self
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// First failing byte of the virtual disk, where known.
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&self.message)?;
        if let Some(offset) = self.offset {
            write!(f, " (at byte {offset} of the disk)")?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}
