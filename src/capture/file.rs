//! A disk in a file or a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::io::Errno;

use super::source::Stretch;

/// An open file.
pub(super) struct FileSource {
    file: File,
    size: u64,
    /// It may tell its holes.
    regular: bool,
}

impl FileSource {
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|e| e.to_string())?;
        let metadata = file.metadata().map_err(|e| e.to_string())?;
        let regular = metadata.is_file();
        if !regular && !metadata.file_type().is_block_device() {
            return Err("it is neither a file nor a block device".into());
        }
        let size = match regular {
            true => metadata.len(),
            false => file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?,
        };
        Ok(Self { file, size, regular })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Holes are zeroes; where the file system does not tell them, everything is data.
    pub(super) fn map(&self, from: u64, to: u64) -> Vec<Stretch> {
        let mut stretches = Vec::new();
        let mut at = from;
        while at < to {
            let (data, hole) = self.next_data(at, to);
            for (from, to, zero) in [(at, data, true), (data, hole, false)] {
                if from < to {
                    stretches.push(Stretch { from, to, zero });
                }
            }
            at = hole;
        }
        stretches
    }

    /// Start and end of the first data of `at .. to`.
    fn next_data(&self, at: u64, to: u64) -> (u64, u64) {
        use rustix::fs::{SeekFrom, seek};
        if !self.regular {
            return (at, to);
        }
        let data = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data.clamp(at, to),
            // Nothing but a hole up to the end; unless the end has moved, which reading will tell.
            Err(Errno::NXIO) if self.file.metadata().is_ok_and(|m| m.len() >= self.size) => to,
            Err(_) => at,
        };
        if data == to {
            return (to, to);
        }
        match seek(&self.file, SeekFrom::Hole(data)) {
            Ok(hole) if hole > data => (data, hole.min(to)),
            _ => (data, to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_covers_its_range_and_calls_only_zeroes_zeroes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((8 << 20) + 5).unwrap();
        file.as_file().write_all_at(&[1; 10_000], 1 << 20).unwrap();
        file.as_file().write_all_at(&[1; 3], 5 << 20).unwrap();
        let source = FileSource::open(file.path()).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        for (from, to) in [(0, source.size()), (5, 1 << 20), ((1 << 20) + 9, 6 << 20)] {
            let map = source.map(from, to);
            let mut at = from;
            for stretch in map {
                assert_eq!(stretch.from, at);
                assert!(stretch.to > at);
                let range = usize::try_from(at).unwrap()..usize::try_from(stretch.to).unwrap();
                assert!(!stretch.zero || bytes[range].iter().all(|byte| *byte == 0));
                at = stretch.to;
            }
            assert_eq!(at, to);
        }
    }

    #[test]
    fn a_file_that_became_shorter_is_not_taken_for_zeroes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let source = FileSource::open(file.path()).unwrap();
        file.as_file().set_len(4096).unwrap();
        assert!(source.map(8192, 1 << 20).iter().all(|stretch| !stretch.zero));
        assert!(source.read(&mut [0; 512], 8192).is_err());
    }

    #[test]
    fn a_directory_is_no_disk() {
        let refused = FileSource::open(Path::new("/")).err().unwrap();
        assert!(refused.contains("neither"), "{refused}");
    }
}
