//! Directories: `DIR_INDEX` items in the order in which the names were made, and `DIR_ITEM` by hash.
//!
//! A cursor is the index that a page begins with.

use fs_btrfs::dir::{DIR_INDEX_KEY, DIR_ITEM_KEY, DirEntry, name_hash, parse_dir_items};
use fs_btrfs::fs::ROOT_ITEM_KEY;
use fs_btrfs::inode::INODE_ITEM_KEY;

use super::subvolumes::{Subvolume, Subvolumes};
use super::volume::key;
use super::{Btrfs, EMPTY_DIRECTORY, error_of, type_of};
use crate::error::{Error, Result};
use crate::fs::{Cursor, Entry, FileType, Node, Page};

/// Names of a page, whatever the caller would take.
const MAX_PAGE: usize = 1 << 16;

/// A directory within its subvolume.
pub(super) struct Directory {
    pub(super) index: usize,
    pub(super) subvolume: Subvolume,
    pub(super) ino: u64,
}

/// A page of a directory.
///
/// # Errors
/// `Corrupt`, `Limit`, `Io`.
pub(super) fn list(
    btrfs: &Btrfs,
    directory: &Directory,
    cursor: Cursor,
    limit: usize,
) -> Result<Page> {
    let limit = limit.clamp(1, MAX_PAGE);
    let ino = directory.ino;
    let mut page = Page::default();
    let from = key(ino, DIR_INDEX_KEY, cursor.0);
    btrfs.volume.for_each(directory.subvolume.root, from, &mut |key, data| {
        if key.objectid != ino || key.key_type != DIR_INDEX_KEY {
            return Ok(false);
        }
        if page.entries.len() == limit {
            page.next = Some(Cursor(key.offset));
            return Ok(false);
        }
        let mut entries = parse_dir_items(data).map_err(error_of)?;
        match (entries.pop(), entries.is_empty()) {
            (Some(entry), true) => page.entries.push(entry_of(btrfs, directory, entry)?),
            _ => return Err(Error::corrupt(format!("btrfs: an index of directory {ino} is bad"))),
        }
        Ok(true)
    })?;
    Ok(page)
}

/// Finds `name`.
///
/// # Errors
/// `Corrupt`, `Limit`, `Io`.
pub(super) fn lookup(btrfs: &Btrfs, directory: &Directory, name: &[u8]) -> Result<Option<Node>> {
    let wanted = key(directory.ino, DIR_ITEM_KEY, name_hash(name));
    let found = btrfs.volume.find(directory.subvolume.root, wanted, |data| {
        Ok(parse_dir_items(data).map_err(error_of)?.into_iter().find(|entry| entry.name == name))
    })?;
    match found.flatten() {
        Some(entry) => Ok(Some(entry_of(btrfs, directory, entry)?.node)),
        None => Ok(None),
    }
}

fn entry_of(btrfs: &Btrfs, directory: &Directory, entry: DirEntry) -> Result<Entry> {
    let ino = directory.ino;
    let bad = |what: &str| Error::corrupt(format!("btrfs: directory {ino} has {what}"));
    if entry.name.iter().any(|byte| matches!(byte, 0 | b'/'))
        || matches!(&entry.name[..], b"" | b"." | b"..")
    {
        return Err(bad("a name that none can have"));
    }
    match entry.location_type {
        INODE_ITEM_KEY => Ok(Entry {
            name: entry.name,
            node: Subvolumes::node(directory.index, entry.ino)?,
            file_type: entry.ftype.map(type_of),
        }),
        ROOT_ITEM_KEY => {
            let parent = directory.subvolume.id;
            let node = match btrfs.subvolumes.within(entry.ino, parent, ino)? {
                Some(node) => node,
                None => Subvolumes::node(directory.index, EMPTY_DIRECTORY)?,
            };
            Ok(Entry { name: entry.name, node, file_type: Some(FileType::Directory) })
        }
        _ => Err(bad("a name of something that is neither file nor subvolume")),
    }
}
