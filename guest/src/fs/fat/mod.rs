//! FAT12, FAT16 and FAT32, with long names, after Microsoft's specification of 2005.
//!
//! A node is the byte of the volume where the short entry lies; 0 is the root. Nothing is written twice in
//! FAT, and there is no journal: a volume that was not unmounted is shown as it lies, and says so.
//!
//! Times on FAT are those of a wall clock in no known zone; they are taken as UTC. Short names without a
//! long name are taken as code page 437.

mod boot;
pub(super) mod bytes;
mod entry;
pub(super) mod heap;
pub(super) mod names;
mod pieces;
pub(super) mod table;
pub(super) mod time;

use std::sync::Arc;

use super::{
    About, Attributes, Cursor, Entry, FileSystem, FileType, Node, Page, Piece, Place, Status,
};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;
use boot::{Boot, RootPlace};
use entry::{LongName, Short, Slot};
use heap::{Extent, Heap, Span};
use names::{Fold, Search, from_wtf8, to_wtf8};
use table::{Table, Width};

/// Bytes of a directory, as the specification bounds it.
const DIRECTORY: u64 = 65_536 * 32;
/// What a volume says that was in use.
pub(super) const IN_USE: &str =
    "the volume was not unmounted: what was being written may be missing or half written";

/// Whether `source` holds such a file system, by its boot sector.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(source: &dyn Source) -> Result<bool> {
    if source.size() < boot::LENGTH as u64 {
        return Ok(false);
    }
    let mut sector = [0; boot::LENGTH];
    source.read_at(&mut sector, 0)?;
    Ok(boot::looks_like(&sector))
}

/// Opens it.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    let mut sector = [0; boot::LENGTH];
    source.read_at(&mut sector, 0)?;
    let boot = Boot::parse(&sector)?;
    let table = Table::new(source, boot.width, boot.table, boot.clusters);
    let mut walker = table.walker();
    let (kind, unmounted) = match boot.width {
        Width::Fat12 => ("fat12", true),
        Width::Fat16 => ("fat16", walker.raw(1)? & 0x8000 != 0),
        _ => ("fat32", walker.raw(1)? & 0x0800_0000 != 0),
    };
    drop(walker);
    let used = match boot.width {
        Width::Fat12 | Width::Fat16 => Some(u64::from(table.used()?) * boot.cluster),
        _ => None,
    };
    let clean = unmounted && !boot.dirty;
    let status = if clean { Status::Clean } else { Status::Stale(IN_USE.to_owned()) };
    let mut fat = Fat {
        about: About {
            kind: kind.to_owned(),
            label: String::new(),
            uuid: boot.serial.map_or(String::new(), serial),
            size: boot.size,
            used,
            status,
        },
        wide: boot.width == Width::Fat32,
        root: boot.root,
        heap: Heap::new(source, table, boot.heap, boot.cluster),
        fold: Fold::Unicode,
    };
    fat.about.label = match fat.label() {
        Ok(Some(label)) => label,
        Ok(None) if boot.label == *b"NO NAME    " => String::new(),
        Err(e) if e.kind == ErrorKind::Io => return Err(e),
        _ => entry::decode(boot.label.trim_ascii_end(), false),
    };
    Ok(Box::new(fat))
}

/// A serial number as people write it.
pub(super) fn serial(number: u32) -> String {
    format!("{:04X}-{:04X}", number >> 16, number & 0xffff)
}

/// What is called with an entry: the number of the slot after it, its name, its node, its slot. It returns
/// whether to go on.
type VisitEntry<'a> = dyn FnMut(u64, Vec<u16>, Node, &[u8; 32]) -> Result<bool> + 'a;

struct Fat {
    about: About,
    wide: bool,
    root: RootPlace,
    heap: Heap,
    fold: Fold,
}

impl Fat {
    /// The entry of a node other than the root.
    fn entry(&self, node: Node) -> Result<Short> {
        let fixed = match self.root {
            RootPlace::Fixed { start, length } => (start..start + length).contains(&node.0),
            RootPlace::Chain(_) => false,
        };
        let slot = match node.0.is_multiple_of(heap::SLOT)
            && (fixed || self.heap.cluster_at(node.0).is_ok())
        {
            true => self.heap.slot(node.0)?,
            false => return Err(no_entry(node)),
        };
        match entry::kind(&slot) {
            Slot::Short => Ok(Short::parse(&slot, self.wide)),
            _ => Err(no_entry(node)),
        }
    }

    /// The place of a directory.
    fn directory(&self, node: Node) -> Result<Extent> {
        let most = Span::Whole(u32::try_from(DIRECTORY / self.heap.cluster()).unwrap_or(1).max(1));
        if node == self.root() {
            return match self.root {
                RootPlace::Fixed { start, length } => Ok(Extent::Fixed { start, length }),
                RootPlace::Chain(first) => self.heap.chain(first, most),
            };
        }
        let entry = self.entry(node)?;
        if !entry.directory {
            return Err(Error::new(ErrorKind::NotADirectory, "not a directory"));
        }
        let extent = self.heap.chain(entry.first, most)?;
        // Every directory but the root begins with itself; other clusters hold no directory.
        let mut own = false;
        self.heap.slots(&extent, 0, &mut |_, _, slot| {
            let itself = Short::parse(slot, self.wide);
            own = slot.starts_with(b".          ") && itself.first == entry.first;
            Ok(false)
        })?;
        match own {
            true => Ok(extent),
            false => Err(Error::corrupt(format!(
                "the directory at cluster {:#x} does not begin with itself",
                entry.first
            ))),
        }
    }

