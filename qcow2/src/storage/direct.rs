//! Large transfers that bypass the page cache.
//!
//! The page cache costs a copy and a page allocation per 4 KiB and is of no use to a backup that is
//! written once, or to a restore that is read once; large aligned transfers go around it where the
//! file system allows. Everything else stays buffered, and no page is ever written both ways at once:
//! an image's clusters are whole pages, and the engine orders writes that share one. A direct read
//! sees every buffered write that was answered before it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;

/// Alignment of memory, offset and length: what every disk and file system accepts, in bytes.
pub(super) const ALIGNMENT: usize = 4096;
/// Smallest write for which the way around the page cache pays, in bytes.
const MIN_WRITE: usize = 64 << 10;
/// Smallest part of a long read for which it pays, in bytes: a page that is read through the cache
/// makes the system read what follows as well.
const MIN_READ: usize = ALIGNMENT;

/// A second descriptor of a file, with `O_DIRECT`.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// Shortest transfer, in bytes.
    least: usize,
    /// The file system took the flag but refuses the transfers.
    refused: AtomicBool,
}

/// Opens `file` once more, in another way.
pub(super) fn reopen(file: &File, how: &OpenOptions) -> io::Result<File> {
    // The descriptor's own path: the file may have been renamed since it was opened.
    how.open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl Direct {
    /// Opens `file` once more for writing; `None` where direct writes are not possible.
    pub(super) fn for_writing(file: &File) -> Option<Self> {
        Self::open(file, OpenOptions::new().write(true), MIN_WRITE)
    }

    /// The same for reading.
    pub(super) fn for_reading(file: &File) -> Option<Self> {
        Self::open(file, OpenOptions::new().read(true), MIN_READ)
    }

    /// Takes over a descriptor that was opened for reading with `O_DIRECT`.
    pub(super) fn reading(file: File) -> Self {
        Self { file, least: MIN_READ, refused: AtomicBool::new(false) }
    }

    fn open(file: &File, how: &mut OpenOptions, least: usize) -> Option<Self> {
        #[allow(clippy::cast_possible_wrap, reason = "the flags of open(2) are an int")]
        let flags = OFlags::DIRECT.bits() as i32;
        let file = reopen(file, how.custom_flags(flags)).ok()?;
        Some(Self { file, least, refused: AtomicBool::new(false) })
    }

    /// The descriptor.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The part of `buf` that can go directly, as (start, end); empty where none can.
    pub(super) fn part(&self, buf: &[u8], offset: u64) -> (usize, usize) {
        #[allow(clippy::cast_possible_truncation, reason = "a remainder")]
        let in_page = (offset % ALIGNMENT as u64) as usize;
        if self.refused.load(Ordering::Relaxed) || buf.as_ptr().addr() % ALIGNMENT != in_page {
            return (0, 0);
        }
        let start = (ALIGNMENT - in_page) % ALIGNMENT;
        let end = start + buf.len().saturating_sub(start) / ALIGNMENT * ALIGNMENT;
        if end - start < self.least { (0, 0) } else { (start, end) }
    }

    /// Reads into an aligned buffer from an aligned offset, as far as the file and its file system
    /// allow; returns the bytes read.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(buf, offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                    self.refused.store(true, Ordering::Relaxed);
                    return Ok(0);
                }
                result => return result,
            }
        }
    }

    /// Writes an aligned buffer at an aligned offset; `false` where the file system refuses and
    /// the caller must write through the page cache.
    pub(super) fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<bool> {
        match self.file.write_all_at(buf, offset) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                self.refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_align_in_memory_and_on_disk_go_directly() {
        let file = tempfile::tempfile().unwrap();
        let direct = Direct { file, least: MIN_WRITE, refused: AtomicBool::new(false) };
        let memory = vec![0; 1 << 20];
        let skip = memory.as_ptr().align_offset(ALIGNMENT);
        let pages = &memory[skip..skip + (512 << 10)];
        assert_eq!(direct.part(pages, 8192), (0, 512 << 10));
        assert_eq!(direct.part(&pages[512..], 512), (3584, (512 << 10) - 512));
        assert_eq!(direct.part(&pages[..(64 << 10) + 100], 0), (0, 64 << 10));
        assert_eq!(direct.part(&pages[..4096], 0), (0, 0), "too small");
        assert_eq!(direct.part(pages, 512), (0, 0), "memory and disk differ");
    }
}
