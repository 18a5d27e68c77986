//! What all connections share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::buffers::Budget;
use super::exports::Exports;
use super::limits::Limits;

/// The server's state: exports, bounds and memory.
pub struct Server {
    /// What is served.
    pub exports: Exports,
    /// The bounds.
    pub limits: Limits,
    pub(super) read_memory: Arc<Budget>,
    pub(super) write_memory: Arc<Budget>,
    connections: AtomicUsize,
}

impl Server {
    /// A server without exports.
    ///
    /// # Errors
    /// `InvalidInput` for bounds that cannot work together.
    pub fn new(limits: Limits) -> std::io::Result<Arc<Self>> {
        limits.validate().map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidInput, e))?;
        Ok(Arc::new(Self {
            exports: Exports::default(),
            read_memory: Budget::new(limits.buffered_reads()),
            write_memory: Budget::new(limits.buffered_writes()),
            connections: AtomicUsize::new(0),
            limits,
        }))
    }

    /// Most bytes of payload that were in memory for reads and for writes.
    pub fn peak_memory(&self) -> (usize, usize) {
        (self.read_memory.peak(), self.write_memory.peak())
    }

    /// Counts a connection in.
    ///
    /// # Errors
    /// A sentence with the bound where there are too many.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Entry, String> {
        let most = self.limits.connections;
        let claim = |n: usize| (n < most).then_some(n + 1);
        match self.connections.fetch_update(Ordering::AcqRel, Ordering::Acquire, claim) {
            Ok(_) => Ok(Entry { server: Arc::clone(self) }),
            Err(_) => Err(format!("this server has {most} connections already, its maximum")),
        }
    }
}

/// One of the server's connections; counts until dropped.
pub(super) struct Entry {
    server: Arc<Server>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.server.connections.fetch_sub(1, Ordering::AcqRel);
    }
}
