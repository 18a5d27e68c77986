//! Negotiation on the async runtime: bounded in time as a whole, and in number.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use nbd_proto::OptionReply;
use nbd_proto::server::{
    CloseReason, Event, Handshake, HandshakeConfig, Negotiated, Purpose, Refusal,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::AbortHandle;

use super::exports::Slot;
use super::server::{Entry, Server};
use super::session;
use super::socket::Socket;

/// Bytes received at once.
const RECEIVE: usize = 4096;

/// Where a connection comes from: an address, or the local machine.
pub type Source = Option<IpAddr>;

/// Negotiations in progress. When there are too many, the oldest gives way: a real client is done
/// in milliseconds, so whoever is old is idle.
#[derive(Default)]
pub struct Pending {
    tasks: Mutex<BTreeMap<u64, (Source, AbortHandle)>>,
}

impl Pending {
    fn enter(&self, id: u64, source: Source, task: AbortHandle, server: &Server) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let same = tasks.iter().filter(|(_, (s, _))| *s == source);
        let crowded = same.clone().count() >= server.limits.handshakes_per_source;
        let oldest = match crowded {
            true => same.map(|(id, _)| *id).next(),
            false if tasks.len() >= server.limits.handshakes => tasks.keys().next().copied(),
            false => None,
        };
        if let Some((_, abort)) = oldest.and_then(|id| tasks.remove(&id)) {
            tracing::debug!(?source, "too many negotiations; the oldest is dropped");
            abort.abort();
        }
        tasks.insert(id, (source, task));
    }

    fn leave(&self, id: u64) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Negotiations in progress.
    pub fn len(&self) -> usize {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A stream that can be taken from the runtime.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whether it is TCP.
    const TCP: bool;

    /// The socket itself.
    ///
    /// # Errors
    /// When the runtime cannot let go of it.
    fn into_fd(self) -> io::Result<OwnedFd>;
}

impl Stream for tokio::net::TcpStream {
    const TCP: bool = true;

    fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

impl Stream for tokio::net::UnixStream {
    const TCP: bool = false;

    fn into_fd(self) -> io::Result<OwnedFd> {
        Ok(self.into_std()?.into())
    }
}

/// Serves an accepted connection in the background. `only` restricts it to one export, which the
/// empty name stands for too.
pub fn accept<S: Stream>(
    server: &Arc<Server>,
    pending: &Arc<Pending>,
    id: u64,
    stream: S,
    source: Source,
    only: Option<Arc<str>>,
) {
    let (task_server, task_pending) = (Arc::clone(server), Arc::clone(pending));
    // The task waits until it is entered, so that it cannot leave before.
    let (entered, wait) = tokio::sync::oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let _ = wait.await;
        handle(&task_server, stream, source, only.as_deref()).await;
        task_pending.leave(id);
    });
    pending.enter(id, source, task.abort_handle(), server);
    let _ = entered.send(());
}

async fn handle<S: Stream>(
    server: &Arc<Server>,
    mut stream: S,
    source: Source,
    only: Option<&str>,
) {
    let peer = source.map_or_else(|| "local".to_owned(), |address| address.to_string());
    let time = server.limits.handshake;
    let outcome = tokio::time::timeout(time, negotiate(server, &mut stream, only)).await;
    let (negotiated, (slot, entry)) = match outcome {
        Ok(Ok(Some(accepted))) => accepted,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => {
            tracing::debug!(peer, %error, "negotiation ended");
            return;
        }
        Err(_) => {
            tracing::debug!(peer, "negotiation took longer than {time:?}");
            return;
        }
    };
    let started = stream
        .into_fd()
        .and_then(|fd| Socket::new(fd, S::TCP, server.limits.stall))
        .and_then(|socket| {
            let server = Arc::clone(server);
            std::thread::Builder::new().name("nbd-session".into()).stack_size(super::STACK).spawn(
                move || {
                    session::serve(server, socket, &slot, &negotiated, &peer);
                    drop(entry);
                },
            )
        });
    if let Err(error) = started {
        tracing::error!(%error, "cannot serve a connection");
    }
}

/// A place among the export's connections, and one among all.
type Place = (Slot, Entry);

/// Negotiates; `None` where the peer ended it.
async fn negotiate<S: Stream>(
    server: &Arc<Server>,
    stream: &mut S,
    only: Option<&str>,
) -> io::Result<Option<(Box<Negotiated>, Place)>> {
    let mut handshake = Handshake::new(HandshakeConfig::default());
    let mut place = None;
    let mut buffer = [0; RECEIVE];
    loop {
        if server.exports.is_closing() {
            handshake.begin_shutdown();
        }
        let event = handshake.poll();
        let output = handshake.take_output();
        if !output.is_empty() {
            stream.write_all(&output).await?;
        }
        match event {
            Event::NeedInput => match stream.read(&mut buffer).await? {
                0 => return Ok(None),
                n => handshake.handle_input(&buffer[..n]),
            },
            Event::Lookup { name, purpose } => {
                let found = lookup(server, &name, purpose, only, &mut place);
                if let Some(reason) = handshake.handle_lookup(found) {
                    return Err(closed(&reason));
                }
            }
            Event::ListExports => {
                let all = server.exports.all();
                let visible = all.iter().filter(|e| only.is_none_or(|only| e.name == only));
                handshake.handle_list(visible.map(|e| (&*e.name, &*e.description)));
            }
            Event::Transmit(negotiated) => return Ok(place.map(|place| (negotiated, place))),
            Event::Close(CloseReason::Aborted) => return Ok(None),
            Event::Close(reason) => return Err(closed(&reason)),
            // Not offered by the configuration above.
            Event::StartTls => return Ok(None),
        }
    }
}

fn closed(reason: &CloseReason) -> io::Error {
    match reason {
        CloseReason::Aborted => io::Error::other("aborted by the client"),
        CloseReason::Refused(text) => io::Error::other(format!("refused: {text}")),
        CloseReason::Protocol(text) => io::Error::other(format!("protocol violation: {text}")),
    }
}

fn lookup(
    server: &Arc<Server>,
    name: &str,
    purpose: Purpose,
    only: Option<&str>,
    place: &mut Option<Place>,
) -> Result<nbd_proto::server::ExportInfo, Refusal> {
    let wanted = match only {
        Some(only) if name.is_empty() || is_named(server, name, only) => only,
        Some(_) => return Err(Refusal::unknown(name)),
        None => name,
    };
    let export = server.exports.get(wanted).ok_or_else(|| Refusal::unknown(name))?;
    if purpose == Purpose::Use {
        let reserve = || Ok((export.reserve()?, server.enter()?));
        *place = Some(reserve().map_err(|text: String| {
            tracing::warn!(export = %export.name, "connection refused: {text}");
            Refusal::new(OptionReply::ErrPolicy, text)
        })?);
    }
    Ok(export.info())
}

/// Whether `name` is that export's name or alias.
fn is_named(server: &Server, name: &str, export: &str) -> bool {
    name == export || server.exports.get(name).is_some_and(|found| found.name == export)
}
