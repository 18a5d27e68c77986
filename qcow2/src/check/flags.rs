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
    what: &'static str,
}

/// Notes every wrong flag.
pub(super) fn check(
    storage: &dyn Storage,
    header: &Header,
    report: &mut CheckReport,
) -> Result<()> {
    visit(storage, header, None, &mut |wrong| {
        report.corruption(|| {
            format!(
                "the COPIED flag of the {} entry at {:#x} is wrong",
                wrong.what, wrong.at
            )
        });
        Ok(())
    })
}

/// Puts every wrong flag right, except in tables that overlap something else: what looks like a flag
/// there may be guest data. Refcounts must be right.
pub(super) fn fix(storage: &dyn Storage, header: &Header, map: &RefMap) -> Result<()> {
    visit(storage, header, Some(map), &mut |wrong| {
        storage
            .write_at(&wrong.word.to_be_bytes(), wrong.at)
            .map_err(|e| Error::io(format!("cannot write a table entry at {:#x}", wrong.at), e))
    })?;
    storage
        .flush()
        .map_err(|e| Error::io("cannot flush the image", e))
}

fn visit(
    storage: &dyn Storage,
    header: &Header,
    sparing: Option<&RefMap>,
    wrong: &mut dyn FnMut(Wrong) -> Result<()>,
) -> Result<()> {
    let g = header.geometry;
    let file_len = storage
        .len()
        .map_err(|e| Error::io("cannot tell the file's length", e))?;
    // A misaligned refcount block is a finding of its own.
    let Ok(mut refcounts) =
        Refcounts::load(storage, g, header.reftable_offset, header.reftable_clusters)
    else {
        return Ok(());
    };
    let mut test = |at: u64, word: u64, host: Option<HostOffset>, what| -> Result<()> {
        // Compressed clusters share host clusters and never have the flag.
        let one = match host {
            Some(host) => refcounts.get(storage, g.host_cluster(host))? == 1,
            None => false,
        };
        if one == (word & COPIED != 0) {
            return Ok(());
        }
        wrong(Wrong {
            at,
            word: if one { word | COPIED } else { word & !COPIED },
            what,
        })
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
        test(header.l1_offset.0 + index * 8, word, Some(table), "L1")?;
        tables.push(table);
    }
    tables.sort_unstable();
    tables.dedup();
    let per_entry = g.words_per_entry();
    for table in tables {
        if sparing.is_some_and(|map| map.is_overlap(g.host_cluster(table))) {
            continue;
        }
        let words = read_words(storage, table, (1 << g.l2_bits()) * per_entry)?;
        for (number, entry) in (0u64..).zip(words.chunks_exact(per_entry)) {
            let at = table.0 + number * per_entry as u64 * 8;
            match L2Entry::decode(entry[0], &g) {
                Ok(
                    L2Entry::Standard { host, .. }
                    | L2Entry::Zero {
                        host: Some(host), ..
                    },
                ) if host.0 < file_len => test(at, entry[0], Some(host), "L2")?,
                Ok(L2Entry::Compressed(_)) => test(at, entry[0], None, "compressed L2")?,
                _ => {}
            }
        }
    }
    Ok(())
}
