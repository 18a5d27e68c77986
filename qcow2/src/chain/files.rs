//! The open files of a chain, for somebody who reads it elsewhere.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{FileGate, OpenGate};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::open::OpenOptions;
use crate::storage::{FileStorage, Storage};

/// One file of a chain, open for reading.
#[derive(Debug, Clone)]
pub struct ChainFile {
    /// Its path.
    pub path: PathBuf,
    /// What the image above calls it; empty for the top.
    pub name: String,
    /// The file. Its locks last as long as it, or a duplicate of its descriptor, is open.
    pub file: Arc<FileStorage>,
}

/// Opens all files of the image at `path`, top first, as [`Image::open`] finds them: a referrer is
/// always the file before. Nothing is opened for writing, whatever `options` say.
///
/// # Errors
/// As [`Image::open`].
pub fn chain_files(path: &Path, options: &OpenOptions) -> Result<Vec<ChainFile>> {
    let options = options.clone().read_only();
    let open = || -> Result<Arc<FileStorage>> {
        let file = FileStorage::open(path, false);
        let file = file.map_err(|e| Error::io("cannot open the image", e))?;
        if options.lock {
            file.lock(path, false)?;
        }
        Ok(Arc::new(file))
    };
    let file = open().map_err(|e| e.in_file(path))?;
    let top = ChainFile { path: path.to_owned(), name: String::new(), file: Arc::clone(&file) };
    let gate = Recorder { inner: FileGate { lock: options.lock }, files: Mutex::new(vec![top]) };
    Image::open_storage(file, path, &gate, &options)?;
    Ok(gate.files.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Opens files as its gate does, and keeps what it opened.
struct Recorder {
    inner: FileGate,
    files: Mutex<Vec<ChainFile>>,
}

impl OpenGate for Recorder {
    fn open(&self, referrer: &Path, name: &str) -> Result<(PathBuf, Arc<dyn Storage>)> {
        let (path, file) = self.inner.open_file(referrer, name)?;
        let file = Arc::new(file);
        let opened =
            ChainFile { path: path.clone(), name: name.to_owned(), file: Arc::clone(&file) };
        self.files.lock().unwrap_or_else(PoisonError::into_inner).push(opened);
        Ok((path, file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::BackingFormat;
    use crate::image::create::{CreateOptions, create};

    #[test]
    fn the_files_of_a_chain_come_top_first_with_the_names_that_lead_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("base.raw"), vec![7; 1 << 20]).unwrap();
        let middle = CreateOptions::new(1 << 20).backing("base.raw", BackingFormat::Raw);
        create(&at("middle.qcow2"), &middle).unwrap();
        let top = CreateOptions::new(1 << 20).backing("middle.qcow2", BackingFormat::Qcow2);
        create(&at("top.qcow2"), &top).unwrap();

        let files = chain_files(&at("top.qcow2"), &OpenOptions::new()).unwrap();
        let found: Vec<_> = files.iter().map(|f| (f.path.clone(), f.name.as_str())).collect();
        let wanted = [
            (at("top.qcow2"), ""),
            (at("middle.qcow2"), "middle.qcow2"),
            (at("base.raw"), "base.raw"),
        ];
        assert_eq!(found, wanted);
        // They are locked for as long as they are held.
        assert!(Image::open(&at("middle.qcow2"), &OpenOptions::new()).is_err());
        drop(files);
        assert!(Image::open(&at("middle.qcow2"), &OpenOptions::new()).is_ok());

        std::fs::remove_file(at("base.raw")).unwrap();
        assert!(chain_files(&at("top.qcow2"), &OpenOptions::new()).is_err());
    }
}
