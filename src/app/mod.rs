//! The server process: start order, reload, orderly end.

mod hub;

pub use hub::{Hub, Reachable, check, serve};

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::dropins;
use crate::export;
use crate::model::ExportSpec;
use crate::nbd::exports::Export;
use crate::nbd::handshake::Pending;
use crate::nbd::limits::Limits;
use crate::nbd::listener::{Listener, Serving};
use crate::nbd::ports::{PortRange, Ports};
use crate::nbd::server::Server;
use crate::nbd::stats::Snapshot;
use crate::pages;

/// Time that clients of an export which a reload takes away have to finish.
const RELOAD_DRAIN: Duration = Duration::from_millis(1500);

/// What the process is to serve.
#[derive(Debug, Clone)]
pub struct AppOptions {
    /// TCP addresses that serve every export.
    pub listen: Vec<SocketAddr>,
    /// Unix socket that serves every export.
    pub unix: Option<PathBuf>,
    /// Ports for single exports.
    pub pool: Option<PortRange>,
    /// Directory of export drop-ins.
    pub config_dir: Option<PathBuf>,
    /// Unix socket that tells the status.
    pub control: Option<PathBuf>,
    /// Exports from the command line.
    pub exports: Vec<ExportSpec>,
    /// Bounds.
    pub limits: Limits,
}

/// One export in the status.
#[derive(Debug, Serialize)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Connections now.
    pub connections: usize,
    /// Connections ever.
    pub connections_served: u64,
    /// What it did.
    #[serde(flatten)]
    pub stats: Snapshot,
}

/// The status of the process.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Version of the program.
    pub version: &'static str,
    /// Negotiations in progress.
    pub negotiating: usize,
    /// Most bytes of payload that were in memory for reads.
    pub peak_read_memory: usize,
    /// Most bytes of payload that were in memory for writes.
    pub peak_write_memory: usize,
    /// The exports, by name.
    pub exports: Vec<ExportStatus>,
}

/// How the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Everything was flushed and closed.
    Clean,
    /// Something was not; the log says what.
    Unclean,
    /// A second signal cut the shutdown short.
    Forced,
}

struct App {
    server: Arc<Server>,
    pending: Arc<Pending>,
    ports: Option<Ports>,
    /// Listeners of single exports.
    own: BTreeMap<String, Serving>,
    shared: Vec<Serving>,
    config_dir: Option<PathBuf>,
    configured: Vec<ExportSpec>,
}

/// Serves until a signal ends the process. Prints one URI per export once all are reachable.
///
/// # Errors
/// When something cannot be opened; nothing is served then.
pub async fn run(options: AppOptions) -> io::Result<Ended> {
    let signals = Signals::new()?;
    pages::warn_if_small();
    let server = Server::new(options.limits.clone())?;
    let pending = Arc::new(Pending::default());
    let mut app = App {
        server,
        pending,
        ports: options.pool.map(Ports::new),
        own: BTreeMap::new(),
        shared: Vec::new(),
        config_dir: options.config_dir.clone(),
        configured: Vec::new(),
    };
    let started = app.start(&options).await;
    let control = match (&started, &options.control) {
        (Ok(_), Some(path)) => Some(app.control(path)),
        _ => None,
    };
    let outcome = match (started, control.transpose()) {
        (Ok(uris), Ok(_control)) => {
            announce(&uris)?;
            app.serve(signals).await
        }
        (Err(error), _) | (_, Err(error)) => {
            // What was opened so far is closed as at any other end.
            app.stop().await;
            return Err(error);
        }
    };
    Ok(outcome)
}

/// Tells the URIs to whoever started the process.
fn announce(uris: &[String]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for uri in uris {
        writeln!(out, "{uri}")?;
    }
    out.flush()
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    reload: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        // Whoever limits the size of files means writes to fail, not the process to die: the default
        // of this signal would leave every image unflushed.
        drop(signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            reload: signal(SignalKind::hangup())?,
        })
    }
}

