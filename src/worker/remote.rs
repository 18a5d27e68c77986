//! A volume's tree as its worker tells it.

use std::sync::Arc;

use guest::tree::{LISTING, Layout, Listed, Listing, READ, Resolved};
use guest::{Attributes, Cursor, Node, Result, Tree};

use super::check;
use super::plain;
use super::process::Worker;
use super::protocol::{Call, Request};

pub(super) struct RemoteTree {
    pub(super) worker: Arc<Worker>,
    pub(super) volume: u32,
}

impl RemoteTree {
    fn request(&self, call: Call) -> Request {
        Request { volume: self.volume, call }
    }

    /// Reads around the worker where that can be, and is worth it.
    fn read_plain(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<Option<usize>> {
        if !plain::is_worth_it(buf.len(), offset) {
            return Ok(None);
        }
        let layout = || self.layout(file, offset);
        let read = self.worker.plain.read((self.volume, file), buf, offset, layout)?;
        // Whatever came of it: from its end on a mount shows nothing.
        self.worker.check_alive()?;
        Ok(read)
    }
}

impl Tree for RemoteTree {
    fn root(&self) -> Result<Node> {
        self.worker.ask(&self.request(Call::Root), |_| Ok(()))
    }

    fn stat(&self, node: Node) -> Result<Attributes> {
        self.worker.ask(&self.request(Call::Stat(node)), |found| check::attributes(found))
    }

    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> Result<Listing> {
        let limit = limit.clamp(1, LISTING);
        let told = u32::try_from(limit).unwrap_or(u32::MAX);
        let call = Call::List { directory, cursor, limit: told };
        self.worker.ask(&self.request(call), |found| check::listing(found, limit))
    }

    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Listed>> {
        let call = Call::Lookup { directory, name: name.to_vec() };
        self.worker.ask(&self.request(call), |found: &mut Option<Listed>| match found {
            Some(listed) => check::listed(listed),
            None => Ok(()),
        })
    }

    fn resolve(&self, path: &[u8], follow: bool) -> Result<Resolved> {
        let call = Call::Resolve { path: path.to_vec(), follow };
        self.worker.ask(&self.request(call), |found| check::resolved(found))
    }

    fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize> {
        let length = buf.len().min(READ);
        let buf = &mut buf[..length];
        if let Some(read) = self.read_plain(file, buf, offset)? {
            return Ok(read);
        }
        let told = u32::try_from(length).unwrap_or(u32::MAX);
        let request = self.request(Call::Read { file, offset, length: told });
        self.worker.read(&request, buf)
    }

    fn read_link(&self, link: Node) -> Result<Vec<u8>> {
        self.worker
            .ask(&self.request(Call::ReadLink(link)), |target: &mut Vec<u8>| check::link(target))
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let request = self.request(Call::Xattrs(node));
        self.worker.ask(&request, |found: &mut Vec<_>| check::xattrs(found))
    }

    fn layout(&self, file: Node, from: u64) -> Result<Layout> {
        let call = Call::Layout { file, from };
        self.worker.ask(&self.request(call), |found| check::layout(found, from))
    }
}
