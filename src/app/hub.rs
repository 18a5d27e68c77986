//! The hub as a whole: what starts after what, and the orderly end.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::net::TcpListener;

use super::{Ended, Signals, close_all};
use crate::api::{Api, Door, TlsFiles, TlsListener, hash_token, new_token};
use crate::backup::{Backups, Settings, dispatch, keep, watch};
use crate::catalog::{Catalog, Repository};
use crate::config::HubConfig;
use crate::model::{Role, Timestamp, new_id, parse_size};
use crate::nbd::handshake::Pending;
use crate::nbd::limits::Limits;
use crate::nbd::listener::{Listener, Serving};
use crate::nbd::ports::PortRange;
use crate::nbd::publisher::Publisher;
use crate::nbd::server::Server;
use crate::pages;
use crate::repository::Root;
use crate::restore::{self, MountSettings, Mounts, Restores};
use crate::secrets::Secrets;
use crate::worker;

/// Names inside the data directory.
const LOCK: &str = "hub.lock";
const CATALOG: &str = "catalog.db";
const KEY: &str = "secret.key";
const REPOSITORY: &str = "repository";
const OVERLAYS: &str = "overlays";
const MOUNTS: &str = "mounts";
/// Name of the token that a first start makes.
const FIRST_TOKEN: &str = "first-admin";
/// Events that are kept; older ones are forgotten at a start.
const EVENTS: u32 = 100_000;
/// Time to open the disks of a restore point and find what is on them.
const OPEN: Duration = Duration::from_secs(60);
/// Time between two looks at exports and mounts of restore points.
const RESTORES: Duration = Duration::from_secs(1);
/// Time that a thread which looks after backups has to finish what it is at.
const THREADS_END: Duration = Duration::from_secs(3);
/// Time that mounts, exports of restore points and backups have to end.
const STOP: Duration = Duration::from_secs(20);
/// Time that requests of the API have to finish when the hub ends.
const API_END: Duration = Duration::from_secs(3);

/// Where a running hub can be reached.
#[derive(Debug, Clone)]
pub struct Reachable {
    /// NBD, for every export.
    pub nbd: Vec<SocketAddr>,
    /// The agents' door.
    pub agent: SocketAddr,
    /// The admins' door, where it is another one.
    pub admin: Option<SocketAddr>,
    /// The token that was made, at the first start only.
    pub first_token: Option<String>,
}

/// A running hub.
pub struct Hub {
    backups: Arc<Backups>,
    restores: Arc<Restores>,
    mounts: Arc<Mounts>,
    server: Arc<Server>,
    listeners: Vec<Serving>,
    doors: Vec<tokio::task::JoinHandle<()>>,
    end_doors: tokio::sync::watch::Sender<bool>,
    watching: Vec<(mpsc::Sender<()>, std::thread::JoinHandle<()>)>,
    reachable: Reachable,
    /// Held as long as the hub runs: there is one per data directory.
    _lock: File,
}

fn explain(what: &str, path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let text = format!("{what} '{}'", path.display());
    move |e| io::Error::new(e.kind(), format!("{text}: {e}"))
}

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

fn lock(directory: &Path) -> io::Result<File> {
    let path = directory.join(LOCK);
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(explain("cannot open", &path))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let text = format!(
            "another hub runs with the data directory '{}': stop it, or use another directory",
            directory.display()
        );
        io::Error::new(io::ErrorKind::AddrInUse, text)
    })?;
    Ok(file)
}

fn settings(config: &HubConfig, nbd: &[SocketAddr]) -> Result<Settings, String> {
    let port = nbd.first().map_or(Settings::default().nbd_port, SocketAddr::port);
    let seconds = Duration::from_secs;
    Ok(Settings {
        nbd_host: config.nbd.advertised_host.clone(),
        nbd_port: config.nbd.advertised_port.unwrap_or(port),
        sna_url: config.agent.url.clone(),
        sna_timeout: seconds(config.agent.timeout_seconds),
        agent_poll: seconds(config.agent.poll_seconds),
        skip_unchanged: config.backups.skip_unchanged,
        running: config.backups.running,
        running_per_repository: config.backups.running_per_repository,
        stall: seconds(config.backups.stall_seconds),
        reconnect: seconds(config.backups.reconnect_seconds),
        min_free: parse_size(&config.backups.min_free)?,
        quarantine: config.backups.quarantine,
    })
}

/// Least memory of a worker, which must hold the program too.
const WORKER_MEMORY: u64 = 256 << 20;

fn mount_settings(config: &HubConfig, directory: &Path) -> Result<MountSettings, String> {
    let memory = parse_size(&config.restore.worker_memory)?;
    if memory < WORKER_MEMORY {
        return Err(format!("'{}' is less than 256M", config.restore.worker_memory));
    }
    let request = Duration::from_secs(config.restore.request_seconds);
    Ok(MountSettings {
        mounts: config.restore.mounts,
        idle: Duration::from_secs(config.restore.mount_idle_seconds),
        program: worker::Program::own(),
        limits: worker::Limits { memory, request, open: OPEN.max(request) },
        root: config.restore.mount_root.clone().unwrap_or_else(|| directory.join(MOUNTS)),
    })
}