impl App {
    async fn start(&mut self, options: &AppOptions) -> io::Result<Vec<String>> {
        let configured = match &self.config_dir {
            Some(directory) => dropins::read_directory(directory).map_err(io::Error::other)?,
            None => Vec::new(),
        };
        let mut listeners = Listener::from_systemd()?;
        for address in &options.listen {
            listeners.push(Listener::tcp(*address).await?);
        }
        if let Some(path) = &options.unix {
            listeners.push(Listener::unix(path)?);
        }
        for spec in options.exports.iter().chain(&configured) {
            self.open(spec).await.map_err(io::Error::other)?;
        }
        let mut uris = Vec::new();
        for spec in options.exports.iter().chain(&configured) {
            let uri = match self.listen_alone(&spec.name)? {
                Some(uri) => Some(uri),
                None => listeners.first().map(|l| l.uri(&spec.name)).transpose()?,
            };
            uris.extend(uri);
        }
        self.configured = configured;
        for listener in listeners {
            let (server, pending) = (Arc::clone(&self.server), Arc::clone(&self.pending));
            self.shared.push(listener.serve(server, pending, None));
        }
        Ok(uris)
    }

    /// Opens an export and makes it visible.
    async fn open(&self, spec: &ExportSpec) -> Result<(), String> {
        let (source, read_only) = (spec.source.clone(), spec.read_only);
        let opened = tokio::task::spawn_blocking(move || export::open(&source, read_only)).await;
        let device = match opened {
            Ok(Ok(device)) => device,
            Ok(Err(error)) => return Err(format!("export '{}': {error}", spec.name)),
            Err(error) => return Err(format!("export '{}': {error}", spec.name)),
        };
        let mut limits = self.server.limits.clone();
        if let Some(most) = spec.max_connections {
            limits.connections_per_export = most;
        }
        let export =
            Export::new(spec.name.clone(), spec.description.clone(), Arc::clone(&device), &limits);
        let added = self.server.exports.add(export);
        if added.is_err() {
            // It was never visible.
            let _ = device.close();
        }
        added?;
        tracing::info!(export = %spec.name, source = %spec.source, "export opened");
        Ok(())
    }

    /// Gives an export a port of its own, where there is a pool; its URI.
    fn listen_alone(&mut self, name: &str) -> io::Result<Option<String>> {
        let Some(ports) = &mut self.ports else { return Ok(None) };
        let bound = ports.allocate(name).map_err(io::Error::other)?;
        let listener = Listener::from_tcp(bound)?;
        let uri = listener.uri(name)?;
        let (server, pending) = (Arc::clone(&self.server), Arc::clone(&self.pending));
        self.own.insert(name.to_owned(), listener.serve(server, pending, Some(name.to_owned())));
        Ok(Some(uri))
    }

    async fn serve(mut self, mut signals: Signals) -> Ended {
        loop {
            tokio::select! {
                _ = signals.interrupt.recv() => break,
                _ = signals.terminate.recv() => break,
                _ = signals.reload.recv() => self.reload().await,
            }
        }
        tracing::info!("shutting down");
        tokio::select! {
            _ = signals.interrupt.recv() => Ended::Forced,
            _ = signals.terminate.recv() => Ended::Forced,
            clean = self.stop() => if clean { Ended::Clean } else { Ended::Unclean },
        }
    }

