//! A tree in memory that does as it is told, damage included; for tests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use guest::tree::{Layout, Listed, Listing, Origin, Placed, Resolved};
use guest::{Attributes, Cursor, Error, ErrorKind, FileType, Node, Result, Time, Tree};

/// What a node holds.
pub(crate) enum Content {
    Directory(Vec<(Vec<u8>, usize)>),
    Bytes(Vec<u8>),
    /// A file of a length that reads as zeroes: as a hole, or as data.
    Zeroes(u64, bool),
    Link(Vec<u8>),
    Other(FileType),
}

/// What a tree is made of.
pub(crate) struct Made {
    pub(crate) name: Vec<u8>,
    pub(crate) mode: u32,
    content: Content,
    children: Vec<Made>,
}

fn made(name: impl AsRef<[u8]>, mode: u32, content: Content, children: Vec<Made>) -> Made {
    Made { name: name.as_ref().to_vec(), mode, content, children }
}

pub(crate) fn dir(name: impl AsRef<[u8]>, children: Vec<Made>) -> Made {
    made(name, 0o755, Content::Directory(Vec::new()), children)
}

pub(crate) fn file(name: impl AsRef<[u8]>, bytes: impl AsRef<[u8]>) -> Made {
    made(name, 0o644, Content::Bytes(bytes.as_ref().to_vec()), Vec::new())
}

pub(crate) fn zeroes(name: impl AsRef<[u8]>, length: u64, hole: bool) -> Made {
    made(name, 0o644, Content::Zeroes(length, hole), Vec::new())
}

pub(crate) fn link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Made {
    made(name, 0o777, Content::Link(target.as_ref().to_vec()), Vec::new())
}

pub(crate) fn other(name: impl AsRef<[u8]>, file_type: FileType) -> Made {
    made(name, 0o644, Content::Other(file_type), Vec::new())
}

struct Inode {
    mode: u32,
    content: Content,
}

#[derive(Default)]
pub(crate) struct Fake {
    nodes: Vec<Inode>,
    /// From which byte on reading a file fails.
    damaged: HashMap<Node, u64>,
    unlistable: Vec<Node>,
    /// Layouts come byte by byte.
    pub(crate) crumbs: bool,
    /// Parts of layouts that were asked for.
    pub(crate) layouts: AtomicUsize,
}

impl Fake {
    pub(crate) fn new(children: Vec<Made>) -> Self {
        let mut tree = Self::default();
        tree.add(dir("", children));
        tree
    }

    fn add(&mut self, made: Made) -> usize {
        let at = self.nodes.len();
        self.nodes.push(Inode { mode: made.mode, content: made.content });
        let inside: Vec<_> =
            made.children.into_iter().map(|child| (child.name.clone(), self.add(child))).collect();
        if let Content::Directory(names) = &mut self.nodes[at].content {
            *names = inside;
        }
        at
    }

    pub(crate) fn find(&self, path: &str) -> Node {
        self.resolve(path.as_bytes(), false).unwrap().node
    }

    pub(crate) fn fail_list(&mut self, node: Node) {
        self.unlistable.push(node);
    }

    pub(crate) fn fail_read(&mut self, node: Node, from: u64) {
        self.damaged.insert(node, from);
    }

    pub(crate) fn link_into(&mut self, directory: Node, name: &str, node: Node) {
        let entry = (name.as_bytes().to_vec(), usize::try_from(node.0).unwrap());
        match &mut self.nodes[usize::try_from(directory.0).unwrap()].content {
            Content::Directory(names) => names.push(entry),
            _ => panic!("no directory"),
        }
    }

    fn inode(&self, node: Node) -> Result<&Inode> {
        let at = usize::try_from(node.0).unwrap();
        self.nodes.get(at).ok_or_else(|| Error::not_found("no such node"))
    }

    fn listed(&self, name: &[u8], node: usize) -> Listed {
        let node = Node(node as u64);
        Listed {
            name: name.to_vec(),
            node,
            attributes: self.stat(node),
            target: self.read_link(node).ok(),
        }
    }
}

