//! Disks of which only few blocks hold anything, and checksums.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest::{DiskRange, Result, Source, source::check_range};

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// A disk that is zero where it has no block.
#[derive(Clone, Default)]
pub struct Sparse {
    pub disk: u32,
    pub size: u64,
    pub blocks: BTreeMap<u64, Arc<[u8; BLOCK]>>,
}

impl Sparse {
    /// Bytes at any place; zeroes past the end.
    pub fn get(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes, at);
        bytes
    }

    /// Overwrites bytes; those past the end count for nothing.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        for (place, byte) in (at..self.size).zip(bytes) {
            let block = self.blocks.entry(place / BLOCK as u64);
            let block = block.or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(block)[(place % BLOCK as u64) as usize] = *byte;
        }
    }

    fn fill(&self, buf: &mut [u8], offset: u64) {
        buf.fill(0);
        let (first, end) = (offset / BLOCK as u64, offset.saturating_add(buf.len() as u64));
        for (number, block) in self.blocks.range(first..end.div_ceil(BLOCK as u64)) {
            let start = number * BLOCK as u64;
            let (from, to) = (start.max(offset), (start + BLOCK as u64).min(end));
            let part = &block[(from - start) as usize..(to - start) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        }
    }
}

impl Source for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.size, offset, buf.len())?;
        self.fill(buf, offset);
        Ok(())
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        let offset = offset.min(self.size);
        let length = length.min(self.size - offset);
        if length > 0 {
            visit(DiskRange { disk: self.disk, offset, length });
        }
    }
}

/// Goes on from `state` with `bytes`, by a polynomial with its bits reversed; neither start nor end is
/// inverted.
pub fn crc(polynomial: u32, state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |state, byte| {
        (0..8).fold(state ^ u32::from(*byte), |state, _| {
            if state & 1 == 1 { state >> 1 ^ polynomial } else { state >> 1 }
        })
    })
}

/// A number of `N` bytes, the lowest first; 0 where it does not lie in `bytes`.
pub fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let part = bytes.get(at..at + N).unwrap_or(&[]);
    part.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
