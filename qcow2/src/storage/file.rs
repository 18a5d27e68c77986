//! A regular file or block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::direct::Direct;
use super::{Identity, Storage};
use crate::lock;

/// Positional access to a file: through the page cache, and around it for large writes once
/// [`FileStorage::write_directly`] was called.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    direct: Option<Direct>,
    block_device: bool,
    identity: Identity,
}

impl FileStorage {
    /// Opens the file at `path`, for writing too where `write` is set.
    ///
    /// # Errors
    /// Those of open(2); `InvalidInput` for what is neither a regular file nor a block device.
    pub fn open(path: &Path, write: bool) -> io::Result<Self> {
        Self::from_file(OpenOptions::new().read(true).write(write).open(path)?)
    }

    /// Creates the file at `path`, which must not exist.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn create_new(path: &Path) -> io::Result<Self> {
        Self::from_file(OpenOptions::new().read(true).write(true).create_new(true).open(path)?)
    }

    /// Takes over an open file.
    ///
    /// # Errors
    /// Those of fstat(2); `InvalidInput` for what is neither a regular file nor a block device.
    pub fn from_file(file: File) -> io::Result<Self> {
        let meta = file.metadata()?;
        let kind = meta.file_type();
        let block_device = kind.is_block_device();
        if !kind.is_file() && !block_device {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let identity = Identity { device: meta.dev(), inode: meta.ino() };
        Ok(Self { file, direct: None, block_device, identity })
    }

    /// Lets large aligned writes bypass the page cache, where the file system can; returns whether
    /// it can.
    pub fn write_directly(&mut self) -> bool {
        self.direct = Direct::open(&self.file);
        self.direct.is_some()
    }

    /// Takes the locks that qemu's programs take: for writing, or for reading. `path` names the
    /// file in messages.
    ///
    /// # Errors
    /// `Locked`, with the holder where it can be told; `Io`.
    pub fn lock(&self, path: &Path, write: bool) -> crate::Result<()> {
        lock::lock(&self.file, path, if write { lock::Mode::Write } else { lock::Mode::Read })
    }

    /// Releases the locks.
    pub fn unlock(&self) {
        lock::unlock(&self.file);
    }

    /// The file itself, for status.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        if self.block_device {
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let Some(direct) = &self.direct else {
            return self.file.write_all_at(buf, offset);
        };
        let (start, end) = direct.part(buf, offset);
        if start == end || !direct.write_at(&buf[start..end], offset + start as u64)? {
            return self.file.write_all_at(buf, offset);
        }
        self.file.write_all_at(&buf[..start], offset)?;
        self.file.write_all_at(&buf[end..], offset + end as u64)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.block_device {
            return if len <= self.len()? {
                Ok(())
            } else {
                Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    "the image has outgrown its block device",
                ))
            };
        }
        self.file.set_len(len)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        if self.block_device {
            return self.set_len(end);
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                if self.len()? < end {
                    self.set_len(end)?;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, offset, length) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()> {
        let length = std::num::NonZeroU64::new(length);
        Ok(rustix::fs::fadvise(&self.file, offset, length, Advice::WillNeed)?)
    }

    fn grows_with_zeroes(&self) -> bool {
        !self.block_device
    }

    fn identity(&self) -> Option<Identity> {
        Some(self.identity)
    }
}
