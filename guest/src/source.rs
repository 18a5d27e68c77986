//! Where bytes come from: a disk, a part of one, or a volume that lies on several.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

/// A range of one of the machine's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskRange {
    /// Number of the disk.
    pub disk: u32,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A range of bytes that can be read at any place, from several threads.
pub trait Source: Send + Sync {
    /// Length in bytes. It never changes.
    fn size(&self) -> u64;

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// `Corrupt` where the range lies outside (something on the disk points there); `Io`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Calls `visit` with the ranges of disks that `length` bytes at `offset` come from, in order. What
    /// lies outside, or comes from no disk, is left out.
    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange));
}

/// Refuses a range that does not lie within `size`.
///
/// # Errors
/// `Corrupt`.
pub fn check_range(size: u64, offset: u64, length: usize) -> Result<()> {
    match offset.checked_add(length as u64) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::corrupt(format!(
            "{length} bytes at byte {offset} were asked for, and there are {size}"
        ))),
    }
}

/// A part of a source: a partition.
pub struct Slice {
    whole: Arc<dyn Source>,
    start: u64,
    length: u64,
}

impl Slice {
    /// The `length` bytes of `whole` from `start` on; what lies outside is cut off.
    pub fn new(whole: Arc<dyn Source>, start: u64, length: u64) -> Self {
        let start = start.min(whole.size());
        let length = length.min(whole.size() - start);
        Self { whole, start, length }
    }
}

impl Source for Slice {
    fn size(&self) -> u64 {
        self.length
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.length, offset, buf.len())?;
        self.whole.read_at(buf, self.start + offset)
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        let offset = offset.min(self.length);
        self.whole.trace(self.start + offset, length.min(self.length - offset), visit);
    }
}

/// A raw disk image: a file, number `disk` of the machine.
pub struct RawDisk {
    file: std::fs::File,
    disk: u32,
    size: u64,
}

impl RawDisk {
    /// Takes over an open file.
    ///
    /// # Errors
    /// `Io` where its length cannot be told.
    pub fn new(file: std::fs::File, disk: u32) -> Result<Self> {
        let length = file.metadata().map(|meta| meta.len());
        let size = length.map_err(|e| Error::new(ErrorKind::Io, e.to_string()))?;
        Ok(Self { file, disk, size })
    }
}

impl Source for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        use std::os::unix::fs::FileExt;
        check_range(self.size, offset, buf.len())?;
        self.file.read_exact_at(buf, offset).map_err(|e| {
            Error::new(ErrorKind::Io, format!("disk {} at byte {offset}: {e}", self.disk))
        })
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        let offset = offset.min(self.size);
        let length = length.min(self.size - offset);
        if length > 0 {
            visit(DiskRange { disk: self.disk, offset, length });
        }
    }
}

#[cfg(any(test, feature = "test-util"))]
/// A disk in memory.
pub struct MemoryDisk {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its number.
    pub disk: u32,
}

#[cfg(any(test, feature = "test-util"))]
impl Source for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.size(), offset, buf.len())?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        Ok(())
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        let offset = offset.min(self.size());
        let length = length.min(self.size() - offset);
        if length > 0 {
            visit(DiskRange { disk: self.disk, offset, length });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Arc<dyn Source> {
        Arc::new(MemoryDisk { bytes: (0..=255).collect(), disk: 3 })
    }

    #[test]
    fn a_slice_reads_and_traces_what_it_covers_and_refuses_the_rest() {
        let slice = Slice::new(disk(), 100, 50);
        let mut buf = [0; 4];
        slice.read_at(&mut buf, 46).unwrap();
        assert_eq!(buf, [146, 147, 148, 149]);
        for offset in [47, 50, u64::MAX] {
            assert_eq!(slice.read_at(&mut buf, offset).unwrap_err().kind, ErrorKind::Corrupt);
        }
        let mut found = Vec::new();
        slice.trace(40, 1000, &mut |range| found.push(range));
        assert_eq!(found, [DiskRange { disk: 3, offset: 140, length: 10 }]);
    }

    #[test]
    fn a_slice_past_the_end_is_cut_off() {
        assert_eq!(Slice::new(disk(), 250, 100).size(), 6);
        assert_eq!(Slice::new(disk(), 300, u64::MAX).size(), 0);
    }
}
