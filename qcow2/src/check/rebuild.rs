//! New refcount structures at the end of the file, from counted references.
//!
//! The old structures stay in use until the header points to the new ones, which are durable by
//! then: a crash leaves the image as it was, or repaired.

use std::collections::BTreeSet;

use super::refmap::RefMap;
use crate::error::{Error, ErrorKind, Result};
use crate::header::{Header, MAX_REFTABLE_BYTES, field};
use crate::meta::read_words;
use crate::refcount::write_entry;
use crate::storage::Storage;
use crate::types::{HostCluster, HostOffset};

/// Writes refcounts that equal `map` and lets the header point to them. Where something could not
/// be followed (`unreadable`), the old structures are kept as used, so that nothing is overwritten.
pub(super) fn rebuild(
    storage: &dyn Storage,
    header: &Header,
    mut map: RefMap,
    unreadable: bool,
) -> Result<()> {
    let g = header.geometry;
    if !unreadable {
        forget_old_structures(storage, header, &mut map)?;
    }
    let length = storage
        .len()
        .map_err(|e| Error::io("cannot tell the file's length", e))?;
    let start = length.div_ceil(g.cluster_size()).max(map.end());
    let bits = g.refblock_bits();

    // The new structures are counted by themselves: repeat until nothing is added.
    let mut needed: BTreeSet<u64> = map.used().map(|(c, _)| c.0 >> bits).collect();
    let mut table_clusters = 1;
    loop {
        let count = table_clusters + needed.len() as u64;
        let before = (needed.len(), table_clusters);
        needed.extend(start >> bits..=(start + count - 1) >> bits);
        let entries = needed.last().map_or(1, |last| last + 1);
        table_clusters = (entries * 8).div_ceil(g.cluster_size()).max(table_clusters);
        if before == (needed.len(), table_clusters) {
            break;
        }
    }
    if table_clusters << g.cluster_bits > MAX_REFTABLE_BYTES.max(g.cluster_size()) {
        return Err(Error::unsupported(
            "the file is too long for a refcount table",
        ));
    }
    for cluster in start..start + table_clusters + needed.len() as u64 {
        map.add(HostCluster(cluster))?;
    }
    let first_block = start + table_clusters;
    write_blocks(storage, header, &map, &needed, first_block)?;

    #[allow(
        clippy::cast_possible_truncation,
        reason = "at most MAX_REFTABLE_BYTES"
    )]
    let mut table = vec![0; (table_clusters << g.cluster_bits) as usize];
    for (home, index) in (first_block..).zip(&needed) {
        #[allow(clippy::cast_possible_truncation, reason = "inside the table")]
        let at = *index as usize * 8;
        table[at..at + 8].copy_from_slice(&(home << g.cluster_bits).to_be_bytes());
    }
    let write = |bytes: &[u8], offset: u64| {
        storage
            .write_at(bytes, offset)
            .map_err(|e| Error::io("cannot write new refcounts", e))
    };
    let sync = || {
        storage
            .flush()
            .map_err(|e| Error::io("cannot flush the image", e))
    };
    write(&table, start << g.cluster_bits)?;
    sync()?;
    let mut pointer = (start << g.cluster_bits).to_be_bytes().to_vec();
    #[allow(
        clippy::cast_possible_truncation,
        reason = "at most MAX_REFTABLE_BYTES"
    )]
    pointer.extend_from_slice(&(table_clusters as u32).to_be_bytes());
    write(&pointer, field::REFTABLE_OFFSET)?;
    sync()
}

fn forget_old_structures(storage: &dyn Storage, header: &Header, map: &mut RefMap) -> Result<()> {
    let g = header.geometry;
    let table = g.host_cluster(header.reftable_offset);
    for i in 0..u64::from(header.reftable_clusters) {
        map.remove(table + i);
    }
    let words = u64::from(header.reftable_clusters) << g.cluster_bits >> 3;
    #[allow(
        clippy::cast_possible_truncation,
        reason = "bounded by the header's check"
    )]
    for word in read_words(storage, header.reftable_offset, words as usize)? {
        let block = HostOffset(word & !0x1ff);
        if block.0 != 0 && block.0.is_multiple_of(g.cluster_size()) {
            map.remove(g.host_cluster(block));
        }
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
        #[allow(
            clippy::cast_possible_truncation,
            reason = "a cluster is at most 2 MiB"
        )]
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
