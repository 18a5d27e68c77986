//! Making exports reachable while the server runs, and taking them away again.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::exports::Export;
use super::handshake::Pending;
use super::listener::{Listener, Serving};
use super::ports::{PortRange, Ports};
use super::server::Server;
use crate::block::{BlockDevice, BlockResult};

/// What an export is to be.
pub struct Publication {
    /// Its name.
    pub name: String,
    /// Another name for it.
    pub alias: Option<String>,
    /// For human eyes.
    pub description: String,
    /// What it serves.
    pub device: Arc<dyn BlockDevice>,
    /// Most connections; the server's bound where not given.
    pub max_connections: Option<usize>,
}

struct Own {
    ports: Ports,
    listeners: BTreeMap<String, (u16, Serving)>,
}

/// Adds exports to a running server and removes them. Callable from any thread.
pub struct Publisher {
    server: Arc<Server>,
    pending: Arc<Pending>,
    runtime: tokio::runtime::Handle,
    /// Exports get a port of their own too, where there is a pool.
    own: Option<Mutex<Own>>,
}

impl Publisher {
    /// For `server`, whose negotiations run on `runtime`. With `pool`, each export gets a port.
    pub fn new(
        server: Arc<Server>,
        pending: Arc<Pending>,
        runtime: tokio::runtime::Handle,
        pool: Option<PortRange>,
    ) -> Self {
        let own = pool
            .map(|range| Mutex::new(Own { ports: Ports::new(range), listeners: BTreeMap::new() }));
        Self { server, pending, runtime, own }
    }

    /// The server.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    fn own(&self) -> Option<MutexGuard<'_, Own>> {
        self.own.as_ref().map(|own| own.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes an export visible and reachable; its own port, where it has one. Where this fails the
    /// device is left open.
    ///
    /// # Errors
    /// A sentence where the name is taken or no port is free.
    pub fn publish(&self, what: Publication) -> Result<(Arc<Export>, Option<u16>), String> {
        let mut limits = self.server.limits.clone();
        if let Some(most) = what.max_connections {
            limits.connections_per_export = most;
        }
        let export = Export::new(what.name, what.description, what.device, &limits);
        // The port is bound before the name is visible, and nobody is answered before it is.
        let bound = self.listen_alone(&export.name).map_err(|e| e.to_string())?;
        if let Err(taken) =
            self.server.exports.add_with_alias(Arc::clone(&export), what.alias.as_deref())
        {
            self.release(&export.name);
            return Err(taken);
        }
        Ok((export, bound))
    }

    fn listen_alone(&self, name: &str) -> io::Result<Option<u16>> {
        let Some(mut own) = self.own() else { return Ok(None) };
        let bound = own.ports.allocate(name).map_err(io::Error::other)?;
        let port = bound.local_addr()?.port();
        let _runtime = self.runtime.enter();
        let listener = Listener::from_tcp(bound)?;
        let (server, pending) = (Arc::clone(&self.server), Arc::clone(&self.pending));
        let serving = listener.serve(server, pending, Some(name.to_owned()));
        own.listeners.insert(name.to_owned(), (port, serving));
        Ok(Some(port))
    }

    fn release(&self, name: &str) {
        if let Some(mut own) = self.own() {
            own.listeners.remove(name);
            own.ports.release(name);
        }
    }

    /// Makes an export invisible, ends its connections after `notice` and closes its device. Blocks
    /// until that is done; an export that is not there is no error.
    ///
    /// # Errors
    /// What closing the device gave.
    pub fn withdraw(&self, name: &str, notice: Duration) -> BlockResult<()> {
        let export = self.server.exports.remove(name);
        self.release(name);
        match export {
            Some(export) => export.close(notice, self.server.limits.shutdown),
            None => Ok(()),
        }
    }

    /// Gives none of these ports to exports from now on.
    pub fn avoid(&self, ports: impl IntoIterator<Item = u16>) {
        if let Some(mut own) = self.own() {
            own.ports.avoid(ports);
        }
    }

    /// The range of the pool, and the ports in use with their exports.
    pub fn ports(&self) -> Option<(PortRange, Vec<(u16, String)>)> {
        let own = self.own()?;
        let used = own.listeners.iter().map(|(name, (port, _))| (*port, name.clone())).collect();
        Some((own.ports.range(), used))
    }
}
