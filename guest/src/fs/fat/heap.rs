//! Clusters, and the chains that files and directories are made of.
//!
//! A chain is walked once: its numbers are checked, a loop is found, and every so many clusters a mark is
//! kept. Reading starts at the mark before, so a chain takes little memory however broken up it is. No
//! walk takes more than a few times the steps of the clusters that were asked for.
//!
//! That two chains share clusters cannot be seen in either of them, and is not looked for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::pieces::Pieces;
use super::table::{Table, Walker};
use crate::error::{Error, Result};
use crate::source::Source;

/// Bytes of a directory entry.
pub(crate) const SLOT: u64 = 32;
/// Chains whose marks are kept.
const CHAINS: usize = 16;
/// Marks of a chain, at most.
const MARKS: u32 = 32 << 10;
/// Clusters between marks, at least.
const STRIDE: u32 = 64;
/// Bytes of directories that are read at once, and how many such pieces are kept.
const PIECE: u64 = 16 << 10;
const PIECES: usize = 16;

/// How long a chain shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    /// So many clusters; more may follow that hold nothing.
    Clusters(u32),
    /// As long as it is, and at most so many clusters.
    Whole(u32),
}

/// A chain that was walked.
pub(crate) struct Chain {
    clusters: u32,
    stride: u32,
    marks: Vec<u32>,
}

