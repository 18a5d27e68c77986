//! The Sendense hub: an in-process NBD server that writes QCOW2 chains, and the backup hub around
//! it. See `docs/architecture.md` for the way a write takes through it.

pub mod api;
pub mod app;
pub mod backup;
pub mod block;
pub mod capture;
pub mod catalog;
pub mod checksum;
pub mod cli;
pub mod config;
pub mod ctl;
pub mod demo;
pub mod export;
pub mod model;
pub mod nbd;
pub mod pages;
pub mod repository;
pub mod restore;
pub mod secrets;
pub mod telemetry;
pub mod worker;
