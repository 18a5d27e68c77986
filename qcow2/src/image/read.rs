//! Reading the virtual disk.

use super::Image;
use crate::chain::past_end;
use crate::error::{Error, Result};
use crate::storage::Span;
use crate::table::segment::{Segment, SegmentKind};
use crate::types::HostOffset;

impl Image {
    /// Fills `buf` with the disk's bytes from `offset` on.
    ///
    /// # Errors
    /// `OutOfBounds`, `Closed`; `Io` and `Corrupt` with the guest offset from which on the buffer's
    /// content is undefined.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = self.bounds(offset, buf.len() as u64)?;
        let _guard = self.enter_reading(offset, end)?;
        self.read_entered(buf, offset)
    }

    /// Reads a range that the caller has entered.
    pub(super) fn read_entered(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buf.len() as u64;
        let span = Span::of(buf.len());
        let mut segments = Vec::new();
        self.meta()
            .segments(&*self.storage, offset, end, &mut segments)
            .map_err(|e| e.in_file(&self.path))?;
        let mut rest = buf;
        for segment in &segments {
            // The segments cover the buffer exactly.
            #[allow(clippy::cast_possible_truncation, reason = "bounded by the buffer")]
            let (part, tail) = rest.split_at_mut(segment.length as usize);
            self.read_segment(part, segment, span).map_err(|e| e.at_guest(segment.guest.0))?;
            rest = tail;
        }
        Ok(())
    }

    /// Fills `buf` with the content of the whole of `segment`.
    fn read_segment(&self, buf: &mut [u8], segment: &Segment, span: Span) -> Result<()> {
        match segment.kind {
            SegmentKind::ZeroPlain | SegmentKind::ZeroAllocated { .. } => {
                buf.fill(0);
                Ok(())
            }
            SegmentKind::Unallocated => match &self.chain {
                Some(chain) => chain.read(buf, segment.guest.0, span),
                None => {
                    buf.fill(0);
                    Ok(())
                }
            },
            SegmentKind::Data { host, .. } => {
                // Of a run of clusters the last one must begin in the file, too.
                let last = self.geometry.align_down(host.0 + segment.length.saturating_sub(1));
                if !self.is_inside_file(HostOffset(last))? {
                    let length = self.file_len.load(std::sync::atomic::Ordering::Relaxed);
                    return Err(past_end(host, length).in_file(&self.path));
                }
                span.read(&*self.storage, buf, host.0)
                    .map_err(|e| Error::io(format!("cannot read {} bytes at {host}", buf.len()), e))
                    .map_err(|e| e.in_file(&self.path))
            }
            SegmentKind::Compressed(data) => {
                let inside = self.geometry.in_cluster(segment.guest.0);
                let size = self.geometry.cluster_size();
                let compression = self.header.compression;
                self.clusters
                    .read(&*self.storage, compression, data, size, inside, buf)
                    .map_err(|e| e.in_file(&self.path))
            }
        }
    }
}