/// Where a file or directory lies.
#[derive(Clone)]
pub(crate) enum Extent {
    /// At one place.
    Fixed {
        /// First byte on the volume.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// In the clusters of a chain.
    Chain(Arc<Chain>),
}

/// What is called with a slot of a directory: its number, its byte on the volume, and its content. It
/// returns whether to go on.
pub(crate) type VisitSlot<'a> = dyn FnMut(u64, u64, &[u8; 32]) -> Result<bool> + 'a;

/// The clusters of a volume.
pub(crate) struct Heap {
    source: Arc<dyn Source>,
    table: Table,
    start: u64,
    cluster: u64,
    chains: Mutex<VecDeque<(u32, Span, Arc<Chain>)>>,
    slots: Pieces,
}

impl Heap {
    /// The clusters of `cluster` bytes from byte `start` on, which `table` describes.
    pub(crate) fn new(source: &Arc<dyn Source>, table: Table, start: u64, cluster: u64) -> Self {
        Self {
            source: Arc::clone(source),
            table,
            start,
            cluster,
            chains: Mutex::default(),
            slots: Pieces::new(source, 0, source.size(), PIECE, PIECES),
        }
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster(&self) -> u64 {
        self.cluster
    }

    /// First byte of a cluster, which must be a valid one.
    fn place(&self, cluster: u32) -> u64 {
        self.start + u64::from(cluster.saturating_sub(2)) * self.cluster
    }

    /// The cluster that byte `offset` of the volume lies in.
    ///
    /// # Errors
    /// `Corrupt` where it lies in none.
    pub(crate) fn cluster_at(&self, offset: u64) -> Result<u32> {
        let index = offset.checked_sub(self.start).map(|inside| inside / self.cluster + 2);
        let cluster = index.and_then(|index| u32::try_from(index).ok());
        self.table.check(cluster.unwrap_or(u32::MAX))
    }

    /// First byte of the cluster that follows `cluster` in a chain, or on the volume.
    ///
    /// # Errors
    /// `Corrupt` where none follows; `Io`.
    pub(crate) fn after(&self, cluster: u32, contiguous: bool) -> Result<u64> {
        let next = match contiguous {
            true => Some(self.table.check(cluster.saturating_add(1))?),
            false => self.table.walker().next(cluster)?,
        };
        let next = next.ok_or_else(|| Error::corrupt("an entry goes on after its directory"))?;
        Ok(self.place(next))
    }

    /// How many clusters `size` bytes take.
    ///
    /// # Errors
    /// `Corrupt` where there are not as many.
    pub(crate) fn count(&self, size: u64) -> Result<u32> {
        let clusters = u32::try_from(size.div_ceil(self.cluster)).unwrap_or(u32::MAX);
        if clusters > self.table.clusters() {
            return Err(Error::corrupt(format!(
                "{size} bytes in clusters of {}, and the volume has {}",
                self.cluster,
                self.table.clusters()
            )));
        }
        Ok(clusters)
    }

    /// The place of `clusters` clusters that follow each other.
    ///
    /// # Errors
    /// `Corrupt` where they leave the volume.
    pub(crate) fn contiguous(&self, first: u32, clusters: u32) -> Result<Extent> {
        self.table.check(first)?;
        self.table.check(first.saturating_add(clusters.saturating_sub(1)))?;
        let length = u64::from(clusters) * self.cluster;
        Ok(Extent::Fixed { start: self.place(first), length })
    }

    /// The chain from cluster `first` on.
    ///
    /// # Errors
    /// `Corrupt` where it loops, ends too early or leaves the volume; `Limit` where it is longer than the
    /// most that was allowed; `Io`.
    pub(crate) fn chain(&self, first: u32, span: Span) -> Result<Extent> {
        {
            let mut kept = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = kept.iter().position(|(f, s, _)| (*f, *s) == (first, span))
                && let Some(found) = kept.remove(at)
            {
                let chain = Arc::clone(&found.2);
                kept.push_front(found);
                return Ok(Extent::Chain(chain));
            }
        }
        let chain = Arc::new(self.walk(first, span)?);
        let mut kept = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= CHAINS {
            kept.pop_back();
        }
        kept.push_front((first, span, Arc::clone(&chain)));
        Ok(Extent::Chain(chain))
    }

    /// Walks a chain, and finds loops as R. P. Brent does: a cluster is remembered for as many steps as
    /// were made before it. A loop among the first `n` clusters is met within `3 n` steps; so after `4 n`
    /// steps without one, the first `n` are known to be different, whatever follows them.
    fn walk(&self, first: u32, span: Span) -> Result<Chain> {
        let (wanted, most) = match span {
            Span::Clusters(n) => (Some(n), u64::from(n)),
            Span::Whole(n) => (None, u64::from(n)),
        };
        let stride = u32::try_from(most / u64::from(MARKS)).unwrap_or(u32::MAX);
        let stride = stride.saturating_add(1).max(STRIDE);
        let mut walker = self.table.walker();
        let mut cluster = self.table.check(first)?;
        let (mut marks, mut clusters) = (Vec::new(), 0_u32);
        let (mut remembered, mut since, mut window) = (first, 0_u64, 1_u64);
        for step in 0..most * 4 + 4 {
            if step < most {
                if clusters.is_multiple_of(stride) {
                    marks.push(cluster);
                }
                clusters += 1;
            }
            let Some(next) = walker.next(cluster)? else {
                return match (wanted, clusters) {
                    (Some(wanted), found) if found < wanted => Err(Error::corrupt(format!(
                        "the chain from cluster {first:#x} has {found} clusters, and {wanted} are needed"
                    ))),
                    _ if step >= most && wanted.is_none() => Err(too_long(first, most)),
                    _ => Ok(Chain { clusters, stride, marks }),
                };
            };
            if next == remembered {
                return Err(Error::corrupt(format!(
                    "the chain from cluster {first:#x} comes back to cluster {next:#x}"
                )));
            }
            since += 1;
            if since == window {
                (remembered, since, window) = (next, 0, window * 2);
            }
            cluster = next;
        }
        match wanted {
            Some(_) => Ok(Chain { clusters, stride, marks }),
            None => Err(too_long(first, most)),
        }
    }

    /// Length of an extent in bytes.
    pub(crate) fn length(&self, extent: &Extent) -> u64 {
        match extent {
            Extent::Fixed { length, .. } => *length,
            Extent::Chain(chain) => u64::from(chain.clusters) * self.cluster,
        }
    }

    /// Calls `visit` with the places of `length` bytes from byte `from` of an extent on, as few as they
    /// are, until it returns `false`.
    ///
    /// # Errors
    /// `Corrupt` where the extent is shorter; `Io`; and what `visit` returned.
    pub(crate) fn runs(
        &self,
        extent: &Extent,
        from: u64,
        length: u64,
        visit: &mut dyn FnMut(u64, u64) -> Result<bool>,
    ) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        if from.checked_add(length).is_none_or(|end| end > self.length(extent)) {
            return Err(Error::corrupt(format!(
                "{length} bytes at byte {from} of a shorter chain"
            )));
        }
        let chain = match extent {
            Extent::Fixed { start, .. } => {
                visit(start + from, length)?;
                return Ok(());
            }
            Extent::Chain(chain) => chain,
        };
        let mut walker = self.table.walker();
        let mut cluster = seek(&mut walker, chain, from / self.cluster)?;
        let mut inside = from % self.cluster;
        let mut left = length;
        loop {
            let start = self.place(cluster) + inside;
            let mut run = self.cluster - inside;
            while run < left {
                let next = walker.next(cluster)?.ok_or_else(changed)?;
                let joined = next == cluster + 1;
                cluster = next;
                if !joined {
                    break;
                }
                run += self.cluster;
            }
            inside = 0;
            let run = run.min(left);
            left -= run;
            if !visit(start, run)? || left == 0 {
                return Ok(());
            }
        }
    }

