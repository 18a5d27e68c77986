//! A disk of the machine inside the worker: an image over files that came as descriptors.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use guest::source::check_range;
use guest::{DiskRange, Error, ErrorKind, Source};
use qcow2::storage::{Identity, Storage};
use qcow2::{Image, OpenGate, OpenOptions};
use rustix::fs::{FileType, SeekFrom};

use super::protocol::FileAbout;

/// Memory for the mapping of one disk, in bytes.
const METADATA: usize = 4 << 20;

/// A file that is open for reading. Its length is that of the start: nobody changes a restore point.
struct ReadOnlyFile {
    file: File,
    length: u64,
    identity: Identity,
}

impl ReadOnlyFile {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let meta = rustix::fs::fstat(&fd)?;
        let length = match FileType::from_raw_mode(meta.st_mode) {
            FileType::RegularFile => meta.st_size.cast_unsigned(),
            FileType::BlockDevice => rustix::fs::seek(&fd, SeekFrom::End(0))?,
            _ => return Err(io::Error::other("neither a regular file nor a block device")),
        };
        let identity = Identity { device: meta.st_dev, inode: meta.st_ino };
        Ok(Self { file: File::from(fd), length, identity })
    }
}

impl Storage for ReadOnlyFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                // It was longer when it was opened: what is missing is no zeroes.
                Ok(0) if offset < self.length => {
                    let text = format!("the file ends at byte {offset}, and had {}", self.length);
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
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
        Some(self.identity)
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
struct Received(Mutex<Vec<Below>>);

impl OpenGate for Received {
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
pub(super) fn open(
    number: u32,
    chain: Vec<(FileAbout, OwnedFd)>,
) -> guest::Result<Arc<dyn Source>> {
    let failed =
        |e: &dyn std::fmt::Display| Error::new(ErrorKind::Io, format!("disk {number}: {e}"));
    let mut files = chain.into_iter().map(|(about, fd)| {
        let path = PathBuf::from(OsString::from_vec(about.path));
        ReadOnlyFile::new(fd).map(|file| (path, about.name, file)).map_err(|e| failed(&e))
    });
    let (top, _, storage) = files.next().ok_or_else(|| failed(&"it has no files"))??;
    let mut below = Vec::new();
    let mut referrer = top.clone();
    for file in files {
        let (path, name, storage) = file?;
        let above = std::mem::replace(&mut referrer, path.clone());
        below.push(Below { referrer: above, name, path, storage: Some(storage) });
    }
    let options = OpenOptions { metadata_cache: METADATA, lock: false, ..OpenOptions::new() };
    let gate = Received(Mutex::new(below));
    let image = Image::open_storage(Arc::new(storage), &top, &gate, &options.read_only());
    Ok(Arc::new(Disk { image: image.map_err(|e| failed(&e))?, number }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2::{BackingFormat, CreateOptions, create};

    fn chain(dir: &Path) -> Vec<(FileAbout, OwnedFd)> {
        let (base, top) = (dir.join("base.qcow2"), dir.join("top.qcow2"));
        create(&base, &CreateOptions::new(1 << 20)).unwrap();
        let image = Image::open(&base, &OpenOptions::new()).unwrap();
        image.write_at(b"below", 4096).unwrap();
        image.close().unwrap();
        let options = CreateOptions::new(1 << 20).backing("base.qcow2", BackingFormat::Qcow2);
        create(&top, &options).unwrap();
        let files = qcow2::chain_files(&top, &OpenOptions::new()).unwrap();
        let received = files.into_iter().map(|file| {
            let path = file.path.into_os_string().into_vec();
            (FileAbout { path, name: file.name }, file.file.file().try_clone().unwrap().into())
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
        files[1].0.name = "other.qcow2".into();
        assert!(open(0, files).is_err());
        assert!(open(0, Vec::new()).is_err());
    }
}
