//! One process per mount that reads guests' disks, because nothing on such a disk is to be believed.
//!
//! ```text
//! hub: Worker, RemoteTree -> frames -- Unix socket -- frames -> serve -> guest -> qcow2 :worker
//! ```
//!
//! The worker is this program again, under another name. It gets the open files of the disks as
//! descriptors, and may do nothing but read them and answer ([`sandbox`]). The hub believes its answers
//! no more than the disk: each is checked for its bounds and must come in time. A worker that fails
//! either is killed, and only its mount fails with it. It never outlives the hub.

mod check;
mod disk;
mod frames;
mod plain;
mod process;
mod protocol;
mod remote;
pub mod sandbox;
mod serve;
mod spawner;

pub use process::{Limits, Program, Worker};
pub use serve::serve;
