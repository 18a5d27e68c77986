//! From logical addresses to bytes: the chunk map, copies of them, and nodes of trees.
//!
//! A node is taken only where its checksum, its address, its volume, its level, its generation and its
//! first key are what its parent says. So a tree cannot have loops, and what was there before is not
//! taken for what is.

use std::sync::Arc;

use fs_btrfs::btree::{Body, TreeBlock, TreeGeometry, compare_keys};
use fs_btrfs::chunk::{ChunkMap, ChunkProfile, DiskKey, chunk_from_item};
use fs_btrfs::superblock::Superblock;

use super::error_of;
use crate::error::{Error, Result};
use crate::fs::recent::Recent;
use crate::source::{Source, check_range};

/// Bytes of nodes in one generation of the cache.
const NODE_BYTES: usize = 16 << 20;
/// Chunks of a volume, at most: with 256 MiB each they hold 256 TiB.
const MAX_CHUNKS: usize = 1 << 20;

/// A tree: where its root is, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Root {
    /// Logical address of the root node.
    pub(super) address: u64,
    /// Level of the root node.
    pub(super) level: u8,
    /// Generation of the root node.
    pub(super) generation: u64,
}

/// The volume: its source, its superblock, its chunks.
pub(super) struct Volume {
    pub(super) source: Arc<dyn Source>,
    pub(super) sb: Superblock,
    map: ChunkMap,
    geometry: TreeGeometry,
    nodes: Recent<u64, Arc<TreeBlock>>,
}

/// What a parent says of its child.
struct Expected {
    address: u64,
    level: u8,
    generation: u64,
    first: Option<DiskKey>,
}

pub(super) fn key(objectid: u64, key_type: u8, offset: u64) -> DiskKey {
    DiskKey { objectid, key_type, offset }
}

impl Volume {
    /// Reads the chunk tree.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Limit`, `Io`.
    pub(super) fn open(source: Arc<dyn Source>, sb: Superblock) -> Result<Self> {
        let map = ChunkMap::bootstrap(&sb).map_err(error_of)?;
        let geometry = TreeGeometry::from_superblock(&sb);
        let chunks = Root {
            address: sb.chunk_root,
            level: sb.chunk_root_level,
            generation: sb.chunk_root_generation,
        };
        let sectorsize = sb.sectorsize;
        let mut volume = Self { source, sb, map, geometry, nodes: Recent::new(NODE_BYTES) };
        let mut found = Vec::new();
        volume.for_each(chunks, key(0, 0, 0), &mut |key, data| {
            found.extend(chunk_from_item(key, data, sectorsize).map_err(error_of)?);
            if found.len() > MAX_CHUNKS {
                return Err(Error::limit(format!("more than {MAX_CHUNKS} chunks")));
            }
            Ok(true)
        })?;
        let mut map = ChunkMap::new();
        for chunk in found {
            map.insert(chunk).map_err(error_of)?;
        }
        volume.map = map;
        Ok(volume)
    }

    /// Copies of what is at `logical`.
    pub(super) fn mirrors(&self, logical: u64) -> Result<usize> {
        self.map.mirrors_at(logical).map_err(error_of)
    }

    /// Where the bytes at `logical` lie, and how many of `length` lie there.
    pub(super) fn place(&self, logical: u64, mirror: usize, length: u64) -> Result<(u64, u64)> {
        let chunk = self.map.chunk_for(logical).ok_or_else(|| {
            Error::corrupt(format!("btrfs: no chunk holds the address {logical}"))
        })?;
        match chunk.profile().map_err(error_of)? {
            ChunkProfile::Single | ChunkProfile::Dup => {}
            profile => return Err(Error::unsupported(format!("btrfs as {}", profile.name()))),
        }
        let mapped = chunk.map_mirror(logical, mirror).map_err(error_of)?;
        if mapped.devid != self.sb.dev_item.devid {
            return Err(Error::unsupported(super::SEVERAL));
        }
        Ok((mapped.physical, mapped.len.min(length)))
    }

    /// Fills `buf` from `logical`.
    pub(super) fn read(&self, buf: &mut [u8], logical: u64, mirror: usize) -> Result<()> {
        let mut rest = buf;
        let mut at = logical;
        while !rest.is_empty() {
            let (physical, length) = self.place(at, mirror, rest.len() as u64)?;
            let length = usize::try_from(length).unwrap_or(usize::MAX).clamp(1, rest.len());
            let (piece, after) = rest.split_at_mut(length);
            check_range(self.source.size(), physical, piece.len())?;
            self.source.read_at(piece, physical)?;
            at += length as u64;
            rest = after;
        }
        Ok(())
    }

