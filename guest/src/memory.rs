//! A file system in memory, for tests of what stands on the readers.
//!
//! Huge files and directories cost nothing: their bytes and names are made when they are asked for.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};
use crate::fs::{
    About, Attributes, Cursor, Entry, FileSystem, FileType, Node, Page, Piece, Place, Status, Time,
};

/// Nodes from here on are made names: the directory's number in the high half, the name's in the low.
const MADE: u32 = 32;

enum Content {
    Nothing,
    Bytes(Vec<u8>),
    Pattern { seed: u64 },
    Pieces(Vec<(u64, Vec<u8>)>),
    Names(Vec<(Vec<u8>, Node)>),
    ManyNames { count: u32, size: u64 },
    Target(Vec<u8>),
}

struct Item {
    attributes: Attributes,
    content: Content,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tree in memory. The paths of its builders are separated by `/`, and missing parents are made.
pub struct MemoryFs {
    about: About,
    items: Vec<Item>,
    broken: BTreeMap<Node, Error>,
}

/// Fills `buf` with the bytes of a pattern from byte `offset` on.
pub fn pattern(seed: u64, offset: u64, buf: &mut [u8]) {
    let word = |index: u64| {
        let mut word = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (word ^ (word >> 27)).to_le_bytes()
    };
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        let within = usize::try_from(at % 8).unwrap_or_default();
        let bytes = &word(at / 8)[within..];
        let count = bytes.len().min(rest.len());
        rest[..count].copy_from_slice(&bytes[..count]);
        rest = &mut rest[count..];
        at += count as u64;
    }
}

impl Default for MemoryFs {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryFs {
    /// An empty root directory.
    pub fn new() -> Self {
        let about = About {
            kind: "memory".into(),
            label: "MEMORY".into(),
            uuid: "00000000-0000-0000-0000-000000000000".into(),
            size: 1 << 30,
            used: None,
            status: Status::Clean,
        };
        let mut fs = Self { about, items: Vec::new(), broken: BTreeMap::new() };
        fs.add(FileType::Directory, 0o755, 0, Content::Names(Vec::new()));
        fs
    }

    /// What it says of itself, to be changed.
    pub fn about_mut(&mut self) -> &mut About {
        &mut self.about
    }

    /// A directory with its parents, where it is not there yet.
    pub fn dir(&mut self, path: impl AsRef<[u8]>) -> Node {
        let mut node = self.root();
        for name in path.as_ref().split(|&b| b == b'/').filter(|name| !name.is_empty()) {
            node = match self.child(node, name) {
                Some(child) => child,
                None => {
                    let made = self.add(FileType::Directory, 0o755, 0, Content::Names(Vec::new()));
                    self.link(node, name, made);
                    made
                }
            };
        }
        node
    }

    /// A file with these bytes.
    pub fn file(&mut self, path: impl AsRef<[u8]>, bytes: impl Into<Vec<u8>>) -> Node {
        let bytes = bytes.into();
        let size = bytes.len() as u64;
        self.put(path.as_ref(), FileType::File, 0o644, size, Content::Bytes(bytes))
    }

    /// A file of `size` bytes of [`pattern`] `seed`, which take no memory.
    pub fn large(&mut self, path: impl AsRef<[u8]>, size: u64, seed: u64) -> Node {
        self.put(path.as_ref(), FileType::File, 0o644, size, Content::Pattern { seed })
    }

    /// A file of `size` bytes with these `pieces` (offset and bytes, in order) and holes between them.
    pub fn sparse(
        &mut self,
        path: impl AsRef<[u8]>,
        size: u64,
        pieces: Vec<(u64, Vec<u8>)>,
    ) -> Node {
        self.put(path.as_ref(), FileType::File, 0o644, size, Content::Pieces(pieces))
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: impl AsRef<[u8]>, target: impl Into<Vec<u8>>) -> Node {
        let target = target.into();
        let size = target.len() as u64;
        self.put(path.as_ref(), FileType::Symlink, 0o777, size, Content::Target(target))
    }

    /// A device, a pipe, a socket, or something opaque with a `note`.
    pub fn special(
        &mut self,
        path: impl AsRef<[u8]>,
        file_type: FileType,
        note: Option<&str>,
    ) -> Node {
        let node = self.put(path.as_ref(), file_type, 0o600, 0, Content::Nothing);
        self.attributes(node).note = note.map(str::to_owned);
        node
    }

    /// A directory with `count` files of `size` bytes each, which take no memory: `entry-0000000` with
    /// [`pattern`] 0, and so on.
    pub fn many(&mut self, path: impl AsRef<[u8]>, count: u32, size: u64) -> Node {
        let content = Content::ManyNames { count, size };
        self.put(path.as_ref(), FileType::Directory, 0o755, 0, content)
    }

    /// One more name for `node`: a hard link, or a name that no real directory could have.
    pub fn link(&mut self, directory: Node, name: impl AsRef<[u8]>, node: Node) {
        match &mut self.items[index(directory)].content {
            Content::Names(names) => names.push((name.as_ref().to_vec(), node)),
            _ => panic!("node {} takes no names", directory.0),
        }
        let links = &mut self.items[index(node)].attributes.links;
        *links += 1;
    }

