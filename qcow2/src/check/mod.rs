//! Checking and repairing an image's metadata.
//!
//! Every reference in the image is counted ([`walk`], [`beside`]) into a map of the file's clusters
//! ([`refmap`]) and compared with the stored refcounts ([`compare`]). Repair writes leaked counts
//! down in place, or builds the refcounts anew at the end of the file ([`rebuild`]).

mod beside;
mod compare;
mod flags;
mod rebuild;
mod refmap;
mod report;
mod walk;

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::header::{Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, field};
use crate::storage::{FileStorage, Storage};
pub use report::{CheckReport, Repair};
use walk::Walk;

/// Checks the image at `path`, and repairs it as `repair` says. Backing files are not looked at.
///
/// # Errors
/// `Io`, `Locked`, `NotQcow2`, `Unsupported`; `Corrupt` where the header itself is beyond use.
/// Findings are no errors: the report has them.
pub fn check(path: &Path, repair: Repair) -> Result<CheckReport> {
    let run = || {
        let writes = repair != Repair::None;
        let file =
            FileStorage::open(path, writes).map_err(|e| Error::io("cannot open the image", e))?;
        file.lock(path, writes)?;
        check_storage(&file, repair)
    };
    run().map_err(|e| e.in_file(path))
}

/// Checks the image in `storage`, which nobody else may change meanwhile.
///
/// # Errors
/// As [`check`].
pub fn check_storage(storage: &dyn Storage, repair: Repair) -> Result<CheckReport> {
    let header = Header::read(storage)?;
    let mut before = inspect(storage, &header)?;
    let mut report = before.report;
    match repair {
        Repair::None => return Ok(report),
        Repair::Leaks if report.corruptions == 0 && report.leaks > 0 => {
            compare::lower_leaks(storage, &header, &before.map)?;
            // A refcount that came down to one brings its flag back.
            flags::fix(storage, &header, &before.map)?;
        }
        Repair::Leaks => return Ok(report),
        Repair::All => {
            let bits = header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
            if report.corruptions == 0 && report.leaks == 0 && bits == 0 {
                return Ok(report);
            }
            rebuild::rebuild(storage, &header, &mut before.map, before.unreadable)?;
            flags::fix(storage, &Header::read(storage)?, &before.map)?;
        }
    }
    let header = Header::read(storage)?;
    let after = inspect(storage, &header)?.report;
    report.corruptions_fixed = report.corruptions.saturating_sub(after.corruptions);
    report.leaks_fixed = report.leaks.saturating_sub(after.leaks);
    report.corruptions = after.corruptions;
    report.leaks = after.leaks;
    report.image_end_offset = after.image_end_offset;
    if repair == Repair::All && after.corruptions == 0 {
        clear_bits(storage, &header, INCOMPAT_DIRTY | INCOMPAT_CORRUPT)?;
    }
    Ok(report)
}

struct Inspection {
    report: CheckReport,
    map: refmap::RefMap,
    /// Something that is referenced could not be followed.
    unreadable: bool,
}

fn inspect(storage: &dyn Storage, header: &Header) -> Result<Inspection> {
    let Walk { map, mut report, unreadable, refcount_blocks, .. } = Walk::new(storage, header)?;
    compare::compare(storage, header, &map, &refcount_blocks, &mut report)?;
    flags::check(storage, header, &mut report)?;
    Ok(Inspection { report, map, unreadable })
}

/// Builds the refcounts of an image anew from what its tables refer to, and clears its dirty bit:
/// what a program must do that finds the bit set and wants to write.
///
/// # Errors
/// `Corrupt` where tables cannot be followed or overlap: the image is as before. `Io`, `NoSpace`.
pub(crate) fn rebuild_refcounts(storage: &dyn Storage, header: &Header) -> Result<()> {
    let mut walk = Walk::new(storage, header)?;
    if walk.report.corruptions > 0 {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "the image was not closed cleanly and its tables are damaged ({}); run a check \
                 with repair",
                walk.report.findings.first().map_or("no details", String::as_str)
            ),
        ));
    }
    rebuild::rebuild(storage, header, &mut walk.map, false)?;
    let header = Header::read(storage)?;
    flags::fix(storage, &header, &walk.map)?;
    clear_bits(storage, &header, INCOMPAT_DIRTY)
}

fn clear_bits(storage: &dyn Storage, header: &Header, bits: u64) -> Result<()> {
    if header.incompatible & bits == 0 {
        return Ok(());
    }
    let word = (header.incompatible & !bits).to_be_bytes();
    storage
        .write_at(&word, field::INCOMPATIBLE)
        .and_then(|()| storage.flush())
        .map_err(|e| Error::io("cannot update the header", e))
}
