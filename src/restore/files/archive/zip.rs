//! ZIP, always streamed: sizes and checksums follow the data, in Zip64 where they have to.
//!
//! The central directory is kept in a file without a name until the end, so that memory does not grow
//! with the number of entries. APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Seek as _, Write};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::deflate::Deflater;
use super::{Container, Meta};

/// From this size on an entry is written as Zip64: DEFLATE may make it a little larger, so before 4 GiB.
const LARGE: u64 = 0xF000_0000;
/// Most bytes of the list of entries, which waits on the hub's disk.
const CENTRAL: u64 = 4 << 30;
/// No entry of the list is larger.
const RECORD: u64 = 2 * MAX_16 as u64;
const MAX_32: u32 = u32::MAX;
const MAX_16: u16 = u16::MAX;
/// Sizes follow the data; names are UTF-8.
const FLAGS_FILE: u16 = 1 << 3 | 1 << 11;
const FLAGS: u16 = 1 << 11;
const VERSION: u16 = 45;
const STORED: u16 = 0;
const DEFLATED: u16 = 8;

/// What the central directory says of an entry.
struct Record {
    flags: u16,
    method: u16,
    stamp: [u8; 4],
    crc: u32,
    compressed: u64,
    size: u64,
    attributes: u32,
    offset: u64,
    name: Vec<u8>,
    seconds: Option<i32>,
    ids: (u32, u32),
    zip64: bool,
}

/// A writer that counts.
struct Counted<'w> {
    out: &'w mut dyn Write,
    count: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

pub(super) struct Zip<'w> {
    out: Counted<'w>,
    deflater: Deflater,
    central: BufWriter<File>,
    central_bytes: u64,
    entries: u64,
    current: Option<Record>,
    /// From which size on entries are Zip64.
    large: u64,
    /// Most bytes of the list of entries.
    most: u64,
}

impl<'w> Zip<'w> {
    pub(super) fn new(out: &'w mut dyn Write, scratch: &Path) -> io::Result<Self> {
        let central = BufWriter::with_capacity(64 << 10, nameless(scratch)?);
        let out = Counted { out, count: 0 };
        let deflater = Deflater::new()?;
        Ok(Self {
            out,
            deflater,
            central,
            central_bytes: 0,
            entries: 0,
            current: None,
            large: LARGE,
            most: CENTRAL,
        })
    }

    #[cfg(test)]
    pub(super) fn set_large(&mut self, large: u64) {
        self.large = large;
    }

    #[cfg(test)]
    pub(super) fn set_most(&mut self, most: u64) {
        self.most = most;
    }

    fn local(&mut self, record: &Record) -> io::Result<()> {
        let known = record.flags & 1 << 3 == 0;
        let (crc, size) = if known { (record.crc, record.size) } else { (0, 0) };
        let mut extra = record.stamps();
        let mut sizes = [u32::try_from(size).unwrap_or(MAX_32); 2];
        if record.zip64 {
            sizes = [MAX_32; 2];
            put16(&mut extra, &[1, 16]);
            extra.extend_from_slice(&[0; 16]);
        }
        let mut header = Vec::with_capacity(64 + record.name.len());
        header.extend_from_slice(b"PK\x03\x04");
        put16(&mut header, &[VERSION, record.flags, record.method]);
        header.extend_from_slice(&record.stamp);
        put32(&mut header, &[crc, sizes[0], sizes[1]]);
        put16(&mut header, &[short(record.name.len())?, short(extra.len())?]);
        header.extend_from_slice(&record.name);
        header.extend_from_slice(&extra);
        self.out.write_all(&header)
    }

