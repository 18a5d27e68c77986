//! Devices that do what a test tells them.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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

/// A disk in memory that keeps account of what is durable.
pub struct Accountant {
    pub memory: MemoryDevice,
    info: DeviceInfo,
    account: Mutex<Account>,
    /// What the disk held when the session began.
    base: Mutex<Vec<u8>>,
    /// Bytes written so far, zeroes not counted.
    pub written: AtomicU64,
    /// Writes fail with this once so many bytes are written.
    pub full_at: AtomicU64,
}

#[derive(Default)]
struct Account {
    /// By unit of the disk.
    written: Vec<bool>,
    /// By unit of the disk; what was written when the last flush came.
    durable: Vec<bool>,
}

impl Accountant {
    /// What is accounted for is a multiple of this, in bytes.
    pub const UNIT: u64 = 512;

    pub fn new(size: usize, tells_durable: bool) -> Self {
        let memory = MemoryDevice::new(size, false);
        let info = DeviceInfo { tells_durable, ..memory.info().clone() };
        let units = size.div_ceil(512);
        let account = Account { written: vec![false; units], durable: vec![false; units] };
        Self {
            memory,
            info,
            account: Mutex::new(account),
            base: Mutex::new(vec![0; size]),
            written: AtomicU64::new(0),
            full_at: AtomicU64::new(u64::MAX),
        }
    }

    /// Forgets what was not made durable: what a crash of the server does.
    pub fn crash(&self) {
        let mut account = self.account.lock().unwrap();
        let durable = account.durable.clone();
        for (unit, durable) in (0..).zip(&durable) {
            if !durable {
                let offset = unit * Self::UNIT;
                let length = Self::UNIT.min(self.info.size - offset);
                let range = usize::try_from(offset).unwrap();
                let range = range..range + usize::try_from(length).unwrap();
                self.memory.write(&self.base.lock().unwrap()[range], offset).unwrap();
            }
        }
        account.written = durable;
    }

    /// A new session: what was written before is kept, but is not of this session.
    pub fn begin(&self) {
        let bytes = self.memory.snapshot();
        *self.base.lock().unwrap() = bytes;
        let mut account = self.account.lock().unwrap();
        account.written.fill(false);
        account.durable.fill(false);
    }

    /// Bytes that are durable.
    pub fn durable_bytes(&self) -> u64 {
        let account = self.account.lock().unwrap();
        account.durable.iter().filter(|durable| **durable).count() as u64 * Self::UNIT
    }

    /// Whole units inside a range; the last unit of the disk may be short.
    fn units(&self, offset: u64, length: u64) -> std::ops::Range<usize> {
        let end = offset + length;
        let last = if end == self.info.size { end.div_ceil(Self::UNIT) } else { end / Self::UNIT };
        let unit = |at: u64| usize::try_from(at).unwrap();
        let first = unit(offset.div_ceil(Self::UNIT));
        first..unit(last).max(first)
    }
}

impl BlockDevice for Accountant {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.memory.read(buf, offset)
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        let length = buf.len() as u64;
        let written = self.written.fetch_add(length, Ordering::SeqCst) + length;
        if written > self.full_at.load(Ordering::SeqCst) {
            return Err(BlockError::new(BlockErrorKind::NoSpace, "the repository is full"));
        }
        // Both at once: a crash must not come between them.
        let mut account = self.account.lock().unwrap();
        self.memory.write(buf, offset)?;
        account.written[self.units(offset, length)].fill(true);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        let mut account = self.account.lock().unwrap();
        self.memory.write_zeroes(offset, length, options)?;
        account.written[self.units(offset, length)].fill(true);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.discard(offset, length)
    }

    fn flush(&self) -> BlockResult<()> {
        let mut account = self.account.lock().unwrap();
        account.durable = account.written.clone();
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
        self.memory.extents(offset, length, visit)
    }

    fn durable(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(u64, u64, bool) -> bool,
    ) -> BlockResult<()> {
        let account = self.account.lock().unwrap();
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let unit = at / Self::UNIT;
            let to = ((unit + 1) * Self::UNIT).min(end);
            if !visit(at, to - at, account.durable[usize::try_from(unit).unwrap()]) {
                break;
            }
            at = to;
        }
        Ok(())
    }

    fn close(&self) -> BlockResult<()> {
        self.memory.close()
    }
}
