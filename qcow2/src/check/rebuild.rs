//! New refcount structures at the end of the file, from counted references.
//!
//! The old structures stay in use until the header points to the new ones, which are durable by
//! then: a crash leaves the image as it was, or repaired.

use std::collections::BTreeSet;

use super::compare::read_block;
use super::refmap::{RefMap, Use};
use crate::error::{Error, ErrorKind, Result};
use crate::header::{Header, MAX_REFTABLE_BYTES, field};
use crate::meta::read_words;
use crate::refcount::{read_entry, write_entry};
use crate::storage::Storage;
use crate::types::{HostCluster, HostOffset};

/// Writes refcounts that equal `map` and lets the header point to them. Where something could not
/// be followed (`unreadable`), everything that the old refcounts call used stays so: it may be what
/// a broken reference led to, and must not be overwritten.
pub(super) fn rebuild(
    storage: &dyn Storage,
    header: &Header,
    map: &mut RefMap,
    unreadable: bool,
) -> Result<()> {
    let g = header.geometry;
    if unreadable {
        keep_what_was_used(storage, header, map)?;
    } else {
        forget_old_structures(storage, header, map)?;
    }
    let length = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
    let start = length.div_ceil(g.cluster_size()).max(map.end());
    let bits = g.refblock_bits();

    // The new structures are counted by themselves: repeat until nothing is added.
    let mut needed: BTreeSet<u64> = map.used().map(|(c, _)| c.0 >> bits).collect();
    needed.insert(start >> bits);
    let mut table_clusters = 1;
    loop {
        let entries = needed.last().map_or(1, |last| last + 1);
        table_clusters = (entries * 8).div_ceil(g.cluster_size()).max(table_clusters);
        if table_clusters << g.cluster_bits > MAX_REFTABLE_BYTES.max(g.cluster_size()) {
            return Err(Error::unsupported(
                "the file is too long for a refcount table; copy the image with qemu-img convert",
            ));
        }
        let before = needed.len();
        let count = table_clusters + before as u64;
        needed.extend(start >> bits..=(start + count - 1) >> bits);
        if needed.len() == before {
            break;
        }
    }
    for cluster in start..start + table_clusters + needed.len() as u64 {
        map.add(HostCluster(cluster), 1, Use::Exclusive)?;
    }
    let first_block = start + table_clusters;
    write_blocks(storage, header, map, &needed, first_block)?;

    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_REFTABLE_BYTES")]
    let mut table = vec![0; (table_clusters << g.cluster_bits) as usize];
    for (home, index) in (first_block..).zip(&needed) {
        #[allow(clippy::cast_possible_truncation, reason = "inside the table")]
        let at = *index as usize * 8;
        table[at..at + 8].copy_from_slice(&(home << g.cluster_bits).to_be_bytes());
    }
    let write = |bytes: &[u8], offset: u64| {
        storage.write_at(bytes, offset).map_err(|e| Error::io("cannot write new refcounts", e))
    };
    let sync = || storage.flush().map_err(|e| Error::io("cannot flush the image", e));
    write(&table, start << g.cluster_bits)?;
    sync()?;
    let mut pointer = (start << g.cluster_bits).to_be_bytes().to_vec();
    #[allow(clippy::cast_possible_truncation, reason = "at most MAX_REFTABLE_BYTES")]
    pointer.extend_from_slice(&(table_clusters as u32).to_be_bytes());
    write(&pointer, field::REFTABLE_OFFSET)?;
    sync()
}

/// Reads the old refcount table: (index, offset) of each aligned block.
fn old_blocks(storage: &dyn Storage, header: &Header) -> Result<Vec<(u64, HostOffset)>> {
    let g = header.geometry;
    let words = u64::from(header.reftable_clusters) << g.cluster_bits >> 3;
    #[allow(clippy::cast_possible_truncation, reason = "bounded by the header's check")]
    let words = read_words(storage, header.reftable_offset, words as usize)?;
    Ok((0..)
        .zip(words)
        .map(|(index, word)| (index, HostOffset(word & !0x1ff)))
        .filter(|(_, at)| at.0 != 0 && at.0.is_multiple_of(g.cluster_size()))
        .collect())
}

/// Counts one reference to each cluster of the file that has a refcount but no reference.
fn keep_what_was_used(storage: &dyn Storage, header: &Header, map: &mut RefMap) -> Result<()> {
    let g = header.geometry;
    let bits = g.refblock_bits();
    let length = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
    let file_clusters = length.div_ceil(g.cluster_size());
    for (index, at) in old_blocks(storage, header)? {
        if at.0 >= length || index << bits >= file_clusters {
            continue;
        }
        let bytes = read_block(storage, header, at)?;
        for entry in 0..1usize << bits {
            let cluster = HostCluster((index << bits) + entry as u64);
            if cluster.0 < file_clusters
                && map.get(cluster) == 0
                && read_entry(&bytes, g.refcount_order, entry) > 0
            {
                map.add(cluster, 1, Use::Data)?;
            }
        }
    }
    Ok(())
}

fn forget_old_structures(storage: &dyn Storage, header: &Header, map: &mut RefMap) -> Result<()> {
    let g = header.geometry;
    let table = g.host_cluster(header.reftable_offset);
    for i in 0..u64::from(header.reftable_clusters) {
        map.remove(table + i);
    }
    for (_, block) in old_blocks(storage, header)? {
        map.remove(g.host_cluster(block));
    }
    Ok(())
}

fn write_blocks(
    storage: &dyn Storage,
    header: &Header,
    map: &RefMap,
    needed: &BTreeSet<u64>,
    first_block: u64,
) -> Result<()> {
    let g = header.geometry;
    let bits = g.refblock_bits();
    for (home, index) in (first_block..).zip(needed) {
        #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
        let mut bytes = vec![0; g.cluster_size() as usize];
        for entry in 0..1usize << bits {
            let count = u64::from(map.get(HostCluster((index << bits) + entry as u64)));
            if count > g.refcount_max() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "a cluster has {count} references, more than refcounts of this width hold; \
                         convert the image with qemu-img"
                    ),
                ));
            }
            write_entry(&mut bytes, g.refcount_order, entry, count);
        }
        storage
            .write_at(&bytes, home << g.cluster_bits)
            .map_err(|e| Error::io("cannot write new refcounts", e))?;
    }
    Ok(())
}
