//! What to send of a disk, and the change ids that tell the next backup what it may rely on.

use std::io::Read;

use serde_json::Value;

use crate::capture::{CLUSTER, Changes, Source};
use crate::checksum::{Checksum, LENGTH};
use crate::ctl::error::{CtlError, CtlResult};
use crate::ctl::http::{Api, encode};
use crate::ctl::output::{each, number};
use crate::model::random_hex;

/// Random bytes of a change id.
const RANDOM: usize = 8;
/// What a change id begins with whose backup was made while a bitmap was there.
const BITMAP: &str = "bitmap:";
/// What every other begins with.
const CHECKSUMS: &str = "checksums:";

/// How the changes of a disk are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// All of it is sent.
    Everything,
    /// A dirty bitmap tells.
    Bitmap,
    /// All of it is read, and compared with the checksums of the backup before.
    Checksums,
}

impl Mode {
    /// Which is right after a backup with the change id `previous`; empty where the hub wants all.
    pub(super) fn after(previous: &str, bitmap: Option<&str>) -> Self {
        match bitmap {
            _ if previous.is_empty() => Self::Everything,
            Some(name) if bitmap_of(previous) == Some(name) => Self::Bitmap,
            _ => Self::Checksums,
        }
    }

    /// The word for it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Everything => "everything",
            Self::Bitmap => "bitmap",
            Self::Checksums => "checksums",
        }
    }
}

/// The change id of a backup that is made while the source has this bitmap, or none.
pub(super) fn change_id(bitmap: Option<&str>) -> String {
    let random = random_hex(RANDOM);
    match bitmap {
        Some(name) => format!("{BITMAP}{name}:{random}"),
        None => format!("{CHECKSUMS}{random}"),
    }
}

/// The bitmap that was there when the backup with this change id was made.
fn bitmap_of(change_id: &str) -> Option<&str> {
    Some(change_id.strip_prefix(BITMAP)?.rsplit_once(':')?.0)
}

/// Bytes of a disk in an earlier backup.
pub(super) fn size_in(backup: &Value, disk: u64) -> CtlResult<u64> {
    let found = each(backup, "disk_results").find(|d| number(d, "disk_id") == disk);
    found.and_then(|d| d["capacity_bytes"].as_u64()).ok_or_else(|| {
        let cause = format!("the backup before has no disk {disk}");
        CtlError::failed(cause, "make a full backup: --type full")
    })
}

/// What a bitmap tells. What a disk has grown by since is part of it, whatever the bitmap says:
/// nobody wrote there, but it may hold something.
pub(super) fn by_bitmap(source: &Source, name: &str, before: u64) -> CtlResult<Changes> {
    let mut extents = source.changed_extents(Some(name))?;
    if source.size() > before {
        extents.push((before, source.size() - before));
    }
    Ok(Changes::Extents(extents))
}

/// What differs from the checksums of `parent`, where the disk had `before` bytes.
pub(super) fn by_checksums(api: &Api, parent: &str, disk: u64, before: u64) -> CtlResult<Changes> {
    let list = checksums(api, parent, disk, before)?;
    let earlier = move |cluster: u64| {
        let index = usize::try_from(cluster).ok()?;
        Checksum::decode(*list.get(index)?)
    };
    Ok(Changes::Checksums(Box::new(earlier)))
}

/// The checksums of a disk of `size` bytes at a restore point, encoded, by cluster.
pub(in crate::ctl) fn checksums(
    api: &Api,
    backup: &str,
    disk: u64,
    size: u64,
) -> CtlResult<Vec<[u8; LENGTH]>> {
    let path = format!("/backups/{}/disks/{disk}/checksums", encode(backup));
    let (told, stream) = api.stream(&path)?;
    read(stream, told, size.div_ceil(CLUSTER))
}

/// Reads the checksums of exactly so many clusters.
fn read(mut stream: impl Read, told: Option<u64>, clusters: u64) -> CtlResult<Vec<[u8; LENGTH]>> {
    let wanted = clusters * LENGTH as u64;
    let odd = |got: u64| {
        let cause = format!("the hub has {got} bytes of checksums for {clusters} clusters");
        CtlError::failed(cause, "verify the backup before, or make a full one: --type full")
    };
    if let Some(told) = told.filter(|told| *told != wanted) {
        return Err(odd(told));
    }
    let count = usize::try_from(clusters).map_err(|_| odd(wanted))?;
    let mut list = vec![[0; LENGTH]; count];
    let mut got = 0;
    let filled = stream.read_exact(list.as_flattened_mut());
    filled.map_err(|e| {
        let cause = format!("the checksums of the backup before cannot be read: {e}");
        CtlError::new(crate::ctl::error::Kind::Unreachable, cause, "try again")
    })?;
    got += wanted;
    match stream.read(&mut [0]) {
        Ok(0) => Ok(list),
        _ => Err(odd(got + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_believed_only_after_a_backup_with_the_same_one() {
        let with = change_id(Some("a:b"));
        for (previous, bitmap, expected) in [
            ("", None, Mode::Everything),
            ("", Some("a:b"), Mode::Everything),
            (with.as_str(), Some("a:b"), Mode::Bitmap),
            (with.as_str(), Some("a"), Mode::Checksums),
            (with.as_str(), None, Mode::Checksums),
            (change_id(None).as_str(), Some("a:b"), Mode::Checksums),
            ("52 3c ec 11/446", Some("a:b"), Mode::Checksums),
            ("bitmap:a", Some("a"), Mode::Checksums),
        ] {
            assert_eq!(Mode::after(previous, bitmap), expected, "{previous} {bitmap:?}");
        }
    }

    #[test]
    fn no_two_change_ids_are_the_same() {
        assert_ne!(change_id(None), change_id(None));
        assert_ne!(change_id(Some("a")), change_id(Some("a")));
    }

    #[test]
    fn a_list_of_checksums_that_is_too_short_or_too_long_is_refused() {
        let bytes = [7; 24];
        assert_eq!(read(&bytes[..], Some(24), 3).unwrap(), [[7; 8]; 3]);
        assert_eq!(read(&bytes[..], None, 3).unwrap().len(), 3);
        for (told, clusters) in [(Some(16), 3), (Some(24), 2), (None, 4), (None, 2)] {
            assert!(read(&bytes[..], told, clusters).is_err(), "{told:?} {clusters}");
        }
    }
}
