//! Configuration that is read from files.

pub mod dropins;
mod hub;

pub use hub::HubConfig;
