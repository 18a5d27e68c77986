//! An NTFS volume as a file system of handles.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::attribute::kind;
use super::boot::{BOOT_SECTOR, Geometry};
use super::bytes::u16_at;
use super::file::File;
use super::index::Directory;
use super::journal::{self, Overlay};
use super::mft::{Mft, NUMBER};
use super::names::{self, UpCase};
use super::stream::Stream;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{
    About, Attributes, Cursor, Entry, FileSystem, FileType, Node, Page, Piece, Place, Status,
};
use crate::source::Source;

const VOLUME: u64 = 3;
const ROOT: u64 = 5;
const BITMAP: u64 = 6;
const UPCASE: u64 = 10;
/// First record that is not the format's own.
const FIRST_USER: u64 = 24;
const DIRTY: u16 = 1;
const MAX_NAME: u64 = 1024;
const MAX_UPCASE: u64 = 128 << 10;
/// Largest bitmap whose bits are counted at opening: 512 GiB in clusters of 4 KiB.
const MAX_COUNTED: u64 = 16 << 20;
/// Open files and directories that are kept.
const KEPT: usize = 32;
/// Flags of a name: it has a reparse point; it is a directory.
const NAME_REPARSE: u32 = 0x400;
const NAME_DIRECTORY: u32 = 0x1000_0000;
const HIBERFIL: &[u8] = b"hiberfil.sys";
const HIBERNATED: &str =
    "Windows is hibernated on it: its newest changes are in the memory that it saved";

/// A few values by file reference, those used last.
struct Kept<T>(Mutex<VecDeque<(u64, Arc<T>)>>);

impl<T> Kept<T> {
    fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    fn find_or(&self, reference: u64, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = {
            let mut kept = lock();
            let at = kept.iter().position(|(of, _)| *of == reference);
            at.and_then(|at| kept.remove(at)).inspect(|found| kept.push_front(found.clone()))
        };
        if let Some((_, value)) = found {
            return Ok(value);
        }
        let value = Arc::new(make()?);
        let mut kept = lock();
        kept.push_front((reference, Arc::clone(&value)));
        kept.truncate(KEPT);
        Ok(value)
    }
}

/// An open volume.
pub(super) struct Ntfs {
    mft: Mft,
    overlay: Option<Arc<Overlay>>,
    about: About,
    root: u64,
    upcase: UpCase,
    streams: Kept<Stream>,
    directories: Kept<Directory>,
}

impl Ntfs {
    /// Opens the volume, and replays its log in memory where changes wait in it.
    ///
    /// # Errors
    /// `Corrupt`; `Io`.
    pub(super) fn open(source: &Arc<dyn Source>) -> Result<Self> {
        let mut boot = [0; BOOT_SECTOR];
        source.read_at(&mut boot, 0)?;
        let geometry = Geometry::parse(&boot)?;
        let mft = Mft::open(Arc::clone(source), geometry)?;
        let Some(why) = journal::pending(&mft)? else {
            let mut ntfs = Self::with(mft, None, Status::Clean)?;
            if ntfs.is_hibernated()? {
                ntfs.about.status = Status::Stale(HIBERNATED.to_owned());
            } else if ntfs.is_dirty()? {
                ntfs.about.status = Status::Stale(
                    "the volume is marked to be checked: it was not unmounted, or Windows found damage on it"
                        .to_owned(),
                );
            }
            return Ok(ntfs);
        };
        // A volume whose changes wait may not be readable before they are made: that is no failure yet.
        let before = Self::with(mft, None, Status::Stale(String::new()));
        let reason = match &before {
            Ok(ntfs) if ntfs.is_hibernated().unwrap_or(false) => HIBERNATED.to_owned(),
            _ => match Self::replayed(source, geometry) {
                Ok(ntfs) if !ntfs.is_hibernated()? => return Ok(ntfs),
                Ok(_) => HIBERNATED.to_owned(),
                Err(error) => {
                    format!("its journal could not be replayed ({}; {why})", error.message)
                }
            },
        };
        let mut ntfs = before?;
        ntfs.about.status = Status::Stale(reason);
        Ok(ntfs)
    }

