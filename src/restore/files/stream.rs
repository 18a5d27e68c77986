//! A file read from one end to the other, several pieces at a time.

use std::io;
use std::sync::mpsc::sync_channel;

use guest::tree::READ;
use guest::{Error, Node, Result, Tree};

use crate::pages::PageBuffer;

/// Pieces that are being read at a time, each by a thread.
const DEPTH: usize = 3;
/// Bytes of a piece.
const PIECE: u64 = READ as u64;

/// Bytes of a file.
pub struct Piece {
    buffer: PageBuffer,
    length: usize,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }
}

/// Reads bytes of one file in order.
pub struct FileStream<'t> {
    tree: &'t dyn Tree,
    file: Node,
}

impl<'t> FileStream<'t> {
    /// Of `file` in `tree`.
    pub fn new(tree: &'t dyn Tree, file: Node) -> Self {
        Self { tree, file }
    }

    /// The end of the piece that begins at `from`: pieces begin where pages do, but for the first.
    fn piece_end(from: u64, end: u64) -> u64 {
        (from / PIECE + 1).saturating_mul(PIECE).min(end)
    }

    /// Reads the first of the pieces that make `from .. end`; empty where that is.
    ///
    /// # Errors
    /// Those of [`Tree::read_at`]; `Corrupt` where the file ends before.
    pub fn first(&self, from: u64, end: u64) -> Result<Piece> {
        let until = Self::piece_end(from, end);
        let wanted = usize::try_from(until.saturating_sub(from)).unwrap_or(READ);
        let mut buffer = PageBuffer::new(from, wanted);
        let mut length = 0;
        while length < wanted {
            let rest = buffer.get_mut(length..).unwrap_or_default();
            match self.tree.read_at(self.file, rest, from + length as u64)? {
                0 => {
                    let at = from + length as u64;
                    return Err(Error::corrupt(format!("it ends at byte {at}, before its size")));
                }
                read => length += read.min(wanted - length),
            }
        }
        Ok(Piece { buffer, length })
    }

    /// Reads the pieces that make `from .. end`, and gives them to `take` in order, until that fails or
    /// one cannot be read.
    ///
    /// # Errors
    /// Those of `take`, and those of [`FileStream::first`] as they are.
    pub fn read(
        &self,
        from: u64,
        end: u64,
        mut take: impl FnMut(Piece) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut starts = Vec::new();
        let mut at = from;
        while starts.len() < DEPTH && at < end {
            starts.push(at);
            at = Self::piece_end(at, end);
        }
        let stride = PIECE * DEPTH as u64;
        std::thread::scope(|scope| {
            let mut lanes = Vec::new();
            for start in starts {
                // Nothing waits in it: a thread that has a piece gives it away before it reads another.
                let (give, lane) = sync_channel(0);
                let read = move || {
                    let mut at = start;
                    while at < end {
                        let piece = self.first(at, end);
                        let failed = piece.is_err();
                        if give.send(piece).is_err() || failed {
                            return;
                        }
                        at = (at / PIECE * PIECE).saturating_add(stride);
                    }
                };
                let thread = std::thread::Builder::new().name("file-read".into());
                thread.spawn_scoped(scope, read)?;
                lanes.push(lane);
            }
            let mut turn = 0;
            // The lanes take turns: the first that has no piece any more ends it.
            while let Some(Ok(piece)) = lanes.get(turn).map(|lane| lane.recv()) {
                take(piece.map_err(io::Error::other)?)?;
                turn = (turn + 1) % lanes.len();
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::{Fake, file, zeroes};
    use super::*;

    fn all(tree: &Fake, from: u64, end: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        FileStream::new(tree, tree.find("/file")).read(from, end, |piece| {
            assert!(piece.as_ref().len() <= READ);
            bytes.extend_from_slice(piece.as_ref());
            Ok(())
        })?;
        Ok(bytes)
    }

    #[test]
    fn any_part_of_a_file_comes_in_order() {
        let bytes: Vec<u8> = (0..251).cycle().take(7 * READ + 123).collect();
        let tree = Fake::new(vec![file("file", &bytes)]);
        for (from, end) in [
            (0, bytes.len()),
            (1, bytes.len()),
            (READ - 1, READ + 1),
            (READ, 5 * READ),
            (3 * READ + 77, 4 * READ),
            (5, 5),
        ] {
            let part = all(&tree, from as u64, end as u64).unwrap();
            assert!(part == bytes[from..end], "{from} .. {end}");
        }
    }

    #[test]
    fn what_cannot_be_read_ends_it_after_what_can() {
        let mut tree = Fake::new(vec![file("file", vec![7; 2 * READ + 5])]);
        let error = all(&tree, 0, 4 * PIECE).unwrap_err();
        assert!(error.to_string().contains(&format!("byte {}", 2 * READ + 5)), "{error}");
        tree.fail_read(tree.find("/file"), PIECE + 5);
        let mut taken = 0;
        let stream = FileStream::new(&tree, tree.find("/file"));
        let ended = stream.read(0, 2 * PIECE, |piece| {
            taken += piece.as_ref().len();
            Ok(())
        });
        assert!(ended.unwrap_err().to_string().contains("a sector cannot be read"));
        assert_eq!(taken, READ);
    }

    #[test]
    fn whoever_takes_no_more_ends_it() {
        let tree = Fake::new(vec![zeroes("file", 1 << 40, false)]);
        let mut pieces = 0;
        let ended = FileStream::new(&tree, tree.find("/file")).read(0, 1 << 40, |_| {
            pieces += 1;
            if pieces < 10 { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
        assert_eq!((ended.unwrap_err().kind(), pieces), (io::ErrorKind::BrokenPipe, 10));
    }
}
