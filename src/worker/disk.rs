//! A disk of the machine inside the worker: an image over files that came as descriptors.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use guest::source::check_range;
use guest::{DiskRange, Error, ErrorKind, Source};
use qcow2::storage::{FileStorage, Identity, Storage};
use qcow2::{Image, OpenGate, OpenOptions};

use super::protocol::FileAbout;

/// Memory for the mapping of one disk, in bytes.
const METADATA: usize = 4 << 20;

/// A file that is open for reading. Its length is that of the start: nobody changes a restore point.
struct ReadOnlyFile {
    file: Arc<FileStorage>,
    length: u64,
}

impl ReadOnlyFile {
    fn new(file: Arc<FileStorage>) -> io::Result<Self> {
        let length = file.len()?;
        Ok(Self { file, length })
    }

    /// Refuses what was read where the file has become shorter: what is missing is no zeroes.
    fn check(&self) -> io::Result<()> {
        let length = self.file.len()?;
        if length < self.length {
            let text = format!("the file ends at byte {length}, and had {}", self.length);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        Ok(())
    }
}

impl Storage for ReadOnlyFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)?;
        self.check()
    }

    fn read_once_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_once_at(buf, offset)?;
        self.check()
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn identity(&self) -> Option<Identity> {
        self.file.identity()
    }
}

/// A file of a chain: its path, what the image above calls it, and the file.
type Link = (PathBuf, String, Arc<FileStorage>);

/// A file as it came: what was told of it, and its descriptors.
pub(super) struct Received {
    pub(super) about: FileAbout,
    pub(super) file: OwnedFd,
    /// For reads around the page cache.
    pub(super) direct: Option<OwnedFd>,
}

impl Received {
    fn link(self) -> io::Result<Link> {
        let mut file = FileStorage::from_file(File::from(self.file))?;
        file.read_with(self.direct.map(File::from));
        let path = PathBuf::from(OsString::from_vec(self.about.path));
        Ok((path, self.about.name, Arc::new(file)))
    }
}

/// A file below the top: who calls it what, its path, and the file until it is opened.
struct Below {
    referrer: PathBuf,
    name: String,
    path: PathBuf,
    storage: Option<ReadOnlyFile>,
}

/// Knows the files that came, each under the name that the image above it has for it. There are no
/// others.
struct Gate(Mutex<Vec<Below>>);

impl OpenGate for Gate {
    fn open(&self, referrer: &Path, name: &str) -> qcow2::Result<(PathBuf, Arc<dyn Storage>)> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = files
            .iter_mut()
            .find(|file| file.referrer == referrer && file.name == name)
            .and_then(|file| Some((file.path.clone(), file.storage.take()?)));
        match known {
            Some((path, storage)) => Ok((path, Arc::new(storage))),
            None => Err(qcow2::Error::new(
                qcow2::ErrorKind::Chain,
                format!("backing file '{name}' is not among those that were opened"),
            )),
        }
    }
}

/// A disk of the machine.
struct Disk {
    image: Image,
    number: u32,
}

impl Source for Disk {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> guest::Result<()> {
        check_range(self.size(), offset, buf.len())?;
        self.image
            .read_at(buf, offset)
            .map_err(|e| Error::new(ErrorKind::Io, format!("disk {}: {e}", self.number)))
    }

    fn trace(&self, offset: u64, length: u64, visit: &mut dyn FnMut(DiskRange)) {
        let offset = offset.min(self.size());
        let length = length.min(self.size() - offset);
        if length > 0 {
            visit(DiskRange { disk: self.number, offset, length });
        }
    }
}

/// Opens a disk over its chain, which comes top first.
///
/// # Errors
/// `Io` where the files are no chain, or the image cannot be read.
pub(super) fn open(number: u32, chain: Vec<Received>) -> guest::Result<Arc<dyn Source>> {
    let links = chain.into_iter().map(Received::link).collect::<io::Result<Vec<_>>>();
    let image = links.map_err(qcow2_error).and_then(image);
    let failed = |e| Error::new(ErrorKind::Io, format!("disk {number}: {e}"));
    Ok(Arc::new(Disk { image: image.map_err(failed)?, number }))
}

