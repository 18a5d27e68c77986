//! L1 and L2 tables: entries, and the walk from a slice to mapped segments.

pub(crate) mod entry;
pub(crate) mod segment;