    /// Fills `buf` from byte `offset` of an extent.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub(crate) fn read(&self, extent: &Extent, buf: &mut [u8], offset: u64) -> Result<()> {
        let length = buf.len() as u64;
        let mut rest = buf;
        self.runs(extent, offset, length, &mut |place, run| {
            let run = usize::try_from(run).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = std::mem::take(&mut rest).split_at_mut(run);
            rest = later;
            self.source.read_at(now, place)?;
            Ok(true)
        })
    }

    /// Calls `visit` with the slots of a directory from number `from` on.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, and what `visit` returned.
    pub(crate) fn slots(
        &self,
        extent: &Extent,
        from: u64,
        visit: &mut VisitSlot<'_>,
    ) -> Result<()> {
        let Some(length) =
            from.checked_mul(SLOT).and_then(|start| self.length(extent).checked_sub(start))
        else {
            return Ok(());
        };
        let mut number = from;
        self.runs(extent, from * SLOT, length / SLOT * SLOT, &mut |place, run| {
            let (mut index, mut piece) = (u64::MAX, Arc::from([]));
            for offset in (place..place + run).step_by(32) {
                let (at_index, at) = self.slots.locate(offset);
                if at_index != index {
                    piece = self.slots.piece(at_index)?;
                    index = at_index;
                }
                let slot = piece.get(at..).and_then(|rest| rest.first_chunk::<32>());
                let slot = slot.ok_or_else(|| Error::corrupt("a directory leaves the volume"))?;
                if !visit(number, offset, slot)? {
                    return Ok(false);
                }
                number += 1;
            }
            Ok(true)
        })
    }

    /// The slot at byte `offset` of the volume.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub(crate) fn slot(&self, offset: u64) -> Result<[u8; 32]> {
        self.slots.array(offset)
    }
}

/// The cluster number `index` of a chain.
fn seek(walker: &mut Walker<'_>, chain: &Chain, index: u64) -> Result<u32> {
    let stride = u64::from(chain.stride);
    let mark = usize::try_from(index / stride).ok().and_then(|mark| chain.marks.get(mark));
    let mut cluster = *mark.ok_or_else(changed)?;
    for _ in 0..index % stride {
        cluster = walker.next(cluster)?.ok_or_else(changed)?;
    }
    Ok(cluster)
}

fn changed() -> Error {
    Error::corrupt("a chain is shorter than it was")
}

fn too_long(first: u32, most: u64) -> Error {
    Error::limit(format!("the directory at cluster {first:#x} has more than {most} clusters"))
}

#[cfg(test)]
mod tests {
    use super::super::table::Width;
    use super::*;
    use crate::source::MemoryDisk;

    /// Six clusters of 512 bytes that hold their numbers, and a table that says `next` of each.
    fn heap(next: [u16; 6]) -> Heap {
        let mut bytes = vec![0; 512];
        for (number, next) in (2_u8..).zip(next) {
            bytes[usize::from(number) * 2..][..2].copy_from_slice(&next.to_le_bytes());
            bytes.extend([number; 512]);
        }
        let source: Arc<dyn Source> = Arc::new(MemoryDisk { bytes, disk: 0 });
        let table = Table::new(&source, Width::Fat16, 0, 6);
        Heap::new(&source, table, 512, 512)
    }

    fn read(heap: &Heap, first: u32, clusters: u32) -> Result<Vec<u8>> {
        let extent = heap.chain(first, Span::Clusters(clusters))?;
        let mut bytes = vec![0; clusters as usize * 512];
        heap.read(&extent, &mut bytes, 0)?;
        Ok(bytes.chunks(512).map(|cluster| cluster[0]).collect())
    }

    #[test]
    fn chains_that_share_clusters_read_each_as_far_as_they_go() {
        // 2, 4, 5, 7 and 3, 4, 5, 7: what they share is read for both, and no further than it goes.
        let heap = heap([4, 4, 5, 7, 0, 0xffff]);
        assert_eq!(read(&heap, 2, 4).unwrap(), [2, 4, 5, 7]);
        assert_eq!(read(&heap, 3, 4).unwrap(), [3, 4, 5, 7]);
        assert_eq!(read(&heap, 3, 2).unwrap(), [3, 4]);
        assert!(read(&heap, 3, 5).unwrap_err().message.contains("5 are needed"));
    }

    #[test]
    fn a_chain_that_enters_the_loop_of_another_is_refused() {
        let heap = heap([4, 4, 5, 4, 0, 0]);
        for first in [2, 3, 4] {
            let error = read(&heap, first, 3).unwrap_err();
            assert!(error.message.contains("comes back"), "{error}");
            assert!(heap.chain(first, Span::Whole(6)).is_err());
        }
    }
}
