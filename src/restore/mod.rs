//! Restore points as disks: exports to read or boot from, and what differs between two of them.

mod diff;
mod exports;

pub use diff::{Difference, difference};
pub use exports::{RestoreExport, Restores, Settings, Wish};
