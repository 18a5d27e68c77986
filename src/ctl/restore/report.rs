//! Whether an archive says of itself that it is not all there is.
//!
//! The hub tells so in its last entry, since it has sent the rest by the time it knows.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use flate2::write::MultiGzDecoder;

/// Name of the entry; a number follows where something at the top has that name.
pub(super) const NAME: &str = "RESTORE-ERRORS.txt";
/// Bytes of a tar's block.
const BLOCK: usize = 512;
/// Where a tar's header has the name, the size, the kind, and its magic.
const TAR_NAME: Range<usize> = 0..100;
const TAR_SIZE: Range<usize> = 124..136;
const TAR_KIND: usize = 156;
const TAR_MAGIC: Range<usize> = 257..262;
/// Most bytes of PAX records that are looked at.
const RECORDS: usize = 1 << 20;
/// Bytes at the end of a ZIP that have its last entry.
const TAIL: u64 = 64 << 10;
/// What an entry in a ZIP's list begins with, and where it has its lengths, its mode and its name.
const CENTRAL: &[u8] = b"PK\x01\x02";
const CENTRAL_LENGTHS: usize = 28;
const CENTRAL_MODE: usize = 40;
const CENTRAL_NAME: usize = 46;
/// Bytes behind a ZIP's list: its end, and before that what large ones have.
const END: usize = 22;
const END_64: usize = 76;
const LOCATOR: &[u8] = b"PK\x06\x07";
const LOCATOR_BYTES: usize = 20;
/// Kind of a regular file in a mode.
const REGULAR: u16 = 0o10;

/// Whether the hub calls its report so. Everything else is below a directory.
fn is_report(name: &[u8]) -> bool {
    let Some(rest) = name.strip_prefix(NAME.as_bytes()) else { return false };
    match rest.strip_prefix(b"-") {
        Some(number) => !number.is_empty() && number.iter().all(u8::is_ascii_digit),
        None => rest.is_empty(),
    }
}

/// Looks at a tar.gz while it is loaded. It unpacks it for that, and so notices damage of it too.
pub(super) struct Watch(MultiGzDecoder<Blocks>);

/// The blocks of a tar: headers, and what they say follows.
#[derive(Default)]
struct Blocks {
    block: Vec<u8>,
    /// Bytes of the entry that are still to come, as blocks.
    skip: u64,
    /// PAX records of the next header, while they come.
    records: Option<Vec<u8>>,
    /// The next entry's size, from its records.
    size: Option<u64>,
    found: bool,
}

impl Blocks {
    fn take(&mut self) {
        if self.skip > 0 {
            self.skip -= 1;
            if let Some(records) = &mut self.records {
                if records.len() < RECORDS {
                    records.extend_from_slice(&self.block);
                }
                if self.skip == 0 {
                    self.size = size_record(records);
                    self.records = None;
                }
            }
            return;
        }
        let field = |range: Range<usize>| {
            let bytes = self.block.get(range).unwrap_or_default();
            bytes.split(|byte| *byte == 0).next().unwrap_or_default()
        };
        if field(TAR_MAGIC) != b"ustar" {
            return;
        }
        let octal = str::from_utf8(field(TAR_SIZE)).ok();
        let octal = octal.and_then(|text| u64::from_str_radix(text.trim(), 8).ok());
        let kind = self.block.get(TAR_KIND).copied();
        let report = kind == Some(b'0') && is_report(field(TAR_NAME));
        let size = self.size.take().or(octal).unwrap_or_default();
        self.found |= report;
        self.skip = size.div_ceil(BLOCK as u64);
        self.records = (kind == Some(b'x') && self.skip > 0).then(Vec::new);
    }
}

/// The size that PAX records tell: `LENGTH KEY=VALUE`, each a line of that length.
fn size_record(mut records: &[u8]) -> Option<u64> {
    let mut size = None;
    while let Some(space) = records.iter().position(|byte| *byte == b' ') {
        let (length, _) = records.split_at(space);
        let length: usize = str::from_utf8(length).ok()?.parse().ok()?;
        let record = records.get(space + 1..length)?;
        if let Some(value) = record.strip_prefix(b"size=") {
            size = str::from_utf8(value).ok()?.trim_end().parse().ok();
        }
        records = records.get(length..)?;
    }
    size
}

impl Write for Blocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (now, _) = bytes.split_at((BLOCK - self.block.len()).min(bytes.len()));
        self.block.extend_from_slice(now);
        if self.block.len() == BLOCK {
            self.take();
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

/// Whether a ZIP's last entry is such a one.
pub(super) fn in_zip(file: &File) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(TAIL);
    let mut tail = vec![0; usize::try_from(length - from).unwrap_or_default()];
    file.read_exact_at(&mut tail, from)?;
    Ok(ends_with_report(&tail).unwrap_or(false))
}

