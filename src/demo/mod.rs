//! The demonstration: a disk with a file system, backed up over NBD as a full and an incremental,
//! read back and compared. Needs nothing but a directory for temporary files.

mod disk;
mod transfer;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qcow2::{BackingFormat, CreateOptions, Repair};

use crate::export;
use crate::model::{Format, Source};
use crate::nbd::exports::Export;
use crate::nbd::handshake::Pending;
use crate::nbd::limits::Limits;
use crate::nbd::listener::Listener;
use crate::nbd::server::Server;
use disk::Disk;
use transfer::{Extents, changed_blocks, data_blocks, read_back, send};

/// Time for an export to close.
const CLOSE: Duration = Duration::from_secs(30);

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Step {
    /// What was done.
    pub name: &'static str,
    /// Bytes that went over the wire.
    pub bytes: u64,
    /// Length of the file it made, where it made one.
    pub file: Option<u64>,
    /// How long it took.
    pub took: Duration,
}

/// What the demonstration found.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Bytes of the disk.
    pub disk: u64,
    /// The steps in order.
    pub steps: Vec<Step>,
    /// The first byte in which the chain differs from the disk; `None` is as it should be.
    pub difference: Option<u64>,
    /// What the check of both images found, in words; empty is as it should be.
    pub findings: Vec<String>,
}

/// Runs the demonstration in `directory`, which stays as it was.
///
/// # Errors
/// When a file, a socket or an image fails.
pub fn run(directory: &Path) -> io::Result<Outcome> {
    let work = directory.join(format!("sendense-demo-{}", std::process::id()));
    fs::create_dir_all(&work)?;
    let outcome = in_directory(&work);
    let cleaned = fs::remove_dir_all(&work);
    let outcome = outcome?;
    cleaned.map(|()| outcome)
}

fn in_directory(work: &Path) -> io::Result<Outcome> {
    let hub = Hub::start()?;
    let mut steps = Vec::new();
    let mut disk = Disk::create(&work.join("disk.raw"))?;

    let (full, incremental) = (work.join("full.qcow2"), work.join("incremental.qcow2"));
    let options = CreateOptions::new(disk.size());
    qcow2::create(&full, &options).map_err(io::Error::other)?;
    let blocks = data_blocks(disk.path())?;
    steps.push(hub.backup("full backup", &full, &disk, &blocks)?);

    let before = disk.keep_copy(&work.join("before.raw"))?;
    disk.change()?;
    let changed = changed_blocks(&before, disk.path())?;
    let options = CreateOptions::new(disk.size()).backing("full.qcow2", BackingFormat::Qcow2);
    qcow2::create(&incremental, &options).map_err(io::Error::other)?;
    steps.push(hub.backup("incremental", &incremental, &disk, &changed)?);

    let (step, difference) = hub.compare(&incremental, &disk)?;
    steps.push(step);
    let mut findings = Vec::new();
    for image in [&full, &incremental] {
        let report = qcow2::check(image, Repair::None).map_err(io::Error::other)?;
        findings.extend(report.findings);
    }
    Ok(Outcome { disk: disk.size(), steps, difference, findings })
}

/// The server under demonstration, on a loopback port of its own.
struct Hub {
    server: Arc<Server>,
    address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Hub {
    fn start() -> io::Result<Self> {
        let server = Server::new(Limits::default())?;
        let bound = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        let address = bound.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let serving = Arc::clone(&server);
        let thread = std::thread::Builder::new().name("nbd-accept".into()).spawn(move || {
            runtime.block_on(async move {
                match Listener::from_tcp(bound) {
                    Ok(listener) => {
                        let _serving = listener.serve(serving, Arc::new(Pending::default()), None);
                        let _ = stopped.await;
                    }
                    Err(error) => tracing::error!(%error, "cannot listen"),
                }
            });
        })?;
        Ok(Self { server, address, stop: Some(stop), thread: Some(thread) })
    }

    fn export(&self, image: &Path, read_only: bool) -> io::Result<Arc<Export>> {
        let source = Source { format: Format::Qcow2, path: image.to_owned() };
        let device = export::open(&source, read_only).map_err(io::Error::other)?;
        let limits = &self.server.limits;
        let export = Export::new("disk".into(), String::new(), device, limits);
        self.server.exports.add(Arc::clone(&export)).map_err(io::Error::other)?;
        Ok(export)
    }

    fn close(&self) -> io::Result<()> {
        match self.server.exports.remove("disk") {
            Some(export) => export.close(Duration::ZERO, CLOSE).map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// Sends `extents` of the disk into `image`; the time includes making it durable.
    fn backup(
        &self,
        name: &'static str,
        image: &Path,
        disk: &Disk,
        extents: &Extents,
    ) -> io::Result<Step> {
        self.export(image, false)?;
        let started = Instant::now();
        let sent = send(self.address, disk.path(), extents);
        self.close()?;
        let took = started.elapsed();
        let file = Some(fs::metadata(image)?.len());
        Ok(Step { name, bytes: sent?, file, took })
    }

    fn compare(&self, image: &Path, disk: &Disk) -> io::Result<(Step, Option<u64>)> {
        self.export(image, true)?;
        let started = Instant::now();
        let difference = read_back(self.address, disk.path());
        let took = started.elapsed();
        self.close()?;
        let step = Step { name: "read back, compare", bytes: disk.size(), file: None, took };
        Ok((step, difference?))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where the demonstration works unless told otherwise.
pub fn default_directory() -> PathBuf {
    std::env::temp_dir()
}
