//! A panic of a reader becomes an error of one call, and ends nothing else.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};
use crate::fs::{About, Attributes, Cursor, FileSystem, Node, Page, Piece};

/// Calls `read`, and makes a panic in it the failure of `what`.
///
/// # Errors
/// Those of `read`; `Corrupt` after a panic.
pub(crate) fn call<T>(what: impl Fn() -> String, read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(Error::corrupt(format!("the reader failed on {}: the volume may be damaged", what())))
    })
}

/// A file system whose reader may panic.
pub(crate) struct Guarded(pub(crate) Box<dyn FileSystem>);

impl FileSystem for Guarded {
    fn about(&self) -> &About {
        self.0.about()
    }

    fn root(&self) -> Node {
        self.0.root()
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        call(|| format!("node {}", node.0), || self.0.stat(node))
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        call(|| format!("directory {}", directory.0), || self.0.lookup(directory, name))
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Page> {
        call(|| format!("directory {}", directory.0), || self.0.list(directory, cursor, limit))
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let what = || format!("file {} at byte {offset}", file.0);
        call(what, || self.0.read_at(file, buf, offset))
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        call(|| format!("link {}", link.0), || self.0.read_link(link))
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        call(|| format!("the attributes of node {}", node.0), || self.0.xattrs(node))
    }

    fn layout(&self, file: Node, from: u64, visit: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
        call(|| format!("the layout of file {}", file.0), || self.0.layout(file, from, visit))
    }

    fn checks_content(&self) -> bool {
        self.0.checks_content()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::memory::MemoryFs;

    /// Panics on everything but its root.
    struct Panics(MemoryFs);

    impl FileSystem for Panics {
        fn about(&self) -> &About {
            self.0.about()
        }

        fn root(&self) -> Node {
            self.0.root()
        }

        fn stat(&self, node: Node) -> Result<Attributes> {
            assert_eq!(node, self.root());
            self.0.stat(node)
        }

        fn lookup(&self, _: Node, _: &[u8]) -> Result<Option<Node>> {
            panic!("on purpose")
        }

        fn list(&self, _: Node, _: Cursor, _: usize) -> Result<Page> {
            panic!("on purpose")
        }

        fn read_at(&self, _: Node, _: &mut [u8], _: u64) -> Result<usize> {
            panic!("on purpose")
        }

        fn read_link(&self, _: Node) -> Result<Vec<u8>> {
            panic!("on purpose")
        }

        fn xattrs(&self, _: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
            panic!("on purpose")
        }

        fn layout(&self, _: Node, _: u64, _: &mut dyn FnMut(Piece) -> bool) -> Result<()> {
            panic!("on purpose")
        }
    }

    #[test]
    fn a_panic_is_the_error_of_its_call_and_the_next_call_works() {
        let fs = Guarded(Box::new(Panics(MemoryFs::new())));
        let node = Node(7);
        let failures = [
            fs.stat(node).err(),
            fs.lookup(node, b"x").err(),
            fs.list(node, Cursor::default(), 1).err(),
            fs.read_at(node, &mut [0], 0).err(),
            fs.read_link(node).err(),
            fs.xattrs(node).err(),
            fs.layout(node, 0, &mut |_| true).err(),
        ];
        for error in failures {
            let error = error.unwrap();
            assert_eq!(error.kind, ErrorKind::Corrupt);
            assert!(error.message.starts_with("the reader failed on"));
            assert!(fs.stat(fs.root()).is_ok());
        }
    }
}
