//! ext.

use std::sync::Arc;

use super::FileSystem;
use crate::error::{Error, Result};
use crate::source::Source;

/// Whether `source` holds such a file system, by its signature.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(_source: &dyn Source) -> Result<bool> {
    Ok(false)
}

/// Opens it.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(_source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    Err(Error::unsupported("not read yet"))
}
