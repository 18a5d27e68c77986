//! Every bound of the NBD server, with its default.

use std::time::Duration;

use crate::block::DeviceInfo;

/// Length of one piece in which payloads move between socket and disk, in bytes.
pub const PIECE: usize = 1 << 20;
/// Longest write that is handled on the connection's own thread, in bytes. Longer ones are worth the
/// way to another thread, for what the disk gains from having several at a time.
pub const INLINE_WRITE: usize = 32 << 10;
/// The same for reads, which mostly come from memory.
pub const INLINE_READ: usize = 64 << 10;

/// Bounds of the server; all can be configured.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Time for the whole negotiation, from the accepted connection on.
    pub handshake: Duration,
    /// Negotiations in progress for one source address; the oldest gives way to a new one.
    pub handshakes_per_source: usize,
    /// Negotiations in progress in all; the oldest gives way to a new one.
    pub handshakes: usize,
    /// Connections of one export, unless the export says otherwise.
    pub connections_per_export: usize,
    /// Connections in the transmission phase in all.
    pub connections: usize,
    /// Requests of one connection that are being worked on.
    pub requests_per_connection: usize,
    /// Longest payload of one read or write, in bytes; advertised.
    pub max_payload: u32,
    /// Bytes of payload in memory in the whole process.
    pub buffered: usize,
    /// Bytes of payload in memory for the reads of one connection. A longer request is taken alone.
    pub buffered_per_connection: usize,
    /// Time without a byte after which a peer in the middle of a request, or one that does not take
    /// its replies, is dropped. A connection between requests is never dropped.
    pub stall: Duration,
    /// The same while others wait for the memory that the unsent replies hold.
    pub stall_under_pressure: Duration,
    /// Time during which requests are answered with `NBD_ESHUTDOWN` before connections are closed.
    pub shutdown_notice: Duration,
    /// Time for the whole shutdown: requests finish, images flush and close.
    pub shutdown: Duration,
    /// Threads of one export that move pieces between memory and its disk: deep enough for disks
    /// that answer late, and not so deep that sequential writes become random.
    pub workers: usize,
    /// The same for an export that is only read. There is one more for each backing file: what a long
    /// chain has in one place lies in many.
    pub readers: usize,
    /// The same for the longest chain.
    pub readers_of_chain: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            handshakes_per_source: 256,
            handshakes: 4096,
            connections_per_export: 64,
            connections: 2048,
            requests_per_connection: 256,
            max_payload: 64 << 20,
            buffered: 256 << 20,
            buffered_per_connection: 32 << 20,
            stall: Duration::from_secs(120),
            stall_under_pressure: Duration::from_secs(5),
            shutdown_notice: Duration::from_millis(200),
            shutdown: Duration::from_secs(30),
            workers: 6,
            readers: 8,
            readers_of_chain: 16,
        }
    }
}

impl Limits {
    /// The part of the memory that only writes may use, so that peers which do not take their
    /// replies cannot stop others from writing.
    pub fn buffered_writes(&self) -> usize {
        self.buffered / 4
    }

    /// The part of the memory for reads.
    pub fn buffered_reads(&self) -> usize {
        self.buffered - self.buffered_writes()
    }

    /// Threads of an export of a device.
    pub fn threads(&self, info: &DeviceInfo) -> usize {
        if !info.read_only {
            return self.workers;
        }
        let most = self.readers_of_chain.max(self.readers);
        self.readers.saturating_add(info.backing_files).min(most)
    }

    /// Checks that the bounds can work together.
    ///
    /// # Errors
    /// A sentence that names the bounds.
    pub fn validate(&self) -> Result<(), String> {
        if (self.max_payload as usize) < PIECE || !self.max_payload.is_power_of_two() {
            return Err(format!("the longest payload must be a power of two of {PIECE} or more"));
        }
        // A read that must be answered in one piece has to fit, alignment included.
        let needed = (self.max_payload as usize + 2 * PIECE) * 4 / 3 + 4 * PIECE;
        if self.buffered < needed {
            return Err(format!(
                "{} bytes of buffers are too few for payloads of {} bytes; at least {needed}",
                self.buffered, self.max_payload
            ));
        }
        if self.workers.min(self.readers).min(self.requests_per_connection) == 0 {
            return Err("at least one worker and one request in flight are needed".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_work_together() {
        Limits::default().validate().unwrap();
    }

    #[test]
    fn a_long_chain_is_read_by_more_threads_than_an_image_and_is_bounded_too() {
        let limits = Limits::default();
        let mut info = DeviceInfo {
            size: 1 << 20,
            read_only: true,
            preferred_block: 64 << 10,
            can_zero_fast: false,
            can_discard: false,
            has_depth: true,
            tells_durable: false,
            backing_files: 0,
            rotational: false,
        };
        for (backing_files, threads) in [(0, 8), (3, 11), (8, 16), (500, 16)] {
            info.backing_files = backing_files;
            assert_eq!(limits.threads(&info), threads);
        }
        info.read_only = false;
        assert_eq!(limits.threads(&info), 6);
    }

    #[test]
    fn too_little_memory_for_the_longest_payload_is_refused() {
        let limits = Limits { buffered: 64 << 20, ..Limits::default() };
        assert!(limits.validate().is_err());
    }
}
