//! Writing the virtual disk: in place where the image alone owns the cluster, else into newly
//! allocated clusters that the mapping then points to.

use super::{Image, PAGE};
use crate::alloc::Run;
use crate::error::{Error, Result};
use crate::ranges::Access;
use crate::table::entry::L2Entry;
use crate::table::segment::{Segment, SegmentKind};
use crate::types::{GuestCluster, GuestOffset, HostOffset};
use crate::zeroes::is_zero;

/// What a cluster about to be allocated holds so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Old {
    /// Zeroes, known without reading.
    Zero,
    /// Something that must be read and copied where it is not overwritten.
    Content,
}

/// A stretch of a write request that is handled in one way.
#[derive(Clone, Copy)]
enum Step {
    /// Overwrite bytes at `host`.
    InPlace { start: u64, end: u64, host: HostOffset },
    /// A zero cluster keeps its host cluster and gets content.
    Refill { start: u64, end: u64, host: HostOffset },
    /// Allocate. `old` is that of the stretch's clusters.
    Allocate { start: u64, end: u64, old: Old },
}

impl Image {
    /// Stores `buf` at byte `offset` of the disk. Durable after the next [`Image::flush`].
    ///
    /// # Errors
    /// `OutOfBounds`, `ReadOnly`, `Closed`, `NoSpace`, `Io`, `Corrupt`. After an error each sector
    /// of the range holds its old or its new content.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let end = self.writable_bounds(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let result = match self.try_in_place(buf, offset, end) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.write_remapping(buf, offset, end).and_then(|()| self.checkpoint_if_full())
            }
            Err(error) => Err(error),
        };
        // A failed write may have changed something too.
        self.durability.note_write();
        result.map_err(|e| e.in_file(&self.path))
    }

    /// Writes if every byte can be overwritten where it is; `false` if not.
    fn try_in_place(&self, buf: &[u8], start: u64, end: u64) -> Result<bool> {
        let page_end = end.next_multiple_of(PAGE);
        let _guard = self.enter_changing(start / PAGE * PAGE, page_end, Access::InPlace)?;
        let mut segments = Vec::new();
        self.meta().segments(&*self.storage, start, end, &mut segments)?;
        if !segments.iter().all(|s| matches!(s.kind, SegmentKind::Data { copied: true, .. })) {
            return Ok(false);
        }
        for segment in &segments {
            let SegmentKind::Data { host, .. } = segment.kind else {
                continue;
            };
            let guest = segment.guest.0;
            self.put(slice(buf, start, guest, segment.end()), host)
                .map_err(|e| e.at_guest(guest))?;
        }
        Ok(true)
    }

    /// Writes guest bytes to `host`, after making sure that no metadata is there.
    fn put(&self, bytes: &[u8], host: HostOffset) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.check_data_range(host, bytes.len() as u64)?;
        self.storage
            .write_at(bytes, host.0)
            .map_err(|e| Error::io(format!("cannot write {} bytes at {host}", bytes.len()), e))
    }

    pub(super) fn write_remapping(&self, buf: &[u8], start: u64, end: u64) -> Result<()> {
        let (first, last) = (self.geometry.align_down(start), self.geometry.align_up(end));
        let _guard = self.enter_changing(first, last, Access::Remap)?;
        let mut segments = Vec::new();
        let map_end = last.min(self.geometry.size);
        self.meta().segments(&*self.storage, first, map_end, &mut segments)?;
        for step in self.plan(&segments, start, end)? {
            match step {
                Step::InPlace { start: from, end: to, host } => {
                    self.put(slice(buf, start, from, to), host).map_err(|e| e.at_guest(from))?;
                }
                Step::Refill { start: from, end: to, host } => {
                    self.refill(slice(buf, start, from, to), from, to, host)
                        .map_err(|e| e.at_guest(from))?;
                }
                Step::Allocate { start: from, end: to, old } => {
                    self.write_new(slice(buf, start, from, to), from, to, old)?;
                }
            }
        }
        Ok(())
    }

    /// Decides for each stretch of `start .. end` how it is written.
    fn plan(&self, segments: &[Segment], start: u64, end: u64) -> Result<Vec<Step>> {
        let mut steps: Vec<Step> = Vec::new();
        for segment in segments {
            let from = segment.guest.0.max(start);
            let to = segment.end().min(end);
            if from >= to {
                continue;
            }
            let skip = from - segment.guest.0;
            match segment.kind {
                SegmentKind::Data { host, copied: true } => {
                    steps.push(Step::InPlace { start: from, end: to, host: host + skip });
                }
                SegmentKind::ZeroAllocated { host, copied: true } => {
                    steps.push(Step::Refill { start: from, end: to, host: host + skip });
                }
                kind => {
                    let old = match kind {
                        SegmentKind::ZeroPlain | SegmentKind::ZeroAllocated { .. } => Old::Zero,
                        SegmentKind::Unallocated => self.old_of_unallocated(from, to)?,
                        SegmentKind::Data { .. } | SegmentKind::Compressed(_) => Old::Content,
                    };
                    match steps.last_mut() {
                        Some(Step::Allocate { end: last, old: before, .. }) if *last == from => {
                            *last = to;
                            // Only the outer clusters are ever filled up; one that needs it decides.
                            if old == Old::Content {
                                *before = Old::Content;
                            }
                        }
                        _ => steps.push(Step::Allocate { start: from, end: to, old }),
                    }
                }
            }
        }
        Ok(steps)
    }

    /// What the chain has in those parts of the outer clusters that a write does not cover.
    fn old_of_unallocated(&self, start: u64, end: u64) -> Result<Old> {
        let Some(chain) = &self.chain else {
            return Ok(Old::Zero);
        };
        let (first, last) = (self.geometry.align_down(start), self.geometry.align_up(end));
        let zero = (first == start || chain.is_zero(first, start)?)
            && (last == end || chain.is_zero(end, last)?);
        Ok(if zero { Old::Zero } else { Old::Content })
    }

    /// Gives zero clusters with a host cluster of their own content.
    fn refill(&self, bytes: &[u8], start: u64, end: u64, host: HostOffset) -> Result<()> {
        let g = self.geometry;
        let (first, last) = (g.align_down(start), g.align_up(end));
        let home = HostOffset(host.0 - (start - first));
        self.put(&zeroes(start - first), home)?;
        self.put(bytes, host)?;
        self.put(&zeroes(last - end), host + (end - start))?;
        let mut meta = self.meta();
        for i in 0..(last - first) >> g.cluster_bits {
            let cluster = HostOffset(home.0 + (i << g.cluster_bits));
            let guest = g.guest_cluster(GuestOffset(first)) + i;
            meta.install(&*self.storage, guest, L2Entry::standard(cluster), Some(cluster))?;
        }
        Ok(())
    }

    /// Writes `start .. end`, none of whose clusters can be written in place, into new clusters.
    fn write_new(&self, bytes: &[u8], start: u64, end: u64, old: Old) -> Result<()> {
        let g = self.geometry;
        let mut at = start;
        while at < end {
            let first = g.align_down(at);
            let (zero, stretch_end) = self.stretch(slice(bytes, start, at, end), at, end);
            if zero {
                self.map_zeroes(at, stretch_end)?;
                at = stretch_end;
                continue;
            }
            let want = (g.align_up(stretch_end) - first) >> g.cluster_bits;
            let run = self.meta().allocate(&*self.storage, want)?;
            let to = (first + (run.count << g.cluster_bits)).min(stretch_end);
            let written = self
                .fill_run(slice(bytes, start, at, to), at, to, run, old)
                .and_then(|()| self.map_run(first, run));
            if let Err(error) = written {
                self.return_unmapped(first, run)?;
                return Err(error.at_guest(at));
            }
            at = to;
        }
        Ok(())
    }

    /// The longest stretch from `start` on that is all zero clusters, or has none: whether it is
    /// zero, and its end. A cluster that the write covers in part counts as not zero.
    fn stretch(&self, bytes: &[u8], start: u64, end: u64) -> (bool, u64) {
        let g = self.geometry;
        if !self.detect_zeroes || g.version < 3 {
            return (false, end);
        }
        let is_zero = |at: u64, to: u64| {
            let whole = at == g.align_down(at) && (to == g.align_up(to) || to == g.size);
            whole && is_zero(slice(bytes, start, at, to))
        };
        let mut to = (g.align_down(start) + g.cluster_size()).min(end);
        let zero = is_zero(start, to);
        while to < end {
            let next = (to + g.cluster_size()).min(end);
            if is_zero(to, next) != zero {
                break;
            }
            to = next;
        }
        (zero, to)
    }

    /// Lets the whole clusters of `start .. end` read as zeroes.
    fn map_zeroes(&self, start: u64, end: u64) -> Result<()> {
        let g = self.geometry;
        let mut segments = Vec::new();
        self.meta().segments(&*self.storage, start, end, &mut segments)?;
        for segment in &segments {
            let (from, to) = (segment.guest.0, segment.end());
            let zero = match segment.kind {
                SegmentKind::ZeroPlain => true,
                SegmentKind::Unallocated => match &self.chain {
                    Some(chain) => chain.is_zero(from, to)?,
                    None => true,
                },
                _ => false,
            };
            if zero {
                continue;
            }
            let mut meta = self.meta();
            for cluster in from >> g.cluster_bits..g.align_up(to) >> g.cluster_bits {
                let word = L2Entry::zero_plain();
                meta.install(&*self.storage, GuestCluster(cluster), word, None)?;
            }
        }
        Ok(())
    }

    /// Writes guest bytes `start .. end` into `run`, with what its outer clusters held besides.
    fn fill_run(&self, bytes: &[u8], start: u64, end: u64, run: Run, old: Old) -> Result<()> {
        let g = self.geometry;
        let (first, last) = (g.align_down(start), g.align_up(end));
        let home = g.host_offset(run.start);
        if old == Old::Content || !run.fresh {
            for (from, to) in [(first, start), (end, last)] {
                if from < to {
                    self.put(&self.old_bytes(from, to, old)?, home + (from - first))?;
                }
            }
        }
        self.put(bytes, home + (start - first))
    }

    /// The disk's bytes `from .. to` before the write; zeroes past the disk's end.
    fn old_bytes(&self, from: u64, to: u64, old: Old) -> Result<Vec<u8>> {
        let mut bytes = zeroes(to - from);
        let inside = to.min(self.geometry.size).saturating_sub(from);
        if old == Old::Content && inside > 0 {
            #[allow(clippy::cast_possible_truncation, reason = "less than a cluster")]
            self.read_entered(&mut bytes[..inside as usize], from)?;
        }
        Ok(bytes)
    }

    fn map_run(&self, first: u64, run: Run) -> Result<()> {
        let g = self.geometry;
        let guest = g.guest_cluster(GuestOffset(first));
        let mut meta = self.meta();
        for i in 0..run.count {
            let word = L2Entry::standard(g.host_offset(run.start + i));
            meta.install(&*self.storage, guest + i, word, None)?;
        }
        Ok(())
    }

    /// Gives back those clusters of `run` that nothing was mapped to.
    fn return_unmapped(&self, first: u64, run: Run) -> Result<()> {
        let g = self.geometry;
        let mut meta = self.meta();
        for i in 0..run.count {
            let at = first + (i << g.cluster_bits);
            let mut segments = Vec::new();
            let end = (at + 1).min(g.size);
            meta.segments(&*self.storage, at, end, &mut segments)?;
            let host = g.host_offset(run.start + i);
            let mapped = segments
                .first()
                .is_some_and(|s| matches!(s.kind, SegmentKind::Data { host: h, .. } if h == host));
            if !mapped {
                let one = Run { start: run.start + i, count: 1, fresh: false };
                meta.give_back(&*self.storage, one)?;
            }
        }
        Ok(())
    }
}

/// The part `from .. to` of `buf`, whose first byte is guest byte `start`.
#[allow(clippy::cast_possible_truncation, reason = "offsets inside a buffer")]
fn slice(buf: &[u8], start: u64, from: u64, to: u64) -> &[u8] {
    &buf[(from - start) as usize..(to - start) as usize]
}

#[allow(clippy::cast_possible_truncation, reason = "less than a cluster")]
fn zeroes(length: u64) -> Vec<u8> {
    vec![0; length as usize]
}
