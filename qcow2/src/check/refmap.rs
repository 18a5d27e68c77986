//! How often each host cluster is referred to: a sparse map with bounded memory.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::types::HostCluster;

/// Clusters counted together.
const CHUNK: u64 = 4096;
/// Most chunks: 512 MiB of memory, 8 TiB of densely used file at 64 KiB clusters.
const MAX_CHUNKS: usize = 32 << 10;

/// Counts by host cluster.
#[derive(Default)]
pub(super) struct RefMap {
    chunks: BTreeMap<u64, Box<[u32; CHUNK as usize]>>,
}

#[allow(clippy::cast_possible_truncation, reason = "a remainder of CHUNK")]
fn locate(cluster: HostCluster) -> (u64, usize) {
    (cluster.0 / CHUNK, (cluster.0 % CHUNK) as usize)
}

impl RefMap {
    /// Adds a reference; returns the new count.
    ///
    /// # Errors
    /// `Unsupported` when the map would outgrow its bound.
    pub(super) fn add(&mut self, cluster: HostCluster) -> Result<u32> {
        let (chunk, index) = locate(cluster);
        if !self.chunks.contains_key(&chunk) && self.chunks.len() >= MAX_CHUNKS {
            return Err(Error::unsupported(
                "the image uses more clusters than a check can count; check it with qemu-img",
            ));
        }
        let counts = self
            .chunks
            .entry(chunk)
            .or_insert_with(|| Box::new([0; CHUNK as usize]));
        counts[index] = counts[index].saturating_add(1);
        Ok(counts[index])
    }

    /// Takes a reference away.
    pub(super) fn remove(&mut self, cluster: HostCluster) {
        let (chunk, index) = locate(cluster);
        if let Some(counts) = self.chunks.get_mut(&chunk) {
            counts[index] = counts[index].saturating_sub(1);
        }
    }

    /// References to `cluster`.
    pub(super) fn get(&self, cluster: HostCluster) -> u32 {
        let (chunk, index) = locate(cluster);
        self.chunks.get(&chunk).map_or(0, |counts| counts[index])
    }

    /// Every cluster that is referred to, in order, with its count.
    pub(super) fn used(&self) -> impl Iterator<Item = (HostCluster, u32)> {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            (chunk * CHUNK..)
                .zip(counts.iter())
                .filter(|(_, count)| **count > 0)
                .map(|(cluster, count)| (HostCluster(cluster), *count))
        })
    }

    /// One past the last cluster that is referred to.
    pub(super) fn end(&self) -> u64 {
        self.chunks
            .iter()
            .rev()
            .find_map(|(chunk, counts)| {
                counts
                    .iter()
                    .rposition(|c| *c > 0)
                    .map(|i| chunk * CHUNK + i as u64 + 1)
            })
            .unwrap_or(0)
    }
}