    /// The attributes of a node, to be changed.
    pub fn attributes(&mut self, node: Node) -> &mut Attributes {
        &mut self.items[index(node)].attributes
    }

    /// Gives a node an extended attribute.
    pub fn xattr(&mut self, node: Node, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.items[index(node)].xattrs.push((name.into(), value.into()));
    }

    /// Makes reading, listing and the layout of a node fail; it can still be asked with `stat`.
    pub fn damage(&mut self, node: Node, error: Error) {
        self.broken.insert(node, error);
    }

    fn add(&mut self, file_type: FileType, mode: u32, size: u64, content: Content) -> Node {
        let time = Some(Time { seconds: 1_600_000_000, nanoseconds: 123_456_700 });
        let attributes = Attributes {
            file_type,
            size,
            allocated: None,
            mode,
            uid: 0,
            gid: 0,
            links: u32::from(self.items.is_empty()),
            modified: time,
            accessed: time,
            changed: time,
            created: None,
            note: None,
        };
        self.items.push(Item { attributes, content, xattrs: Vec::new() });
        Node(self.items.len() as u64)
    }

    fn put(
        &mut self,
        path: &[u8],
        file_type: FileType,
        mode: u32,
        size: u64,
        content: Content,
    ) -> Node {
        let (parent, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        let parent = self.dir(parent);
        let node = self.add(file_type, mode, size, content);
        self.link(parent, name, node);
        node
    }

    fn child(&self, directory: Node, name: &[u8]) -> Option<Node> {
        match &self.items.get(index(directory))?.content {
            Content::Names(names) => names.iter().find(|(known, _)| known == name).map(|n| n.1),
            Content::ManyNames { count, .. } => {
                let digits = std::str::from_utf8(name.strip_prefix(b"entry-")?).ok()?;
                let number: u32 = digits.parse().ok()?;
                (number < *count && made_name(number) == name).then(|| made(directory, number))
            }
            _ => None,
        }
    }

    /// The item of a node, and the number among the made names of it where the node is one.
    fn item(&self, node: Node) -> Result<(&Item, Option<u32>)> {
        let gone = || Error::not_found(format!("there is no node {}", node.0));
        if node.0 >> MADE == 0 {
            return Ok((self.items.get(index(node)).ok_or_else(gone)?, None));
        }
        let item = self.items.get(index(Node(node.0 >> MADE))).ok_or_else(gone)?;
        let number = u32::try_from(node.0 & u64::from(u32::MAX)).map_err(|_| gone())?;
        match item.content {
            Content::ManyNames { count, .. } if number < count => Ok((item, Some(number))),
            _ => Err(gone()),
        }
    }

    fn sound(&self, node: Node) -> Result<()> {
        self.broken.get(&node).map_or(Ok(()), |error| Err(error.clone()))
    }

    fn file_size(&self, node: Node) -> Result<u64> {
        self.sound(node)?;
        let attributes = self.stat(node)?;
        match attributes.file_type {
            FileType::File => Ok(attributes.size),
            FileType::Opaque => {
                Err(Error::unsupported(attributes.note.unwrap_or_else(|| "opaque".into())))
            }
            _ => Err(Error::new(ErrorKind::NotAFile, format!("node {} is no file", node.0))),
        }
    }
}

fn index(node: Node) -> usize {
    usize::try_from(node.0).ok().and_then(|n| n.checked_sub(1)).unwrap_or(usize::MAX)
}

fn made(directory: Node, number: u32) -> Node {
    Node(directory.0 << MADE | u64::from(number))
}

fn made_name(number: u32) -> Vec<u8> {
    format!("entry-{number:07}").into_bytes()
}

impl FileSystem for MemoryFs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node(1)
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        let (item, number) = self.item(node)?;
        let mut attributes = item.attributes.clone();
        if let (Some(_), Content::ManyNames { size, .. }) = (number, &item.content) {
            (attributes.file_type, attributes.mode) = (FileType::File, 0o644);
            (attributes.size, attributes.links) = (*size, 1);
        }
        Ok(attributes)
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        self.sound(directory)?;
        match self.stat(directory)?.file_type {
            FileType::Directory => Ok(self.child(directory, name)),
            _ => Err(not_a_directory(directory)),
        }
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        self.sound(directory)?;
        let start = usize::try_from(cursor.0).unwrap_or(usize::MAX);
        let (entries, count) = match self.item(directory)? {
            (Item { content: Content::Names(names), .. }, None) => {
                let entry = |(name, node): &(Vec<u8>, Node)| Entry {
                    name: name.clone(),
                    node: *node,
                    file_type: self.stat(*node).ok().map(|attributes| attributes.file_type),
                };
                let page = names.iter().skip(start).take(limit).map(entry);
                (page.collect::<Vec<_>>(), names.len() as u64)
            }
            (Item { content: Content::ManyNames { count, .. }, .. }, None) => {
                let start = u32::try_from(start).unwrap_or(u32::MAX);
                let entry = |number| Entry {
                    name: made_name(number),
                    node: made(directory, number),
                    file_type: Some(FileType::File),
                };
                ((start..*count).take(limit).map(entry).collect(), u64::from(*count))
            }
            _ => return Err(not_a_directory(directory)),
        };
        let end = cursor.0.saturating_add(entries.len() as u64);
        Ok(Page { entries, next: (end < count).then_some(Cursor(end)) })
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let size = self.file_size(file)?;
        let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = buf.len().min(left);
        let buf = &mut buf[..length];
        match self.item(file)? {
            (_, Some(number)) => pattern(u64::from(number), offset, buf),
            (Item { content: Content::Pattern { seed }, .. }, _) => pattern(*seed, offset, buf),
            (Item { content: Content::Bytes(bytes), .. }, _) => copy(buf, offset, 0, bytes),
            (Item { content: Content::Pieces(pieces), .. }, _) => {
                buf.fill(0);
                pieces.iter().for_each(|(at, bytes)| copy(buf, offset, *at, bytes));
            }
            _ => buf.fill(0),
        }
        Ok(length)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        self.sound(link)?;
        match &self.item(link)?.0.content {
            Content::Target(target) => Ok(target.clone()),
            _ => Err(Error::new(ErrorKind::NotALink, format!("node {} is no link", link.0))),
        }
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let (item, number) = self.item(node)?;
        Ok(if number.is_none() { item.xattrs.clone() } else { Vec::new() })
    }

