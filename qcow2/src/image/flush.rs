//! Making writes durable, in the order that keeps every crash point readable; closing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::{Batch, Put};
use crate::ranges::Access;

/// Flushes that closing does at most: changes, then the refcounts of what they freed.
const CLOSING_FLUSHES: usize = 4;
/// Metadata writes that touch are joined up to this many bytes.
const MAX_JOINED: usize = 1 << 20;

/// What has been written, what is durable, and whether the image can still be trusted.
#[derive(Default)]
pub(super) struct Durability {
    /// Operations that changed something, counted as they complete.
    written: AtomicU64,
    /// The count of `written` that the last flush covered. Held while a flush runs.
    flushed: Mutex<u64>,
    /// The failure after which the disk's content is unknown.
    failed: OnceLock<String>,
    closed: AtomicBool,
}

impl Durability {
    pub(super) fn check_open(&self) -> Result<()> {
        match self.closed.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Closed, "the image is closed")),
        }
    }

    pub(super) fn check_healthy(&self) -> Result<()> {
        match self.failed.get() {
            None => Ok(()),
            Some(message) => Err(Error::new(
                ErrorKind::Io,
                format!("writes are refused since an earlier flush failed: {message}"),
            )),
        }
    }

    pub(super) fn note_write(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }
}

impl Image {
    /// Makes durable every write, zeroing and discard that completed before this call, whoever made
    /// it. Costs nothing when nothing was written since the last flush; concurrent calls share one.
    ///
    /// # Errors
    /// `Io`, `NoSpace`. When the system's own flush fails, what reached the disk is unknown: from
    /// then on every write and flush fails, and the image should be closed and checked.
    pub fn flush(&self) -> Result<()> {
        self.durability.check_open()?;
        if self.read_only {
            return Ok(());
        }
        let wanted = self.durability.written.load(Ordering::Acquire);
        let mut flushed = self.durability.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        self.durability.check_open()?;
        self.durability.check_healthy()?;
        if *flushed >= wanted {
            return Ok(());
        }
        self.flush_holding(&mut flushed).map_err(|e| e.in_file(&self.path))
    }

    fn flush_holding(&self, flushed: &mut u64) -> Result<()> {
        let covered = self.durability.written.load(Ordering::Acquire);
        let batch = self.meta().take_batch();
        match self.write_batch(&batch) {
            Ok(()) => {
                let mut meta = self.meta();
                if let Some(place) = batch.moved_reftable {
                    // The clusters of the former table can be given out from here on.
                    let mut reserved =
                        self.reserved.write().unwrap_or_else(PoisonError::into_inner);
                    reserved.reftable = place;
                }
                meta.commit(&*self.storage, batch)?;
                drop(meta);
                *flushed = covered;
                Ok(())
            }
            Err(error) => {
                self.meta().abort(batch);
                Err(error)
            }
        }
    }

    /// Writes metadata out when the caches are full of changes.
    pub(super) fn checkpoint_if_full(&self) -> Result<()> {
        if !self.meta().wants_checkpoint() {
            return Ok(());
        }
        let mut flushed = self.durability.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if self.durability.check_open().is_err() {
            // Closing has flushed, and said so if it could not.
            return Ok(());
        }
        self.durability.check_healthy()?;
        if self.meta().wants_checkpoint() { self.flush_holding(&mut flushed) } else { Ok(()) }
    }

    /// The three steps of `docs/on-disk.md`, each durable before the next begins.
    fn write_batch(&self, batch: &Batch) -> Result<()> {
        self.put_all(&batch.unreferenced)?;
        self.sync()?;
        if !batch.refcount_pointers.is_empty() {
            self.put_all(&batch.refcount_pointers)?;
            self.sync()?;
        }
        if !batch.mapping.is_empty() {
            self.meta().publish(batch);
            self.put_all(&batch.mapping)?;
            self.sync()?;
        }
        Ok(())
    }

    /// Writes metadata, joining what touches.
    fn put_all(&self, puts: &[Put]) -> Result<()> {
        let mut sorted: Vec<&Put> = puts.iter().collect();
        sorted.sort_unstable_by_key(|put| put.offset);
        let write = |offset: u64, bytes: &[u8]| {
            self.storage.write_at(bytes, offset).map_err(|e| {
                Error::io(
                    format!("cannot write {} bytes of metadata at {offset:#x}", bytes.len()),
                    e,
                )
            })
        };
        let mut joined: Vec<u8> = Vec::new();
        let mut start = 0;
        for put in sorted {
            let touches = start + joined.len() as u64 == put.offset;
            if !touches || joined.len() + put.bytes.len() > MAX_JOINED {
                if !joined.is_empty() {
                    write(start, &joined)?;
                }
                joined.clear();
                start = put.offset;
            }
            joined.extend_from_slice(&put.bytes);
        }
        if joined.is_empty() { Ok(()) } else { write(start, &joined) }
    }

    fn sync(&self) -> Result<()> {
        self.storage.flush().map_err(|e| {
            let error = Error::io("flushing the image file failed; what it holds is unknown", e);
            // The first failure stays; a later one adds nothing.
            let _ = self.durability.failed.set(error.to_string());
            error
        })
    }

    /// Waits for operations in flight, flushes, gives back space reserved ahead, and releases the
    /// file's lock. Later calls on the image fail with `Closed`; closing twice does nothing.
    ///
    /// # Errors
    /// As [`Image::flush`]. The image is closed all the same.
    pub fn close(&self) -> Result<()> {
        if self.durability.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let _everything = self.ranges.enter(0..u64::MAX, Access::Remap);
        let result = if self.read_only { Ok(()) } else { self.settle() };
        if let Some(file) = &self.file {
            file.unlock();
        }
        result.map_err(|e| e.in_file(&self.path))
    }

    fn settle(&self) -> Result<()> {
        let mut flushed = self.durability.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        self.durability.check_healthy()?;
        for _ in 0..CLOSING_FLUSHES {
            let clean = *flushed >= self.durability.written.load(Ordering::Acquire);
            if clean && !self.meta().is_dirty() {
                break;
            }
            self.flush_holding(&mut flushed)?;
        }
        let cut = {
            let mut meta = self.meta();
            let alloc = &meta.space()?.alloc;
            alloc.has_slack().then(|| alloc.end().0)
        };
        if let Some(end) = cut {
            self.storage
                .set_len(end)
                .map_err(|e| Error::io("cannot cut the image file to its end", e))?;
            self.sync()?;
        }
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Whoever wants to know calls `close`.
        let _ = self.close();
    }
}
