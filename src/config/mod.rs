//! Configuration that is read from files.

pub mod dropins;
