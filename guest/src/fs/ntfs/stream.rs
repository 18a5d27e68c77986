//! The value of an attribute: resident, plain, with holes, or compressed.

use std::sync::Mutex;

use super::lznt1;
use super::runs::{self, Run};
use crate::error::{Error, Result};
use crate::fs::{Piece, Place};
use crate::source::Source;

/// Largest compression unit: 16 clusters of 64 KiB.
const MAX_UNIT: u64 = 1 << 20;

/// Where the bytes of a value are.
#[derive(Debug)]
enum Content {
    /// Here.
    Resident(Vec<u8>),
    /// In clusters.
    Runs {
        /// All of them, without gaps.
        runs: Vec<Run>,
        /// Bytes of a compression unit; 0 where the value is not compressed.
        unit: u64,
    },
}

/// A value of an attribute.
#[derive(Debug)]
pub(super) struct Stream {
    /// Bytes of it.
    pub(super) size: u64,
    content: Content,
    initialized: u64,
    cluster: u64,
    /// The compression unit that was read last.
    last: Mutex<Option<(u64, Vec<u8>)>>,
}

impl Stream {
    /// A value that lies in its record.
    pub(super) fn resident(bytes: Vec<u8>) -> Self {
        let size = bytes.len() as u64;
        Self {
            size,
            content: Content::Resident(bytes),
            initialized: size,
            cluster: 1,
            last: Mutex::new(None),
        }
    }

    /// A value in clusters of `cluster` bytes; `unit_shift` is 0 where it is not compressed.
    ///
    /// # Errors
    /// `Corrupt` where the runs do not hold `size` bytes.
    pub(super) fn in_clusters(
        runs: Vec<Run>,
        cluster: u64,
        unit_shift: u8,
        (size, initialized): (u64, u64),
    ) -> Result<Self> {
        let unit = match unit_shift {
            0 => 0,
            shift => cluster
                .checked_shl(u32::from(shift))
                .filter(|unit| shift < 16 && (cluster..=MAX_UNIT).contains(unit))
                .ok_or_else(|| {
                    Error::corrupt(format!("compression units of 1 << {shift} clusters"))
                })?,
        };
        let held = runs::end(&runs).saturating_mul(cluster);
        if size > held || initialized > size {
            return Err(Error::corrupt(format!(
                "a value of {size} bytes, {initialized} of them written, in clusters of {held} bytes"
            )));
        }
        let content = Content::Runs { runs, unit };
        Ok(Self { size, content, initialized, cluster, last: Mutex::new(None) })
    }

