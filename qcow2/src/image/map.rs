//! Where each range of the virtual disk is stored, through the chain.

use super::Image;
use crate::error::Result;
use crate::table::segment::{Segment, SegmentKind};

/// Bytes of the disk that are mapped under one hold of the metadata.
const MAP_STEP: u64 = 64 << 30;

/// How a range is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingKind {
    /// Bytes of a file, from `host` on.
    Data {
        /// Offset in the file of that depth.
        host: u64,
    },
    /// Compressed clusters.
    Compressed,
    /// Reads as zeroes, takes no space.
    ZeroPlain,
    /// Reads as zeroes; space is kept for it.
    ZeroAllocated {
        /// Offset in the file of that depth.
        host: u64,
    },
    /// In no file of the chain: reads as zeroes.
    Unallocated,
}

/// A run of the virtual disk that is stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// First byte of the disk.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The file that has it: 0 the image, 1 its backing file, and so on; the number of files in the
    /// chain where none has.
    pub depth: u32,
    /// How it is stored there.
    pub kind: MappingKind,
}

fn kind_of(kind: SegmentKind) -> MappingKind {
    match kind {
        SegmentKind::Unallocated => MappingKind::Unallocated,
        SegmentKind::ZeroPlain => MappingKind::ZeroPlain,
        SegmentKind::ZeroAllocated { host, .. } => MappingKind::ZeroAllocated { host: host.0 },
        SegmentKind::Data { host, .. } => MappingKind::Data { host: host.0 },
        SegmentKind::Compressed(_) => MappingKind::Compressed,
    }
}

impl Image {
    /// Calls `visit` with the mappings that cover `length` bytes at `offset`, in order, until it
    /// returns `false`. Neighbours of one kind may come as one mapping or as several.
    ///
    /// # Errors
    /// `OutOfBounds`, `Closed`, `Io`, `Corrupt`.
    pub fn map(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Mapping) -> bool,
    ) -> Result<()> {
        let end = self.bounds(offset, length)?;
        let step = MAP_STEP.min(self.geometry.table_span().saturating_mul(64));
        let mut at = offset;
        while at < end {
            let to = at.saturating_add(step).min(end);
            if !self.map_step(at, to, visit)? {
                break;
            }
            at = to;
        }
        Ok(())
    }

    fn map_step(
        &self,
        start: u64,
        end: u64,
        visit: &mut dyn FnMut(Mapping) -> bool,
    ) -> Result<bool> {
        let _guard = self.enter_reading(start, end)?;
        let mut segments = Vec::new();
        self.meta()
            .segments(&*self.storage, start, end, &mut segments)
            .map_err(|e| e.in_file(&self.path))?;
        for segment in &segments {
            if !self.map_segment(segment, visit)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn map_segment(
        &self,
        segment: &Segment,
        visit: &mut dyn FnMut(Mapping) -> bool,
    ) -> Result<bool> {
        let Segment { guest, length, kind } = *segment;
        match (&self.chain, kind) {
            (Some(chain), SegmentKind::Unallocated) => {
                let mut go_on = true;
                chain.extents(guest.0, guest.0 + length, &mut |extent| {
                    #[allow(clippy::cast_possible_truncation, reason = "the chain is bounded")]
                    let depth = extent.layer as u32 + 1;
                    let (offset, length) = (extent.guest, extent.length);
                    go_on = visit(Mapping { offset, length, depth, kind: kind_of(extent.kind) });
                    Ok(go_on)
                })?;
                Ok(go_on)
            }
            _ => {
                let depth = u32::from(kind == SegmentKind::Unallocated);
                Ok(visit(Mapping { offset: guest.0, length, depth, kind: kind_of(kind) }))
            }
        }
    }
}
