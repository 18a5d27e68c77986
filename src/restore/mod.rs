//! Restore points as disks: exports to read or boot from, and what differs between two of them. And as
//! files: what is handed out of the trees on those disks.

mod diff;
mod exports;
pub mod files;
pub mod fuse;

pub use diff::{Difference, difference};
pub use exports::{RestoreExport, Restores, Settings, Wish};
