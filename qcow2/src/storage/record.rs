//! A storage that remembers each write and flush, so that a test can build every state that a
//! crash could leave.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::{MemStorage, Storage};

/// One change that reached the storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes written at an offset.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// The length was set.
    SetLen(u64),
    /// Everything before is durable.
    Flush,
}

/// Memory storage with a log of its changes.
#[derive(Debug)]
pub struct RecordingStorage {
    inner: MemStorage,
    log: Arc<Mutex<Vec<Event>>>,
}

impl RecordingStorage {
    /// Starts from `bytes`, with an empty log.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { inner: MemStorage::new(bytes), log: Arc::default() }
    }

    /// The log, shared: it can be read while the storage is in use.
    pub fn log(&self) -> Arc<Mutex<Vec<Event>>> {
        Arc::clone(&self.log)
    }

    fn record(&self, event: Event) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}

impl Storage for RecordingStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.record(Event::Write { offset, data: buf.to_vec() });
        self.inner.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.record(Event::Flush);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Event::SetLen(len));
        self.inner.set_len(len)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        if self.inner.len()? < end {
            self.set_len(end)?;
        }
        Ok(())
    }
}

/// Applies one event to the bytes of a crashed storage. `sectors` limits a write to those of its
/// 512-byte sectors for which it returns `true`: a torn write.
pub fn apply(bytes: &mut Vec<u8>, event: &Event, mut sectors: impl FnMut(usize) -> bool) {
    match event {
        Event::Write { offset, data } => {
            let Ok(start) = usize::try_from(*offset) else {
                return;
            };
            if bytes.len() < start + data.len() {
                bytes.resize(start + data.len(), 0);
            }
            // Sectors are those of the storage, not of the buffer.
            let mut at = 0;
            let mut number = 0;
            while at < data.len() {
                let end = data.len().min(at + 512 - (start + at) % 512);
                if sectors(number) {
                    bytes[start + at..start + end].copy_from_slice(&data[at..end]);
                }
                at = end;
                number += 1;
            }
        }
        Event::SetLen(len) => {
            if let Ok(len) = usize::try_from(*len) {
                bytes.resize(len, 0);
            }
        }
        Event::Flush => {}
    }
}