    fn remember(&mut self, record: &Record) -> io::Result<()> {
        let mut extra = record.stamps();
        let mut fields = Vec::new();
        let mut fit = |value: u64, always: bool| match u32::try_from(value) {
            Ok(small) if small != MAX_32 && !always => small,
            _ => {
                fields.extend_from_slice(&value.to_le_bytes());
                MAX_32
            }
        };
        let size = fit(record.size, record.zip64);
        let compressed = fit(record.compressed, record.zip64);
        let offset = fit(record.offset, false);
        if !fields.is_empty() {
            put16(&mut extra, &[1, short(fields.len())?]);
            extra.extend_from_slice(&fields);
        }
        let mut header = Vec::with_capacity(96 + record.name.len());
        header.extend_from_slice(b"PK\x01\x02");
        // Made on Unix.
        put16(&mut header, &[3 << 8 | VERSION, VERSION, record.flags, record.method]);
        header.extend_from_slice(&record.stamp);
        put32(&mut header, &[record.crc, compressed, size]);
        put16(&mut header, &[short(record.name.len())?, short(extra.len())?, 0, 0, 0]);
        put32(&mut header, &[record.attributes, offset]);
        header.extend_from_slice(&record.name);
        header.extend_from_slice(&extra);
        self.central_bytes += header.len() as u64;
        self.entries += 1;
        self.central.write_all(&header)
    }

    /// An entry whose whole content is known.
    fn small(
        &mut self,
        meta: &Meta<'_>,
        name: Vec<u8>,
        kind: u32,
        content: &[u8],
    ) -> io::Result<()> {
        let mut record = Record::new(meta, name, kind, self.out.count);
        record.crc = crc32fast::hash(content);
        record.size = content.len() as u64;
        record.compressed = record.size;
        self.local(&record)?;
        self.out.write_all(content)?;
        self.remember(&record)
    }
}

impl Container for Zip<'_> {
    /// One more entry is the report.
    fn has_room(&self) -> bool {
        self.central_bytes + 2 * RECORD <= self.most
    }

    fn directory(&mut self, meta: &Meta<'_>) -> io::Result<()> {
        self.small(meta, [meta.path, b"/"].concat(), 0o040_000, b"")
    }

    fn link(&mut self, meta: &Meta<'_>, target: &[u8]) -> io::Result<()> {
        self.small(meta, meta.path.to_vec(), 0o120_000, target)
    }

    fn begin(&mut self, meta: &Meta<'_>) -> io::Result<()> {
        if meta.size == 0 {
            return self.small(meta, meta.path.to_vec(), 0o100_000, b"");
        }
        let mut record = Record::new(meta, meta.path.to_vec(), 0o100_000, self.out.count);
        record.flags = FLAGS_FILE;
        record.method = DEFLATED;
        record.zip64 = meta.size >= self.large;
        self.local(&record)?;
        self.deflater.reset();
        self.current = Some(record);
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.deflater.data(bytes, &mut self.out)
    }

    fn zeroes(&mut self, count: u64) -> io::Result<()> {
        self.deflater.zeroes(count, &mut self.out)
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(mut record) = self.current.take() else { return Ok(()) };
        self.deflater.finish(&mut self.out)?;
        record.crc = self.deflater.crc();
        record.size = self.deflater.read();
        record.compressed = self.deflater.written();
        let mut descriptor = b"PK\x07\x08".to_vec();
        put32(&mut descriptor, &[record.crc]);
        if record.zip64 {
            descriptor.extend_from_slice(&record.compressed.to_le_bytes());
            descriptor.extend_from_slice(&record.size.to_le_bytes());
        } else {
            let narrow = |value| {
                u32::try_from(value).map_err(|_| io::Error::other("an entry outgrew its header"))
            };
            put32(&mut descriptor, &[narrow(record.compressed)?, narrow(record.size)?]);
        }
        self.out.write_all(&descriptor)?;
        self.remember(&record)
    }

    fn finish(&mut self) -> io::Result<()> {
        let start = self.out.count;
        self.central.flush()?;
        let file = self.central.get_mut();
        file.rewind()?;
        let copied = io::copy(&mut file.take(self.central_bytes), &mut self.out)?;
        if copied != self.central_bytes {
            return Err(io::Error::other("the scratch file lost the central directory"));
        }
        let end = self.out.count;
        let count = u16::try_from(self.entries).unwrap_or(MAX_16);
        let (small_size, small_start) = (
            u32::try_from(self.central_bytes).unwrap_or(MAX_32),
            u32::try_from(start).unwrap_or(MAX_32),
        );
        let mut tail = Vec::new();
        if count == MAX_16 || small_size == MAX_32 || small_start == MAX_32 {
            tail.extend_from_slice(b"PK\x06\x06");
            tail.extend_from_slice(&44u64.to_le_bytes());
            put16(&mut tail, &[3 << 8 | VERSION, VERSION]);
            put32(&mut tail, &[0, 0]);
            for value in [self.entries, self.entries, self.central_bytes, start] {
                tail.extend_from_slice(&value.to_le_bytes());
            }
            tail.extend_from_slice(b"PK\x06\x07");
            put32(&mut tail, &[0]);
            tail.extend_from_slice(&end.to_le_bytes());
            put32(&mut tail, &[1]);
        }
        tail.extend_from_slice(b"PK\x05\x06");
        put16(&mut tail, &[0, 0, count, count]);
        put32(&mut tail, &[small_size, small_start]);
        put16(&mut tail, &[0]);
        self.out.write_all(&tail)?;
        self.out.flush()
    }
}

