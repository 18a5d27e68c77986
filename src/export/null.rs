//! A device that holds nothing: what a server costs without a disk.

use crate::block::{BlockDevice, BlockResult, DeviceInfo, Extent, ZeroOptions};

/// Reads as zeroes, forgets what is written.
#[derive(Debug)]
pub struct NullDevice {
    info: DeviceInfo,
}

impl NullDevice {
    /// A device of `size` bytes.
    pub fn new(size: u64, read_only: bool) -> Self {
        let info = DeviceInfo {
            size,
            read_only,
            preferred_block: 64 << 10,
            can_zero_fast: true,
            can_discard: true,
            has_depth: false,
            tells_durable: false,
            backing_files: 0,
            rotational: false,
        };
        Self { info }
    }
}

impl BlockDevice for NullDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read(&self, buf: &mut [u8], _offset: u64) -> BlockResult<()> {
        buf.fill(0);
        Ok(())
    }

    fn write(&self, _buf: &[u8], _offset: u64) -> BlockResult<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroOptions) -> BlockResult<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> BlockResult<()> {
        Ok(())
    }

    fn flush(&self) -> BlockResult<()> {
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> BlockResult<()> {
        Ok(())
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        if length > 0 {
            visit(Extent { offset, length, hole: true, zero: true, depth: 0 });
        }
        Ok(())
    }

    fn close(&self) -> BlockResult<()> {
        Ok(())
    }
}
