//! NTFS.
//!
//! ```text
//! boot -> mft (records, fixups, attribute lists) -> stream (values: runs, holes, LZNT1)
//!                                                -> index (directories)
//!         journal: $LogFile replayed into an overlay that everything above reads through
//! ```
//!
//! A [`Node`] is a file reference: the number of the record in the low 48 bits, above it how often the
//! record was used, so that a handle of a file that is gone names nothing. Records below 24 are the
//! format's own and are hidden. Alternate data streams are not shown.

mod attribute;
mod boot;
mod bytes;
mod file;
mod index;
mod journal;
mod lznt1;
mod mft;
mod names;
mod record;
mod reparse;
mod runs;
mod stream;
mod volume;

use std::sync::Arc;

use super::FileSystem;
use crate::error::Result;
use crate::source::Source;

/// Whether `source` holds such a file system, by its signature.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(source: &dyn Source) -> Result<bool> {
    let mut boot = [0; boot::BOOT_SECTOR];
    if source.size() < boot.len() as u64 {
        return Ok(false);
    }
    source.read_at(&mut boot, 0)?;
    Ok(boot::is_ntfs(&boot))
}

/// Opens it.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    Ok(Box::new(volume::Ntfs::open(source)?))
}