/// The catalog, with a token and a repository in it.
fn open_catalog(directory: &Path) -> io::Result<(Catalog, Option<String>)> {
    let path = directory.join(CATALOG);
    let catalog = Catalog::open(&path).map_err(other)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    catalog.prune_events(EVENTS).map_err(other)?;
    let mut first_token = None;
    if catalog.tokens().map_err(other)?.is_empty() {
        let token = new_token();
        catalog.add_token(FIRST_TOKEN, Role::Admin, &hash_token(&token)).map_err(other)?;
        first_token = Some(token);
    }
    if catalog.repositories().map_err(other)?.is_empty() {
        let path = directory.join(REPOSITORY);
        let (_, identity) = Root::create(&path, &new_id("repo")).map_err(other)?;
        let path = std::path::absolute(path)?.to_string_lossy().into_owned();
        let repository = Repository {
            id: identity.id,
            name: "local".into(),
            kind: "local".into(),
            enabled: true,
            config: serde_json::json!({"path": path}),
            path,
            is_immutable: false,
            min_retention_days: 0,
            created_at: Timestamp::now(),
        };
        catalog.add_repository(&repository).map_err(other)?;
    }
    Ok((catalog, first_token))
}

/// Checks what the types of the configuration do not tell.
///
/// # Errors
/// A sentence with the key.
pub fn check(config: &HubConfig) -> Result<(), String> {
    let key = |name: &str, error: String| format!("{name}: {error}");
    config.nbd.pool.parse::<PortRange>().map_err(|e| key("nbd.pool", e))?;
    let buffers = parse_size(&config.nbd.buffers).map_err(|e| key("nbd.buffers", e))?;
    let buffered = usize::try_from(buffers).unwrap_or(usize::MAX);
    let limits = Limits { buffered, ..Limits::default() };
    limits.validate().map_err(|e| key("nbd.buffers", e))?;
    settings(config, &[]).map_err(|e| key("backups.min_free", e))?;
    mount_settings(config, Path::new("")).map_err(|e| key("restore.worker_memory", e))?;
    for path in config.api.tls_certificate.iter().chain(&config.api.tls_key) {
        fs::metadata(path).map_err(|e| format!("'{}': {e}", path.display()))?;
    }
    Ok(())
}

impl Hub {
    /// Starts a hub with its data in `directory`, which is made where it is not there. On return
    /// every backup is in a true state and everything can be reached.
    ///
    /// # Errors
    /// A sentence with what cannot be opened; nothing runs then.
    pub async fn start(config: &HubConfig, directory: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(explain("cannot make the data directory", directory))?;
        let lock = lock(directory)?;
        let key = directory.join(KEY);
        let secrets = Secrets::open(&key).map_err(explain("cannot use the key file", &key))?;
        let (catalog, first_token) = open_catalog(directory)?;
        let (catalog, secrets) = (Arc::new(catalog), Arc::new(secrets));

        let buffered = parse_size(&config.nbd.buffers).map_err(other)?;
        let buffered = usize::try_from(buffered).unwrap_or(usize::MAX);
        pages::warn_if_small();
        let server = Server::new(Limits { buffered, ..Limits::default() })?;
        let pending = Arc::new(Pending::default());
        let pool: PortRange = config.nbd.pool.parse().map_err(other)?;
        let own = config.nbd.port_per_export.then_some(pool);
        let runtime = tokio::runtime::Handle::current();
        let publisher = Publisher::new(Arc::clone(&server), Arc::clone(&pending), runtime, own);
        let aside = catalog.port_allocations().map_err(other)?;
        publisher.avoid(aside.into_iter().map(|row| row.port));

        // Everything is bound before anything is recovered, and nobody is answered before it is.
        let mut bound = Vec::new();
        let mut nbd = Vec::new();
        for address in &config.nbd.listen {
            let listener = Listener::tcp(*address).await?;
            if let Listener::Tcp(tcp) = &listener {
                nbd.push(tcp.local_addr()?);
            }
            bound.push(listener);
        }
        if let Some(path) = &config.nbd.unix {
            bound.push(Listener::unix(path)?);
        }
        let agent = bind(config.api.agent_listen).await?;
        let admin = match config.api.admin_listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };

        let settings = settings(config, &nbd).map_err(other)?;
        let backups = Backups::new(catalog, Arc::new(publisher), secrets, settings);
        let backups = Arc::new(backups);
        let recovering = Arc::clone(&backups);
        tokio::task::spawn_blocking(move || recovering.recover())
            .await
            .map_err(other)?
            .map_err(other)?;

        let restores = Restores::new(
            Arc::clone(&backups),
            restore::Settings {
                exports: config.restore.exports,
                idle: Duration::from_secs(config.restore.idle_seconds),
                overlays: directory.join(OVERLAYS),
            },
        );
        let restores = Arc::new(restores.map_err(other)?);
        let mounts = mount_settings(config, directory).map_err(other)?;
        let mounts = Arc::new(Mounts::new(Arc::clone(&backups), mounts).map_err(other)?);

