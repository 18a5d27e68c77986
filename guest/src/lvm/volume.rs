//! A logical volume as a source: its extents on physical volumes.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::source::{DiskRange, Source, check_range};

/// One physical volume's part in a segment.
pub(super) struct Stripe {
    pub(super) source: Arc<dyn Source>,
    /// First byte on `source`.
    pub(super) start: u64,
}

/// A range of a logical volume that lies on its stripes in turn.
pub(super) struct Segment {
    /// First byte of the logical volume.
    pub(super) start: u64,
    /// Length in bytes: a multiple of all stripes' chunks.
    pub(super) length: u64,
    /// Bytes that lie on one stripe before the next one's turn: all of them where there is one stripe.
    pub(super) chunk: u64,
    pub(super) stripes: Vec<Stripe>,
}

/// A logical volume.
pub(super) struct LogicalVolume {
    segments: Vec<Segment>,
    size: u64,
}

impl LogicalVolume {
    /// Puts segments together, after checking that they follow each other and lie on their stripes.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(super) fn new(mut segments: Vec<Segment>) -> Result<Self> {
        segments.sort_by_key(|segment| segment.start);
        let mut size: u64 = 0;
        for segment in &segments {
            let bad = |what: &str| {
                Error::corrupt(format!("the segment at byte {} {what}", segment.start))
            };
            if segment.start != size {
                return Err(bad("does not follow the one before it"));
            }
            let width = segment.stripes.len() as u64;
            let each = segment.length.checked_div(width).filter(|_| segment.chunk > 0);
            let each = each.filter(|each| each * width == segment.length);
            let each = each.filter(|each| each % segment.chunk == 0);
            let each = each.ok_or_else(|| bad("does not fit its stripes"))?;
            for stripe in &segment.stripes {
                let end = stripe.start.checked_add(each);
                if end.is_none_or(|end| end > stripe.source.size()) {
                    return Err(bad("reaches past its physical volume"));
                }
            }
            let end = size.checked_add(segment.length);
            size = end.ok_or_else(|| bad("is too long"))?;
        }
        Ok(Self { segments, size })
    }

    /// Where byte `offset` lies, and how many bytes from there on lie in one piece.
    fn place(&self, offset: u64) -> Option<(&dyn Source, u64, u64)> {
        let after = self.segments.partition_point(|segment| segment.start <= offset);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let within = offset.checked_sub(segment.start).filter(|at| *at < segment.length)?;
        let (turn, rest) = (within / segment.chunk, within % segment.chunk);
        let width = segment.stripes.len() as u64;
        let stripe = segment.stripes.get(usize::try_from(turn % width).ok()?)?;
        let at = stripe.start + turn / width * segment.chunk + rest;
        Some((&*stripe.source, at, segment.chunk - rest))
    }
}

impl Source for LogicalVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(self.size, offset, buf.len())?;
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let (source, at, run) =
                self.place(offset).ok_or_else(|| Error::corrupt("no segment lies there"))?;
            let count = usize::try_from(run).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            source.read_at(now, at)?;
            (rest, offset) = (later, offset + count as u64);
        }
        Ok(())
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        let mut offset = offset;
        let end = offset.saturating_add(length).min(self.size);
        while offset < end {
            let Some((source, at, run)) = self.place(offset) else { return };
            let count = run.min(end - offset);
            source.trace(at, count, visit);
            offset += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemoryDisk;

    fn stripe(disk: u32, start: u64) -> Stripe {
        let bytes = (0..100).map(|at| at + 100 * u8::try_from(disk).unwrap()).collect();
        Stripe { source: Arc::new(MemoryDisk { bytes, disk }), start }
    }

    fn volume() -> LogicalVolume {
        let striped = vec![stripe(0, 50), stripe(1, 10)];
        let linear = vec![stripe(1, 80)];
        LogicalVolume::new(vec![
            Segment { start: 40, length: 20, chunk: 20, stripes: linear },
            Segment { start: 0, length: 40, chunk: 10, stripes: striped },
        ])
        .unwrap()
    }

    #[test]
    fn reads_go_over_stripes_and_segments() {
        let mut found = [0; 50];
        volume().read_at(&mut found, 5).unwrap();
        let expected = (55..60).chain(110..120).chain(60..70).chain(120..130).chain(180..195);
        assert!(found.into_iter().eq(expected));
        assert!(volume().read_at(&mut found, 11).is_err());
    }

    #[test]
    fn traces_tell_the_disks_in_the_order_of_the_bytes() {
        let mut found = Vec::new();
        volume().trace(5, 1000, &mut |r| found.push((r.disk, r.offset, r.length)));
        let expected = [(0, 55, 5), (1, 110 - 100, 10), (0, 60, 10), (1, 20, 10), (1, 80, 20)];
        assert_eq!(found, expected);
    }

    #[test]
    fn segments_with_gaps_overlaps_or_out_of_their_volumes_are_refused() {
        let segment = |start, length, chunk, stripes| Segment { start, length, chunk, stripes };
        for wrong in [
            vec![segment(1, 10, 10, vec![stripe(0, 0)])],
            vec![segment(0, 10, 10, vec![stripe(0, 0)]), segment(5, 10, 10, vec![stripe(0, 0)])],
            vec![segment(0, 10, 10, vec![stripe(0, 91)])],
            vec![segment(0, 10, 0, vec![stripe(0, 0)])],
            vec![segment(0, 10, 10, vec![])],
            vec![segment(0, 10, 4, vec![stripe(0, 0), stripe(1, 0)])],
            vec![segment(0, 10, 10, vec![stripe(0, u64::MAX)])],
        ] {
            assert!(LogicalVolume::new(wrong).is_err());
        }
    }
}
