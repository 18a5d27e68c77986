//! Content of files: read straight into the caller's buffer, and told where it lies.

use super::inode::{BLOCK_AREA, Inode, flags};
use super::map;
use super::volume::Volume;
use super::xattr;
use crate::error::Result;
use crate::fs::{Piece, Place};

/// Reads from byte `offset`: as much as `buf` takes, less only at the end of the file.
pub(super) fn read(volume: &Volume, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<usize> {
    let left = inode.size.saturating_sub(offset);
    let length = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
    let buf = &mut buf[..length];
    if buf.is_empty() {
        return Ok(0);
    }
    if inode.has(flags::INLINE_DATA) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let content = inline(inode)?;
        let found = content.get(start..).and_then(|rest| rest.get(..length));
        let found = found.ok_or_else(|| inode.corrupt("its inline data is too short"))?;
        buf.copy_from_slice(found);
        return Ok(length);
    }
    map::blocks_of(volume, inode)?;
    let size = volume.block_size();
    let mut done = 0;
    while done < length {
        let at = offset + done as u64;
        let segment = map::segment(volume, inode, at / size)?;
        let into = at % size;
        let alike = segment.length.saturating_mul(size).saturating_sub(into);
        let part = usize::try_from(alike).unwrap_or(usize::MAX).min(length - done);
        let place = &mut buf[done..done + part];
        match segment.physical {
            None => place.fill(0),
            Some(block) => {
                volume.read(place, block * size + into).map_err(|e| inode.blame(&e))?;
            }
        }
        done += part;
    }
    Ok(length)
}

/// Content that lies within the inode: in place of the block map, and behind the inode's fields.
pub(super) fn inline(inode: &Inode) -> Result<Vec<u8>> {
    let mut content = inode.block_area().to_vec();
    if inode.size > BLOCK_AREA as u64 {
        content.extend_from_slice(xattr::inline_data(inode)?.unwrap_or_default());
    }
    Ok(content)
}

/// Calls `visit` with the consecutive pieces that cover a file from byte `from` on, until it returns
/// `false`.
pub(super) fn layout(
    volume: &Volume,
    inode: &Inode,
    from: u64,
    visit: &mut dyn FnMut(Piece) -> bool,
) -> Result<()> {
    if inode.size == 0 {
        return Ok(());
    }
    if inode.has(flags::INLINE_DATA) {
        visit(Piece { offset: 0, length: inode.size, place: Place::Elsewhere });
        return Ok(());
    }
    let size = volume.block_size();
    let blocks = map::blocks_of(volume, inode)?;
    let mut waiting: Option<Piece> = None;
    let mut at = from / size;
    while at < blocks {
        let mut segment = map::segment(volume, inode, at)?;
        let mut place = Place::Hole;
        if let Some(first) = segment.physical {
            place = Place::Volume(first * size);
            match volume.first_in_journal(first, segment.length) {
                Some(block) if block == first => (place, segment.length) = (Place::Elsewhere, 1),
                Some(block) => segment.length = block - first,
                None => {}
            }
        }
        let end = (at.saturating_add(segment.length)).min(blocks);
        let offset = at * size;
        let piece = Piece { offset, length: (end * size).min(inode.size) - offset, place };
        at = end;
        waiting = match waiting {
            None => Some(piece),
            Some(before) => match joined(before, piece) {
                Some(both) => Some(both),
                None if !visit(before) => return Ok(()),
                None => Some(piece),
            },
        };
    }
    if let Some(last) = waiting {
        visit(last);
    }
    Ok(())
}

/// Two pieces that follow each other as one, where they lie alike.
fn joined(before: Piece, next: Piece) -> Option<Piece> {
    let alike = match (before.place, next.place) {
        (Place::Hole, Place::Hole) | (Place::Elsewhere, Place::Elsewhere) => true,
        (Place::Volume(first), Place::Volume(second)) => first + before.length == second,
        _ => false,
    };
    alike.then_some(Piece { length: before.length + next.length, ..before })
}
