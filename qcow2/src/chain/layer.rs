//! One read-only file of a backing chain.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::header::{Compression, Header};
use crate::meta::read_words;
use crate::storage::{Span, Storage};
use crate::table::entry::decode_l1;
use crate::table::segment::{Segment, SegmentKind, map_slice, push};
use crate::types::{GuestOffset, HostOffset};

/// How the layer stores its bytes.
enum Format {
    Raw,
    Qcow2 { geometry: Geometry, l1: Box<[u64]>, compression: Compression },
}

/// The slice of an L2 table that was read last, and its place: who asks for one range after the other
/// reads each slice once.
pub(crate) type LastSlice = Option<(u64, Box<[u64]>)>;

/// A backing file: raw, or QCOW2 with its L1 table in memory.
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) storage: Arc<dyn Storage>,
    /// Bytes of its virtual disk; what lies beyond reads as zeroes.
    pub(crate) size: u64,
    file_len: u64,
    format: Format,
}

impl Layer {
    pub(crate) fn raw(path: PathBuf, storage: Arc<dyn Storage>) -> Result<Self> {
        let size = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        Ok(Self { path, storage, size, file_len: size, format: Format::Raw })
    }

    pub(crate) fn qcow2(path: PathBuf, storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let file_len = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
        let l1 = read_words(&*storage, header.l1_offset, header.l1_entries as usize)?;
        let geometry = header.geometry;
        let format = Format::Qcow2 { geometry, l1, compression: header.compression };
        Ok(Self { path, storage, size: geometry.size, file_len, format })
    }

    /// Compression of its compressed clusters, and their size.
    pub(crate) fn compression(&self) -> Option<(Compression, u64)> {
        match &self.format {
            Format::Raw => None,
            Format::Qcow2 { geometry, compression, .. } => {
                Some((*compression, geometry.cluster_size()))
            }
        }
    }

    /// Appends the segments of `start .. end`, which may reach past the layer's size: zeroes there.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, with the layer's path.
    pub(crate) fn segments(
        &self,
        (start, end): (u64, u64),
        last: &mut LastSlice,
        out: &mut Vec<Segment>,
    ) -> Result<()> {
        let inside_end = end.min(self.size);
        if start < inside_end {
            let mapped = match &self.format {
                Format::Raw => {
                    let kind = SegmentKind::Data { host: HostOffset(start), copied: false };
                    let guest = GuestOffset(start);
                    push(out, Segment { guest, length: inside_end - start, kind });
                    Ok(())
                }
                Format::Qcow2 { geometry, l1, .. } => {
                    self.qcow2_segments((geometry, l1), (start, inside_end), last, out)
                }
            };
            mapped.map_err(|e| e.in_file(&self.path))?;
        }
        let zeroes = start.max(inside_end);
        if zeroes < end {
            let kind = SegmentKind::ZeroPlain;
            push(out, Segment { guest: GuestOffset(zeroes), length: end - zeroes, kind });
        }
        Ok(())
    }

    fn qcow2_segments(
        &self,
        (geometry, l1): (&Geometry, &[u64]),
        (start, end): (u64, u64),
        last: &mut LastSlice,
        out: &mut Vec<Segment>,
    ) -> Result<()> {
        let (table_span, slice_span) = (geometry.table_span(), geometry.slice_span());
        let slice_bytes = geometry.slice_words() as u64 * 8;
        let mut at = start;
        while at < end {
            let index = usize::try_from(at / table_span).ok();
            let word = index.and_then(|i| l1.get(i)).copied().unwrap_or(0);
            let Some((table, _)) = decode_l1(word, geometry).map_err(|e| e.at_guest(at))? else {
                let table_end = ((at / table_span + 1).saturating_mul(table_span)).min(end);
                map_slice(geometry, None, at, table_end, out)?;
                at = table_end;
                continue;
            };
            let slice_end = ((at / slice_span + 1).saturating_mul(slice_span)).min(end);
            let inside = at % table_span / slice_span * slice_bytes;
            if table.0 + inside >= self.file_len {
                return Err(Error::corrupt(format!(
                    "the L2 table at {table} lies past the end of the file ({} bytes); the file \
                     is truncated",
                    self.file_len
                ))
                .at_guest(at));
            }
            let place = table + inside;
            if last.as_ref().is_none_or(|(known, _)| *known != place.0) {
                let words = read_words(&*self.storage, place, geometry.slice_words())?;
                *last = Some((place.0, words));
            }
            let words = last.as_ref().map(|(_, words)| &**words);
            map_slice(geometry, words, at, slice_end, out)?;
            at = slice_end;
        }
        Ok(())
    }

    /// Fills `buf` with the bytes at `host`.
    ///
    /// # Errors
    /// `Io`; `Corrupt` where the file ends before one of the clusters begins.
    pub(crate) fn read_host(&self, buf: &mut [u8], host: HostOffset, span: Span) -> Result<()> {
        // Of a run of clusters the last one must begin in the file, too.
        let last = match &self.format {
            Format::Raw => host.0,
            Format::Qcow2 { geometry, .. } => {
                geometry.align_down(host.0 + (buf.len() as u64).saturating_sub(1))
            }
        };
        if last >= self.file_len {
            return Err(past_end(host, self.file_len).in_file(&self.path));
        }
        span.read(&*self.storage, buf, host.0)
            .map_err(|e| Error::io(format!("cannot read {} bytes at {host}", buf.len()), e))
            .map_err(|e| e.in_file(&self.path))
    }
}

/// The error for data that should lie past the end of its file.
pub(crate) fn past_end(host: HostOffset, file_len: u64) -> Error {
    Error::corrupt(format!(
        "guest data at {host} lies past the end of the file ({file_len} bytes); the file is \
         truncated, restore it from another copy"
    ))
}