impl Tree for Fake {
    fn root(&self) -> Result<Node> {
        Ok(Node(0))
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        let inode = self.inode(node)?;
        let (file_type, size) = match &inode.content {
            Content::Directory(_) => (FileType::Directory, 0),
            Content::Bytes(bytes) => (FileType::File, bytes.len() as u64),
            Content::Zeroes(length, _) => (FileType::File, *length),
            Content::Link(target) => (FileType::Symlink, target.len() as u64),
            Content::Other(file_type) => (*file_type, 0),
        };
        let time = Some(Time { seconds: 1_700_000_000, nanoseconds: 123_456_789 });
        Ok(Attributes {
            file_type,
            size,
            allocated: matches!(inode.content, Content::Zeroes(_, true)).then_some(0),
            mode: inode.mode,
            uid: 1000,
            gid: 100,
            links: 1,
            modified: time,
            accessed: time,
            changed: time,
            created: None,
            note: (file_type == FileType::Opaque).then(|| "encrypted".to_owned()),
        })
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Listing> {
        if self.unlistable.contains(&directory) {
            return Err(Error::corrupt("block 7 of the directory is damaged"));
        }
        let Content::Directory(names) = &self.inode(directory)?.content else {
            return Err(Error::new(ErrorKind::NotADirectory, "no directory"));
        };
        let start = usize::try_from(cursor.0).unwrap();
        let end = (start + limit).min(names.len());
        let entries =
            names[start..end].iter().map(|(name, node)| self.listed(name, *node)).collect();
        Ok(Listing { entries, next: (end < names.len()).then_some(Cursor(end as u64)) })
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Listed>> {
        let Content::Directory(names) = &self.inode(directory)?.content else {
            return Err(Error::new(ErrorKind::NotADirectory, "no directory"));
        };
        Ok(names.iter().find(|(n, _)| n == name).map(|(n, node)| self.listed(n, *node)))
    }

    fn resolve(&self, path: &[u8], _follow: bool) -> Result<Resolved> {
        let mut node = Node(0);
        for name in path.split(|b| *b == b'/').filter(|n| !n.is_empty()) {
            node = self.lookup(node, name)?.ok_or_else(|| Error::not_found("no such name"))?.node;
        }
        Ok(Resolved { node, path: path.to_vec() })
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let size = self.stat(file)?.size;
        let end = (offset + buf.len() as u64).min(size);
        let count = usize::try_from(end.saturating_sub(offset)).unwrap();
        if self.damaged.get(&file).is_some_and(|from| offset + count as u64 > *from) {
            return Err(Error::new(ErrorKind::Io, "a sector cannot be read"));
        }
        match &self.inode(file)?.content {
            Content::Bytes(bytes) if count > 0 => {
                let offset = usize::try_from(offset).unwrap();
                buf[..count].copy_from_slice(&bytes[offset..offset + count]);
            }
            _ => buf[..count].fill(0),
        }
        Ok(count)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        match &self.inode(link)?.content {
            Content::Link(target) => Ok(target.clone()),
            _ => Err(Error::new(ErrorKind::NotALink, "no link")),
        }
    }

    fn xattrs(&self, _node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        Ok(Vec::new())
    }

    fn layout(&self, file: Node, from: u64) -> Result<Layout> {
        let origin = match self.inode(file)?.content {
            Content::Zeroes(_, true) => Origin::Hole,
            _ => Origin::Unknown,
        };
        self.layouts.fetch_add(1, Ordering::Relaxed);
        let length = self.stat(file)?.size.saturating_sub(from);
        if self.crumbs {
            let crumb = Placed { offset: from, length: 1, origin: Origin::Unknown };
            return Ok(Layout { pieces: vec![crumb], next: Some(from + 1), checked: false });
        }
        let pieces = (length > 0).then_some(Placed { offset: from, length, origin });
        Ok(Layout { pieces: pieces.into_iter().collect(), ..Layout::default() })
    }
}
