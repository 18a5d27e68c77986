//! `$LogFile`: whether changes wait in it, and the volume as they leave it.
//!
//! Nothing is written: replayed metadata lies in an [`Overlay`] over the volume. A log is replayed
//! whole or not at all, and never on a hibernated volume: Windows will go on there from memory that is
//! on no disk, not from the log.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use fs_ntfs::logfile::{self, LogfileState};
use fs_ntfs::{logfile_replay, mft_io::BootParams};

use super::attribute::kind;
use super::boot::Geometry;
use super::mft::Mft;
use super::stream::Stream;
use crate::error::{Error, Result};
use crate::source::{DiskRange, Source};

/// Largest log that is read; Windows makes 64 MiB.
const MAX_LOG: u64 = 256 << 20;
/// Most bytes that a replay may change.
const MAX_OVERLAY: usize = 256 << 20;
const LOG_RECORD: u64 = 2;
const CHUNK: u64 = 1 << 20;

/// A volume with metadata that was replayed over it.
pub(super) struct Overlay {
    below: Arc<dyn Source>,
    /// Bytes by place; they do not overlap.
    writes: BTreeMap<u64, Vec<u8>>,
    /// Length of the longest.
    longest: u64,
}

impl Overlay {
    fn new(below: Arc<dyn Source>, writes: BTreeMap<u64, Vec<u8>>) -> Result<Self> {
        let mut end = 0;
        for (at, bytes) in &writes {
            if *at < end {
                return Err(Error::corrupt("replayed blocks overlap"));
            }
            end = at.saturating_add(bytes.len() as u64);
        }
        if end > below.size() {
            return Err(Error::corrupt("a replayed block lies outside the volume"));
        }
        let total: usize = writes.values().map(Vec::len).sum();
        if total > MAX_OVERLAY {
            return Err(Error::limit(format!("the log changes {total} bytes")));
        }
        let longest = writes.values().map(|bytes| bytes.len() as u64).max().unwrap_or(0);
        Ok(Self { below, writes, longest })
    }

    /// Whether a part of the range was replayed.
    pub(super) fn covers(&self, offset: u64, length: u64) -> bool {
        self.overlapping(offset, length).next().is_some()
    }

    fn overlapping(&self, offset: u64, length: u64) -> impl Iterator<Item = (u64, &[u8])> {
        self.writes
            .range(offset.saturating_sub(self.longest)..offset.saturating_add(length))
            .map(|(at, bytes)| (*at, bytes.as_slice()))
            .filter(move |(at, bytes)| at + bytes.len() as u64 > offset)
    }
}

impl Source for Overlay {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.below.read_at(buf, offset)?;
        let end = offset + buf.len() as u64;
        for (at, bytes) in self.overlapping(offset, buf.len() as u64) {
            let (from, to) = (at.max(offset), (at + bytes.len() as u64).min(end));
            let [from_buf, to_buf, from_bytes, to_bytes] =
                [from - offset, to - offset, from - at, to - at]
                    .map(|n| usize::try_from(n).unwrap_or(usize::MAX));
            buf[from_buf..to_buf].copy_from_slice(&bytes[from_bytes..to_bytes]);
        }
        Ok(())
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        self.below.trace(offset, length, visit);
    }
}

/// The log's own value.
fn log_of(mft: &Mft) -> Result<Stream> {
    mft.value(&mft.record(LOG_RECORD)?, kind::DATA, &[])?
        .filter(|log| log.size <= MAX_LOG)
        .ok_or_else(|| Error::corrupt("$LogFile has no data, or too much"))
}

/// Whether the log may hold changes: why, then.
///
/// # Errors
/// `Corrupt`; `Io`.
pub(super) fn pending(mft: &Mft) -> Result<Option<String>> {
    let log = log_of(mft)?;
    let source = &*mft.source;
    let mut head = [0; 4];
    log.read_at(source, &mut head, 0)?;
    if head == [0xff; 4] && is_empty(&log, source)? {
        return Ok(None);
    }
    let mut failure = None;
    let mut read = |offset: u64, length: usize| {
        let wanted = offset.checked_add(length as u64).filter(|end| *end <= log.size);
        wanted?;
        let mut bytes = vec![0; length];
        match log.read_at(source, &mut bytes, offset) {
            Ok(_) => Some(bytes),
            Err(error) => {
                failure = Some(error);
                None
            }
        }
    };
    let state = catch_unwind(AssertUnwindSafe(|| logfile::state_of_nonempty(&mut read)));
    match (failure, state) {
        (Some(error), _) => Err(error),
        (None, Ok(LogfileState::Empty | LogfileState::Clean(_))) => Ok(None),
        (None, Ok(LogfileState::Pending(why))) => Ok(Some(why)),
        (None, Err(_)) => Ok(Some("$LogFile is damaged".to_owned())),
    }
}

