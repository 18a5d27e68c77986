//! The NBD server: listeners, negotiation, connections, exports.
//!
//! Negotiation runs on the async runtime, where thousands of silent peers cost little. A connection
//! that has chosen its export gets a thread of its own with blocking calls: that is the shortest way
//! from the socket to the disk, and what one peer does there cannot hold up another.

mod block_status;
pub mod buffers;
pub mod client;
pub mod exports;
pub mod handshake;
pub mod limits;
pub mod listener;
pub mod ports;
pub mod publisher;
mod requests;
mod send_queue;
pub mod server;
mod session;
mod socket;
pub mod stats;
mod workers;

/// Stack of a connection's threads, in bytes.
const STACK: usize = 256 << 10;
