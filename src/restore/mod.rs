//! Restore points as disks: exports to read or boot from, and what differs between two of them. And as
//! files: mounts, and what is handed out of the trees on those disks.

mod changes;
mod diff;
mod exports;
pub mod files;
pub mod fuse;
mod mounts;

pub use changes::{Change, ChangeKind, Changes, file_changes};
pub use diff::{Difference, difference};
pub use exports::{RestoreExport, Restores, Settings, Wish};
pub use mounts::{
    CleanupReport, MountInfo, MountSettings, MountStatus, MountWish, Mounts, Using,
    is_end_of_worker,
};
