//! Errors: those that travel to the peer, and those that end a connection.

/// Error numbers of the transmission phase ("Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Errno {
    /// `NBD_EPERM`: the export is read-only.
    Perm,
    /// `NBD_EIO`: the medium failed.
    Io,
    /// `NBD_ENOMEM`
    NoMem,
    /// `NBD_EINVAL`: the request makes no sense.
    Inval,
    /// `NBD_ENOSPC`: past the end, or no room left.
    NoSpc,
    /// `NBD_EOVERFLOW`: more data than one chunk may carry.
    Overflow,
    /// `NBD_ENOTSUP`: not possible in the way that was asked for.
    NotSup,
    /// `NBD_ESHUTDOWN`: the server is about to end.
    Shutdown,
    /// A number that the specification does not name; treated as `NBD_EINVAL`.
    Other(u32),
}

impl Errno {
    /// The number on the wire. Never 0.
    pub fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
            Self::Other(0) => 22,
            Self::Other(code) => code,
        }
    }

    /// The error with this number; `None` for 0, which means success.
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            other => Self::Other(other),
        })
    }
}

/// The peer broke the protocol in a way that leaves no common ground: the connection must close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ProtocolError(pub String);

impl ProtocolError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}
