//! exFAT and the second table of TexFAT, after Microsoft's specification.
//!
//! A node is the byte of the volume where the entry set begins; its lowest bit tells that the directory
//! around it is contiguous, so that a set is found whole without asking the directory. 0 is the root.
//! There is no journal: a volume that was not unmounted is shown as it lies, and says so. Times without a
//! zone are taken as UTC.

mod boot;
mod entry;
#[cfg(test)]
mod tests;
mod upcase;

use std::sync::Arc;

use super::fat::bytes::{u16_at, u32_at, u64_at};
use super::fat::heap::{Extent, Heap, SLOT, Span};
use super::fat::names::{Fold, Search, from_wtf8, to_wtf8};
use super::fat::table::{Table, Width};
use super::fat::{IN_USE, mode, serial};
use super::{
    About, Attributes, Cursor, Entry, FileSystem, FileType, Node, Page, Piece, Place, Status,
};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;
use boot::Boot;
use entry::File;

/// Bytes of a directory, as the specification bounds it.
const DIRECTORY: u64 = 256 << 20;
/// Bytes of an allocation bitmap that is counted; of a larger one, used bytes are not told.
const BITMAP: u64 = 8 << 20;

/// Whether `source` holds such a file system, by its signature.
///
/// # Errors
/// `Io`.
pub(crate) fn recognise(source: &dyn Source) -> Result<bool> {
    if source.size() < 512 {
        return Ok(false);
    }
    let mut sector = [0; 512];
    source.read_at(&mut sector, 0)?;
    Ok(boot::looks_like(&sector))
}

/// Opens it.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(crate) fn open(source: &Arc<dyn Source>) -> Result<Box<dyn FileSystem>> {
    let boot = Boot::read(&**source)?;
    let table = Table::new(source, Width::ExFat, boot.table, boot.clusters);
    let status = match (boot.dirty, boot.failing) {
        (true, _) => Status::Stale(IN_USE.to_owned()),
        (_, true) => Status::Stale("the volume says that its medium failed".to_owned()),
        _ => Status::Clean,
    };
    let mut exfat = ExFat {
        about: About {
            kind: "exfat".to_owned(),
            label: String::new(),
            uuid: serial(boot.serial),
            size: boot.size,
            used: None,
            status,
        },
        first: boot.root,
        heap: Heap::new(source, table, boot.heap, boot.cluster),
        fold: Fold::Unicode,
    };
    exfat.read_root(&boot)?;
    Ok(Box::new(exfat))
}

struct ExFat {
    about: About,
    first: u32,
    heap: Heap,
    fold: Fold,
}

/// A directory: its place, and the bit that its nodes carry.
struct Directory {
    extent: Extent,
    contiguous: bool,
}

impl ExFat {
    /// Takes label, used bytes and the up-case table from the root directory.
    fn read_root(&mut self, boot: &Boot) -> Result<()> {
        let root = self.directory(self.root())?;
        let (mut bitmap, mut upcase) = (None, None);
        let mut label = String::new();
        self.heap.slots(&root.extent, 0, &mut |_, _, slot| {
            match slot[0] {
                entry::END => return Ok(false),
                entry::BITMAP if (slot[1] & 1 != 0) == boot.second => bitmap = Some(*slot),
                entry::UPCASE => upcase = Some(*slot),
                entry::LABEL => {
                    let units =
                        (0..usize::from(slot[1].min(11))).map(|at| u16_at(slot, 2 + at * 2));
                    label = String::from_utf16_lossy(&units.collect::<Vec<_>>());
                }
                _ => {}
            }
            Ok(true)
        })?;
        self.about.label = label;
        // Without its table, letters are told apart as Unicode does, which is what it says on most volumes.
        let table = upcase.map(|slot| {
            let bytes = self.metadata(&slot, upcase::LONGEST)?;
            upcase::parse(&bytes, u32_at(&slot, 4))
        });
        match table.transpose() {
            Ok(Some(table)) => self.fold = Fold::Table(table),
            Err(e) if e.kind == ErrorKind::Io => return Err(e),
            _ => {}
        }
        let bitmap = bitmap.filter(|slot| u64_at(slot, 24) <= BITMAP);
        match bitmap.map(|slot| self.metadata(&slot, BITMAP)).transpose() {
            Ok(Some(bytes)) => {
                let used: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
                let used = used.min(u64::from(boot.clusters));
                self.about.used = Some(used * boot.cluster);
            }
            Err(e) if e.kind == ErrorKind::Io => return Err(e),
            _ => {}
        }
        Ok(())
    }

