//! Capturing a disk: from a file, a block device or an NBD server into an export of the hub.
//!
//! What must stay true:
//!
//! - A copy that returns `Ok` has been flushed: the last flush was answered after the last write.
//! - A range counts as done when a flush that began after its reply was answered, or when the server
//!   says that it is durable. After a cut everything else is sent again.
//! - What is left out reads the same in the target already: it reads as zeroes there, or has the same
//!   checksum.
//! - An error that the server answers ends the copy, unless it says that it is about to end. That and
//!   broken connections are tried again.
//!
//! The source must not change meanwhile: a snapshot, a stopped machine, or what a hypervisor exports
//! for a backup.

mod copy;
mod error;
mod file;
mod ledger;
mod observer;
mod plan;
mod ranges;
mod remote;
mod source;
mod target;
mod uri;
mod worker;
mod zero;

pub use copy::{Summary, copy};
pub use error::CaptureError;
pub use observer::{Observer, Progress};
pub use plan::Changes;
pub use source::Source;
pub use target::{Target, list_exports};

/// Granularity in bytes of comparing, and of looking for zeroes: the cluster size of the hub's
/// images.
pub const CLUSTER: u64 = 64 << 10;
