//! Directories, page by page: short form within the inode, or data blocks in order. The index blocks
//! that follow them (leaf, node, free) are only for lookups.
//!
//! A cursor is one more than the number of the next short-form entry, or one more than the place of the
//! next entry in the directory's address space.

use fs_xfs::dir::{self, DirEntry};
use fs_xfs::inode::{Format, Inode};

use super::extents::{Run, first_after};
use super::{Xfs, error_of, type_of};
use crate::error::{Error, Result};
use crate::fs::{Cursor, Entry, Node, Page};

/// Where the data blocks of a directory end (`XFS_DIR2_LEAF_OFFSET`).
const LEAF_OFFSET: u64 = 32 << 30;
/// Names of a page, whatever the caller would take.
const MAX_PAGE: usize = 1 << 16;
/// Names that are looked at together.
const SCAN_PAGE: usize = 1 << 12;

/// A page of the directory `inode`.
///
/// # Errors
/// `NotADirectory`, `Corrupt`, `Limit`, `Io`.
pub(super) fn list(
    xfs: &Xfs,
    inode: &Inode,
    raw: &[u8],
    cursor: Cursor,
    limit: usize,
) -> Result<Page> {
    if !inode.is_dir() {
        return Err(super::not_a(crate::ErrorKind::NotADirectory, inode.ino, "directory"));
    }
    let limit = limit.clamp(1, MAX_PAGE);
    if inode.format == Format::Local {
        return list_short_form(xfs, inode, raw, cursor, limit);
    }
    let runs = xfs.runs(inode, raw)?;
    let block = u64::from(xfs.sb.dirblocksize());
    let data = data_runs(&runs);
    check_size(inode, data)?;
    let mut page = Page::default();
    let start = cursor.0.saturating_sub(1);
    let mut buf = vec![0; usize::try_from(block).unwrap_or(0)];
    let mut at = start - start % block;
    while let Some(next) = next_block(data, at, block) {
        at = next;
        read_block(xfs, inode, data, at, &mut buf)?;
        for entry in dir::parse_data_block(&buf, &xfs.sb).map_err(error_of)? {
            let place = at + u64::from(entry.offset);
            if place < start || is_self_or_parent(&entry) {
                continue;
            }
            if page.entries.len() == limit {
                page.next = Some(Cursor(place + 1));
                return Ok(page);
            }
            page.entries.push(entry_of(inode.ino, entry)?);
        }
        at += block;
    }
    Ok(page)
}

/// Finds the first name that `matches`, one after the other.
///
/// # Errors
/// `NotADirectory`, `Corrupt`, `Limit`, `Io`.
pub(super) fn scan(
    xfs: &Xfs,
    inode: &Inode,
    raw: &[u8],
    matches: impl Fn(&[u8]) -> bool,
) -> Result<Option<Node>> {
    let mut cursor = Cursor::default();
    loop {
        let page = list(xfs, inode, raw, cursor, SCAN_PAGE)?;
        if let Some(entry) = page.entries.iter().find(|entry| matches(&entry.name)) {
            return Ok(Some(entry.node));
        }
        match page.next {
            Some(next) => cursor = next,
            None => return Ok(None),
        }
    }
}

fn list_short_form(
    xfs: &Xfs,
    inode: &Inode,
    raw: &[u8],
    cursor: Cursor,
    limit: usize,
) -> Result<Page> {
    let (start, end) = inode.data_fork_range(usize::from(xfs.sb.inodesize));
    let fork = raw.get(start..end).unwrap_or_default();
    let entries = dir::read_short_form(inode, fork, &xfs.sb).map_err(error_of)?.entries;
    let count = entries.len();
    let first = usize::try_from(cursor.0.saturating_sub(1)).unwrap_or(usize::MAX);
    let page: Result<Vec<Entry>> =
        entries.into_iter().skip(first).take(limit).map(|e| entry_of(inode.ino, e)).collect();
    let next = first.saturating_add(limit);
    let next = (next < count).then_some(Cursor(next as u64 + 1));
    Ok(Page { entries: page?, next })
}

/// The runs before the index, of which none reaches into it.
fn data_runs(runs: &[Run]) -> &[Run] {
    &runs[..runs.partition_point(|run| run.start < LEAF_OFFSET)]
}

/// A directory ends with its last data block: what is missing there would go unnoticed otherwise.
fn check_size(inode: &Inode, data: &[Run]) -> Result<()> {
    let end = data.last().map_or(0, Run::end);
    if end == inode.size && end <= LEAF_OFFSET && end > 0 {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "directory {} ends at byte {}, and its data blocks at byte {end}",
        inode.ino, inode.size
    )))
}

/// The first directory block at or after `at` that is mapped.
fn next_block(data: &[Run], at: u64, block: u64) -> Option<u64> {
    let run = data.get(first_after(data, at))?;
    let start = run.start.max(at);
    Some(start - start % block)
}

/// Reads and checks the directory block at `at`, which may lie in several runs.
fn read_block(xfs: &Xfs, inode: &Inode, data: &[Run], at: u64, buf: &mut [u8]) -> Result<()> {
    let damaged =
        || Error::corrupt(format!("directory {}: a part at byte {at} is missing", inode.ino));
    let mut done = 0;
    let mut first = None;
    while done < buf.len() {
        let here = at + done as u64;
        let run = data.get(first_after(data, here)).filter(|run| run.start <= here);
        let run = run.filter(|run| !run.unwritten).ok_or_else(damaged)?;
        let disk = run.disk + (here - run.start);
        first.get_or_insert(disk);
        let n = usize::try_from(run.end() - here).unwrap_or(usize::MAX).min(buf.len() - done);
        xfs.read_metadata(&mut buf[done..done + n], disk)?;
        done += n;
    }
    let address = first.unwrap_or_default() / 512;
    dir::verify_data_block(buf, &xfs.sb, address, inode.ino).map_err(error_of)
}

fn is_self_or_parent(entry: &DirEntry) -> bool {
    entry.name == b"." || entry.name == b".."
}

fn entry_of(directory: u64, entry: DirEntry) -> Result<Entry> {
    if entry.name.iter().any(|byte| matches!(byte, 0 | b'/')) || is_self_or_parent(&entry) {
        return Err(Error::corrupt(format!("directory {directory} has a name that none can have")));
    }
    Ok(Entry { name: entry.name, node: Node(entry.ino), file_type: entry.ftype.map(type_of) })
}
