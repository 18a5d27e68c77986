//! The NBD protocol without I/O: fixed newstyle negotiation and the transmission phase, both sides.
//!
//! The types here take bytes and give bytes; sockets, clocks, threads and TLS belong to whoever
//! drives them. Payloads of reads and writes never pass through: the state machines say how many
//! payload bytes follow and the driver moves them between the socket and its own buffers.
//!
//! Method families carry the design: `handle_*` takes input, `poll` gives the next event, and
//! getters take `&self`. Everything that comes from the peer is bounded before memory is taken for
//! it, and nothing that it sends can panic.
//!
//! Sections named in the documentation are those of the NBD project's protocol specification
//! (`doc/proto.md`), extended headers those of its `extension-ext-header` branch.

#![forbid(unsafe_code)]

pub mod client;
mod codes;
mod error;
mod flags;
mod request;
pub mod server;
mod wire;

pub use codes::{CommandType, InfoType, OptionCode, OptionReply, ReplyType, magic};
pub use error::{Errno, ProtocolError};
pub use flags::{CommandFlags, ExtentState, ReplyFlags, TransmissionFlags};
pub use request::{COMPACT_REQUEST, EXTENDED_REQUEST, RequestHeader};

/// Longest string of the protocol in bytes: export names, context names, queries, error texts
/// ("Values", "Strings").
pub const MAX_STRING: usize = 4096;

/// How replies of the transmission phase are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Simple replies only.
    Simple,
    /// Structured replies, compact headers.
    Structured,
    /// Extended headers, which imply structured replies.
    Extended,
}

/// Size constraints of an export in bytes ("Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest unit of offsets and lengths; a power of two.
    pub minimum: u32,
    /// Unit of efficient requests; a power of two.
    pub preferred: u32,
    /// Longest payload of a read or write.
    pub maximum: u32,
}

/// The metadata context that tells holes and zeroes from data.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The metadata context that tells which file of a backing chain has a range.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// The metadata context that tells which of a session's writes are durable, so that a client that was
/// cut off sends only the rest. Of this project, not of the specification.
pub const SENDENSE_DURABLE: &str = "sendense:durable";
/// The bit of [`SENDENSE_DURABLE`] that a durable range has.
pub const STATE_DURABLE: u64 = 1;
