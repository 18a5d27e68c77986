//! A regular file or block device, byte for byte.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use qcow2::storage::{FileStorage, Storage};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::block::{
    BlockDevice, BlockError, BlockErrorKind, BlockResult, DeviceInfo, Extent, ZeroOptions,
};

/// Zeroes that are written as data at once, where the file system knows no better way.
const ZERO_BUFFER: usize = 1 << 20;
/// Preferred block size in bytes.
const PREFERRED: u32 = 64 << 10;

/// A raw disk. Its size is that of the file when it was opened.
#[derive(Debug)]
pub struct RawDevice {
    info: DeviceInfo,
    storage: FileStorage,
    path: PathBuf,
    is_file: bool,
    closed: AtomicBool,
}

impl RawDevice {
    /// Opens and locks the file or device at `path`.
    ///
    /// # Errors
    /// Those of open(2), and where another process has it in use.
    pub fn open(path: &Path, read_only: bool) -> BlockResult<Self> {
        let at = |e: std::io::Error| fault(&format!("{}: cannot open", path.display()), &e);
        let mut storage = FileStorage::open(path, !read_only).map_err(at)?;
        storage
            .lock(path, !read_only)
            .map_err(|e| BlockError::new(BlockErrorKind::Io, e.to_string()))?;
        if !read_only {
            storage.write_directly();
        }
        let size = storage.len().map_err(at)?;
        let is_file = storage.file().metadata().map_err(at)?.is_file();
        let info = DeviceInfo {
            size,
            read_only,
            preferred_block: PREFERRED,
            can_zero_fast: true,
            can_discard: true,
            has_depth: false,
            tells_durable: false,
            backing_files: 0,
            rotational: false,
        };
        let closed = AtomicBool::new(false);
        Ok(Self { info, storage, path: path.to_owned(), is_file, closed })
    }

    fn fault(&self, what: &str, error: &std::io::Error) -> BlockError {
        fault(&format!("{}: {what}", self.path.display()), error)
    }

    fn check(&self, offset: u64, length: u64, writes: bool) -> BlockResult<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(BlockError::new(BlockErrorKind::Closing, "the device is closed"));
        }
        if writes && self.info.read_only {
            return Err(BlockError::new(BlockErrorKind::ReadOnly, "the device is read-only"));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.info.size => Ok(()),
            _ => Err(BlockError::new(BlockErrorKind::OutOfBounds, "past the end").at(offset)),
        }
    }

    /// Asks the file system to zero a range; `false` where it cannot.
    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> BlockResult<bool> {
        match fallocate(self.storage.file(), flags | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(e) => Err(self.fault("cannot zero", &e.into()).at(offset)),
        }
    }
}

fn fault(what: &str, error: &std::io::Error) -> BlockError {
    let kind = match error.kind() {
        std::io::ErrorKind::StorageFull
        | std::io::ErrorKind::QuotaExceeded
        | std::io::ErrorKind::FileTooLarge => BlockErrorKind::NoSpace,
        std::io::ErrorKind::ReadOnlyFilesystem => BlockErrorKind::ReadOnly,
        _ => BlockErrorKind::Io,
    };
    BlockError::new(kind, format!("{what}: {error}"))
}

impl BlockDevice for RawDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.check(offset, buf.len() as u64, false)?;
        self.storage.read_at(buf, offset).map_err(|e| self.fault("cannot read", &e).at(offset))
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.check(offset, buf.len() as u64, true)?;
        self.storage.write_at(buf, offset).map_err(|e| self.fault("cannot write", &e).at(offset))
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        self.check(offset, length, true)?;
        if length == 0 {
            return Ok(());
        }
        let zero = FallocateFlags::ZERO_RANGE;
        let punch = FallocateFlags::PUNCH_HOLE;
        let ways: &[_] = if options.no_hole { &[zero] } else { &[punch, zero] };
        for way in ways {
            if self.allocate(*way, offset, length)? {
                return Ok(());
            }
        }
        if options.fast_only {
            let text = "zeroing is not fast here";
            return Err(BlockError::new(BlockErrorKind::Unsupported, text));
        }
        let zeroes = vec![0; ZERO_BUFFER];
        let mut at = offset;
        while at < offset + length {
            #[allow(clippy::cast_possible_truncation, reason = "bounded by the buffer")]
            let part = (offset + length - at).min(ZERO_BUFFER as u64) as usize;
            self.write(&zeroes[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.check(offset, length, true)?;
        if length > 0 {
            self.allocate(FallocateFlags::PUNCH_HOLE, offset, length)?;
        }
        Ok(())
    }

    fn flush(&self) -> BlockResult<()> {
        self.check(0, 0, false)?;
        if self.info.read_only {
            return Ok(());
        }
        self.storage.flush().map_err(|e| self.fault("cannot flush", &e))
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.check(offset, length, false)?;
        self.storage
            .read_ahead(offset, length)
            .map_err(|e| self.fault("cannot read ahead", &e).at(offset))
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        self.check(offset, length, false)?;
        let end = offset + length;
        let mut at = offset;
        while at < end {
            // Block devices, and file systems that cannot tell, have data everywhere.
            let (data, hole) = match (self.is_file, seek(self.storage.file(), SeekFrom::Data(at))) {
                (false, _) => (at, end),
                (true, Ok(data)) if data > at => (data, data),
                (true, Ok(data)) => {
                    (data, seek(self.storage.file(), SeekFrom::Hole(at)).unwrap_or(end))
                }
                (true, Err(Errno::NXIO)) => (end, end),
                (true, Err(_)) => (at, end),
            };
            let zero = data > at;
            let to = if zero { data } else { hole }.min(end).max(at + 1);
            let depth = u32::from(!zero);
            if !visit(Extent { offset: at, length: to - at, hole: zero, zero, depth }) {
                break;
            }
            at = to;
        }
        Ok(())
    }

    fn close(&self) -> BlockResult<()> {
        if self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let flushed = self.flush();
        self.closed.store(true, Ordering::Release);
        self.storage.unlock();
        flushed
    }
}