    /// Fills `buf` from byte `offset`, as far as there are bytes.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub(super) fn read_at(
        &self,
        source: &dyn Source,
        buf: &mut [u8],
        offset: u64,
    ) -> Result<usize> {
        let length = self.size.saturating_sub(offset).min(buf.len() as u64);
        let Ok(length) = usize::try_from(length) else { return Ok(0) };
        let buf = &mut buf[..length];
        let written = self.initialized.saturating_sub(offset).min(length as u64);
        let (written, zeroes) = buf.split_at_mut(usize::try_from(written).unwrap_or(length));
        zeroes.fill(0);
        match &self.content {
            Content::Resident(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                written.copy_from_slice(super::bytes::part(bytes, from, written.len())?);
            }
            Content::Runs { runs, unit: 0 } => self.read_plain(source, runs, written, offset)?,
            Content::Runs { runs, unit } => {
                self.read_units(source, runs, *unit, written, offset)?
            }
        }
        Ok(length)
    }

    /// All of it, where that is at most `limit` bytes.
    ///
    /// # Errors
    /// `Limit`, `Corrupt`, `Io`.
    pub(super) fn read_all(&self, source: &dyn Source, limit: u64) -> Result<Vec<u8>> {
        let size = usize::try_from(self.size).ok().filter(|_| self.size <= limit);
        let size = size.ok_or_else(|| {
            Error::limit(format!("{} bytes, where at most {limit} are read", self.size))
        })?;
        let mut bytes = vec![0; size];
        self.read_at(source, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// The run that holds byte `offset`: its place on the volume there, and bytes to its end.
    fn run_at(&self, runs: &[Run], offset: u64) -> Result<(Option<u64>, u64)> {
        let vcn = offset / self.cluster;
        let run = runs::find(runs, vcn)
            .and_then(|index| runs.get(index))
            .ok_or_else(|| Error::corrupt(format!("no cluster for byte {offset} of a value")))?;
        let within = offset - run.vcn * self.cluster;
        Ok((run.lcn.map(|lcn| lcn * self.cluster + within), run.length * self.cluster - within))
    }

    /// Where byte `offset` lies on the volume, of a value that is not compressed.
    pub(super) fn place(&self, offset: u64) -> Option<u64> {
        match &self.content {
            Content::Runs { runs, unit: 0 } => self.run_at(runs, offset).ok()?.0,
            _ => None,
        }
    }

    fn read_plain(
        &self,
        source: &dyn Source,
        runs: &[Run],
        mut buf: &mut [u8],
        mut offset: u64,
    ) -> Result<()> {
        while !buf.is_empty() {
            let (place, left) = self.run_at(runs, offset)?;
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            let (now, later) = buf.split_at_mut(take);
            match place {
                Some(place) => source.read_at(now, place)?,
                None => now.fill(0),
            }
            offset += take as u64;
            buf = later;
        }
        Ok(())
    }

    /// Bytes of the unit at `start` that are allocated, from its start on: all of a unit that is not
    /// compressed, none of one that is a hole.
    fn filled(&self, runs: &[Run], unit: u64, start: u64) -> Result<u64> {
        let mut filled = 0;
        let mut at = start;
        while at < start + unit && at < runs::end(runs) * self.cluster {
            let (place, left) = self.run_at(runs, at)?;
            let left = left.min(start + unit - at);
            match place {
                Some(_) if filled == at - start => filled += left,
                Some(_) => {
                    return Err(Error::corrupt(format!(
                        "a hole within the compressed unit at byte {start}"
                    )));
                }
                None => {}
            }
            at += left;
        }
        Ok(filled)
    }

    /// How the unit at `start` is stored, and where the same goes on: whole units in one run are told
    /// at once.
    fn unit_at(&self, runs: &[Run], unit: u64, start: u64) -> Result<(Stored, u64)> {
        let (place, left) = self.run_at(runs, start)?;
        let whole = left / unit * unit;
        if whole > 0 {
            return Ok((if place.is_some() { Stored::Plain } else { Stored::Hole }, whole));
        }
        let end = (runs::end(runs) * self.cluster).min(start + unit);
        Ok(match self.filled(runs, unit, start)? {
            0 => (Stored::Hole, unit),
            filled if filled == unit => (Stored::Plain, unit),
            // The last unit of a value may end with its clusters, and is then as it is.
            filled if start + filled == end && end < start + unit => (Stored::Plain, unit),
            filled => (Stored::Compressed(filled), unit),
        })
    }

    fn read_units(
        &self,
        source: &dyn Source,
        runs: &[Run],
        unit: u64,
        mut buf: &mut [u8],
        mut offset: u64,
    ) -> Result<()> {
        while !buf.is_empty() {
            let within = offset % unit;
            let start = offset - within;
            let (stored, length) = self.unit_at(runs, unit, start)?;
            let take = usize::try_from(length - within).unwrap_or(usize::MAX).min(buf.len());
            let (now, later) = buf.split_at_mut(take);
            match stored {
                Stored::Hole => now.fill(0),
                Stored::Plain => self.read_plain(source, runs, now, offset)?,
                Stored::Compressed(filled) => {
                    let packed = usize::try_from(filled).unwrap_or(0);
                    let mut packed = vec![0; packed];
                    if take as u64 == unit {
                        self.read_plain(source, runs, &mut packed, start)?;
                        lznt1::decompress(&packed, now)?;
                    } else {
                        self.read_part(source, runs, unit, start, &mut packed, now, within)?;
                    }
                }
            }
            offset += take as u64;
            buf = later;
        }
        Ok(())
    }

    /// A part of a compressed unit. The whole is kept: the next part is likely to be asked for next.
    #[allow(clippy::too_many_arguments)]
    fn read_part(
        &self,
        source: &dyn Source,
        runs: &[Run],
        unit: u64,
        start: u64,
        packed: &mut [u8],
        buf: &mut [u8],
        within: u64,
    ) -> Result<()> {
        let within = usize::try_from(within).unwrap_or(0);
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, bytes)) = last.as_ref().filter(|(kept, _)| *kept == start) {
            buf.copy_from_slice(super::bytes::part(bytes, within, buf.len())?);
            return Ok(());
        }
        self.read_plain(source, runs, packed, start)?;
        let mut bytes = vec![0; usize::try_from(unit).unwrap_or(0)];
        lznt1::decompress(packed, &mut bytes)?;
        buf.copy_from_slice(super::bytes::part(&bytes, within, buf.len())?);
        *last = Some((start, bytes));
        Ok(())
    }

    /// Tells the pieces of the value from byte `from` on, until `visit` returns `false`.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(super) fn layout(&self, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let Content::Runs { runs, unit } = &self.content else {
            if self.size > 0 {
                visit(Piece { offset: 0, length: self.size, place: Place::Elsewhere });
            }
            return Ok(());
        };
        let mut offset = from - from.checked_rem(*unit).unwrap_or(0);
        while offset < self.initialized {
            let (place, left) = self.run_at(runs, offset)?;
            let plain = (place.map_or(Place::Hole, Place::Volume), left);
            let (place, length) = match *unit {
                0 => plain,
                unit if !offset.is_multiple_of(unit) => {
                    (plain.0, plain.1.min(unit - offset % unit))
                }
                unit => match self.unit_at(runs, unit, offset)? {
                    (Stored::Hole, length) => (Place::Hole, length),
                    (Stored::Plain, length) => (plain.0, length.min(left)),
                    (Stored::Compressed(filled), length) if filled <= left => match plain.0 {
                        Place::Volume(first) => {
                            (Place::Encoded { offset: first, length: filled }, length)
                        }
                        other => (other, length),
                    },
                    (Stored::Compressed(_), length) => (Place::Elsewhere, length),
                },
            };
            let length = length.min(self.initialized - offset);
            if !visit(Piece { offset, length, place }) {
                return Ok(());
            }
            offset += length;
        }
        if self.initialized < self.size {
            let length = self.size - self.initialized;
            visit(Piece { offset: self.initialized, length, place: Place::Hole });
        }
        Ok(())
    }
}

/// How a compression unit is stored.
enum Stored {
    /// Not at all.
    Hole,
    /// As it is.
    Plain,
    /// In so many bytes.
    Compressed(u64),
}