    fn node(&self, expected: &Expected) -> Result<Arc<TreeBlock>> {
        let Expected { address, level, generation, first } = expected;
        let bad = |what: &str| Error::corrupt(format!("btrfs: the node at {address} {what}"));
        let node = match self.nodes.get(address) {
            Some(node) => node,
            None => self.read_node(*address)?,
        };
        if node.header.level != *level || node.header.generation != *generation {
            return Err(bad("has another level or generation than its parent says"));
        }
        let found = match &node.body {
            Body::Node(pointers) => pointers.first().map(|pointer| pointer.key),
            Body::Leaf(items) => items.first().map(|item| item.key),
        };
        if first.is_some() && found != *first {
            return Err(bad("begins with another key than its parent says"));
        }
        Ok(node)
    }

    /// Reads a node from the first of its copies that is whole.
    fn read_node(&self, address: u64) -> Result<Arc<TreeBlock>> {
        let size = self.sb.nodesize as usize;
        let mut failure = None;
        for mirror in 0..self.mirrors(address)? {
            let mut bytes = vec![0; size];
            let read = self
                .read(&mut bytes, address, mirror)
                .and_then(|()| TreeBlock::parse(bytes, address, &self.geometry).map_err(error_of));
            match read {
                Ok(node) => {
                    let node = Arc::new(node);
                    self.nodes.put(address, Arc::clone(&node), 2 * size);
                    return Ok(node);
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| Error::corrupt(format!("btrfs: no node at {address}"))))
    }

    /// The leaf where `from` is or would be, and the first key after that leaf.
    fn leaf(&self, root: Root, from: &DiskKey) -> Result<(Arc<TreeBlock>, Option<DiskKey>)> {
        let mut expected = Expected {
            address: root.address,
            level: root.level,
            generation: root.generation,
            first: None,
        };
        let mut bound = None;
        loop {
            let node = self.node(&expected)?;
            let Body::Node(pointers) = &node.body else { return Ok((node, bound)) };
            let above = pointers.partition_point(|p| compare_keys(&p.key, from).is_le());
            if let Some(next) = pointers.get(above.max(1)) {
                bound = Some(next.key);
            }
            let (Some(pointer), Some(level)) =
                (pointers.get(above.saturating_sub(1)), expected.level.checked_sub(1))
            else {
                return Err(Error::corrupt("btrfs: a node has no children"));
            };
            expected = Expected {
                address: pointer.blockptr,
                level,
                generation: pointer.generation,
                first: Some(pointer.key),
            };
        }
    }

    /// Calls `visit` with the items from `from` on, in order, until it returns `false`.
    ///
    /// # Errors
    /// `Corrupt`, `Io`, and what `visit` gives.
    pub(super) fn for_each(
        &self,
        root: Root,
        from: DiskKey,
        visit: &mut dyn FnMut(&DiskKey, &[u8]) -> Result<bool>,
    ) -> Result<()> {
        self.walk(root, from, false, visit)
    }

    /// The same, from the last item at or before `from` on.
    pub(super) fn for_each_around(
        &self,
        root: Root,
        from: DiskKey,
        visit: &mut dyn FnMut(&DiskKey, &[u8]) -> Result<bool>,
    ) -> Result<()> {
        self.walk(root, from, true, visit)
    }

    fn walk(
        &self,
        root: Root,
        mut from: DiskKey,
        mut around: bool,
        visit: &mut dyn FnMut(&DiskKey, &[u8]) -> Result<bool>,
    ) -> Result<()> {
        loop {
            let (leaf, bound) = self.leaf(root, &from)?;
            let items = leaf.body.items().unwrap_or_default();
            let mut first = items.partition_point(|item| compare_keys(&item.key, &from).is_lt());
            if around && items.get(first).is_none_or(|item| item.key != from) {
                first = first.saturating_sub(1);
            }
            around = false;
            for item in &items[first..] {
                if bound.is_some_and(|bound| compare_keys(&item.key, &bound).is_ge()) {
                    return Err(Error::corrupt("btrfs: a leaf reaches into the next one"));
                }
                let data = leaf.item_data(item).unwrap_or_default();
                if !visit(&item.key, data)? {
                    return Ok(());
                }
            }
            // The bound is larger than where this round began: the rounds come to an end.
            match bound {
                Some(bound) => from = bound,
                None => return Ok(()),
            }
        }
    }

    /// The item of `wanted`, handed to `take`.
    pub(super) fn find<T>(
        &self,
        root: Root,
        wanted: DiskKey,
        take: impl FnOnce(&[u8]) -> Result<T>,
    ) -> Result<Option<T>> {
        let (leaf, _) = self.leaf(root, &wanted)?;
        let items = leaf.body.items().unwrap_or_default();
        match items.binary_search_by(|item| compare_keys(&item.key, &wanted)) {
            Ok(index) => take(leaf.item_data(&items[index]).unwrap_or_default()).map(Some),
            Err(_) => Ok(None),
        }
    }
}
