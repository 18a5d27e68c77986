//! How the name of a backing file becomes an open storage.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::storage::{FileStorage, Storage};

/// Opens backing files: the only way in which an image can reach another file.
pub trait OpenGate {
    /// Opens, for reading, the file that the image at `referrer` calls `name`. Returns the path to
    /// use in messages and for names inside that file.
    ///
    /// # Errors
    /// `Chain` where the name is refused or the file cannot be opened, `Locked`.
    fn open(&self, referrer: &Path, name: &str) -> Result<(PathBuf, Arc<dyn Storage>)>;
}

/// Opens files by path; relative names count from the directory of the image that stores them.
#[derive(Debug, Clone, Copy)]
pub struct FileGate {
    /// Take qemu's locks on each file.
    pub lock: bool,
}

/// The path that `name`, stored in the image at `referrer`, stands for.
///
/// # Errors
/// `Chain` for names with a protocol (`nbd:`, `json:`, ...): they would make reading a disk image
/// an access to something else.
pub(crate) fn resolve(referrer: &Path, name: &str) -> Result<PathBuf> {
    let first_part = name.split('/').next().unwrap_or_default();
    if first_part.contains(':') {
        return Err(Error::new(
            ErrorKind::Chain,
            format!(
                "backing file name '{name}' has a protocol; only plain file names are followed \
                 (a file name with a colon can be written as './name')"
            ),
        ));
    }
    Ok(referrer.parent().unwrap_or(Path::new("")).join(name))
}

impl FileGate {
    pub(super) fn open_file(self, referrer: &Path, name: &str) -> Result<(PathBuf, FileStorage)> {
        let path = resolve(referrer, name)?;
        let file = FileStorage::open(&path, false).map_err(|e| {
            Error::new(
                ErrorKind::Chain,
                format!("cannot open backing file '{}': {e}", path.display()),
            )
        })?;
        if self.lock {
            file.lock(&path, false)?;
        }
        Ok((path, file))
    }
}

impl OpenGate for FileGate {
    fn open(&self, referrer: &Path, name: &str) -> Result<(PathBuf, Arc<dyn Storage>)> {
        let (path, file) = self.open_file(referrer, name)?;
        Ok((path, Arc::new(file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_names_count_from_the_directory_of_the_image() {
        let resolve = |referrer: &str, name| resolve(Path::new(referrer), name).unwrap();
        assert_eq!(resolve("/a/top.qcow2", "base.qcow2"), Path::new("/a/base.qcow2"));
        assert_eq!(resolve("top.qcow2", "base.qcow2"), Path::new("base.qcow2"));
        assert_eq!(resolve("/a/top.qcow2", "/b/base.qcow2"), Path::new("/b/base.qcow2"));
        assert_eq!(resolve("/a/top.qcow2", "./10:30.qcow2"), Path::new("/a/./10:30.qcow2"));
    }

    #[test]
    fn names_with_a_protocol_are_refused() {
        for name in ["nbd://host/x", "json:{}", "http://x", "file:base", "10:30.qcow2"] {
            let error = resolve(Path::new("/a/top.qcow2"), name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Chain, "{name}");
        }
    }
}
