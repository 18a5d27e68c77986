//! Our sources as the block devices of the file system crates.

use std::sync::Arc;

use crate::source::Source;

/// A source, read-only, for a crate of the `rust-fs` family.
pub struct Device(pub Arc<dyn Source>);

impl fs_core::BlockRead for Device {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> fs_core::Result<()> {
        self.0
            .read_at(buf, offset)
            .map_err(|e| fs_core::Error::Io(std::io::Error::other(e.to_string())))
    }

    fn size_bytes(&self) -> u64 {
        self.0.size()
    }
}
