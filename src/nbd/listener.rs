//! Where connections come in: TCP, a Unix socket, sockets that systemd opened.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;

use super::handshake::{Pending, accept};
use super::server::Server;

/// Pause after a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that accepts connections.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket, removed at the end where it was made here.
    Unix(UnixListener, Option<PathBuf>),
}

impl Listener {
    /// Listens on a TCP address.
    ///
    /// # Errors
    /// Those of bind(2), with the address.
    pub async fn tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await;
        listener.map(Self::Tcp).map_err(|e| explain(&format!("cannot listen on {address}"), &e))
    }

    /// Takes over a bound TCP socket.
    ///
    /// # Errors
    /// When the runtime does not take it.
    pub fn from_tcp(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(TcpListener::from_std(listener)?))
    }

    /// Listens on a Unix socket at `path`. The socket of a process that is gone is replaced.
    ///
    /// # Errors
    /// `AddrInUse` where somebody answers there; those of bind(2).
    pub fn unix(path: &Path) -> io::Result<Self> {
        let name = format!("cannot listen on '{}'", path.display());
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
            match std::os::unix::net::UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(|e| explain(&name, &e))?;
                }
                _ => return Err(explain(&name, &io::ErrorKind::AddrInUse.into())),
            }
        }
        let listener = UnixListener::bind(path).map_err(|e| explain(&name, &e))?;
        Ok(Self::Unix(listener, Some(path.to_owned())))
    }

    /// The sockets that systemd passed, if it did (`LISTEN_FDS`).
    ///
    /// # Errors
    /// When a passed descriptor is no listening stream socket.
    pub fn from_systemd() -> io::Result<Vec<Self>> {
        let mut passed = listenfd::ListenFd::from_env();
        let mut listeners = Vec::new();
        for index in 0..passed.len() {
            if let Ok(Some(listener)) = passed.take_tcp_listener(index) {
                listeners.push(Self::from_tcp(listener)?);
            } else if let Some(listener) = passed.take_unix_listener(index)? {
                listener.set_nonblocking(true)?;
                listeners.push(Self::Unix(UnixListener::from_std(listener)?, None));
            }
        }
        Ok(listeners)
    }

    /// The URI of `export` through this listener.
    ///
    /// # Errors
    /// When the system does not tell the socket's address.
    pub fn uri(&self, export: &str) -> io::Result<String> {
        match self {
            Self::Tcp(listener) => {
                let address = listener.local_addr()?;
                Ok(format!("nbd://{address}/{export}"))
            }
            Self::Unix(listener, _) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().unwrap_or(Path::new("")).to_string_lossy();
                Ok(format!("nbd+unix:///{export}?socket={path}"))
            }
        }
    }

    /// Accepts connections in the background until the task is aborted. `only` restricts them to
    /// one export.
    pub fn serve(
        self,
        server: Arc<Server>,
        pending: Arc<Pending>,
        only: Option<String>,
    ) -> Serving {
        let path = match &self {
            Self::Tcp(_) => None,
            Self::Unix(_, path) => path.clone(),
        };
        let only: Option<Arc<str>> = only.map(Into::into);
        let task = tokio::spawn(async move {
            loop {
                if let Err(error) = self.accept_one(&server, &pending, only.as_ref()).await {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        });
        Serving { task, path }
    }

    async fn accept_one(
        &self,
        server: &Arc<Server>,
        pending: &Arc<Pending>,
        only: Option<&Arc<str>>,
    ) -> io::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let only = only.map(Arc::clone);
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Small replies of the negotiation must not wait for each other.
                stream.set_nodelay(true)?;
                let id = NEXT.fetch_add(1, Ordering::Relaxed);
                accept(server, pending, id, stream, Some(peer.ip()), only);
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let id = NEXT.fetch_add(1, Ordering::Relaxed);
                accept(server, pending, id, stream, None, only);
            }
        }
        Ok(())
    }
}

/// A listener at work; stops when dropped, and takes its socket file away.
#[derive(Debug)]
pub struct Serving {
    task: JoinHandle<()>,
    path: Option<PathBuf>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(path) = &self.path {
            // Somebody may have removed it; that is what is wanted.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn explain(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
