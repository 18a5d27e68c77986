//! A regular file or block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Advice, FallocateFlags, FileType, SeekFrom, fstat};
use rustix::io::Errno;

use super::cached::Cached;
use super::direct::Direct;
use super::{Identity, Storage};
use crate::lock;

/// Positional access to a file: through the page cache, and around it for parts of long reads, and for
/// large writes once [`FileStorage::write_directly`] was called.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    direct: Option<Direct>,
    /// Opened with the first long read: a file that nobody reads has one descriptor.
    direct_reads: OnceLock<Option<Direct>>,
    /// The same for what is in the page cache.
    cached_reads: OnceLock<Option<Cached>>,
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
        let meta = fstat(&file)?;
        let kind = FileType::from_raw_mode(meta.st_mode);
        let block_device = kind == FileType::BlockDevice;
        if kind != FileType::RegularFile && !block_device {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let identity = Identity { device: meta.st_dev, inode: meta.st_ino };
        let (direct_reads, cached_reads) = (OnceLock::new(), OnceLock::new());
        Ok(Self { file, direct: None, direct_reads, cached_reads, block_device, identity })
    }

    /// Lets large aligned writes bypass the page cache, where the file system can; returns whether
    /// it can.
    pub fn write_directly(&mut self) -> bool {
        self.direct = Direct::for_writing(&self.file);
        self.direct.is_some()
    }

    /// The file opened once more for parts of long reads, with `O_DIRECT`; `None` where its file system
    /// has no such reads.
    pub fn direct_reads(&self) -> Option<&File> {
        self.reader().map(Direct::file)
    }

    /// Takes over a descriptor for parts of long reads; without one they go through the page cache. From
    /// now on nothing is opened here.
    pub fn read_with(&mut self, direct: Option<File>) {
        self.direct_reads = OnceLock::from(direct.map(Direct::reading));
        self.cached_reads = OnceLock::from(None);
    }

    fn reader(&self) -> Option<&Direct> {
        self.direct_reads.get_or_init(|| Direct::for_reading(&self.file)).as_ref()
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
        Ok(fstat(&self.file)?.st_size.cast_unsigned())
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

    fn read_once_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(direct) = self.reader() else { return self.read_at(buf, offset) };
        let (start, end) = direct.part(buf, offset);
        if start > 0 {
            self.read_at(&mut buf[..start], offset)?;
        }
        let mut rest = start;
        if start < end
            && let Some(cached) = self.cached_reads.get_or_init(|| Cached::open(&self.file))
        {
            rest += cached.read_at(&mut buf[start..end], offset + start as u64);
        }
        // The end of the file may lie within, and a device may do less than it was asked for.
        if rest < end {
            rest += direct.read_at(&mut buf[rest..end], offset + rest as u64)?;
        }
        if rest < buf.len() { self.read_at(&mut buf[rest..], offset + rest as u64) } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use super::super::direct::ALIGNMENT;
    use super::*;

    /// `length` bytes of `memory` whose address is congruent to `offset`, page by page.
    fn placed(memory: &mut Vec<u8>, offset: u64, length: usize) -> &mut [u8] {
        memory.resize(length + 2 * ALIGNMENT, 0xff);
        let in_page = usize::try_from(offset).unwrap() % ALIGNMENT;
        let skip = memory.as_ptr().align_offset(ALIGNMENT) + in_page;
        &mut memory[skip..skip + length]
    }

    fn file(dir: &Path, bytes: &[u8]) -> FileStorage {
        let path = dir.join("file");
        std::fs::write(&path, bytes).unwrap();
        FileStorage::open(&path, true).unwrap()
    }

    #[test]
    fn parts_of_long_reads_are_what_is_there_however_they_lie() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..251).cycle().take(300_001).collect();
        let storage = file(dir.path(), &bytes);
        for (offset, length, skew) in [
            (0, 300_001, 0),
            (4096, 8192, 0),
            (4096, 8192, 1),
            (100, 200_000, 0),
            (100, 200_000, 7),
            // Past the end all is zero.
            (299_008, 8192, 0),
            (303_104, 4096, 0),
        ] {
            let mut memory = Vec::new();
            let buffer = placed(&mut memory, offset + skew, length);
            storage.read_once_at(buffer, offset).unwrap();
            let start = usize::try_from(offset).unwrap().min(bytes.len());
            let there = &bytes[start..(start + length).min(bytes.len())];
            let wanted = [there, &vec![0; length - there.len()]].concat();
            assert!(*buffer == *wanted, "{length} bytes at {offset}, {skew} askew");
        }
    }

    #[test]
    fn a_long_read_sees_what_was_written_through_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let storage = file(dir.path(), &vec![1; 64 << 10]);
        let mut memory = Vec::new();
        let buffer = placed(&mut memory, 0, 64 << 10);
        for byte in 2..50 {
            storage.write_at(&[byte; 5000], 3000).unwrap();
            storage.read_once_at(buffer, 0).unwrap();
            assert!(buffer[3000..8000].iter().all(|b| *b == byte));
        }
    }

    #[test]
    fn a_file_without_direct_reads_is_read_through_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = file(dir.path(), &[7; 8192]);
        storage.read_with(None);
        assert!(storage.direct_reads().is_none());
        let mut memory = Vec::new();
        let buffer = placed(&mut memory, 0, 8192);
        storage.read_once_at(buffer, 0).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 7));
        // One that takes no direct reads although it was opened for them.
        storage.read_with(Some(File::open("/dev/null").unwrap()));
        storage.read_once_at(buffer, 0).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 7));
    }
}