    /// Reads the drop-ins again and serves what they say now.
    async fn reload(&mut self) {
        let Some(directory) = &self.config_dir else {
            tracing::info!("nothing to reload: there is no directory of drop-ins");
            return;
        };
        let wanted = match dropins::read_directory(directory) {
            Ok(wanted) => wanted,
            Err(error) => {
                tracing::error!(%error, "reload refused, nothing is changed");
                return;
            }
        };
        let plan = dropins::plan(&self.configured, &wanted);
        for name in &plan.remove {
            self.configured.retain(|spec| spec.name != *name);
            self.own.remove(name);
            if let Some(ports) = &mut self.ports {
                ports.release(name);
            }
            let Some(export) = self.server.exports.remove(name) else { continue };
            let notice = self.server.limits.shutdown_notice;
            if close(export, notice, RELOAD_DRAIN).await {
                tracing::info!(export = %name, "export removed");
            }
        }
        for spec in &plan.add {
            let served = match self.open(spec).await {
                Ok(()) => self.listen_alone(&spec.name).map_err(|e| e.to_string()),
                Err(error) => Err(error),
            };
            match served {
                Ok(uri) => {
                    tracing::info!(export = %spec.name, uri, "export added");
                    self.configured.push(spec.clone());
                }
                Err(error) => tracing::error!(%error, "export not added"),
            }
        }
        let (removed, added, unchanged) = (plan.remove.len(), plan.add.len(), plan.unchanged);
        tracing::info!(removed, added, unchanged, "reload done");
    }

    /// Ends everything in order; whether all of it ended well.
    async fn stop(&mut self) -> bool {
        let clean = close_all(&self.server).await;
        self.shared.clear();
        self.own.clear();
        clean
    }

    /// Serves the status on a Unix socket that only the owner can use.
    fn control(&self, path: &PathBuf) -> io::Result<Control> {
        use std::os::unix::fs::PermissionsExt;
        let Listener::Unix(listener, _) = Listener::unix(path)? else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let (server, pending) = (Arc::clone(&self.server), Arc::clone(&self.pending));
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let status = serde_json::to_vec(&status(&server, &pending)).unwrap_or_default();
                // A reader that is gone again does not matter.
                let _ = stream.write_all(&status).await;
            }
        });
        Ok(Control { task, path: path.clone() })
    }
}

/// The status socket; gone when dropped.
struct Control {
    task: tokio::task::JoinHandle<()>,
    path: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        // Somebody may have removed it; that is what is wanted.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn status(server: &Server, pending: &Pending) -> Status {
    let (peak_read_memory, peak_write_memory) = server.peak_memory();
    let exports = server.exports.all().into_iter().map(|export| {
        let info = export.device.info();
        let (connections, connections_served) = export.connections();
        ExportStatus {
            name: export.name.clone(),
            size: info.size,
            read_only: info.read_only,
            connections,
            connections_served,
            stats: export.stats.snapshot(),
        }
    });
    Status {
        version: env!("CARGO_PKG_VERSION"),
        negotiating: pending.len(),
        peak_read_memory,
        peak_write_memory,
        exports: exports.collect(),
    }
}

/// Ends all exports within the time for a shutdown; whether all ended well.
async fn close_all(server: &Arc<Server>) -> bool {
    let limits = server.limits.clone();
    server.exports.begin_shutdown();
    let closing: Vec<_> = server
        .exports
        .all()
        .into_iter()
        .map(|export| tokio::spawn(close(export, limits.shutdown_notice, limits.shutdown)))
        .collect();
    let all = async {
        let mut clean = true;
        for task in closing {
            clean &= task.await.unwrap_or(false);
        }
        clean
    };
    // Devices may take longer than their connections: the bound holds for both.
    tokio::time::timeout(limits.shutdown, all).await.unwrap_or_else(|_| {
        tracing::error!("shutdown took longer than {:?}", limits.shutdown);
        false
    })
}

/// Ends an export's connections and closes its device; whether both went well.
async fn close(export: Arc<Export>, notice: Duration, bound: Duration) -> bool {
    let name = export.name.clone();
    let closed = tokio::task::spawn_blocking(move || export.close(notice, bound)).await;
    match closed {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::error!(export = %name, %error, "export was not closed cleanly");
            false
        }
        Err(error) => {
            tracing::error!(export = %name, %error, "export was not closed");
            false
        }
    }
}