/// Finds the entry that ends where the list does. The report's is small: the tail has all of it.
fn ends_with_report(tail: &[u8]) -> Option<bool> {
    let mut end = tail.len().checked_sub(END)?;
    let locator = end.checked_sub(LOCATOR_BYTES).and_then(|at| tail.get(at..));
    if locator.is_some_and(|rest| rest.starts_with(LOCATOR)) {
        end = end.checked_sub(END_64)?;
    }
    let list = tail.get(..end)?;
    let report = |entry: &[u8]| {
        let short = |at: usize| Some(u16::from_le_bytes(*entry.get(at..)?.first_chunk()?));
        let (name, extra) = (short(CENTRAL_LENGTHS)?, short(CENTRAL_LENGTHS + 2)?);
        let comment = short(CENTRAL_LENGTHS + 4)?;
        let lengths = usize::from(name) + usize::from(extra) + usize::from(comment);
        let whole = entry.len() == CENTRAL_NAME + lengths;
        let regular = short(CENTRAL_MODE)? >> 12 == REGULAR;
        let name = entry.get(CENTRAL_NAME..)?.get(..usize::from(name))?;
        Some(whole && regular && is_report(name))
    };
    let mut entries = (0..list.len()).filter_map(|at| list.get(at..));
    Some(entries.any(|entry| entry.starts_with(CENTRAL) && report(entry).unwrap_or(false)))
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;

    use super::*;

    fn header(name: &str, kind: u8, size: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[TAR_SIZE].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[TAR_KIND] = kind;
        block[TAR_MAGIC].copy_from_slice(b"ustar");
        block
    }

    fn file(name: &str) -> Vec<u8> {
        header(name, b'0', 0)
    }

    fn packed(blocks: &[Vec<u8>]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        blocks.iter().for_each(|block| packer.write_all(block).unwrap());
        packer.finish().unwrap()
    }

    #[test]
    fn a_tar_is_looked_at_while_it_comes() {
        let inside = [header("top/f", b'0', 600), file(NAME), vec![0; BLOCK]].concat();
        let mut records = b"13 size=1024\n".to_vec();
        records.resize(BLOCK, 0);
        let large = [header("pax", b'x', 13), records, file("top/large")].concat();
        for (blocks, expected) in [
            (vec![file("a"), file(NAME)], true),
            (vec![file("a"), file("RESTORE-ERRORS.txt-12")], true),
            (vec![file("a"), file("b/RESTORE-ERRORS.txt"), file("RESTORE-ERRORS.txt~")], false),
            (vec![header("RESTORE-ERRORS.txt/", b'5', 0)], false),
            (vec![header(NAME, b'5', 0), header(NAME, b'2', 0)], false),
            (vec![file("RESTORE-ERRORS.txt-2/a"), file("RESTORE-ERRORS.txt-")], false),
            (vec![inside.clone()], false),
            (vec![inside, file(NAME)], true),
            (vec![large.clone(), file(NAME), file(NAME)], false),
            (vec![large, file("a"), file("b"), file(NAME)], true),
        ] {
            let bytes = packed(&blocks);
            let mut watch = Watch::new();
            bytes.chunks(7).for_each(|part| watch.take(part).unwrap());
            assert_eq!(watch.found().unwrap(), expected);
        }
        let bytes = packed(&[file("a")]);
        let mut watch = Watch::new();
        watch.take(&bytes[..bytes.len() - 6]).unwrap();
        assert!(watch.found().is_err(), "its end is missing");
        assert!(Watch::new().take(b"no gzip at all, not even its first bytes").is_err());
    }

    #[test]
    fn a_zip_is_looked_at_from_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(!in_zip(&file).unwrap());
        let entry = |name: &str, mode: u16| {
            let mut entry = vec![0; CENTRAL_NAME];
            entry[..4].copy_from_slice(CENTRAL);
            entry[CENTRAL_LENGTHS] = u8::try_from(name.len()).unwrap();
            entry[CENTRAL_LENGTHS + 2] = 3;
            entry[CENTRAL_MODE..][..2].copy_from_slice(&mode.to_le_bytes());
            [entry, name.as_bytes().to_vec(), vec![7; 3]].concat()
        };
        let large = [vec![0; END_64 - LOCATOR_BYTES], LOCATOR.to_vec(), vec![0; 16]].concat();
        for (name, mode, expected) in [
            (NAME, 0o100_644, true),
            ("RESTORE-ERRORS.txt-2", 0o100_644, true),
            ("d/RESTORE-ERRORS.txt", 0o100_644, false),
            ("RESTORE-ERRORS.txt/", 0o040_755, false),
            (NAME, 0o120_777, false),
        ] {
            for more in [&[][..], &large] {
                let list = [entry(NAME, 0o100_644), entry(name, mode), more.to_vec()].concat();
                file.set_len(0).unwrap();
                file.rewind().unwrap();
                file.write_all(&[&[0; 100_000], &list[..], &[0; END]].concat()).unwrap();
                assert_eq!(in_zip(&file).unwrap(), expected, "{name}");
            }
        }
    }
}
