//! Devices that do what a test tells them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use sendense_hub::block::{
    BlockDevice, BlockError, BlockErrorKind, BlockResult, DeviceInfo, Extent, ZeroOptions,
};
use sendense_hub::export::memory::MemoryDevice;

/// A disk in memory with a gate before its writes, a bad byte for reads, and a range of holes.
pub struct Scripted {
    pub memory: MemoryDevice,
    /// Reads that start here take a while.
    pub slow: Option<u64>,
    /// Reads of this byte fail.
    pub bad: Option<u64>,
    /// Reported as a hole.
    pub hole: std::ops::Range<u64>,
    /// Fail every flush, and closing.
    pub broken_flush: AtomicBool,
    /// Writes that wait at the gate.
    pub waiting: AtomicUsize,
    /// Reads so far.
    pub reads: AtomicUsize,
    gate: Mutex<bool>,
    opened: Condvar,
}

impl Scripted {
    pub fn new(size: usize) -> Self {
        Self {
            memory: MemoryDevice::new(size, false),
            slow: None,
            bad: None,
            hole: 0..0,
            broken_flush: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            gate: Mutex::new(true),
            opened: Condvar::new(),
        }
    }

    /// Lets writes through, or not.
    pub fn open_gate(&self, open: bool) {
        *self.gate.lock().unwrap() = open;
        self.opened.notify_all();
    }
}

impl BlockDevice for Scripted {
    fn info(&self) -> &DeviceInfo {
        self.memory.info()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if self.slow == Some(offset) {
            std::thread::sleep(Duration::from_millis(20));
        }
        match self.bad {
            Some(bad) if (offset..offset + buf.len() as u64).contains(&bad) => {
                Err(BlockError::new(BlockErrorKind::Io, "the platter is scratched").at(bad))
            }
            _ => self.memory.read(buf, offset),
        }
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut open = self.gate.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
        drop(open);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.memory.write(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        self.memory.write_zeroes(offset, length, options)
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.discard(offset, length)
    }

    fn flush(&self) -> BlockResult<()> {
        if self.broken_flush.load(Ordering::SeqCst) {
            return Err(BlockError::new(BlockErrorKind::Io, "the disk does not flush"));
        }
        self.memory.flush()
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.cache(offset, length)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        let end = offset + length;
        let cut = |at: u64| at.clamp(offset, end);
        let (from, to) = (cut(self.hole.start), cut(self.hole.end));
        for (start, stop, hole) in [(offset, from, false), (from, to, true), (to, end, false)] {
            let extent = Extent { offset: start, length: stop - start, hole, zero: hole, depth: 1 };
            if start < stop && !visit(extent) {
                break;
            }
        }
        Ok(())
    }

    fn close(&self) -> BlockResult<()> {
        self.flush()?;
        self.memory.close()
    }
}
