//! Mapping pairs: which clusters hold a value.

use crate::error::{Error, Result};

/// Most runs of one value.
pub(super) const MAX_RUNS: usize = 1 << 21;
/// Clusters are counted below this, so that sums of two do not overflow.
const MAX_CLUSTERS: u64 = 1 << 52;

/// Consecutive clusters of a value that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First cluster, in the value.
    pub(super) vcn: u64,
    /// Clusters; never 0.
    pub(super) length: u64,
    /// First cluster, on the volume; `None` where there is nothing: a hole.
    pub(super) lcn: Option<u64>,
}

/// Adds the runs of one extent to `runs`, which holds all clusters below `lowest`. Neighbours are
/// joined.
///
/// # Errors
/// `Corrupt`; `Limit`.
pub(super) fn decode(pairs: &[u8], lowest: u64, clusters: u64, runs: &mut Vec<Run>) -> Result<()> {
    let mut vcn = lowest;
    let mut lcn = 0_i64;
    let mut rest = pairs;
    let cut = || Error::corrupt("mapping pairs that are cut off");
    loop {
        let (&header, tail) = rest.split_first().ok_or_else(cut)?;
        if header == 0 {
            return Ok(());
        }
        let (length_bytes, offset_bytes) = (usize::from(header & 15), usize::from(header >> 4));
        if length_bytes > 8 || offset_bytes > 8 || tail.len() < length_bytes + offset_bytes {
            return Err(cut());
        }
        let (length, tail) = tail.split_at(length_bytes);
        let (offset, tail) = tail.split_at(offset_bytes);
        rest = tail;
        let length = u64::try_from(signed(length)).unwrap_or(0);
        if length == 0 || length > MAX_CLUSTERS || vcn + length > MAX_CLUSTERS {
            return Err(Error::corrupt(format!(
                "a run of {length} clusters at cluster {vcn} of a value"
            )));
        }
        let place = if offset.is_empty() {
            None
        } else {
            lcn = lcn.checked_add(signed(offset)).unwrap_or(-1);
            // Before NTFS 3 a hole was a run at cluster -1.
            match u64::try_from(lcn) {
                Ok(first) if length <= clusters && first <= clusters - length => Some(first),
                _ => {
                    return Err(Error::corrupt(format!(
                        "a run of {length} clusters at cluster {lcn} of a volume of {clusters}"
                    )));
                }
            }
        };
        push(runs, Run { vcn, length, lcn: place })?;
        vcn += length;
    }
}

fn push(runs: &mut Vec<Run>, run: Run) -> Result<()> {
    if let Some(last) = runs.last_mut() {
        let joins = match (last.lcn, run.lcn) {
            (None, None) => true,
            (Some(a), Some(b)) => a + last.length == b,
            _ => false,
        };
        if joins {
            last.length += run.length;
            return Ok(());
        }
    }
    if runs.len() >= MAX_RUNS {
        return Err(Error::limit(format!("more than {MAX_RUNS} runs of one value")));
    }
    runs.push(run);
    Ok(())
}

/// A signed little-endian number of up to eight bytes.
fn signed(bytes: &[u8]) -> i64 {
    let fill = if bytes.last().is_some_and(|last| *last >= 0x80) { 0xff } else { 0 };
    let mut all = [fill; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(all)
}

/// First cluster behind the runs.
pub(super) fn end(runs: &[Run]) -> u64 {
    runs.last().map_or(0, |run| run.vcn + run.length)
}

/// Number of the run that holds cluster `vcn`.
pub(super) fn find(runs: &[Run], vcn: u64) -> Option<usize> {
    let next = runs.partition_point(|run| run.vcn <= vcn);
    let index = next.checked_sub(1)?;
    runs.get(index).filter(|run| vcn < run.vcn + run.length).map(|_| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_go_back_and_forth_and_have_holes() {
        let mut runs = Vec::new();
        // 24 clusters at 0x5634; a hole of 16; 5 clusters, 0x34 before; 3 that follow them.
        let pairs = [0x21, 0x18, 0x34, 0x56, 0x01, 0x10, 0x11, 5, 0xcc, 0x11, 3, 5, 0];
        decode(&pairs, 0, 1 << 20, &mut runs).unwrap();
        assert_eq!(
            runs,
            [
                Run { vcn: 0, length: 24, lcn: Some(0x5634) },
                Run { vcn: 24, length: 16, lcn: None },
                Run { vcn: 40, length: 8, lcn: Some(0x5600) },
            ]
        );
        assert_eq!((find(&runs, 23), find(&runs, 24), find(&runs, 48)), (Some(0), Some(1), None));
        assert_eq!(end(&runs), 48);
    }

    #[test]
    fn nonsense_is_refused() {
        for pairs in [
            &[][..],
            &[0x21, 1],
            &[0x99; 20],
            &[0x11, 0, 1, 0],
            &[0x11, 1, 0x80, 0],
            &[0x11, 9, 5, 0],
        ] {
            assert!(decode(pairs, 0, 10, &mut Vec::new()).is_err(), "{pairs:?}");
        }
    }
}
