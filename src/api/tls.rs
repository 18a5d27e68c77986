//! TLS for the admin door.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::server::TlsStream;

/// Time for a handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes that are done and wait to be taken.
const WAITING: usize = 64;
/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Certificate and key, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The chain of certificates, the server's first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A listener that speaks TLS. Handshakes go on side by side: a silent peer holds up nobody.
pub struct TlsListener {
    done: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Speaks TLS on `listener`.
    ///
    /// # Errors
    /// When the files are no certificate and key that belong together.
    pub fn new(listener: TcpListener, files: &TlsFiles) -> io::Result<Self> {
        let explain = |path: &PathBuf, e: &dyn std::fmt::Display| {
            io::Error::other(format!("'{}': {e}", path.display()))
        };
        let chain = CertificateDer::pem_file_iter(&files.certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|e| explain(&files.certificate, &e))?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| explain(&files.key, &e))?;
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|e| explain(&files.certificate, &e))?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let address = listener.local_addr()?;
        let (send, done) = mpsc::channel(WAITING);
        tokio::spawn(accept_all(listener, acceptor, send));
        Ok(Self { done, address })
    }
}

async fn accept_all(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    send: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    while !send.is_closed() {
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (acceptor, send) = (acceptor.clone(), send.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => drop(send.send((stream, peer)).await),
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
        });
    }
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.done.recv().await {
            Some(next) => next,
            // The accepting task lives as long as this does.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}
