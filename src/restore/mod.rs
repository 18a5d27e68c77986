//! Restore points as disks: exports to read or boot from, and what differs between two of them. And as
//! files: mounts.

mod diff;
mod exports;
mod mounts;

pub use diff::{Difference, difference};
pub use exports::{RestoreExport, Restores, Settings, Wish};
pub use mounts::{CleanupReport, MountInfo, MountSettings, MountStatus, MountWish, Mounts, Using};
