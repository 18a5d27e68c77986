//! Files out of a restore point, as they are handed out: names as text, listings of whole subtrees,
//! search, archives.
//!
//! All of it works on a [`guest::Tree`], and believes it no more than the disk behind it: names are
//! checked, depth and counts have bounds, and memory does not grow with the number of files.

pub mod archive;
pub mod names;
mod search;
mod stream;
#[cfg(test)]
pub(crate) mod tree;
mod walk;

pub use search::{BYTES, Found, Matches, Pattern, SearchLimits, everything, search, weight};
pub use stream::{FileStream, Piece};
pub(crate) use walk::proper;
pub use walk::{DEPTH, Step, Trouble, Walk};
