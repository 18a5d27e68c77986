//! How often each host cluster is referred to, and as what: a sparse map with bounded memory.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::types::HostCluster;

/// Clusters counted together.
const CHUNK: usize = 4096;
/// Most chunks: 512 MiB of memory, 8 TiB of densely used file at 64 KiB clusters.
const MAX_CHUNKS: usize = 32 << 10;
/// Bits of a count below the bits that tell the uses.
const COUNT_BITS: u32 = 28;
const COUNT_MASK: u32 = (1 << COUNT_BITS) - 1;

/// What a cluster is used as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Header, L1, refcount or bitmap metadata: one use and no other.
    Exclusive,
    /// An L2 table, which snapshots may share.
    Table,
    /// Content: guest data (compressed too) or bitmap data, which may be shared.
    Data,
}

impl Use {
    const fn bit(self) -> u32 {
        match self {
            Self::Exclusive => 1 << COUNT_BITS,
            Self::Table => 2 << COUNT_BITS,
            Self::Data => 4 << COUNT_BITS,
        }
    }
}

/// Counts by host cluster.
#[derive(Default)]
pub(super) struct RefMap {
    chunks: BTreeMap<u64, Box<[u32; CHUNK]>>,
}

#[allow(clippy::cast_possible_truncation, reason = "a remainder of CHUNK")]
fn locate(cluster: HostCluster) -> (u64, usize) {
    let chunk = CHUNK as u64;
    (cluster.0 / chunk, (cluster.0 % chunk) as usize)
}

fn is_overlap(word: u32) -> bool {
    let both = Use::Table.bit() | Use::Data.bit();
    word & both == both || word & Use::Exclusive.bit() != 0 && word & COUNT_MASK > 1
}

impl RefMap {
    /// Adds `times` references; a count that no refcount below 32 bits holds stops growing.
    ///
    /// # Errors
    /// `Unsupported` when the map would outgrow its bound.
    pub(super) fn add(&mut self, cluster: HostCluster, times: u32, usage: Use) -> Result<()> {
        let (chunk, index) = locate(cluster);
        if !self.chunks.contains_key(&chunk) && self.chunks.len() >= MAX_CHUNKS {
            return Err(Error::unsupported(
                "the image uses more clusters than a check can count; check it with qemu-img",
            ));
        }
        let counts = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK]));
        let word = counts[index];
        let count = (word & COUNT_MASK).saturating_add(times).min(COUNT_MASK);
        counts[index] = word & !COUNT_MASK | count | usage.bit();
        Ok(())
    }

    /// Takes a reference away.
    pub(super) fn remove(&mut self, cluster: HostCluster) {
        let (chunk, index) = locate(cluster);
        if let Some(counts) = self.chunks.get_mut(&chunk)
            && counts[index] & COUNT_MASK > 0
        {
            counts[index] -= 1;
        }
    }

    /// References to `cluster`.
    pub(super) fn get(&self, cluster: HostCluster) -> u32 {
        let (chunk, index) = locate(cluster);
        self.chunks.get(&chunk).map_or(0, |counts| counts[index] & COUNT_MASK)
    }

    fn words(&self) -> impl Iterator<Item = (HostCluster, u32)> {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            (chunk * CHUNK as u64..)
                .zip(counts.iter())
                .map(|(cluster, word)| (HostCluster(cluster), *word))
        })
    }

    /// Every cluster that is referred to, in order, with its count.
    pub(super) fn used(&self) -> impl Iterator<Item = (HostCluster, u32)> {
        self.words()
            .map(|(cluster, word)| (cluster, word & COUNT_MASK))
            .filter(|(_, count)| *count > 0)
    }

    /// Clusters that hold metadata and something else too, in order.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = HostCluster> {
        self.words().filter(|(_, word)| is_overlap(*word)).map(|(cluster, _)| cluster)
    }

    /// Whether `cluster` holds metadata and something else too.
    pub(super) fn is_overlap(&self, cluster: HostCluster) -> bool {
        let (chunk, index) = locate(cluster);
        self.chunks.get(&chunk).is_some_and(|counts| is_overlap(counts[index]))
    }

    /// One past the last cluster that is referred to.
    pub(super) fn end(&self) -> u64 {
        self.chunks
            .iter()
            .rev()
            .find_map(|(chunk, counts)| {
                counts
                    .iter()
                    .rposition(|word| word & COUNT_MASK > 0)
                    .map(|i| chunk * CHUNK as u64 + i as u64 + 1)
            })
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_tables_and_shared_data_do_not_overlap_but_a_mix_does() {
        let mut map = RefMap::default();
        let uses = [
            (1, Use::Exclusive),
            (2, Use::Table),
            (2, Use::Table),
            (3, Use::Data),
            (3, Use::Data),
            (4, Use::Table),
            (4, Use::Data),
            (9_000, Use::Exclusive),
            (9_000, Use::Exclusive),
        ];
        for (cluster, usage) in uses {
            map.add(HostCluster(cluster), 1, usage).unwrap();
        }
        assert!(map.overlaps().eq([HostCluster(4), HostCluster(9_000)]));
        assert_eq!(map.get(HostCluster(2)), 2);
        assert_eq!(map.end(), 9_001);
        map.remove(HostCluster(9_000));
        map.remove(HostCluster(9_000));
        map.remove(HostCluster(9_000));
        assert_eq!(map.end(), 5);
    }

    #[test]
    fn a_count_saturates_without_touching_what_tells_the_uses() {
        let mut map = RefMap::default();
        map.add(HostCluster(0), u32::MAX, Use::Data).unwrap();
        map.add(HostCluster(0), u32::MAX, Use::Data).unwrap();
        assert_eq!(map.get(HostCluster(0)), COUNT_MASK);
        assert_eq!(map.overlaps().count(), 0);
    }
}
