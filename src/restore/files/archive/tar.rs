//! tar: ustar headers with PAX records for what they cannot say, inside gzip.
//!
//! <https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html>. Names keep their bytes; one that
//! is no UTF-8 and needs a PAX record gets `hdrcharset=BINARY`.

use std::io::{self, Write};

use super::deflate::Gzip;
use super::{Container, Meta};

const BLOCK: u64 = 512;
/// Largest value of a field of 11 octal digits.
const OCTAL_11: u64 = (1 << 33) - 1;
/// Largest value of a field of 7 octal digits.
const OCTAL_7: u32 = (1 << 21) - 1;
/// Bytes of a name in a header.
const NAME: usize = 100;

pub(super) struct Tar<'w> {
    gzip: Gzip<'w>,
    /// What the entry's header has promised and has not come yet.
    owed: u64,
    /// Zeroes after the entry.
    padding: u64,
}

impl<'w> Tar<'w> {
    pub(super) fn new(out: &'w mut dyn Write) -> io::Result<Self> {
        Ok(Self { gzip: Gzip::new(out)?, owed: 0, padding: 0 })
    }

    fn header(&mut self, kind: u8, meta: &Meta<'_>, name: &[u8], target: &[u8]) -> io::Result<()> {
        let mut records = Vec::new();
        let strange = |bytes: &[u8]| bytes.len() > NAME && std::str::from_utf8(bytes).is_err();
        if strange(name) || strange(target) {
            record(&mut records, "hdrcharset", b"BINARY");
        }
        if name.len() > NAME {
            record(&mut records, "path", name);
        }
        if target.len() > NAME {
            record(&mut records, "linkpath", target);
        }
        if meta.size > OCTAL_11 {
            record(&mut records, "size", meta.size.to_string().as_bytes());
        }
        for (key, id) in [("uid", meta.uid), ("gid", meta.gid)] {
            if id > OCTAL_7 {
                record(&mut records, key, id.to_string().as_bytes());
            }
        }
        let seconds = meta.modified.map_or(0, |time| time.seconds);
        let nanoseconds = meta.modified.map_or(0, |time| time.nanoseconds.min(999_999_999));
        let plain = u64::try_from(seconds).ok().filter(|s| *s <= OCTAL_11);
        if plain.is_none() || nanoseconds != 0 {
            record(&mut records, "mtime", decimal(seconds, nanoseconds).as_bytes());
        }
        if !records.is_empty() {
            let size = records.len() as u64;
            let block =
                ustar(b'x', b"PaxHeaders/entry", b"", (0o644, 0, 0), size, plain.unwrap_or(0));
            self.gzip.data(&block)?;
            self.gzip.data(&records)?;
            self.gzip.zeroes(padding(size))?;
        }
        let ids = (meta.mode & 0o777, meta.uid.min(OCTAL_7), meta.gid.min(OCTAL_7));
        let size = if meta.size > OCTAL_11 { 0 } else { meta.size };
        let block = ustar(kind, name, target, ids, size, plain.unwrap_or(0));
        self.gzip.data(&block)
    }
}

impl Container for Tar<'_> {
    fn directory(&mut self, meta: &Meta<'_>) -> io::Result<()> {
        let name = [meta.path, b"/"].concat();
        self.header(b'5', meta, &name, b"")
    }

    fn link(&mut self, meta: &Meta<'_>, target: &[u8]) -> io::Result<()> {
        self.header(b'2', meta, meta.path, target)
    }

    fn begin(&mut self, meta: &Meta<'_>) -> io::Result<()> {
        self.header(b'0', meta, meta.path, b"")?;
        self.owed = meta.size;
        self.padding = padding(meta.size);
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.owed = self.owed.checked_sub(bytes.len() as u64).ok_or_else(too_long)?;
        self.gzip.data(bytes)
    }

    fn zeroes(&mut self, count: u64) -> io::Result<()> {
        self.owed = self.owed.checked_sub(count).ok_or_else(too_long)?;
        self.gzip.zeroes(count)
    }

    fn end(&mut self) -> io::Result<()> {
        let rest = std::mem::take(&mut self.owed) + std::mem::take(&mut self.padding);
        self.gzip.zeroes(rest)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.gzip.zeroes(2 * BLOCK)?;
        self.gzip.finish()
    }
}

fn too_long() -> io::Error {
    io::Error::other("more content than the header of the entry promises")
}

fn padding(size: u64) -> u64 {
    (BLOCK - size % BLOCK) % BLOCK
}

/// A PAX record: its own length, key, value.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + digits(length) != length {
        length = rest + digits(length);
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn digits(number: usize) -> usize {
    number.to_string().len()
}

/// Seconds with nanoseconds behind the point; the whole is what is negative.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    if seconds >= 0 || nanoseconds == 0 {
        return format!("{seconds}.{nanoseconds:09}");
    }
    format!("-{}.{:09}", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds)
}

fn ustar(
    kind: u8,
    name: &[u8],
    target: &[u8],
    (mode, uid, gid): (u32, u32, u32),
    size: u64,
    time: u64,
) -> Vec<u8> {
    let mut block = Vec::with_capacity(512);
    let text = |block: &mut Vec<u8>, bytes: &[u8], width: usize| {
        let end = block.len() + width;
        block.extend_from_slice(bytes.get(..width).unwrap_or(bytes));
        block.resize(end, 0);
    };
    text(&mut block, name, NAME);
    for id in [mode, uid, gid] {
        text(&mut block, format!("{id:07o}").as_bytes(), 8);
    }
    text(&mut block, format!("{size:011o}").as_bytes(), 12);
    text(&mut block, format!("{time:011o}").as_bytes(), 12);
    let checksum = block.len();
    block.extend_from_slice(b"        ");
    block.push(kind);
    text(&mut block, target, NAME);
    block.extend_from_slice(b"ustar\x0000");
    block.resize(512, 0);
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    for (at, byte) in format!("{sum:06o}\0 ").bytes().enumerate() {
        if let Some(place) = block.get_mut(checksum + at) {
            *place = byte;
        }
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_their_own_length() {
        for length in [1, 2, 80, 86, 87, 88, 89, 90, 91, 92, 93, 980, 990, 991, 992, 993, 9980] {
            let mut records = Vec::new();
            record(&mut records, "path", &vec![b'a'; length]);
            assert!(records.starts_with(format!("{} path=a", records.len()).as_bytes()));
        }
        assert_eq!(decimal(5, 1), "5.000000001");
        assert_eq!(decimal(-2, 500_000_000), "-1.500000000");
        assert_eq!(decimal(-1, 1), "-0.999999999");
    }
}
