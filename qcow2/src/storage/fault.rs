//! A storage that fails on command: EIO, ENOSPC, short writes, lost flushes.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Identity, Storage};

/// Which calls are counted against a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `read_at`.
    Read,
    /// `write_at`.
    Write,
    /// `flush`.
    Flush,
    /// `reserve` and `set_len`.
    Grow,
}

/// A planned failure.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The call that fails.
    pub call: Call,
    /// How many of these calls succeed first.
    pub after: u64,
    /// How many then fail; `u64::MAX` for all.
    pub count: u64,
    /// The system error.
    pub error: io::ErrorKind,
    /// For writes: how many bytes still reach the storage.
    pub short: usize,
}

/// Wraps a storage with planned failures.
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    faults: Mutex<Vec<Fault>>,
    calls: AtomicU64,
}

impl FaultStorage {
    /// Passes everything to `inner` until a fault is planned.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, faults: Mutex::default(), calls: AtomicU64::new(0) }
    }

    /// Plans a failure.
    pub fn plan(&self, fault: Fault) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    /// Forgets every planned failure.
    pub fn heal(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Calls seen so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    fn hit(&self, call: Call) -> Option<Fault> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        for fault in faults.iter_mut().filter(|f| f.call == call) {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.count > 0 {
                fault.count = fault.count.saturating_sub(1);
                return Some(*fault);
            }
        }
        None
    }

    fn check(&self, call: Call) -> io::Result<()> {
        self.hit(call).map_or(Ok(()), |f| Err(f.error.into()))
    }
}

impl Storage for FaultStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(Call::Read)?;
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if let Some(fault) = self.hit(Call::Write) {
            self.inner.write_at(&buf[..fault.short.min(buf.len())], offset)?;
            return Err(fault.error.into());
        }
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.check(Call::Flush)?;
        self.inner.flush()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check(Call::Grow)?;
        self.inner.set_len(len)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(Call::Grow)?;
        self.inner.reserve(offset, length)
    }

    fn grows_with_zeroes(&self) -> bool {
        self.inner.grows_with_zeroes()
    }

    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }
}
