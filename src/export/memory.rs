//! A device in memory, for tests and benchmarks of the server alone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::block::{
    BlockDevice, BlockError, BlockErrorKind, BlockResult, DeviceInfo, Extent, ZeroOptions,
};

/// Bytes in a vector.
#[derive(Debug)]
pub struct MemoryDevice {
    info: DeviceInfo,
    bytes: RwLock<Vec<u8>>,
    flushes: AtomicU64,
    closed: AtomicBool,
}

impl MemoryDevice {
    /// A device of `size` zeroes.
    pub fn new(size: usize, read_only: bool) -> Self {
        let info = DeviceInfo {
            size: size as u64,
            read_only,
            preferred_block: 64 << 10,
            can_zero_fast: true,
            can_discard: true,
            has_depth: false,
            tells_durable: false,
            backing_files: 0,
            rotational: false,
        };
        let bytes = RwLock::new(vec![0; size]);
        Self { info, bytes, flushes: AtomicU64::new(0), closed: AtomicBool::new(false) }
    }

    /// A copy of everything.
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Number of flushes so far.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }

    /// Whether the device was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn range(&self, offset: u64, length: usize) -> BlockResult<std::ops::Range<usize>> {
        if self.is_closed() {
            return Err(BlockError::new(BlockErrorKind::Closing, "the device is closed"));
        }
        let outside = || BlockError::new(BlockErrorKind::OutOfBounds, "past the end").at(offset);
        let start = usize::try_from(offset).map_err(|_| outside())?;
        let end = start.checked_add(length).ok_or_else(outside)?;
        if end as u64 > self.info.size { Err(outside()) } else { Ok(start..end) }
    }
}

impl BlockDevice for MemoryDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        let range = self.range(offset, buf.len())?;
        buf.copy_from_slice(&self.bytes.read().unwrap_or_else(PoisonError::into_inner)[range]);
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        let range = self.range(offset, buf.len())?;
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)[range].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, _: ZeroOptions) -> BlockResult<()> {
        let range = self.range(offset, usize::try_from(length).unwrap_or(usize::MAX))?;
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)[range].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.write_zeroes(offset, length, ZeroOptions::default())
    }

    fn flush(&self) -> BlockResult<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.range(offset, usize::try_from(length).unwrap_or(usize::MAX)).map(drop)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        if length > 0 {
            visit(Extent { offset, length, hole: false, zero: false, depth: 1 });
        }
        Ok(())
    }

    fn close(&self) -> BlockResult<()> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
}
