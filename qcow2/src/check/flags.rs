//! The `COPIED` flags of the active tables: set exactly where the refcount is one.

use super::refmap::RefMap;
use super::report::CheckReport;
use crate::error::{Error, Result};
use crate::header::Header;
use crate::meta::read_words;
use crate::refcount::Refcounts;
use crate::storage::Storage;
use crate::table::entry::{COPIED, L2Entry, decode_l1};
use crate::types::HostOffset;

/// A flag that is wrong: the word's place and its right content.
struct Wrong {
    at: u64,
    word: u64,
    /// What the word points to; `None` for compressed data.
    host: Option<HostOffset>,
    /// In an L2 table, not in the L1 table.
    in_l2: bool,
}

/// Notes every wrong flag.
pub(super) fn check(
    storage: &dyn Storage,
    header: &Header,
    report: &mut CheckReport,
) -> Result<()> {
    visit(storage, header, &mut |wrong| {
        report.corruption(|| {
            let level = if wrong.in_l2 { "L2" } else { "L1" };
            format!("the COPIED flag of the {level} entry at {:#x} is wrong", wrong.at)
        });
        Ok(())
    })
}

/// Puts every wrong flag right. A table that overlaps something else may be guest data, so there
/// only flags are taken that would let a write in place destroy metadata. Refcounts must be right.
pub(super) fn fix(storage: &dyn Storage, header: &Header, map: &RefMap) -> Result<()> {
    let overlaps = |at| map.is_overlap(header.geometry.host_cluster(at));
    visit(storage, header, &mut |wrong| {
        let protects = wrong.word & COPIED == 0 && wrong.host.is_some_and(overlaps);
        if wrong.in_l2 && overlaps(HostOffset(wrong.at)) && !protects {
            return Ok(());
        }
        storage
            .write_at(&wrong.word.to_be_bytes(), wrong.at)
            .map_err(|e| Error::io(format!("cannot write a table entry at {:#x}", wrong.at), e))
    })?;
    storage.flush().map_err(|e| Error::io("cannot flush the image", e))
}

fn visit(
    storage: &dyn Storage,
    header: &Header,
    wrong: &mut dyn FnMut(Wrong) -> Result<()>,
) -> Result<()> {
    let g = header.geometry;
    let file_len = storage.len().map_err(|e| Error::io("cannot tell the file's length", e))?;
    // A misaligned refcount block is a finding of its own.
    let Ok(mut refcounts) =
        Refcounts::load(storage, g, header.reftable_offset, header.reftable_clusters)
    else {
        return Ok(());
    };
    let mut test = |at: u64, word: u64, host: Option<HostOffset>, in_l2| -> Result<()> {
        // Compressed clusters share host clusters and never have the flag.
        let one = match host {
            Some(host) => refcounts.get(storage, g.host_cluster(host))? == 1,
            None => false,
        };
        if one == (word & COPIED != 0) {
            return Ok(());
        }
        wrong(Wrong { at, word: if one { word | COPIED } else { word & !COPIED }, host, in_l2 })
    };
    let mut tables = Vec::new();
    let l1 = read_words(storage, header.l1_offset, header.l1_entries as usize)?;
    for (index, word) in (0u64..).zip(l1) {
        let Ok(Some((table, _))) = decode_l1(word, &g) else {
            continue;
        };
        if table.0 >= file_len {
            continue;
        }
        test(header.l1_offset.0 + index * 8, word, Some(table), false)?;
        tables.push(table);
    }
    tables.sort_unstable();
    tables.dedup();
    let per_entry = g.words_per_entry();
    for table in tables {
        let words = read_words(storage, table, (1 << g.l2_bits()) * per_entry)?;
        for (number, entry) in (0u64..).zip(words.chunks_exact(per_entry)) {
            let at = table.0 + number * per_entry as u64 * 8;
            match L2Entry::decode(entry[0], &g) {
                Ok(L2Entry::Standard { host, .. } | L2Entry::Zero { host: Some(host), .. })
                    if host.0 < file_len =>
                {
                    test(at, entry[0], Some(host), true)?
                }
                Ok(L2Entry::Compressed(_)) => test(at, entry[0], None, true)?,
                _ => {}
            }
        }
    }
    Ok(())
}