    fn replayed(source: &Arc<dyn Source>, geometry: Geometry) -> Result<Self> {
        let overlay = journal::replay(&Mft::open(Arc::clone(source), geometry)?)?;
        let mft = Mft::open(Arc::<Overlay>::clone(&overlay), geometry)?;
        Self::with(mft, Some(overlay), Status::Replayed)
    }

    fn with(mft: Mft, overlay: Option<Arc<Overlay>>, status: Status) -> Result<Self> {
        let source = &*mft.source;
        let root = mft.record(ROOT)?.reference();
        let upcase = mft
            .value(&mft.record(UPCASE)?, kind::DATA, &[])?
            .ok_or_else(|| Error::corrupt("$UpCase has no data"))?
            .read_all(source, MAX_UPCASE)?;
        let label = match mft.value(&mft.record(VOLUME)?, kind::VOLUME_NAME, &[])? {
            Some(name) => names::to_utf8(&name.read_all(source, MAX_NAME)?),
            None => Vec::new(),
        };
        let about = About {
            kind: "ntfs".to_owned(),
            label: String::from_utf8_lossy(&label).into_owned(),
            uuid: format!("{:016X}", mft.geometry.serial),
            size: mft.geometry.size(),
            used: used(&mft)?,
            status,
        };
        let upcase = UpCase::new(&upcase);
        let (streams, directories) = (Kept::new(), Kept::new());
        Ok(Self { mft, overlay, about, root, upcase, streams, directories })
    }

    /// Whether the volume asks to be checked.
    fn is_dirty(&self) -> Result<bool> {
        match self.mft.value(&self.mft.record(VOLUME)?, kind::VOLUME_INFORMATION, &[])? {
            Some(value) => {
                let value = value.read_all(&*self.mft.source, MAX_NAME)?;
                Ok(u16_at(&value, 10)? & DIRTY != 0)
            }
            None => Err(Error::corrupt("$VOLUME_INFORMATION is missing")),
        }
    }

    /// Whether Windows will go on from what it saved in `hiberfil.sys`. After that was done, or was
    /// given up, the file begins otherwise.
    fn is_hibernated(&self) -> Result<bool> {
        let Some(file) = self.lookup(self.root(), HIBERFIL)? else { return Ok(false) };
        let mut head = [0; 4];
        let read = self.read_at(file, &mut head, 0)?;
        Ok(read == 4 && head.eq_ignore_ascii_case(b"hibr"))
    }

    fn directory(&self, node: Node) -> Result<Arc<Directory>> {
        self.directories.find_or(node.0, || {
            let record = self.mft.file(node.0)?;
            let wrong = || {
                let what = format!("file {} is no directory", record.number);
                Error::new(ErrorKind::NotADirectory, what)
            };
            // A junction has an index as well.
            match File::open(&self.mft, &record)?.attributes.file_type {
                FileType::Directory => Directory::open(&self.mft, &record)?.ok_or_else(wrong),
                _ => Err(wrong()),
            }
        })
    }

    fn stream(&self, node: Node) -> Result<Arc<Stream>> {
        self.streams.find_or(node.0, || {
            let record = self.mft.file(node.0)?;
            let number = record.number;
            let attributes = File::open(&self.mft, &record)?.attributes;
            match attributes.file_type {
                FileType::File => {}
                FileType::Opaque => {
                    let why = attributes.note.unwrap_or_default();
                    return Err(Error::unsupported(format!("file {number} cannot be read: {why}")));
                }
                _ => return Err(Error::new(ErrorKind::NotAFile, format!("{number} is no file"))),
            }
            Ok(self
                .mft
                .value(&record, kind::DATA, &[])?
                .unwrap_or_else(|| Stream::resident(Vec::new())))
        })
    }