impl Record {
    fn new(meta: &Meta<'_>, name: Vec<u8>, kind: u32, offset: u64) -> Self {
        let seconds = meta.modified.map(|time| time.seconds);
        Self {
            flags: FLAGS,
            method: STORED,
            stamp: dos_time(seconds.unwrap_or(0)),
            crc: 0,
            compressed: 0,
            size: 0,
            // Unix mode above; below, what DOS calls a directory.
            attributes: (kind | meta.mode & 0o777) << 16 | u32::from(kind == 0o040_000) << 4,
            offset,
            name,
            seconds: seconds.and_then(|s| i32::try_from(s).ok()),
            ids: (meta.uid, meta.gid),
            zip64: false,
        }
    }

    /// Extra fields: time in UTC (`UT`), owner and group (`ux`).
    fn stamps(&self) -> Vec<u8> {
        let mut extra = Vec::with_capacity(40);
        if let Some(seconds) = self.seconds {
            put16(&mut extra, &[0x5455, 5]);
            extra.push(1);
            extra.extend_from_slice(&seconds.to_le_bytes());
        }
        put16(&mut extra, &[0x7875, 11]);
        extra.extend_from_slice(&[1, 4]);
        put32(&mut extra, &[self.ids.0]);
        extra.push(4);
        put32(&mut extra, &[self.ids.1]);
        extra
    }
}

fn put16(bytes: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
}

fn put32(bytes: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
}

fn short(length: usize) -> io::Result<u16> {
    u16::try_from(length).map_err(|_| io::Error::other("a name is too long for a ZIP archive"))
}

/// Time and date as DOS writes them, in UTC; what it cannot say becomes the nearest it can.
fn dos_time(seconds: i64) -> [u8; 4] {
    // 1980-01-01 to 2107-12-31.
    let seconds = seconds.clamp(315_532_800, 4_354_819_198);
    let time = jiff::Timestamp::from_second(seconds).unwrap_or_default();
    let time = jiff::tz::Offset::UTC.to_datetime(time);
    let part = |value: i8| u16::try_from(value).unwrap_or(0);
    let year = u16::try_from(time.year()).unwrap_or(1980).saturating_sub(1980);
    let clock = part(time.hour()) << 11 | part(time.minute()) << 5 | (part(time.second()) / 2);
    let date = year << 9 | part(time.month()) << 5 | part(time.day());
    let ([a, b], [c, d]) = (clock.to_le_bytes(), date.to_le_bytes());
    [a, b, c, d]
}

/// A file without a name in `directory`.
fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok(file.into()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
        }
        Err(error) => return Err(error.into()),
    }
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    let path = directory.join(format!(".central-{:016x}", u64::from_le_bytes(random)));
    let file =
        rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    std::fs::remove_file(&path)?;
    Ok(file.into())
}