    /// Calls `visit` with the entries of a directory from slot `from` on.
    fn entries(&self, extent: &Extent, from: u64, visit: &mut VisitEntry<'_>) -> Result<()> {
        let mut long = LongName::default();
        self.heap.slots(extent, from, &mut |number, place, slot| {
            match entry::kind(slot) {
                Slot::End => return Ok(false),
                Slot::Long => long.push(slot),
                Slot::Nothing | Slot::Label(_) => long = LongName::default(),
                Slot::Short => {
                    let name = long.finish(slot);
                    return visit(number + 1, name, Node(place), slot);
                }
            }
            Ok(true)
        })
    }

    /// The label in the root directory.
    fn label(&self) -> Result<Option<String>> {
        let mut label = None;
        self.heap.slots(&self.directory(self.root())?, 0, &mut |_, _, slot| {
            match entry::kind(slot) {
                Slot::End => return Ok(false),
                Slot::Label(name) => label = Some(entry::decode(name.trim_ascii_end(), false)),
                _ => {}
            }
            Ok(label.is_none())
        })?;
        Ok(label)
    }

    /// A file's size and place; no place where it is empty.
    fn file(&self, node: Node) -> Result<(u64, Option<Extent>)> {
        let not_a_file = || Error::new(ErrorKind::NotAFile, "not a file");
        let entry = if node == self.root() { None } else { Some(self.entry(node)?) };
        let entry = entry.filter(|entry| !entry.directory).ok_or_else(not_a_file)?;
        let size = u64::from(entry.size);
        if size == 0 {
            return Ok((0, None));
        }
        let clusters = self.heap.count(size)?;
        Ok((size, Some(self.heap.chain(entry.first, Span::Clusters(clusters))?)))
    }
}

fn no_entry(node: Node) -> Error {
    Error::not_found(format!("no entry of a directory lies at byte {}", node.0))
}

fn file_type(directory: bool) -> FileType {
    if directory { FileType::Directory } else { FileType::File }
}

/// Permissions made up from attributes.
pub(super) fn mode(directory: bool, read_only: bool) -> u32 {
    match (directory, read_only) {
        (true, _) => 0o755,
        (false, true) => 0o444,
        (false, false) => 0o644,
    }
}

impl FileSystem for Fat {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node(0)
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        let entry = (node != self.root()).then(|| self.entry(node)).transpose()?;
        let directory = entry.as_ref().is_none_or(|entry| entry.directory);
        let size = entry.as_ref().filter(|_| !directory).map(|entry| u64::from(entry.size));
        let cluster = self.heap.cluster();
        Ok(Attributes {
            file_type: file_type(directory),
            size: size.unwrap_or(0),
            allocated: size.map(|size| size.next_multiple_of(cluster)),
            mode: mode(directory, entry.as_ref().is_some_and(|entry| entry.read_only)),
            uid: 0,
            gid: 0,
            links: 1,
            modified: entry.as_ref().and_then(|entry| entry.modified),
            accessed: entry.as_ref().and_then(|entry| entry.accessed),
            changed: None,
            created: entry.as_ref().and_then(|entry| entry.created),
            note: None,
        })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let extent = self.directory(directory)?;
        let Some(wanted) = from_wtf8(name) else { return Ok(None) };
        let mut search = Search::new(&self.fold, &wanted);
        // The short name that a long one hides finds an entry as well, after every name that is shown.
        let mut hidden = None;
        let short = wanted.len() <= entry::SHORT;
        self.entries(&extent, 0, &mut |_, name, node, slot| {
            if short && hidden.is_none() && self.fold.same(&entry::short_name(slot), &wanted) {
                hidden = Some(node);
            }
            search.offer(&name, node)
        })?;
        Ok(search.found().or(hidden))
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        let extent = self.directory(directory)?;
        let mut page = Page::default();
        let mut next = cursor;
        self.entries(&extent, cursor.0, &mut |after, name, node, slot| {
            if page.entries.len() >= limit.max(1) {
                page.next = Some(next);
                return Ok(false);
            }
            let file_type = Some(file_type(Short::parse(slot, self.wide).directory));
            page.entries.push(Entry { name: to_wtf8(&name), node, file_type });
            next = Cursor(after);
            Ok(true)
        })?;
        Ok(page)
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let (size, extent) = self.file(file)?;
        let Some(extent) = extent.filter(|_| offset < size) else { return Ok(0) };
        let length = usize::try_from(size - offset).unwrap_or(usize::MAX).min(buf.len());
        self.heap.read(&extent, &mut buf[..length], offset)?;
        Ok(length)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        self.stat(link)?;
        Err(Error::new(ErrorKind::NotALink, "FAT has no symbolic links"))
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let (size, extent) = self.file(file)?;
        let Some(extent) = extent.filter(|_| from < size) else { return Ok(()) };
        let mut offset = from;
        self.heap.runs(&extent, from, size - from, &mut |place, length| {
            let piece = Piece { offset, length, place: Place::Volume(place) };
            offset += length;
            Ok(visit(piece))
        })
    }
}