fn is_empty(log: &Stream, source: &dyn Source) -> Result<bool> {
    let mut buf = vec![0; usize::try_from(log.size.min(CHUNK)).unwrap_or(0)];
    let mut at = 0;
    while at < log.size {
        let read = log.read_at(source, &mut buf, at)?;
        if read == 0 || buf[..read].iter().any(|byte| *byte != 0xff) {
            return Ok(false);
        }
        at += read as u64;
    }
    Ok(true)
}

/// The volume as its log leaves it. The log is kept as it is.
///
/// # Errors
/// Why it cannot be replayed in full.
pub(super) fn replay(mft: &Mft) -> Result<Arc<Overlay>> {
    let log_stream = log_of(mft)?;
    let log = log_stream.read_all(&*mft.source, MAX_LOG)?;
    let params = boot_params(&mft.geometry)?;
    let source = Arc::clone(&mft.source);
    let mut read = |at: u64, buf: &mut [u8]| {
        source.read_at(buf, at).map_err(|e| fs_ntfs::error::Error::io(e.message))
    };
    let plan = catch_unwind(AssertUnwindSafe(|| logfile_replay::plan(&log, &params, &mut read)))
        .map_err(|_| Error::corrupt("the reader of the log gave up on it"))?
        .map_err(|e| Error::corrupt(e.to_string()))?;
    drop(log);
    let overlay = Arc::new(Overlay::new(Arc::clone(&mft.source), plan.writes)?);
    let replayed = Mft::open(Arc::<Overlay>::clone(&overlay), mft.geometry)?;
    // A log of another volume, or of a table that lay elsewhere, must not be replayed.
    for (record, at) in plan.mft_records {
        if replayed.place(record) != Some(at) {
            return Err(Error::corrupt(format!(
                "the log has MFT record {record} at byte {at}, where the volume has it elsewhere"
            )));
        }
    }
    let mut touched = false;
    log_stream.layout(0, &mut |piece| {
        if let crate::fs::Place::Volume(at) = piece.place {
            touched |= overlay.covers(at, piece.length);
        }
        !touched
    })?;
    if touched {
        return Err(Error::corrupt("the log changes itself"));
    }
    Ok(overlay)
}

/// The same sizes for the crate that plans the replay.
fn boot_params(geometry: &Geometry) -> Result<BootParams> {
    let sector = u16::try_from(geometry.sector).map_err(|_| Error::corrupt("sector size"))?;
    Ok(BootParams {
        bytes_per_sector: sector,
        sectors_per_cluster: geometry.cluster / u64::from(sector),
        cluster_size: geometry.cluster,
        mft_lcn: geometry.mft,
        file_record_size: u64::from(geometry.record),
        total_sectors: geometry.sectors,
        serial_number: geometry.serial,
        index_block_size: geometry.index_block,
        oem_id: *b"NTFS    ",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::MemoryDisk;

    fn overlay(writes: &[(u64, &[u8])]) -> Result<Overlay> {
        let below = Arc::new(MemoryDisk { bytes: vec![b'.'; 20], disk: 0 });
        Overlay::new(below, writes.iter().map(|(at, bytes)| (*at, bytes.to_vec())).collect())
    }

    #[test]
    fn every_part_of_an_overlay_shows_what_was_replayed_there() {
        let overlay = overlay(&[(2, b"abcdef"), (8, b"g"), (15, b"hij")]).unwrap();
        let whole = b"..abcdefg......hij..";
        for from in 0..20 {
            for to in from + 1..=20 {
                let mut buf = vec![0; to - from];
                overlay.read_at(&mut buf, from as u64).unwrap();
                assert_eq!(buf, whole[from..to]);
                let changed = whole[from..to].iter().any(|byte| *byte != b'.');
                assert_eq!(overlay.covers(from as u64, (to - from) as u64), changed);
            }
        }
    }

    #[test]
    fn blocks_that_overlap_or_lie_outside_are_refused() {
        assert!(overlay(&[(2, b"abc"), (4, b"d")]).is_err());
        assert!(overlay(&[(18, b"abc")]).is_err());
        assert!(overlay(&[(u64::MAX, b"abc")]).is_err());
    }
}