        let listeners = bound
            .into_iter()
            .map(|listener| listener.serve(Arc::clone(&server), Arc::clone(&pending), None))
            .collect();
        let (end_doors, ending) = tokio::sync::watch::channel(false);
        let reachable = Reachable {
            nbd,
            agent: agent.local_addr()?,
            admin: admin.as_ref().map(TcpListener::local_addr).transpose()?,
            first_token,
        };
        let api = |door| {
            let (restores, mounts) = (Arc::clone(&restores), Arc::clone(&mounts));
            Api::new(Arc::clone(&backups), restores, mounts, door, pool).router()
        };
        let mut doors = vec![open_door(agent, api(Door::Agent), ending.clone())];
        if let Some(listener) = admin {
            let files = tls_files(config);
            doors.push(match files {
                Some(files) => {
                    let listener = TlsListener::new(listener, &files)?;
                    open_door(listener, api(Door::Admin), ending)
                }
                None => open_door(listener, api(Door::Admin), ending),
            });
        }
        let watching = vec![
            start_thread("watchdog", Arc::clone(&backups), watch)?,
            start_thread("dispatcher", Arc::clone(&backups), dispatch)?,
            start_thread("keeper", Arc::clone(&backups), keep)?,
            start_thread(
                "restores",
                Arc::new((Arc::clone(&restores), Arc::clone(&mounts))),
                |(restores, mounts), stop| {
                    while stop.recv_timeout(RESTORES) == Err(mpsc::RecvTimeoutError::Timeout) {
                        restores.look();
                        mounts.look();
                    }
                },
            )?,
        ];
        Ok(Self {
            backups,
            restores,
            mounts,
            server,
            listeners,
            doors,
            end_doors,
            watching,
            reachable,
            _lock: lock,
        })
    }

    /// Where it can be reached.
    pub fn reachable(&self) -> &Reachable {
        &self.reachable
    }

    /// Ends everything in order: requests, images, connections. Whether all ended well.
    pub async fn stop(mut self) -> bool {
        for (stop, thread) in self.watching.drain(..) {
            drop(stop);
            // It may be in the middle of something; what a copy has not done is done at the next
            // start.
            let ended = tokio::task::spawn_blocking(move || thread.join());
            let _ = tokio::time::timeout(THREADS_END, ended).await;
        }
        let _ = self.end_doors.send(true);
        for door in &mut self.doors {
            if tokio::time::timeout(API_END, &mut *door).await.is_err() {
                door.abort();
            }
        }
        let (backups, restores) = (Arc::clone(&self.backups), Arc::clone(&self.restores));
        let mounts = Arc::clone(&self.mounts);
        let stopping = move || {
            mounts.stop();
            restores.stop();
            backups.stop();
        };
        // A disk that hangs must not keep others from being flushed and closed.
        let stopped = tokio::time::timeout(STOP, tokio::task::spawn_blocking(stopping)).await;
        if stopped.is_err() {
            tracing::error!("mounts, restores or backups did not end in {STOP:?}: a disk may hang");
        }
        let clean = close_all(&self.server).await;
        self.listeners.clear();
        clean
    }
}

/// Runs a hub until a signal ends it; `announce` is called once everything can be reached.
///
/// # Errors
/// Those of [`Hub::start`].
pub async fn serve(
    config: HubConfig,
    directory: PathBuf,
    announce: impl FnOnce(&Reachable) -> io::Result<()>,
) -> io::Result<Ended> {
    let mut signals = Signals::new()?;
    let hub = Hub::start(&config, &directory).await?;
    announce(hub.reachable())?;
    tokio::select! {
        _ = signals.interrupt.recv() => {}
        _ = signals.terminate.recv() => {}
    }
    tracing::info!("shutting down");
    tokio::select! {
        _ = signals.interrupt.recv() => Ok(Ended::Forced),
        _ = signals.terminate.recv() => Ok(Ended::Forced),
        clean = hub.stop() => Ok(if clean { Ended::Clean } else { Ended::Unclean }),
    }
}

async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|e| io::Error::new(e.kind(), format!("the API cannot listen on {address}: {e}")))
}

fn tls_files(config: &HubConfig) -> Option<TlsFiles> {
    let certificate = config.api.tls_certificate.clone()?;
    Some(TlsFiles { certificate, key: config.api.tls_key.clone()? })
}

fn open_door<L>(
    listener: L,
    router: axum::Router,
    mut ending: tokio::sync::watch::Receiver<bool>,
) -> tokio::task::JoinHandle<()>
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    tokio::spawn(async move {
        let end = async move {
            // A hub that is gone ends its doors too.
            let _ = ending.wait_for(|end| *end).await;
        };
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(end).await {
            tracing::error!(%error, "a door of the API failed");
        }
    })
}

/// A thread that works until its sender is dropped.
fn start_thread<T: Send + Sync + 'static>(
    name: &str,
    on: Arc<T>,
    work: fn(&T, &mpsc::Receiver<()>),
) -> io::Result<(mpsc::Sender<()>, std::thread::JoinHandle<()>)> {
    let (stop, stopped) = mpsc::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    let thread = thread.spawn(move || work(&on, &stopped))?;
    Ok((stop, thread))
}
