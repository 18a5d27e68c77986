//! Watching a copy, and stopping it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::error::CaptureError;

/// What a copy tells of its progress; called from several threads, often. What is sent again after a
/// cut is told again.
pub trait Observer: Sync {
    /// The copy covers so many bytes of the disk.
    fn planned(&self, bytes: u64);

    /// So many more bytes were read from the source.
    fn read(&self, bytes: u64);

    /// So many more bytes of data were sent and answered.
    fn sent(&self, bytes: u64);

    /// So many more bytes of the plan were sent, zeroed or skipped.
    fn done(&self, bytes: u64);

    /// The connection was cut, or did not come back yet; it is tried again.
    fn cut(&self, cause: &CaptureError);

    /// Whether to stop. Asked between requests and while waiting for a connection.
    fn is_cancelled(&self) -> bool;
}

/// An observer that counts.
#[derive(Debug, Default)]
pub struct Progress {
    planned: AtomicU64,
    read: AtomicU64,
    sent: AtomicU64,
    done: AtomicU64,
    cuts: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Nothing done yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of the disk that the copy covers.
    pub fn bytes_planned(&self) -> u64 {
        self.planned.load(Ordering::Relaxed)
    }

    /// Bytes read from the source.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes of data sent and answered.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes of the plan that were sent, zeroed or skipped; more than planned after a cut.
    pub fn bytes_done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Failed connections so far.
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::Relaxed)
    }

    /// Asks the copy to stop.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

impl Observer for Progress {
    fn planned(&self, bytes: u64) {
        self.planned.fetch_add(bytes, Ordering::Relaxed);
    }

    fn read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    fn done(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cut(&self, _cause: &CaptureError) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
