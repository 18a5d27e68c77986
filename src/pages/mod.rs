//! Memory for what moves between sockets and disks: placed as the bytes lie on the disk, in huge pages.

mod slots;

use std::ops::{Deref, DerefMut};

use slots::Slot;
pub use slots::{LARGEST, footprint, warn_if_small};

/// Alignment of memory, offset and length that transfers around the page cache need, in bytes.
const PAGE: usize = 4096;

#[allow(clippy::cast_possible_truncation, reason = "a remainder")]
fn in_page(offset: u64) -> usize {
    (offset % PAGE as u64) as usize
}

/// Bytes whose address is congruent to an offset on a disk, page by page: what is read into it, or
/// written from it, at that offset can go around the page cache.
#[derive(Debug, Default)]
pub struct PageBuffer {
    memory: Slot,
    start: usize,
    length: usize,
}

impl PageBuffer {
    /// `length` bytes with any content for the disk from `offset` on. Up to [`LARGEST`], counted from the
    /// start of the page that `offset` lies in, they are in huge pages as long as there are some.
    pub fn new(offset: u64, length: usize) -> Self {
        let mut buffer = Self::default();
        buffer.fit(offset, length);
        buffer
    }

    /// Makes it `length` bytes for the disk from `offset` on, with any content. Memory that it has is
    /// used again.
    pub fn fit(&mut self, offset: u64, length: usize) {
        let start = |memory: &Slot| memory.as_ptr().align_offset(PAGE) + in_page(offset);
        if self.memory.len() < start(&self.memory).saturating_add(length) {
            // First it gives back what it has: there may be no more.
            self.memory = Slot::default();
            self.memory = Slot::take(length.saturating_add(in_page(offset)));
        }
        self.start = start(&self.memory);
        self.length = length;
    }
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_lies_in_memory_as_its_bytes_lie_on_the_disk() {
        let mut buffer = PageBuffer::default();
        assert!(buffer.is_empty());
        for (offset, length) in
            [(0, 1 << 20), (513, 1 << 20), (4096, 10), (u64::MAX, 100_000), (100, 5 << 20)]
        {
            for buffer in [&mut buffer, &mut PageBuffer::new(offset, length)] {
                buffer.fit(offset, length);
                assert_eq!(buffer.as_ptr().addr() as u64 % 4096, offset % 4096);
                assert_eq!(buffer.len(), length);
                buffer.fill(7);
            }
        }
    }

    #[test]
    fn a_buffer_that_fits_keeps_its_memory() {
        let mut buffer = PageBuffer::new(0, LARGEST);
        let address = buffer.as_ptr();
        buffer.fit(4096 + 5, 1000);
        assert_eq!(buffer.as_ptr(), address.wrapping_add(5));
        buffer.fit(0, LARGEST);
        assert_eq!(buffer.as_ptr(), address);
    }
}
