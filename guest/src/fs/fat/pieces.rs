//! Metadata, read in large aligned pieces of which the last few are kept.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::source::Source;

/// A region of a source, read piece by piece.
pub(crate) struct Pieces {
    source: Arc<dyn Source>,
    start: u64,
    length: u64,
    piece: u64,
    most: usize,
    kept: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

impl Pieces {
    /// The `length` bytes of `source` from `start` on, in pieces of `piece` bytes, of which `most` are
    /// kept. What lies outside the source is cut off.
    pub(crate) fn new(
        source: &Arc<dyn Source>,
        start: u64,
        length: u64,
        piece: u64,
        most: usize,
    ) -> Self {
        let length = length.min(source.size().saturating_sub(start));
        let kept = Mutex::new(VecDeque::with_capacity(most));
        Self { source: Arc::clone(source), start, length, piece, most, kept }
    }

    /// Number of the piece that holds byte `offset` of the region, and where in it.
    pub(crate) fn locate(&self, offset: u64) -> (u64, usize) {
        (offset / self.piece, usize::try_from(offset % self.piece).unwrap_or(usize::MAX))
    }

    /// Piece number `index`: full, but for the last one.
    ///
    /// # Errors
    /// `Corrupt` where it lies outside; `Io`.
    pub(crate) fn piece(&self, index: u64) -> Result<Arc<[u8]>> {
        if let Some(piece) = self.find(index) {
            return Ok(piece);
        }
        let offset = index.saturating_mul(self.piece);
        if offset >= self.length {
            return Err(Error::corrupt(format!(
                "byte {offset} of metadata at byte {} lies outside the volume",
                self.start
            )));
        }
        let length = usize::try_from(self.piece.min(self.length - offset)).unwrap_or(0);
        let mut bytes = vec![0; length];
        self.source.read_at(&mut bytes, self.start + offset)?;
        let bytes: Arc<[u8]> = bytes.into();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= self.most {
            kept.pop_back();
        }
        kept.push_front((index, Arc::clone(&bytes)));
        Ok(bytes)
    }

    fn find(&self, index: u64) -> Option<Arc<[u8]>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let place = kept.iter().position(|(kept, _)| *kept == index)?;
        let found = kept.remove(place)?;
        let piece = Arc::clone(&found.1);
        kept.push_front(found);
        Some(piece)
    }

    /// The `N` bytes at `offset`, which must not cross pieces.
    ///
    /// # Errors
    /// `Corrupt` where they lie outside; `Io`.
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let (index, at) = self.locate(offset);
        let piece = self.piece(index)?;
        piece.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or_else(|| {
            Error::corrupt(format!("byte {} lies outside the volume", self.start + offset))
        })
    }
}
