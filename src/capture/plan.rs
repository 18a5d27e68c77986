//! What a copy covers, and in which steps.

use std::collections::VecDeque;

use super::CLUSTER;
use super::error::CaptureError;
use super::ranges::Ranges;
use super::source::{Source, Stretch};
use super::zero::is_zero;
use crate::checksum::Checksum;

/// Bytes of the source whose holes are looked up at once; whole clusters.
const WINDOW: u64 = 256 << 20;

/// What to copy.
pub enum Changes {
    /// The whole disk.
    Everything,
    /// These ranges, as (offset, length): what a dirty bitmap tells.
    Extents(Vec<(u64, u64)>),
    /// Clusters of 64 KiB that differ from an earlier backup. The function gives the checksum of a
    /// cluster, by number, in that backup; `None` where it reads as zeroes there. All of the source
    /// is read. The last cluster of a disk may be short; its checksum covers what there is of it.
    Checksums(Box<dyn Fn(u64) -> Option<Checksum> + Send + Sync>),
}

/// What becomes of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Its bytes are sent.
    Send,
    /// Zeroes are written there.
    Zero,
    /// The target reads the same already.
    Skip,
}

impl Changes {
    /// The ranges that are to be looked at, in whole multiples of `grain`.
    ///
    /// # Errors
    /// Where they reach past the disk.
    pub(super) fn ranges(&self, grain: u64, size: u64) -> Result<Ranges, CaptureError> {
        let Self::Extents(extents) = self else { return Ok(Ranges::of(0, size)) };
        let mut ranges = Ranges::default();
        for (offset, length) in extents {
            match offset.checked_add(*length) {
                Some(end) if end <= size => ranges.insert((*offset, end)),
                _ => {
                    return Err(CaptureError::Invalid(format!(
                        "the changes name {length} bytes at {offset}, but the disk has {size}; they \
                         are of another disk, or of another time"
                    )));
                }
            }
        }
        Ok(ranges.widened(grain, size))
    }

    /// Granularity in bytes of what is looked at.
    pub(super) fn grain(&self, minimum: u64) -> u64 {
        match self {
            Self::Extents(_) => minimum,
            Self::Everything | Self::Checksums(_) => CLUSTER,
        }
    }

    /// What becomes of a piece inside one cluster. `fresh` says that the target reads as zeroes.
    pub(super) fn judge(&self, offset: u64, bytes: &[u8], fresh: bool) -> Verdict {
        let zero = is_zero(bytes);
        let changed = match self {
            Self::Everything => !(zero && fresh),
            Self::Extents(_) => true,
            Self::Checksums(earlier) => match earlier(offset / CLUSTER) {
                None => !zero,
                Some(sum) => sum != Checksum::of(bytes),
            },
        };
        match (changed, zero) {
            (false, _) => Verdict::Skip,
            (true, true) => Verdict::Zero,
            (true, false) => Verdict::Send,
        }
    }

    /// Verdicts for a range that is known to read as zeroes: each with its end.
    pub(super) fn judge_zeroes(&self, (from, to): (u64, u64), fresh: bool) -> Vec<(u64, Verdict)> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut verdicts = Verdicts::default();
        match self {
            Self::Everything if fresh => verdicts.push(to, Verdict::Skip),
            Self::Everything | Self::Extents(_) => verdicts.push(to, Verdict::Zero),
            Self::Checksums(_) => {
                for (from, to) in clusters(from, to) {
                    let bytes = &ZEROES[..usize::try_from(to - from).unwrap_or(ZEROES.len())];
                    verdicts.push(to, self.judge(from, bytes, fresh));
                }
            }
        }
        verdicts.0
    }
}

/// Verdicts for consecutive ranges, each with its end; equal ones joined.
#[derive(Debug, Default)]
pub(super) struct Verdicts(pub(super) Vec<(u64, Verdict)>);

impl Verdicts {
    pub(super) fn push(&mut self, to: u64, verdict: Verdict) {
        match self.0.last_mut() {
            Some((end, last)) if *last == verdict => *end = to,
            _ => self.0.push((to, verdict)),
        }
    }
}

/// The parts of a range inside each cluster, as (start, end).
pub(super) fn clusters(from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
    let next = move |at: u64| (at < to).then(|| (at, ((at / CLUSTER + 1) * CLUSTER).min(to)));
    std::iter::successors(next(from), move |(_, end)| next(*end))
}

/// Hands out the work of one round, to one thread after the other.
pub(super) struct Feeder {
    /// Not looked up yet.
    open: Ranges,
    /// Looked up.
    mapped: VecDeque<Stretch>,
    /// Longest piece of data.
    request: u64,
}

impl Feeder {
    /// For these ranges, in pieces of at most `request` bytes, which are whole clusters.
    pub(super) fn new(open: Ranges, request: u64) -> Self {
        Self { open, mapped: VecDeque::new(), request }
    }

