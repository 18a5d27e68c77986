//! From L2 words to segments: the mapping half of every operation, separate from I/O.

use crate::error::Result;
use crate::geometry::Geometry;
use crate::table::entry::{CompressedRef, L2Entry, subcluster};
use crate::types::{GuestOffset, HostOffset};

/// How a segment of the virtual disk is stored in one image, the backing chain aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SegmentKind {
    /// The backing file decides.
    Unallocated,
    /// Zeroes without a host cluster.
    ZeroPlain,
    /// Zeroes with a host cluster kept; the segment starts at `host` in it.
    ZeroAllocated { host: HostOffset, copied: bool },
    /// Bytes of the image file from `host` on. `copied`: may be overwritten in place.
    Data { host: HostOffset, copied: bool },
    /// One compressed cluster (or a part of it; the segment's offset tells which).
    Compressed(CompressedRef),
}

/// A run of guest bytes stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) guest: GuestOffset,
    pub(crate) length: u64,
    pub(crate) kind: SegmentKind,
}

impl Segment {
    pub(crate) fn end(&self) -> u64 {
        self.guest.0 + self.length
    }

    /// Whether `next` continues this segment in both address spaces.
    fn continues(&self, next: &Self) -> bool {
        use SegmentKind::{Data, Unallocated, ZeroAllocated, ZeroPlain};
        match (self.kind, next.kind) {
            (Unallocated, Unallocated) | (ZeroPlain, ZeroPlain) => true,
            (Data { host: a, copied: ca }, Data { host: b, copied: cb })
            | (ZeroAllocated { host: a, copied: ca }, ZeroAllocated { host: b, copied: cb }) => {
                a + self.length == b && ca == cb
            }
            _ => false,
        }
    }
}

/// Appends `segment`, joined to the last one where it continues it.
pub(crate) fn push(out: &mut Vec<Segment>, segment: Segment) {
    match out.last_mut() {
        Some(last) if last.end() == segment.guest.0 && last.continues(&segment) => {
            last.length += segment.length;
        }
        _ => out.push(segment),
    }
}

/// Maps `start .. end`, which must lie inside the slice that `words` holds.
///
/// `words` are the slice's L2 words in host byte order; `None` stands for a slice without a table.
///
/// # Errors
/// `Corrupt`, with the guest offset of the entry.
pub(crate) fn map_slice(
    geometry: &Geometry,
    words: Option<&[u64]>,
    start: u64,
    end: u64,
    out: &mut Vec<Segment>,
) -> Result<()> {
    let Some(words) = words else {
        let guest = GuestOffset(start);
        push(out, Segment { guest, length: end - start, kind: SegmentKind::Unallocated });
        return Ok(());
    };
    let mask = (1u64 << geometry.slice_bits()) - 1;
    let mut at = start;
    while at < end {
        let cluster = at >> geometry.cluster_bits;
        #[allow(clippy::cast_possible_truncation, reason = "masked to a slice's entries")]
        let index = (cluster & mask) as usize * geometry.words_per_entry();
        let cluster_end = ((cluster + 1) << geometry.cluster_bits).min(end);
        let entry = L2Entry::decode(words[index], geometry).map_err(|e| e.at_guest(at))?;
        match entry {
            L2Entry::Compressed(_) => {
                push_entry(geometry, entry, at, cluster_end, out);
            }
            _ if geometry.extended_l2 => {
                push_subclusters(geometry, entry, words[index + 1], at, cluster_end, out)?;
            }
            _ => push_entry(geometry, entry, at, cluster_end, out),
        }
        at = cluster_end;
    }
    Ok(())
}

fn push_entry(geometry: &Geometry, entry: L2Entry, at: u64, end: u64, out: &mut Vec<Segment>) {
    let inside = geometry.in_cluster(at);
    let kind = match entry {
        L2Entry::Unallocated => SegmentKind::Unallocated,
        L2Entry::Zero { host: None, .. } => SegmentKind::ZeroPlain,
        L2Entry::Zero { host: Some(host), copied } => {
            SegmentKind::ZeroAllocated { host: host + inside, copied }
        }
        L2Entry::Standard { host, copied } => SegmentKind::Data { host: host + inside, copied },
        L2Entry::Compressed(c) => SegmentKind::Compressed(c),
    };
    push(out, Segment { guest: GuestOffset(at), length: end - at, kind });
}

fn push_subclusters(
    geometry: &Geometry,
    entry: L2Entry,
    bitmap: u64,
    start: u64,
    end: u64,
    out: &mut Vec<Segment>,
) -> Result<()> {
    let unit_bits = geometry.unit_bits();
    let mut at = start;
    while at < end {
        let inside = geometry.in_cluster(at);
        #[allow(clippy::cast_possible_truncation, reason = "0 to 31")]
        let index = (inside >> unit_bits) as u32;
        let unit_end = (((at >> unit_bits) + 1) << unit_bits).min(end);
        let (allocated, zero) = subcluster(bitmap, index).map_err(|e| e.at_guest(at))?;
        let kind = match (allocated, zero, entry) {
            (true, _, L2Entry::Standard { host, copied }) => {
                SegmentKind::Data { host: host + inside, copied }
            }
            (true, ..) => {
                return Err(crate::Error::corrupt(
                    "a subcluster is allocated but its cluster has no host offset; \
                     run a check on the image",
                )
                .at_guest(at));
            }
            (false, true, L2Entry::Standard { host, copied }) => {
                SegmentKind::ZeroAllocated { host: host + inside, copied }
            }
            (false, true, _) => SegmentKind::ZeroPlain,
            (false, false, _) => SegmentKind::Unallocated,
        };
        push(out, Segment { guest: GuestOffset(at), length: unit_end - at, kind });
        at = unit_end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contiguous_clusters_become_one_segment() {
        let geometry = Geometry {
            version: 3,
            cluster_bits: 16,
            size: 1 << 30,
            refcount_order: 4,
            extended_l2: false,
        };
        let mut words = vec![0; geometry.slice_words()];
        for (i, word) in words.iter_mut().take(4).enumerate() {
            *word = L2Entry::standard(HostOffset(0x50000 + i as u64 * 0x10000));
        }
        words[4] = L2Entry::zero_plain();
        let mut out = Vec::new();
        map_slice(&geometry, Some(&words), 512, 0x60000, &mut out).unwrap();
        let kinds: Vec<_> = out.iter().map(|s| (s.guest.0, s.length)).collect();
        assert_eq!(kinds, [(512, 0x40000 - 512), (0x40000, 0x10000), (0x50000, 0x10000)]);
        assert_eq!(
            out[0].kind,
            SegmentKind::Data { host: HostOffset(0x50000 + 512), copied: true }
        );
    }
}
