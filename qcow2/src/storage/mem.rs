//! A storage in memory, for tests and benchmarks of the engine alone.

use std::io;
use std::sync::{PoisonError, RwLock};

use super::Storage;

/// Largest length a [`MemStorage`] grows to: 4 GiB. A wild offset fails instead of eating memory.
const MAX_MEM_LEN: u64 = 4 << 30;

/// A growable byte vector.
#[derive(Debug, Default)]
pub struct MemStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemStorage {
    /// A storage that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    /// A copy of everything stored.
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn to_index(offset: u64) -> io::Result<usize> {
    match usize::try_from(offset) {
        Ok(index) if offset <= MAX_MEM_LEN => Ok(index),
        _ => Err(io::Error::new(io::ErrorKind::StorageFull, "past the largest memory storage")),
    }
}

impl Storage for MemStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.read().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let have = match usize::try_from(offset) {
            Ok(start) if start < bytes.len() => &bytes[start..bytes.len().min(start + buf.len())],
            _ => &[],
        };
        let (head, tail) = buf.split_at_mut(have.len());
        head.copy_from_slice(have);
        tail.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let start = to_index(offset)?;
        let end = to_index(offset.saturating_add(buf.len() as u64))?;
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = to_index(len)?;
        self.bytes.write().unwrap_or_else(PoisonError::into_inner).resize(len, 0);
        Ok(())
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = to_index(offset.saturating_add(length))?;
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }
}
