//! Whether an archive says of itself that it is not all there is.
//!
//! The hub tells so in its last entry, since it has sent the rest by the time it knows.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use flate2::write::MultiGzDecoder;

/// Name of the entry; a number may follow.
pub(super) const NAME: &str = "RESTORE-ERRORS.txt";
/// Bytes of a tar's block.
const BLOCK: usize = 512;
/// Where a tar's header has its magic.
const MAGIC: std::ops::Range<usize> = 257..262;
/// Bytes at the end of a ZIP that have its last entries.
const TAIL: u64 = 64 << 10;
/// What an entry in a ZIP's list begins with, where its name is, and where the name's length is.
const CENTRAL: &[u8] = b"PK\x01\x02";
const CENTRAL_NAME: usize = 46;
const CENTRAL_LENGTH: usize = 28;

/// Looks at a tar.gz while it is loaded. It unpacks it for that, and so notices damage of it too.
pub(super) struct Watch(MultiGzDecoder<Blocks>);

#[derive(Default)]
struct Blocks {
    block: Vec<u8>,
    found: bool,
}

impl Write for Blocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (now, _) = bytes.split_at((BLOCK - self.block.len()).min(bytes.len()));
        self.block.extend_from_slice(now);
        if self.block.len() == BLOCK {
            let header = self.block.get(MAGIC) == Some(b"ustar");
            self.found |= header && self.block.starts_with(NAME.as_bytes());
            self.block.clear();
        }
        Ok(now.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Watch {
    pub(super) fn new() -> Self {
        Self(MultiGzDecoder::new(Blocks::default()))
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// Where they are no gzip.
    pub(super) fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Whether there was such an entry.
    ///
    /// # Errors
    /// Where the end is missing.
    pub(super) fn found(mut self) -> io::Result<bool> {
        self.0.try_finish()?;
        Ok(self.0.get_ref().found)
    }
}

/// Whether a ZIP has such an entry.
pub(super) fn in_zip(file: &File) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(TAIL);
    let mut tail = vec![0; usize::try_from(length - from).unwrap_or_default()];
    file.read_exact_at(&mut tail, from)?;
    let names = (0..tail.len()).filter_map(|at| {
        let entry = tail.get(at..)?;
        let length = entry.starts_with(CENTRAL).then(|| entry.get(CENTRAL_LENGTH..))??;
        let length = usize::from(u16::from_le_bytes(*length.first_chunk()?));
        entry.get(CENTRAL_NAME..)?.get(..length)
    });
    Ok({ names }.any(|name| name.starts_with(NAME.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[MAGIC].copy_from_slice(b"ustar");
        block
    }

    fn packed(blocks: &[Vec<u8>]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        blocks.iter().for_each(|block| packer.write_all(block).unwrap());
        packer.finish().unwrap()
    }

    #[test]
    fn a_tar_is_looked_at_while_it_comes() {
        for (names, expected) in [
            (&["a", NAME][..], true),
            (&["a", "b/RESTORE-ERRORS.txt"], false),
            (&[NAME, "z"], true),
        ] {
            let bytes = packed(&names.iter().map(|name| header(name)).collect::<Vec<_>>());
            let mut watch = Watch::new();
            bytes.chunks(7).for_each(|part| watch.take(part).unwrap());
            assert_eq!(watch.found().unwrap(), expected, "{names:?}");
        }
        let bytes = packed(&[header("a")]);
        let mut watch = Watch::new();
        watch.take(&bytes[..bytes.len() - 6]).unwrap();
        assert!(watch.found().is_err(), "its end is missing");
        assert!(Watch::new().take(b"no gzip at all, not even its first bytes").is_err());
    }

    #[test]
    fn a_zip_is_looked_at_from_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(!in_zip(&file).unwrap());
        let entry = |name: &str| {
            let mut entry = vec![0; CENTRAL_NAME];
            entry[..4].copy_from_slice(CENTRAL);
            entry[CENTRAL_LENGTH] = u8::try_from(name.len()).unwrap();
            [entry, name.as_bytes().to_vec()].concat()
        };
        file.write_all(&[0; 100_000]).unwrap();
        file.write_all(&entry("d/RESTORE-ERRORS.txt")).unwrap();
        assert!(!in_zip(&file).unwrap());
        file.write_all(&entry(NAME)).unwrap();
        file.write_all(&[0; 98]).unwrap();
        assert!(in_zip(&file).unwrap());
    }
}
