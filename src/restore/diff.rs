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

/// Which clusters of a disk differ between two restore points: one bit each.
#[derive(Debug, Clone, Default)]
pub(super) struct ChangedClusters {
    words: Vec<u64>,
}

impl ChangedClusters {
    fn set(&mut self, cluster: u64) {
        let word = usize::try_from(cluster / 64).unwrap_or(usize::MAX);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (cluster % 64);
    }

    /// Whether any byte of a range may differ.
    pub(super) fn touches(&self, offset: u64, length: u64) -> bool {
        self.next(offset, offset.saturating_add(length)).is_some()
    }

    /// The first part of `offset .. end` that lies in changed clusters which follow each other.
    pub(super) fn next(&self, offset: u64, end: u64) -> Option<(u64, u64)> {
        let first = self.first(offset, end)?;
        let mut after = first + 1;
        while after * CLUSTER < end && self.is_set(after) {
            after += 1;
        }
        Some(((first * CLUSTER).max(offset), (after * CLUSTER).min(end)))
    }

    fn is_set(&self, cluster: u64) -> bool {
        let word = usize::try_from(cluster / 64).ok().and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// The first changed cluster with a byte in `offset .. end`.
    fn first(&self, offset: u64, end: u64) -> Option<u64> {
        let last = end.checked_sub(1).filter(|last| *last >= offset)?;
        let bits = self.words.len() as u64 * 64;
        let mut at = offset / CLUSTER;
        let end = (last / CLUSTER + 1).min(bits);
        while at < end {
            let bit = at % 64;
            let count = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            let word = usize::try_from(at / 64).ok().and_then(|word| self.words.get(word));
            let found = word.map_or(0, |word| word & mask);
            if found != 0 {
                return Some(at / 64 * 64 + u64::from(found.trailing_zeros()));
            }
            at += count;
        }
        None
    }
}

/// Calls `visit` with the number of each cluster of a disk that differs, in order.
///
/// # Errors
/// As [`difference`].
fn each_changed(
    backups: &Backups,
    (from, to): (&str, &str),
    disk: u32,
    visit: &mut dyn FnMut(u64),
) -> Result<(), Failure> {
    if backups.backup(from)?.vm_id != backups.backup(to)?.vm_id {
        let text = "the two backups are of different VMs";
        return Err(Failure::new(FailureKind::Invalid, text, ""));
    }
    let (first, second) = (backups.checksums(from, disk)?, backups.checksums(to, disk)?);
    let clusters = first.clusters().max(second.clusters());
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
                visit(index);
            }
        }
        at = end;
    }
    Ok(())
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
    let mut difference = Difference {
        from: from.to_owned(),
        to: to.to_owned(),
        bytes: 0,
        ranges: Vec::new(),
        more: false,
    };
    each_changed(backups, (from, to), disk, &mut |cluster| {
        add(&mut difference, cluster * CLUSTER, most);
    })?;
    Ok(difference)
}

/// The clusters of a disk that differ between two restore points: 2 MiB of memory per TiB at most.
///
/// # Errors
/// As [`difference`].
pub(super) fn changed_clusters(
    backups: &Backups,
    (from, to): (&str, &str),
    disk: u32,
) -> Result<ChangedClusters, Failure> {
    let mut changed = ChangedClusters::default();
    each_changed(backups, (from, to), disk, &mut |cluster| changed.set(cluster))?;
    Ok(changed)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_touches_what_changed_when_one_of_its_bytes_lies_in_a_changed_cluster() {
        let mut changed = ChangedClusters::default();
        assert!(!changed.touches(0, u64::MAX));
        for cluster in [3, 64, 200] {
            changed.set(cluster);
        }
        for cluster in [3, 64, 200] {
            let start = cluster * CLUSTER;
            assert!(changed.touches(start, 1));
            assert!(changed.touches(start + CLUSTER - 1, 1));
            assert!(changed.touches(start - 1, 2));
            assert!(!changed.touches(start - 1, 1));
            assert!(!changed.touches(start + CLUSTER, CLUSTER));
            assert!(!changed.touches(start, 0));
        }
        assert!(!changed.touches(4 * CLUSTER, 60 * CLUSTER));
        assert!(changed.touches(4 * CLUSTER, 60 * CLUSTER + 1));
        assert!(changed.touches(199 * CLUSTER, u64::MAX));
        assert!(!changed.touches(201 * CLUSTER, u64::MAX));
    }

    #[test]
    fn changed_parts_of_a_range_are_told_one_after_the_other_and_cut_at_its_ends() {
        let mut changed = ChangedClusters::default();
        for cluster in [3, 4, 5, 63, 64, 90] {
            changed.set(cluster);
        }
        let mut found = Vec::new();
        let (mut at, end) = (4 * CLUSTER + 7, 90 * CLUSTER + 9);
        while let Some(part) = changed.next(at, end) {
            found.push(part);
            at = part.1;
        }
        let expected = [
            (4 * CLUSTER + 7, 6 * CLUSTER),
            (63 * CLUSTER, 65 * CLUSTER),
            (90 * CLUSTER, 90 * CLUSTER + 9),
        ];
        assert_eq!(found, expected);
    }
}
