//! The content of a file, piece by piece: large holes are told and not read.

use std::ops::Range;
use std::vec;

use guest::tree::{Origin, Placed, READ};
use guest::{Error, Node, Tree};

/// Smaller holes are read with what is around them; smaller files are read without asking for holes.
const HOLE: u64 = 1 << 20;
/// Most parts of a layout that are asked for; what lies behind is read.
const LAYOUTS: u32 = 4096;

/// A piece of a file.
pub(super) enum Piece {
    /// So many bytes, in the buffer.
    Data(usize),
    /// So many zeroes.
    Zeroes(u64),
}

pub(super) struct Content<'t> {
    tree: &'t dyn Tree,
    file: Node,
    size: u64,
    at: u64,
    hole: Option<Range<u64>>,
    pieces: vec::IntoIter<Placed>,
    /// Where the layout goes on.
    ahead: Option<u64>,
    /// Parts of the layout that may still be asked for.
    layouts: u32,
    /// Whether somebody still takes it.
    alive: &'t dyn Fn() -> bool,
}

impl<'t> Content<'t> {
    pub(super) fn new(
        tree: &'t dyn Tree,
        file: Node,
        size: u64,
        alive: &'t dyn Fn() -> bool,
    ) -> Self {
        let ahead = (size >= 2 * HOLE).then_some(0);
        let pieces = Vec::new().into_iter();
        Self { tree, file, size, at: 0, hole: None, pieces, ahead, layouts: LAYOUTS, alive }
    }

    /// Bytes told so far.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The next piece; `None` at the end.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> Result<Option<Piece>, Error> {
        if self.at >= self.size {
            return Ok(None);
        }
        if self.hole.as_ref().is_none_or(|hole| hole.end <= self.at) {
            self.hole = self.next_hole();
        }
        let mut end = self.size;
        if let Some(hole) = &self.hole {
            if hole.start <= self.at {
                let count = hole.end.min(self.size) - self.at;
                self.at += count;
                return Ok(Some(Piece::Zeroes(count)));
            }
            end = end.min(hole.start);
        }
        let wanted =
            usize::try_from(end - self.at).unwrap_or(usize::MAX).min(buffer.len()).min(READ);
        let read =
            self.tree.read_at(self.file, buffer.get_mut(..wanted).unwrap_or_default(), self.at)?;
        if read == 0 || read > wanted {
            return Err(Error::corrupt(format!(
                "the file ends at byte {} of {}",
                self.at, self.size
            )));
        }
        self.at += read as u64;
        Ok(Some(Piece::Data(read)))
    }

    /// The next large hole. Where the layout is not known, or makes no sense, everything is read.
    fn next_hole(&mut self) -> Option<Range<u64>> {
        loop {
            for piece in self.pieces.by_ref() {
                let end = piece.offset.saturating_add(piece.length);
                if piece.origin == Origin::Hole && piece.length >= HOLE && end > self.at {
                    return Some(piece.offset..end);
                }
            }
            let from = self.ahead.take().filter(|from| *from < self.size)?;
            if !(self.alive)() {
                return None;
            }
            self.layouts = self.layouts.checked_sub(1)?;
            let layout = self.tree.layout(self.file, from).ok()?;
            self.ahead = layout.next.filter(|next| *next > from);
            self.pieces = layout.pieces.into_iter();
        }
    }
}
