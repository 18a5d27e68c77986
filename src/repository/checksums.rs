//! The checksums of an image's stored clusters, in a file beside it.
//!
//! A page of header, then eight bytes per cluster of the disk: zeroes where the image stores
//! nothing. Clusters that are not stored take no space, because the file is sparse.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use sha2::{Digest, Sha256};

use super::{Result, failed, invalid};
use crate::checksum::{Checksum, LENGTH};
use crate::model::hex;

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"SNDSUMS\x01";
/// Where the checksums begin, in bytes.
const HEADER: u64 = 4096;
/// Checksums that are read at a time.
const BATCH: u64 = 8192;

/// An open file of checksums.
#[derive(Debug)]
pub struct Checksums {
    file: File,
    path: PathBuf,
    cluster_size: u64,
    size: u64,
}

impl Checksums {
    /// Makes the file at `path` for a disk of `size` bytes, without any checksum. One that is there
    /// is replaced.
    ///
    /// # Errors
    /// `Io`.
    pub fn create(path: &Path, size: u64, cluster_size: u32) -> Result<Self> {
        let make = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(true).open(path)?;
            let mut header = [0; 20];
            header[..8].copy_from_slice(&MAGIC);
            header[8..16].copy_from_slice(&size.to_le_bytes());
            header[16..].copy_from_slice(&cluster_size.to_le_bytes());
            file.write_all_at(&header, 0)?;
            Ok(file)
        };
        let file = make().map_err(failed("cannot make", path))?;
        let cluster_size = u64::from(cluster_size);
        let sums = Self { file, path: path.to_owned(), cluster_size, size };
        let length = HEADER + sums.clusters() * LENGTH as u64;
        sums.file.set_len(length).map_err(failed("cannot make", path))?;
        Ok(sums)
    }

    /// Opens the file at `path` for reading.
    ///
    /// # Errors
    /// `Io`; `Invalid` where it is none.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(failed("cannot open", path))?;
        let mut header = [0; 20];
        file.read_exact_at(&mut header, 0).map_err(failed("cannot read", path))?;
        let (magic, rest) = header.split_at(8);
        let (size, cluster) = rest.split_at(8);
        let size = u64::from_le_bytes(size.try_into().unwrap_or_default());
        let cluster_size = u64::from(u32::from_le_bytes(cluster.try_into().unwrap_or_default()));
        if magic != MAGIC || !(512..=2 << 20).contains(&cluster_size) {
            return Err(invalid(path, "is no file of checksums"));
        }
        let sums = Self { file, path: path.to_owned(), cluster_size, size };
        let length = sums.file.metadata().map_err(failed("cannot read", path))?.len();
        if length != HEADER + sums.clusters() * LENGTH as u64 {
            return Err(invalid(path, "is cut off or too long"));
        }
        Ok(sums)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster_size)
    }

    fn at(index: u64) -> u64 {
        HEADER + index * LENGTH as u64
    }

    /// Stores the checksums of consecutive clusters from `first` on.
    ///
    /// # Errors
    /// Those of pwrite(2).
    pub fn set(&self, first: u64, sums: &[Checksum]) -> io::Result<()> {
        let bytes: Vec<u8> = sums.iter().flat_map(|sum| sum.encode()).collect();
        self.file.write_all_at(&bytes, Self::at(first))
    }

    /// Forgets the checksums of the clusters `from .. to`.
    ///
    /// # Errors
    /// Those of pwrite(2).
    pub fn clear(&self, from: u64, to: u64) -> io::Result<()> {
        const FEW: usize = 512;
        let (offset, length) = (Self::at(from), (to - from) * LENGTH as u64);
        if to - from > FEW as u64 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.file, flags, offset, length).is_ok() {
                return Ok(());
            }
        }
        let zeroes = [0; FEW * LENGTH];
        let mut at = offset;
        while at < offset + length {
            let part = (offset + length - at).min(zeroes.len() as u64);
            #[allow(clippy::cast_possible_truncation, reason = "at most the length of zeroes")]
            self.file.write_all_at(&zeroes[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }

    /// The checksums of the clusters `from .. to`.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn read(&self, from: u64, to: u64) -> io::Result<Vec<Option<Checksum>>> {
        let count = usize::try_from(to - from).unwrap_or(usize::MAX);
        let mut bytes = vec![0; count.saturating_mul(LENGTH)];
        self.file.read_exact_at(&mut bytes, Self::at(from))?;
        let (entries, _) = bytes.as_chunks::<LENGTH>();
        Ok(entries.iter().map(|entry| Checksum::decode(*entry)).collect())
    }

    /// Hash over the numbers and checksums of all stored clusters, and how many there are.
    ///
    /// # Errors
    /// `Io`.
    pub fn root_hash(&self) -> Result<(String, u64)> {
        let mut hasher = Sha256::new();
        let mut stored = 0;
        let mut from = 0;
        while from < self.clusters() {
            let to = (from + BATCH).min(self.clusters());
            let sums = self.read(from, to).map_err(failed("cannot read", &self.path))?;
            for (index, sum) in (from..).zip(sums) {
                let Some(sum) = sum else { continue };
                hasher.update(index.to_le_bytes());
                hasher.update(sum.encode());
                stored += 1;
            }
            from = to;
        }
        Ok((hex(&hasher.finalize()), stored))
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// `Io`.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(failed("cannot flush", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_found_again_and_forgotten_where_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.crc");
        let sums = Checksums::create(&path, (5000 << 16) + 1, 1 << 16).unwrap();
        assert_eq!(sums.clusters(), 5001);
        let (empty, none) = sums.root_hash().unwrap();
        assert_eq!(none, 0);
        let three = [b"a", b"b", b"c"].map(|bytes| Checksum::of(bytes));
        sums.set(4998, &three).unwrap();
        sums.set(10, &three).unwrap();
        sums.sync().unwrap();
        let again = Checksums::open(&path).unwrap();
        assert_eq!(again.read(4997, 5001).unwrap()[1..], three.map(Some));
        assert_eq!(again.root_hash().unwrap().1, 6);
        sums.clear(11, 12).unwrap();
        assert_eq!(sums.read(10, 13).unwrap(), [Some(three[0]), None, Some(three[2])]);
        sums.clear(0, 5001).unwrap();
        assert_eq!(sums.root_hash().unwrap().0, empty);
    }

    #[test]
    fn a_file_that_is_cut_off_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.crc");
        Checksums::create(&path, 1 << 30, 1 << 16).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
        assert!(Checksums::open(&path).is_err());
        std::fs::write(&path, b"something else that is long enough").unwrap();
        assert!(Checksums::open(&path).is_err());
    }
}
