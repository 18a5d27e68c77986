//! Stored refcounts against counted references.

use super::refmap::RefMap;
use super::report::CheckReport;
use crate::error::{Error, Result};
use crate::header::Header;
use crate::meta::read_words;
use crate::refcount::{read_entry, write_entry};
use crate::storage::Storage;
use crate::types::{HostCluster, HostOffset};

/// The refcount block at `at`.
pub(super) fn read_block(
    storage: &dyn Storage,
    header: &Header,
    at: HostOffset,
) -> Result<Vec<u8>> {
    #[allow(clippy::cast_possible_truncation, reason = "a cluster is at most 2 MiB")]
    let mut bytes = vec![0; header.geometry.cluster_size() as usize];
    storage
        .read_at(&mut bytes, at.0)
        .map_err(|e| Error::io(format!("cannot read the refcount block at {at}"), e))?;
    Ok(bytes)
}

/// Notes every cluster whose refcount differs from its references.
pub(super) fn compare(
    storage: &dyn Storage,
    header: &Header,
    map: &RefMap,
    blocks: &[(u64, HostOffset)],
    report: &mut CheckReport,
) -> Result<()> {
    let g = header.geometry;
    let bits = g.refblock_bits();
    for (index, at) in blocks {
        let bytes = read_block(storage, header, *at)?;
        for entry in 0..1usize << bits {
            let stored = read_entry(&bytes, g.refcount_order, entry);
            let cluster = HostCluster((index << bits) + entry as u64);
            let counted = u64::from(map.get(cluster));
            let at = g.host_offset(cluster);
            let sentence =
                || format!("the cluster at {at} has refcount {stored} but {counted} reference(s)");
            if stored < counted {
                report.corruption(sentence);
            } else if stored > counted {
                report.leak(sentence);
                let end = at.0.saturating_add(g.cluster_size());
                report.image_end_offset = report.image_end_offset.max(end);
            }
        }
    }
    // What no block counts has refcount 0. Blocks come in ascending order, as clusters do.
    let mut known = blocks.iter().map(|(index, _)| *index).peekable();
    for (cluster, counted) in map.used() {
        let index = cluster.0 >> bits;
        while known.peek().is_some_and(|k| *k < index) {
            known.next();
        }
        if known.peek() != Some(&index) {
            let at = g.host_offset(cluster);
            report.corruption(|| {
                format!("the cluster at {at} has no refcount block but {counted} reference(s)")
            });
        }
    }
    Ok(())
}

/// Writes every refcount above its references down to them. Safe at any crash point: a count that
/// is still too high is only a leak.
pub(super) fn lower_leaks(storage: &dyn Storage, header: &Header, map: &RefMap) -> Result<()> {
    let g = header.geometry;
    let bits = g.refblock_bits();
    let words = u64::from(header.reftable_clusters) << g.cluster_bits >> 3;
    #[allow(clippy::cast_possible_truncation, reason = "bounded by the header's check")]
    let table = read_words(storage, header.reftable_offset, words as usize)?;
    for (index, word) in (0u64..).zip(table) {
        let at = HostOffset(word & !0x1ff);
        if at.0 == 0 {
            continue;
        }
        let mut bytes = read_block(storage, header, at)?;
        let mut changed = false;
        for entry in 0..1usize << bits {
            let counted = u64::from(map.get(HostCluster((index << bits) + entry as u64)));
            if read_entry(&bytes, g.refcount_order, entry) > counted {
                write_entry(&mut bytes, g.refcount_order, entry, counted);
                changed = true;
            }
        }
        if changed {
            storage
                .write_at(&bytes, at.0)
                .map_err(|e| Error::io(format!("cannot write the refcount block at {at}"), e))?;
        }
    }
    storage.flush().map_err(|e| Error::io("cannot flush the image", e))
}
