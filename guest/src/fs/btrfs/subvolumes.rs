//! The subvolumes of a volume, and handles of what is in them.
//!
//! A handle is the number of a subvolume in a table, and an inode number. The table is made once, in
//! the order of the root tree, so the same volume always gives the same handles.

use std::collections::HashMap;

use fs_btrfs::chunk::objectid::FS_TREE;
use fs_btrfs::fs::{ROOT_ITEM_KEY, root_item};

use super::volume::{Root, Volume, key};
use crate::error::{Error, Result};
use crate::fs::Node;

/// Bits of a handle that are the inode number.
const INODE_BITS: u32 = 48;
/// Subvolumes that are read, at most.
const MAX_SUBVOLUMES: usize = 1 << 16;
/// First and last number of a tree that is a subvolume (`BTRFS_FIRST_FREE_OBJECTID` and the last one).
const SUBVOLUMES: std::ops::RangeInclusive<u64> = 256..=u64::MAX - 256;
/// Type of a key that names a subvolume's parent.
const ROOT_BACKREF_KEY: u8 = 144;
/// `btrfs_root_item.refs`: 0 in a subvolume that is being deleted.
const REFS: usize = 216;

/// A subvolume.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subvolume {
    pub(super) id: u64,
    pub(super) root: Root,
    /// The inode of its root directory.
    pub(super) directory: u64,
    /// The subvolume and the directory that it is in.
    parent: Option<(u64, u64)>,
}

/// All subvolumes, the top level first.
pub(super) struct Subvolumes {
    table: Vec<Subvolume>,
    by_id: HashMap<u64, usize>,
}

/// The root of a tree, by the item of the root tree: its root, its directory, its references.
pub(super) fn parse_root(data: &[u8]) -> Result<(Root, u64, u32)> {
    let u64_at = |at: usize| {
        let bytes = data.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes)
    };
    let refs = data.get(REFS..REFS + 4).and_then(|bytes| bytes.try_into().ok());
    let parts = (
        u64_at(root_item::BYTENR),
        data.get(root_item::LEVEL),
        u64_at(root_item::GENERATION),
        u64_at(root_item::ROOT_DIRID),
        refs.map(u32::from_le_bytes),
    );
    let (Some(address), Some(&level), Some(generation), Some(directory), Some(refs)) = parts else {
        return Err(Error::corrupt("btrfs: the root of a tree is cut off"));
    };
    Ok((Root { address, level, generation }, directory, refs))
}

impl Subvolumes {
    /// Reads the root tree.
    ///
    /// # Errors
    /// `Corrupt`, `Limit`, `Io`.
    pub(super) fn read(volume: &Volume, root_tree: Root) -> Result<Self> {
        let mut found = Self { table: Vec::new(), by_id: HashMap::new() };
        volume.for_each(root_tree, key(FS_TREE, ROOT_ITEM_KEY, 0), &mut |key, data| {
            let id = key.objectid;
            if id != FS_TREE && !SUBVOLUMES.contains(&id) {
                return Ok(id < *SUBVOLUMES.end());
            }
            match key.key_type {
                ROOT_ITEM_KEY => {
                    let (root, directory, refs) = parse_root(data)?;
                    if refs > 0 {
                        found.add(Subvolume { id, root, directory, parent: None })?;
                    }
                }
                ROOT_BACKREF_KEY => {
                    let directory = data.get(..8).and_then(|bytes| bytes.try_into().ok());
                    let index = found.by_id.get(&id).copied();
                    if let Some(subvolume) = index.and_then(|index| found.table.get_mut(index)) {
                        subvolume.parent =
                            directory.map(|bytes| (key.offset, u64::from_le_bytes(bytes)));
                    }
                }
                _ => {}
            }
            Ok(true)
        })?;
        match found.table.first() {
            Some(first) if first.id == FS_TREE => Ok(found),
            _ => Err(Error::corrupt("btrfs: there is no tree of files")),
        }
    }

    fn add(&mut self, subvolume: Subvolume) -> Result<()> {
        if self.table.len() == MAX_SUBVOLUMES {
            return Err(Error::limit(format!("more than {MAX_SUBVOLUMES} subvolumes")));
        }
        let replaced = self.by_id.insert(subvolume.id, self.table.len());
        self.table.push(subvolume);
        match replaced {
            None => Ok(()),
            Some(_) => Err(Error::corrupt(format!("btrfs: tree {} is there twice", subvolume.id))),
        }
    }

    /// The handle of an inode in the subvolume number `index`.
    pub(super) fn node(index: usize, ino: u64) -> Result<Node> {
        if ino >> INODE_BITS != 0 || index >= MAX_SUBVOLUMES {
            return Err(Error::limit(format!("btrfs: inode {ino} is too large a number")));
        }
        Ok(Node((index as u64) << INODE_BITS | ino))
    }

    /// The subvolume of a handle, its number, and the inode.
    pub(super) fn resolve(&self, node: Node) -> Result<(usize, Subvolume, u64)> {
        let index = usize::try_from(node.0 >> INODE_BITS).unwrap_or(usize::MAX);
        let ino = node.0 & ((1 << INODE_BITS) - 1);
        match self.table.get(index) {
            Some(&subvolume) => Ok((index, subvolume, ino)),
            None => Err(Error::not_found(format!("this btrfs has no subvolume number {index}"))),
        }
    }

    /// The root directory of the subvolume `id`, where it is mounted in `directory` of `parent`. A
    /// snapshot has the names of the subvolumes within its original, and not what they name.
    pub(super) fn within(&self, id: u64, parent: u64, directory: u64) -> Result<Option<Node>> {
        let Some((index, subvolume)) =
            self.by_id.get(&id).and_then(|&index| Some((index, self.table.get(index)?)))
        else {
            return Ok(None);
        };
        if subvolume.parent != Some((parent, directory)) {
            return Ok(None);
        }
        Self::node(index, subvolume.directory).map(Some)
    }

    /// The root directory of the top level.
    pub(super) fn root(&self) -> Node {
        Node(self.table.first().map_or(0, |top| top.directory))
    }
}
