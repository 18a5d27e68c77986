//! What differs between two restore points of a disk, by their checksums: nothing is read of the
//! disk itself.

use crate::backup::{Backups, Failure, FailureKind};
use crate::model::BackupId;

/// Clusters that are compared at a time.
const BATCH: u64 = 64 << 10;
/// Bytes of a cluster of the hub's images.
const CLUSTER: u64 = 64 << 10;
/// Bytes of an encoded checksum.
const LENGTH: usize = crate::checksum::LENGTH;

/// What differs between two restore points of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The first restore point.
    pub from: BackupId,
    /// The second.
    pub to: BackupId,
    /// Bytes in the ranges below.
    pub bytes: u64,
    /// The ranges, (offset, length), in order; in whole clusters of 64 KiB.
    pub ranges: Vec<(u64, u64)>,
    /// There are more than were asked for.
    pub more: bool,
}

/// Compares a disk at two restore points; at most `most` ranges are told, and all are counted.
///
/// # Errors
/// `NotFound`; `Conflict` where one is no restore point; `Invalid` where they are of different VMs;
/// `Internal` where files cannot be read.
pub fn difference(
    backups: &Backups,
    (from, to): (&str, &str),
    disk: u32,
    most: usize,
) -> Result<Difference, Failure> {
    if backups.backup(from)?.vm_id != backups.backup(to)?.vm_id {
        let text = "the two backups are of different VMs";
        return Err(Failure::new(FailureKind::Invalid, text, ""));
    }
    let (first, second) = (backups.checksums(from, disk)?, backups.checksums(to, disk)?);
    let clusters = first.clusters().max(second.clusters());
    let mut difference = Difference {
        from: from.to_owned(),
        to: to.to_owned(),
        bytes: 0,
        ranges: Vec::new(),
        more: false,
    };
    let mut at = 0;
    while at < clusters {
        let end = (at + BATCH).min(clusters);
        let read = |sums: &crate::backup::MergedChecksums| -> std::io::Result<Vec<u8>> {
            let last = end.min(sums.clusters()).max(at);
            let mut bytes = sums.encode(at, last)?;
            // What a smaller disk does not have reads as zeroes.
            bytes.resize(usize::try_from(end - at).unwrap_or(usize::MAX) * LENGTH, 0);
            Ok(bytes)
        };
        let unreadable = |e: std::io::Error| {
            Failure::new(FailureKind::Internal, format!("cannot read checksums: {e}"), "")
        };
        let (a, b) = (read(&first).map_err(unreadable)?, read(&second).map_err(unreadable)?);
        for (index, (a, b)) in (at..).zip(a.chunks(LENGTH).zip(b.chunks(LENGTH))) {
            if a != b {
                add(&mut difference, index * CLUSTER, most);
            }
        }
        at = end;
    }
    Ok(difference)
}

fn add(difference: &mut Difference, offset: u64, most: usize) {
    difference.bytes += CLUSTER;
    if let Some((start, length)) = difference.ranges.last_mut()
        && *start + *length == offset
    {
        *length += CLUSTER;
    } else if difference.ranges.len() < most {
        difference.ranges.push((offset, CLUSTER));
    } else {
        difference.more = true;
    }
}