    /// The next piece: zeroes of any length, or data of at most a request.
    pub(super) fn next(&mut self, source: &Source) -> Result<Option<Stretch>, CaptureError> {
        if self.mapped.is_empty() {
            let Some((from, to)) = self.open.pop(WINDOW) else { return Ok(None) };
            self.mapped = whole_clusters((from, to), &source.map(from, to)?);
        }
        let Some(mut stretch) = self.mapped.pop_front() else { return Ok(None) };
        if !stretch.zero {
            let to = ((stretch.from / self.request + 1) * self.request).min(stretch.to);
            if to < stretch.to {
                self.mapped.push_front(Stretch { from: to, ..stretch });
            }
            stretch.to = to;
        }
        Ok(Some(stretch))
    }
}

/// The same stretches where zeroes begin and end between clusters, or at the ends of the range. What
/// is cut from them counts as data.
fn whole_clusters((from, to): (u64, u64), stretches: &[Stretch]) -> VecDeque<Stretch> {
    let mut zeroes = Ranges::default();
    stretches.iter().filter(|s| s.zero).for_each(|s| zeroes.insert((s.from, s.to)));
    let mut out = VecDeque::new();
    let mut at = from;
    for (start, end) in zeroes.iter() {
        let start = if start == from { start } else { start.next_multiple_of(CLUSTER) };
        let end = if end == to { end } else { end / CLUSTER * CLUSTER };
        if start >= end {
            continue;
        }
        if at < start {
            out.push_back(Stretch { from: at, to: start, zero: false });
        }
        out.push_back(Stretch { from: start, to: end, zero: true });
        at = end;
    }
    if at < to {
        out.push_back(Stretch { from: at, to, zero: false });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = CLUSTER;

    fn stretch(from: u64, to: u64, zero: bool) -> Stretch {
        Stretch { from, to, zero }
    }

    #[test]
    fn zeroes_inside_a_cluster_count_as_data() {
        let told = [
            stretch(10, C / 2, true),
            stretch(C / 2, C, false),
            stretch(C, C + 5, true),
            stretch(C + 5, C + 6, false),
            stretch(C + 6, 4 * C + 7, true),
            stretch(4 * C + 7, 5 * C + 1, false),
            stretch(5 * C + 1, 5 * C + 9, true),
        ];
        let expected = [
            stretch(10, 2 * C, false),
            stretch(2 * C, 4 * C, true),
            stretch(4 * C, 5 * C + 9, false),
        ];
        assert_eq!(whole_clusters((10, 5 * C + 9), &told), expected);
        let all = [stretch(10, 20, true), stretch(20, 30, true)];
        assert_eq!(whole_clusters((10, 30), &all), [stretch(10, 30, true)]);
    }

    #[test]
    fn checksums_tell_what_to_send_zero_and_skip() {
        let data = vec![7; 64 << 10];
        let sums = [Some(Checksum::of(&data)), None, Some(Checksum::of(&[0; 64 << 10]))];
        let earlier = move |index: u64| sums[usize::try_from(index).unwrap()];
        let changes = Changes::Checksums(Box::new(earlier));
        let zeroes = vec![0; 64 << 10];
        // Zeroes over data must be written, even if someone says that the target is fresh.
        for fresh in [false, true] {
            for (offset, bytes, expected) in [
                (0, &data, Verdict::Skip),
                (0, &zeroes, Verdict::Zero),
                (C, &data, Verdict::Send),
                (C, &zeroes, Verdict::Skip),
                (2 * C, &data, Verdict::Send),
                (2 * C, &zeroes, Verdict::Skip),
            ] {
                assert_eq!(changes.judge(offset, bytes, fresh), expected, "{offset}");
            }
            let verdicts = changes.judge_zeroes((0, 3 * C), fresh);
            assert_eq!(verdicts, [(C, Verdict::Zero), (3 * C, Verdict::Skip)]);
        }
    }

    #[test]
    fn only_a_copy_of_everything_leaves_zeroes_out_and_only_where_the_target_is_fresh() {
        for (changes, fresh, expected) in [
            (Changes::Everything, true, Verdict::Skip),
            (Changes::Everything, false, Verdict::Zero),
            (Changes::Extents(Vec::new()), true, Verdict::Zero),
        ] {
            assert_eq!(changes.judge(0, &[0; 512], fresh), expected);
            assert_eq!(changes.judge_zeroes((0, 9), fresh), [(9, expected)]);
            assert_eq!(changes.judge(0, &[1; 512], fresh), Verdict::Send);
        }
    }

    #[test]
    fn extents_past_the_disk_are_refused_and_others_joined_and_widened() {
        let ranges = |extents| Changes::Extents(extents).ranges(512, 10_000);
        let joined = ranges(vec![(9_000, 1_000), (600, 10), (0, 512)]).unwrap();
        assert_eq!(joined.iter().collect::<Vec<_>>(), [(0, 1024), (8704, 10_000)]);
        assert!(ranges(vec![(0, 10_001)]).is_err());
        assert!(ranges(vec![(u64::MAX, 2)]).is_err());
    }
}