    /// Whether a name of the directory is one of the format's own.
    fn is_hidden(directory: Node, reference: u64) -> bool {
        directory.0 & NUMBER == ROOT && reference & NUMBER < FIRST_USER
    }
}

/// Bytes of the clusters that are in use, where they are quickly counted.
fn used(mft: &Mft) -> Result<Option<u64>> {
    let Some(bitmap) = mft.value(&mft.record(BITMAP)?, kind::DATA, &[])? else { return Ok(None) };
    if bitmap.size > MAX_COUNTED {
        return Ok(None);
    }
    let bytes = bitmap.read_all(&*mft.source, MAX_COUNTED)?;
    let clusters = mft.geometry.size() / mft.geometry.cluster;
    let whole = usize::try_from(clusters / 8).unwrap_or(usize::MAX).min(bytes.len());
    let mut count: u64 = bytes[..whole].iter().map(|byte| u64::from(byte.count_ones())).sum();
    if let Some(last) = bytes.get(whole) {
        count += u64::from((last & ((1 << (clusters % 8)) - 1)).count_ones());
    }
    Ok(Some(count.saturating_mul(mft.geometry.cluster)))
}

impl FileSystem for Ntfs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node(self.root)
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        Ok(File::open(&self.mft, &self.mft.file(node.0)?)?.attributes)
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let index = self.directory(directory)?;
        let Some(wanted) = names::to_utf16(name) else { return Ok(None) };
        let exact: Vec<u8> = wanted.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        let mut found = None;
        index.walk(&self.mft, 0, &mut |entry, _| {
            if Self::is_hidden(directory, entry.reference) {
                return Ok(true);
            }
            if entry.utf16 == exact {
                found = Some(Node(entry.reference));
                return Ok(false);
            }
            if found.is_none() && self.upcase.same(entry.utf16, &wanted) {
                found = Some(Node(entry.reference));
            }
            Ok(true)
        })?;
        Ok(found)
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        let index = self.directory(directory)?;
        let limit = limit.max(1);
        let mut page = Page::default();
        let mut last = cursor;
        index.walk(&self.mft, cursor.0, &mut |entry, behind| {
            if Self::is_hidden(directory, entry.reference) {
                return Ok(true);
            }
            if page.entries.len() == limit {
                page.next = Some(last);
                return Ok(false);
            }
            let name = names::to_utf8(entry.utf16);
            if !names::is_fit(&name) {
                return Err(Error::corrupt(format!(
                    "the name {:?}",
                    String::from_utf8_lossy(&name)
                )));
            }
            // Only directories have one name, and so flags that are never out of date.
            let file_type = (entry.flags & (NAME_DIRECTORY | NAME_REPARSE) == NAME_DIRECTORY)
                .then_some(FileType::Directory);
            page.entries.push(Entry { name, node: Node(entry.reference), file_type });
            last = Cursor(behind);
            Ok(true)
        })?;
        Ok(page)
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let read = self.stream(file)?.read_at(&*self.mft.source, buf, offset);
        read.map_err(|e| super::record::in_record(file.0 & NUMBER, &e))
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        let record = self.mft.file(link.0)?;
        File::open(&self.mft, &record)?
            .target
            .ok_or_else(|| Error::new(ErrorKind::NotALink, format!("{} is no link", record.number)))
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let stream = self.stream(file)?;
        stream.layout(from, &mut |mut piece| {
            let lies = match piece.place {
                Place::Volume(at) => Some((at, piece.length)),
                Place::Encoded { offset, length } => Some((offset, length)),
                Place::Hole | Place::Elsewhere => None,
            };
            if let (Some(overlay), Some((at, length))) = (&self.overlay, lies)
                && overlay.covers(at, length)
            {
                piece.place = Place::Elsewhere;
            }
            visit(piece)
        })
    }
}
