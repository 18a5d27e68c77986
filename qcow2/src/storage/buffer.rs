//! Memory that direct transfers can use.

use std::ops::{Deref, DerefMut};

use super::direct::ALIGNMENT;

/// Bytes whose address is congruent to an offset on a disk, page by page: what is read into it, or
/// written from it, at that offset can go around the page cache.
#[derive(Debug, Default)]
pub struct PageBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl PageBuffer {
    /// `length` bytes, all zero, for the disk from `offset` on.
    pub fn new(offset: u64, length: usize) -> Self {
        let mut buffer = Self::default();
        buffer.fit(offset, length);
        buffer
    }

    /// Makes it `length` bytes for the disk from `offset` on, with any content. Memory that it has is
    /// used again.
    pub fn fit(&mut self, offset: u64, length: usize) {
        let room = length.saturating_add(2 * ALIGNMENT);
        if self.memory.len() < room {
            self.memory = vec![0; room];
        }
        #[allow(clippy::cast_possible_truncation, reason = "a remainder")]
        let in_page = (offset % ALIGNMENT as u64) as usize;
        self.start = self.memory.as_ptr().align_offset(ALIGNMENT) + in_page;
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
        for (offset, length) in [(0, 1 << 20), (513, 1 << 20), (4096, 10), (u64::MAX, 100_000)] {
            buffer.fit(offset, length);
            assert_eq!(buffer.as_ptr().addr() as u64 % 4096, offset % 4096);
            assert_eq!(buffer.len(), length);
            buffer.fill(7);
        }
        assert!(PageBuffer::new(5, 9000).iter().all(|byte| *byte == 0));
    }
}
