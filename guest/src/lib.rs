//! Reads files out of the disks of a virtual machine: partition tables, volume groups, file systems.
//! Nothing is mounted, nothing is written, and nothing on a disk is believed.
//!
//! ```text
//! disks -> tables (GPT, MBR) -> lvm -> fs::open (ext, XFS, btrfs, NTFS, FAT, exFAT) -> volumes
//! ```
//!
//! A [`Source`] gives bytes; [`FileSystem`] gives files by handle; [`path`] finds a handle by name. A
//! [`Guest`] is all disks of a machine at one point in time, as its [`Volume`]s. Journals are replayed
//! in memory, and each volume's [`Status`] says whether what it shows is what the machine would see.
//!
//! # What holds for every reader
//!
//! * No input makes it panic, loop or allocate without a bound: sizes, counts and depths that a disk
//!   names are checked against a named limit before they are used.
//! * Damage is an [`Error`] for what is damaged, and never wrong data or a silently shorter list.
//! * Calls take `&self` and may come from several threads.

pub mod adapter;
mod bytes;
mod crc;
mod error;
pub mod fs;
mod guarded;
pub mod local;
mod lvm;
#[cfg(any(test, feature = "test-util"))]
pub mod memory;
pub mod path;
mod recognise;
pub mod source;
mod tables;
pub mod tree;
mod volumes;

pub use error::{Error, ErrorKind, Result};
pub use fs::{
    About, Attributes, Cursor, Entry, FileSystem, FileType, Node, Page, Piece, Place, Status, Time,
};
pub use source::{DiskRange, Slice, Source};
pub use tree::Tree;
pub use volumes::{DISKS_MAX, Guest, PARTITIONS_MAX, Volume, VolumeAbout};
