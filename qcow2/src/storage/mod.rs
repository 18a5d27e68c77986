//! Where an image's bytes live: positional reads and writes from many threads, and a flush.
//!
//! The engine never touches a file by other means, so that tests can record, reorder, fail and
//! forget writes.

mod cached;
mod direct;
#[cfg(any(test, feature = "test-util"))]
pub mod fault;
mod file;
mod mem;
#[cfg(any(test, feature = "test-util"))]
pub mod record;

pub use file::FileStorage;
pub use mem::MemStorage;

use std::io;

/// What tells two storages apart: device and inode of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// A growable range of bytes with positional, concurrent access.
///
/// Reads and writes are whole: a short transfer is retried or becomes an error inside.
pub trait Storage: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from byte `offset`; what lies past the end reads as zeroes.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// The same for a part of a long read, whose bytes are hardly wanted again soon: they need not be
    /// kept in any cache.
    fn read_once_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(buf, offset)
    }

    /// Writes all of `buf` at byte `offset`, growing the storage where needed.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes every completed write durable.
    fn flush(&self) -> io::Result<()>;

    /// Cuts or grows (with zeroes) to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes room for `length` bytes at `offset`, growing the length over it. New bytes read as
    /// zeroes. A storage that cannot reserve only grows.
    fn reserve(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Gives the space of a range back; it reads as zeroes or as before. Best effort.
    fn punch_hole(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// A hint that a range will be read soon. Best effort.
    fn read_ahead(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// Whether bytes beyond the length read as zeroes once it grows over them. True for files,
    /// false for block devices.
    fn grows_with_zeroes(&self) -> bool {
        true
    }

    /// What tells this storage from others; `None` where nothing does.
    fn identity(&self) -> Option<Identity> {
        None
    }
}

/// Shortest read of a virtual disk that is long, in bytes: what restores and copies ask for, and
/// machines hardly do.
const LONG_READ: usize = 128 << 10;

/// How long a read is as a whole; a storage sees parts of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    Short,
    Long,
}

impl Span {
    pub(crate) fn of(length: usize) -> Self {
        if length < LONG_READ { Self::Short } else { Self::Long }
    }

    /// Reads a part.
    pub(crate) fn read(self, storage: &dyn Storage, buf: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Short => storage.read_at(buf, at),
            Self::Long => storage.read_once_at(buf, at),
        }
    }
}