/// Opens the image at `path` with its chain, for reading: as a worker has it, locked.
///
/// # Errors
/// Those of [`qcow2::chain_files`].
pub(super) fn open_image(path: &Path) -> qcow2::Result<Image> {
    let files = qcow2::chain_files(path, &OpenOptions::new())?;
    image(files.into_iter().map(|file| (file.path, file.name, file.file)).collect())
}

/// The image over a chain of open files, the top first. A file that becomes shorter is an error.
fn image(chain: Vec<Link>) -> qcow2::Result<Image> {
    let mut files = chain.into_iter().map(|(path, name, file)| {
        let file = ReadOnlyFile::new(file).map_err(qcow2_error)?;
        qcow2::Result::Ok((path, name, file))
    });
    let none = || qcow2::Error::new(qcow2::ErrorKind::Chain, "it has no files");
    let (top, _, storage) = files.next().ok_or_else(none)??;
    let mut below = Vec::new();
    let mut referrer = top.clone();
    for file in files {
        let (path, name, storage) = file?;
        let above = std::mem::replace(&mut referrer, path.clone());
        below.push(Below { referrer: above, name, path, storage: Some(storage) });
    }
    let options = OpenOptions { metadata_cache: METADATA, lock: false, ..OpenOptions::new() };
    let gate = Gate(Mutex::new(below));
    Image::open_storage(Arc::new(storage), &top, &gate, &options.read_only())
}

fn qcow2_error(error: io::Error) -> qcow2::Error {
    qcow2::Error::new(qcow2::ErrorKind::Io, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2::{BackingFormat, CreateOptions, create};

    fn chain(dir: &Path) -> Vec<Received> {
        let (base, top) = (dir.join("base.qcow2"), dir.join("top.qcow2"));
        create(&base, &CreateOptions::new(1 << 20)).unwrap();
        let image = Image::open(&base, &OpenOptions::new()).unwrap();
        image.write_at(b"below", 4096).unwrap();
        image.close().unwrap();
        let options = CreateOptions::new(1 << 20).backing("base.qcow2", BackingFormat::Qcow2);
        create(&top, &options).unwrap();
        let files = qcow2::chain_files(&top, &OpenOptions::new()).unwrap();
        let received = files.into_iter().map(|file| {
            let clone = |file: &File| OwnedFd::from(file.try_clone().unwrap());
            let direct = file.file.direct_reads().map(clone);
            let path = file.path.into_os_string().into_vec();
            let about = FileAbout { path, name: file.name, direct: direct.is_some() };
            Received { about, file: clone(file.file.file()), direct }
        });
        received.collect()
    }

    #[test]
    fn a_chain_that_came_as_descriptors_reads_as_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let disk = open(2, chain(dir.path())).unwrap();
        let mut bytes = [0; 5];
        disk.read_at(&mut bytes, 4096).unwrap();
        assert_eq!(&bytes, b"below");
        assert_eq!(disk.size(), 1 << 20);
        assert_eq!(disk.read_at(&mut bytes, 1 << 20).unwrap_err().kind, ErrorKind::Corrupt);
        let mut found = Vec::new();
        disk.trace(4096, 1 << 30, &mut |range| found.push(range));
        assert_eq!(found, [DiskRange { disk: 2, offset: 4096, length: (1 << 20) - 4096 }]);
    }

    #[test]
    fn a_file_that_is_cut_off_while_it_is_open_gives_no_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let disk = open(0, chain(dir.path())).unwrap();
        let base = File::options().write(true).open(dir.path().join("base.qcow2")).unwrap();
        base.set_len(base.metadata().unwrap().len() - 65_536).unwrap();
        let mut bytes = [0; 5];
        assert_eq!(disk.read_at(&mut bytes, 4096).unwrap_err().kind, ErrorKind::Io);
    }

    #[test]
    fn files_that_did_not_come_are_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = chain(dir.path());
        files.truncate(1);
        let error = open(0, files).err().unwrap();
        assert!(error.message.contains("not among those"), "{error}");
        let mut files = chain(tempfile::tempdir().unwrap().path());
        files[1].about.name = "other.qcow2".into();
        assert!(open(0, files).is_err());
        assert!(open(0, Vec::new()).is_err());
    }
}