    /// The content of a bitmap or an up-case table of at most `most` bytes.
    fn metadata(&self, slot: &[u8; 32], most: u64) -> Result<Vec<u8>> {
        let size = u64_at(slot, 24);
        if size > most {
            return Err(Error::corrupt(format!(
                "metadata of {size} bytes, and {most} are allowed"
            )));
        }
        let extent = self.heap.chain(u32_at(slot, 20), Span::Clusters(self.heap.count(size)?))?;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        self.heap.read(&extent, &mut bytes, 0)?;
        Ok(bytes)
    }

    /// The entry set of a node other than the root.
    fn file(&self, node: Node) -> Result<File> {
        let no_entry = || Error::not_found(format!("no entry set lies at byte {}", node.0));
        let (contiguous, place) = (node.0 & 1 != 0, node.0 & !1);
        let mut cluster = match place % SLOT {
            0 => self.heap.cluster_at(place).map_err(|_| no_entry())?,
            _ => return Err(no_entry()),
        };
        let first = self.heap.slot(place)?;
        if first[0] != entry::FILE {
            return Err(no_entry());
        }
        let mut set = vec![first];
        let mut at = place;
        for _ in 1..entry::slots(&first)? {
            at += SLOT;
            if self.heap.cluster_at(at).ok() != Some(cluster) {
                at = self.heap.after(cluster, contiguous)?;
                cluster = self.heap.cluster_at(at)?;
            }
            set.push(self.heap.slot(at)?);
        }
        File::parse(&set, place)
    }

    /// The clusters of `size` bytes of a file or directory.
    fn extent(&self, file: &File) -> Result<Extent> {
        let clusters = self.heap.count(file.size)?;
        match (clusters, file.contiguous) {
            (0, _) => Ok(Extent::Fixed { start: 0, length: 0 }),
            (_, true) => self.heap.contiguous(file.first, clusters),
            (_, false) => self.heap.chain(file.first, Span::Clusters(clusters)),
        }
    }

    fn directory(&self, node: Node) -> Result<Directory> {
        if node == self.root() {
            let most = u32::try_from(DIRECTORY / self.heap.cluster()).unwrap_or(1).max(1);
            let extent = self.heap.chain(self.first, Span::Whole(most))?;
            return Ok(Directory { extent, contiguous: false });
        }
        let file = self.file(node)?;
        if !file.directory {
            return Err(Error::new(ErrorKind::NotADirectory, "not a directory"));
        }
        if file.size > DIRECTORY || file.valid != file.size {
            return Err(Error::corrupt(format!("a directory of {} bytes", file.size)));
        }
        if file.size > 0 && file.first == self.first {
            return Err(Error::corrupt("a directory that is the root again"));
        }
        Ok(Directory { extent: self.extent(&file)?, contiguous: file.contiguous })
    }