    fn layout(&self, file: Node, _from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        let size = self.file_size(file)?;
        let mut at = 0;
        let mut tell = |until: u64, place| {
            let piece = Piece { offset: at, length: until.saturating_sub(at), place };
            at = at.max(until);
            piece.length == 0 || visit(piece)
        };
        if let (Item { content: Content::Pieces(pieces), .. }, None) = self.item(file)? {
            for (start, bytes) in pieces {
                if !tell(*start, Place::Hole) || !tell(start + bytes.len() as u64, Place::Elsewhere)
                {
                    return Ok(());
                }
            }
            tell(size, Place::Hole);
        } else {
            tell(size, Place::Elsewhere);
        }
        Ok(())
    }
}

/// Copies what `bytes`, which lie at `at`, and `buf`, which lies at `offset`, have in common.
fn copy(buf: &mut [u8], offset: u64, at: u64, bytes: &[u8]) {
    let start = offset.max(at);
    let end = (offset + buf.len() as u64).min(at + bytes.len() as u64);
    if start < end {
        let place = |from: u64| {
            let place = |at: u64| usize::try_from(at - from).unwrap_or(usize::MAX);
            place(start)..place(end)
        };
        buf[place(offset)].copy_from_slice(&bytes[place(at)]);
    }
}

fn not_a_directory(node: Node) -> Error {
    Error::new(ErrorKind::NotADirectory, format!("node {} is no directory", node.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_names_and_a_huge_file_cost_nothing_and_are_all_there() {
        let mut fs = MemoryFs::new();
        let many = fs.many("a/many", 1_000_000, 10);
        let huge = fs.large("a/huge", 1 << 50, 7);
        let (mut cursor, mut count) = (Cursor::default(), 0);
        loop {
            let page = fs.list(many, cursor, 10_000).unwrap();
            count += page.entries.len();
            match page.next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        assert_eq!(count, 1_000_000);
        let last = fs.lookup(many, b"entry-0999999").unwrap().unwrap();
        let mut found = [0; 20];
        assert_eq!(fs.read_at(last, &mut found, 3).unwrap(), 7);
        let mut expected = [0; 7];
        pattern(999_999, 3, &mut expected);
        assert_eq!(found[..7], expected);
        assert_eq!(fs.lookup(many, b"entry-1000000").unwrap(), None);
        assert_eq!(fs.read_at(huge, &mut found, (1 << 50) - 3).unwrap(), 3);
        assert_eq!(fs.read_at(huge, &mut found, 1 << 50).unwrap(), 0);
    }

    #[test]
    fn holes_are_told_and_read_as_zeroes() {
        let mut fs = MemoryFs::new();
        let file = fs.sparse("f", 100, vec![(10, vec![1; 5]), (50, vec![2; 5])]);
        let mut found = [9; 100];
        assert_eq!(fs.read_at(file, &mut found, 12).unwrap(), 88);
        assert_eq!((found[2], found[3], found[38], found[42], found[43]), (1, 0, 2, 2, 0));
        let mut pieces = Vec::new();
        fs.layout(file, 0, &mut |piece| {
            pieces.push((piece.offset, piece.length, piece.place == Place::Hole));
            true
        })
        .unwrap();
        let expected =
            [(0, 10, true), (10, 5, false), (15, 35, true), (50, 5, false), (55, 45, true)];
        assert_eq!(pieces, expected);
    }
}
