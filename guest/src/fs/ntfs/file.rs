//! What a file record says of a file: type, times, sizes, and what stands in the way of its content.

use super::attribute::{ENCRYPTED, kind};
use super::bytes::{u32_at, u64_at};
use super::mft::{I30, Mft};
use super::names;
use super::record::{Record, in_record};
use super::reparse::{self, MAX_REPARSE, Reparse};
use crate::error::{Error, Result};
use crate::fs::{Attributes, FileType, Time};

const READ_ONLY: u32 = 0x1;
const SYSTEM: u32 = 0x4;
const MAX_INFORMATION: u64 = 4096;
/// Largest link that Interix wrote: a magic number and a path.
const MAX_INTERIX: u64 = 8 + 2 * 32_768;
/// Seconds from 1601 to 1970.
const EPOCH: i64 = 11_644_473_600;
const TICKS: u64 = 10_000_000;

/// What a record describes.
#[derive(Debug)]
pub(super) struct File {
    /// What is told of it.
    pub(super) attributes: Attributes,
    /// Where it points, of a link.
    pub(super) target: Option<Vec<u8>>,
}

fn time(ticks: u64) -> Option<Time> {
    let seconds = i64::try_from(ticks / TICKS).ok()? - EPOCH;
    let nanoseconds = u32::try_from(ticks % TICKS).ok()? * 100;
    (ticks != 0).then_some(Time { seconds, nanoseconds })
}

impl File {
    /// Reads what `record` says.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub(super) fn open(mft: &Mft, record: &Record) -> Result<Self> {
        Self::read(mft, record).map_err(|e| {
            if e.message.starts_with("MFT record") { e } else { in_record(record.number, &e) }
        })
    }

    fn read(mft: &Mft, record: &Record) -> Result<Self> {
        let source = &*mft.source;
        let information = mft
            .value(record, kind::STANDARD_INFORMATION, &[])?
            .ok_or_else(|| Error::corrupt("$STANDARD_INFORMATION is missing"))?
            .read_all(source, MAX_INFORMATION)?;
        let flags = u32_at(&information, 0x20)?;
        let directory = mft.head(record, kind::INDEX_ROOT, I30)?.is_some();
        let data = mft.head(record, kind::DATA, &[])?;
        let mut file_type = if directory { FileType::Directory } else { FileType::File };
        let mut notes = Vec::new();
        let mut target = None;
        if let Some(point) = mft.value(record, kind::REPARSE_POINT, &[])? {
            match reparse::parse(&point.read_all(source, MAX_REPARSE)?, directory)? {
                Reparse::Link(to) => {
                    file_type = FileType::Symlink;
                    target = Some(to);
                }
                Reparse::Special(special) => file_type = special,
                Reparse::Opaque(why) => {
                    file_type = FileType::Opaque;
                    notes.push(why);
                }
                Reparse::Directory(what) => notes.push(what),
            }
        } else if file_type == FileType::File && flags & SYSTEM != 0 {
            (file_type, target) = interix(mft, record)?;
        }
        let encrypted = data.is_some_and(|data| data.flags & ENCRYPTED != 0);
        if encrypted && !directory {
            file_type = FileType::Opaque;
            notes.push("its content is encrypted (EFS)".to_owned());
        }
        let streams = mft.named_streams(record)?;
        if streams > 0 {
            notes.push(format!("it has {streams} alternate data streams, which are not shown"));
        }
        let size = match (file_type, &target) {
            (FileType::Symlink, Some(target)) => target.len() as u64,
            (FileType::File | FileType::Opaque, _) => data.map_or(0, |data| data.size),
            _ => 0,
        };
        let writable = if flags & READ_ONLY == 0 { 0o200 } else { 0 };
        let mode = match file_type {
            // The flag means something else for directories.
            FileType::Directory => 0o755,
            FileType::Symlink => 0o777,
            _ => 0o444 | writable,
        };
        let attributes = Attributes {
            file_type,
            size,
            allocated: data.map(|data| data.allocated),
            mode,
            uid: 0,
            gid: 0,
            links: u32::from(record.links()).max(1),
            modified: time(u64_at(&information, 8)?),
            accessed: time(u64_at(&information, 0x18)?),
            changed: time(u64_at(&information, 0x10)?),
            created: time(u64_at(&information, 0)?),
            note: (!notes.is_empty()).then(|| notes.join("; ")),
        };
        Ok(Self { attributes, target })
    }
}

/// Links and devices as Interix and NFS servers wrote them: system files with a magic number.
fn interix(mft: &Mft, record: &Record) -> Result<(FileType, Option<Vec<u8>>)> {
    let plain = (FileType::File, None);
    let Some(head) = mft.head(record, kind::DATA, &[])?.filter(|head| head.flags & ENCRYPTED == 0)
    else {
        return Ok(plain);
    };
    if !(8..=MAX_INTERIX).contains(&head.size) {
        return Ok(plain);
    }
    let Some(data) = mft.value(record, kind::DATA, &[])? else { return Ok(plain) };
    let mut magic = [0; 8];
    data.read_at(&*mft.source, &mut magic, 0)?;
    Ok(match &magic {
        b"IntxLNK\x01" => {
            let bytes = data.read_all(&*mft.source, MAX_INTERIX)?;
            (FileType::Symlink, Some(names::to_utf8(bytes.get(8..).unwrap_or(&[]))))
        }
        b"IntxCHR\0" => (FileType::CharDevice, None),
        b"IntxBLK\0" => (FileType::BlockDevice, None),
        _ => plain,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_negative_and_zero_is_none() {
        assert_eq!(time(0), None);
        assert_eq!(time(116_444_736_000_000_001), Some(Time { seconds: 0, nanoseconds: 100 }));
        assert_eq!(time(9_999_999), Some(Time { seconds: -EPOCH, nanoseconds: 999_999_900 }));
    }
}