    /// Calls `visit` with the files of a directory from slot `from` on: the number of the slot after the
    /// set, the node, the file.
    fn files(
        &self,
        directory: &Directory,
        from: u64,
        visit: &mut dyn FnMut(u64, Node, File) -> Result<bool>,
    ) -> Result<()> {
        let mut set: Vec<[u8; 32]> = Vec::new();
        let (mut wanted, mut start) = (0, 0);
        self.heap.slots(&directory.extent, from, &mut |number, place, slot| {
            if wanted > 0 {
                if slot[0] & 0xc0 != 0xc0 {
                    return Err(Error::corrupt(format!(
                        "the entry set at byte {start} is cut off"
                    )));
                }
                set.push(*slot);
                if set.len() < wanted {
                    return Ok(true);
                }
                let file = File::parse(&set, start)?;
                wanted = 0;
                return visit(number + 1, Node(start | u64::from(directory.contiguous)), file);
            }
            match slot[0] {
                entry::END => return Ok(false),
                entry::FILE => {
                    (wanted, start) = (entry::slots(slot)?, place);
                    set.clear();
                    set.push(*slot);
                }
                entry::BITMAP | entry::UPCASE | entry::LABEL => {}
                // What is in use, must be understood, and is not.
                kind if kind & 0xa0 == 0x80 => {
                    return Err(Error::corrupt(format!(
                        "an entry of type {kind:#x} at byte {place}, outside a set"
                    )));
                }
                _ => {}
            }
            Ok(true)
        })?;
        match wanted {
            0 => Ok(()),
            _ => Err(Error::corrupt(format!("the entry set at byte {start} is cut off"))),
        }
    }

    fn content(&self, node: Node) -> Result<(File, Extent)> {
        let file = if node == self.root() { None } else { Some(self.file(node)?) };
        let not_a_file = || Error::new(ErrorKind::NotAFile, "not a file");
        let file = file.filter(|file| !file.directory).ok_or_else(not_a_file)?;
        let extent = self.extent(&file)?;
        Ok((file, extent))
    }
}

fn file_type(directory: bool) -> FileType {
    if directory { FileType::Directory } else { FileType::File }
}

impl FileSystem for ExFat {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node(0)
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        let file = (node != self.root()).then(|| self.file(node)).transpose()?;
        let directory = file.as_ref().is_none_or(|file| file.directory);
        let size = file.as_ref().filter(|_| !directory).map(|file| file.size);
        Ok(Attributes {
            file_type: file_type(directory),
            size: size.unwrap_or(0),
            allocated: size.and_then(|size| size.checked_next_multiple_of(self.heap.cluster())),
            mode: mode(directory, file.as_ref().is_some_and(|file| file.read_only)),
            uid: 0,
            gid: 0,
            links: 1,
            modified: file.as_ref().and_then(|file| file.modified),
            accessed: file.as_ref().and_then(|file| file.accessed),
            changed: None,
            created: file.as_ref().and_then(|file| file.created),
            note: None,
        })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let directory = self.directory(directory)?;
        let Some(wanted) = from_wtf8(name) else { return Ok(None) };
        let mut search = Search::new(&self.fold, &wanted);
        self.files(&directory, 0, &mut |_, node, file| search.offer(&file.name, node))?;
        Ok(search.found())
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        let directory = self.directory(directory)?;
        let mut page = Page::default();
        let mut next = cursor;
        self.files(&directory, cursor.0, &mut |after, node, file| {
            if page.entries.len() >= limit.max(1) {
                page.next = Some(next);
                return Ok(false);
            }
            let file_type = Some(file_type(file.directory));
            page.entries.push(Entry { name: to_wtf8(&file.name), node, file_type });
            next = Cursor(after);
            Ok(true)
        })?;
        Ok(page)
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let (file, extent) = self.content(file)?;
        let left = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = left.min(buf.len());
        let valid = usize::try_from(file.valid.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (data, zeroes) = buf[..length].split_at_mut(valid.min(length));
        self.heap.read(&extent, data, offset)?;
        zeroes.fill(0);
        Ok(length)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        self.stat(link)?;
        Err(Error::new(ErrorKind::NotALink, "exFAT has no symbolic links"))
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let (file, extent) = self.content(file)?;
        let (mut offset, mut on) = (from, true);
        self.heap.runs(&extent, from, file.valid.saturating_sub(from), &mut |place, length| {
            let piece = Piece { offset, length, place: Place::Volume(place) };
            offset += length;
            on = visit(piece);
            Ok(on)
        })?;
        if on && offset < file.size {
            visit(Piece { offset, length: file.size - offset, place: Place::Hole });
        }
        Ok(())
    }
}
