//! The file allocation table: for each cluster the next one of its chain.
//!
//! Only a few pieces of the table are ever in memory, however large it is.

use std::sync::Arc;

use super::bytes::{u16_at, u32_at};
use super::pieces::Pieces;
use crate::error::{Error, Result};
use crate::source::Source;

/// Bytes of the table that are read at once. A table of 12 bits lies in one piece.
const PIECE: u64 = 64 << 10;
/// Pieces that are kept.
const PIECES: usize = 16;

/// How wide an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// 12 bits.
    Fat12,
    /// 16 bits.
    Fat16,
    /// 32 bits, of which 28 count.
    Fat32,
    /// 32 bits.
    ExFat,
}

impl Width {
    /// Bytes that `entries` entries take.
    pub(crate) fn bytes(self, entries: u64) -> u64 {
        match self {
            Self::Fat12 => (entries * 3).div_ceil(2),
            Self::Fat16 => entries * 2,
            Self::Fat32 | Self::ExFat => entries * 4,
        }
    }

    /// The least value that marks the end of a chain, and the one that marks a bad cluster.
    fn marks(self) -> (u32, u32) {
        match self {
            Self::Fat12 => (0xff8, 0xff7),
            Self::Fat16 => (0xfff8, 0xfff7),
            Self::Fat32 => (0x0fff_fff8, 0x0fff_fff7),
            Self::ExFat => (0xffff_fff8, 0xffff_fff7),
        }
    }
}

/// A file allocation table.
pub(crate) struct Table {
    width: Width,
    clusters: u32,
    pieces: Pieces,
}

impl Table {
    /// The table at byte `start` for `clusters` clusters.
    pub(crate) fn new(source: &Arc<dyn Source>, width: Width, start: u64, clusters: u32) -> Self {
        let length = width.bytes(u64::from(clusters) + 2);
        Self { width, clusters, pieces: Pieces::new(source, start, length, PIECE, PIECES) }
    }

    /// How many clusters it describes: numbers 2 and up.
    pub(crate) fn clusters(&self) -> u32 {
        self.clusters
    }

    /// Refuses a number that is not one of a cluster.
    ///
    /// # Errors
    /// `Corrupt`.
    pub(crate) fn check(&self, cluster: u32) -> Result<u32> {
        if cluster >= 2 && cluster - 2 < self.clusters {
            return Ok(cluster);
        }
        Err(Error::corrupt(format!(
            "cluster {cluster:#x} was named, and there are clusters 2 to {}",
            u64::from(self.clusters) + 1
        )))
    }

    /// A reader of entries one after another.
    pub(crate) fn walker(&self) -> Walker<'_> {
        Walker { table: self, index: u64::MAX, piece: Arc::new([]) }
    }

    /// Clusters that are not free.
    ///
    /// # Errors
    /// `Corrupt`, `Io`.
    pub(crate) fn used(&self) -> Result<u32> {
        let mut walker = self.walker();
        let mut used = 0;
        for cluster in 2..=self.clusters + 1 {
            used += u32::from(walker.raw(cluster)? != 0);
        }
        Ok(used)
    }
}

/// Reads entries of a table, and holds on to the piece where it is.
pub(crate) struct Walker<'a> {
    table: &'a Table,
    index: u64,
    piece: Arc<[u8]>,
}

impl Walker<'_> {
    /// The entry number `entry` as it is.
    ///
    /// # Errors
    /// `Corrupt` where it lies outside the volume; `Io`.
    pub(crate) fn raw(&mut self, entry: u32) -> Result<u32> {
        let width = self.table.width;
        let (offset, length) = match width {
            Width::Fat12 => (u64::from(entry) + u64::from(entry / 2), 2),
            Width::Fat16 => (u64::from(entry) * 2, 2),
            Width::Fat32 | Width::ExFat => (u64::from(entry) * 4, 4),
        };
        let (index, at) = self.table.pieces.locate(offset);
        if index != self.index {
            self.piece = self.table.pieces.piece(index)?;
            self.index = index;
        }
        let bytes = self.piece.get(at..).and_then(|rest| rest.get(..length)).ok_or_else(|| {
            Error::corrupt(format!("the allocation table ends before entry {entry:#x}"))
        })?;
        Ok(match width {
            Width::Fat12 if entry.is_multiple_of(2) => u32::from(u16_at(bytes, 0) & 0xfff),
            Width::Fat12 => u32::from(u16_at(bytes, 0) >> 4),
            Width::Fat16 => u32::from(u16_at(bytes, 0)),
            Width::Fat32 => u32_at(bytes, 0) & 0x0fff_ffff,
            Width::ExFat => u32_at(bytes, 0),
        })
    }

    /// The cluster after `cluster`; `None` at the end of the chain.
    ///
    /// # Errors
    /// `Corrupt` where the chain goes on in what is free, bad or no cluster; `Io`.
    pub(crate) fn next(&mut self, cluster: u32) -> Result<Option<u32>> {
        let next = self.raw(self.table.check(cluster)?)?;
        let (end, bad) = self.table.width.marks();
        if next >= end {
            return Ok(None);
        }
        let wrong = match next {
            0 => "is free",
            _ if next == bad => "is bad",
            _ => return self.table.check(next).map(Some),
        };
        Err(Error::corrupt(format!("cluster {cluster:#x} of a chain {wrong}")))
    }
}
