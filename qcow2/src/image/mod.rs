//! One open image: its metadata, the operations in flight, and its backing chain.

pub(crate) mod create;
mod flush;
pub(crate) mod info;
pub(crate) mod map;
pub(crate) mod open;
mod read;
mod write;
pub(crate) mod zero;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::chain::{Chain, past_end};
use crate::compressed::ClusterReader;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::header::Header;
use crate::meta::Meta;
use crate::ranges::{Access, RangeGuard, Ranges};
use crate::storage::{FileStorage, Storage};
use crate::types::HostOffset;
use flush::Durability;

/// In-place writes exclude each other by whole pages, so that two of them never share one on the
/// way to the disk.
const PAGE: u64 = 4096;

/// Host ranges (start, end) of the metadata whose place the header names.
#[derive(Debug, Clone, Copy)]
struct Reserved {
    header: (u64, u64),
    l1: (u64, u64),
    /// Moves when the refcount table grows.
    reftable: (u64, u64),
}

/// An open image, shared by any number of threads.
///
/// Dropping it closes it as well as possible; call [`Image::close`] to see errors.
pub struct Image {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    /// The same file, where it is one, for its locks.
    file: Option<Arc<FileStorage>>,
    header: Header,
    geometry: Geometry,
    read_only: bool,
    detect_zeroes: bool,
    meta: Mutex<Meta>,
    ranges: Ranges,
    durability: Durability,
    chain: Option<Chain>,
    clusters: ClusterReader,
    /// Length of the file when last asked; the file never gets shorter than this while open.
    file_len: AtomicU64,
    /// Host ranges (start, end) that no guest write may touch, whatever an L2 entry says.
    reserved: RwLock<Reserved>,
}

impl Image {
    /// Bytes of the virtual disk.
    pub fn size(&self) -> u64 {
        self.geometry.size
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u32 {
        1 << self.geometry.cluster_bits
    }

    /// Whether the image refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the image has a backing file.
    pub fn has_backing(&self) -> bool {
        self.chain.is_some()
    }

    /// Bytes of metadata held in memory.
    pub fn metadata_memory(&self) -> usize {
        self.meta().memory()
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        // A panic while the metadata was locked cannot happen by design; if it did, the durability
        // gate has been closed by `Poison`.
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a request's range; returns its end.
    fn bounds(&self, offset: u64, length: u64) -> Result<u64> {
        self.durability.check_open()?;
        match offset.checked_add(length) {
            Some(end) if end <= self.geometry.size => Ok(end),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{length} bytes at {offset} reach past the end of the disk ({} bytes)",
                    self.geometry.size
                ),
            )),
        }
    }

    /// As [`Self::bounds`], for an operation that changes the disk.
    fn writable_bounds(&self, offset: u64, length: u64) -> Result<u64> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only")
                .in_file(&self.path));
        }
        let end = self.bounds(offset, length)?;
        self.durability.check_healthy()?;
        Ok(end)
    }

    /// Enters `start .. end` to read. A read-only image never changes, so its readers need not wait.
    fn enter_reading(&self, start: u64, end: u64) -> Result<Option<RangeGuard<'_>>> {
        let guard = (!self.read_only).then(|| self.ranges.enter(start..end, Access::Read));
        self.durability.check_open()?;
        Ok(guard)
    }

    /// Enters `start .. end` to change it. Closing enters everything, so whoever is let in after it
    /// finds the image closed: nothing reaches the file behind the next opener's back.
    fn enter_changing(&self, start: u64, end: u64, access: Access) -> Result<RangeGuard<'_>> {
        let guard = self.ranges.enter(start..end, access);
        self.durability.check_open()?;
        Ok(guard)
    }

    /// Whether the file has bytes at `host`.
    fn is_inside_file(&self, host: HostOffset) -> Result<bool> {
        if host.0 < self.file_len.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let length =
            self.storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        self.file_len.store(length, Ordering::Relaxed);
        Ok(host.0 < length)
    }

    /// Refuses to write guest data where only a damaged L2 entry can point: over the header, the L1
    /// table or the refcount table, or past the end of the file.
    fn check_data_range(&self, host: HostOffset, length: u64) -> Result<()> {
        if !self.is_inside_file(HostOffset(self.geometry.align_down(host.0)))? {
            return Err(past_end(host, self.file_len.load(Ordering::Relaxed)).in_file(&self.path));
        }
        let end = host.0.saturating_add(length);
        let reserved = *self.reserved.read().unwrap_or_else(PoisonError::into_inner);
        let ranges = [reserved.header, reserved.l1, reserved.reftable];
        match ranges.iter().find(|(from, to)| host.0 < *to && *from < end) {
            None => Ok(()),
            Some((from, to)) => Err(Error::corrupt(format!(
                "an L2 entry places guest data at {host}, over metadata at {from:#x} .. {to:#x}; \
                 nothing was written, run a check with repair"
            ))
            .in_file(&self.path)),
        }
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("path", &self.path)
            .field("size", &self.geometry.size)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}
