//! Reaching a server and negotiating with it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbd_proto::client::{Event, Goal, Handshake, HandshakeConfig};
use nbd_proto::{Mode, ProtocolError};
use rustix::net::sockopt;

use super::{Client, ClientError, ClientOptions, ClientResult, Connection};

/// Longest wait for one address of a host to answer.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest silence of the server inside the negotiation.
const NEGOTIATE: Duration = Duration::from_secs(30);
/// Silence after which the system asks whether the peer's is still there, and between questions.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Longest time in milliseconds for which the peer's system may give no sign, or take nothing in. A
/// disk that is slow to flush must not look dead.
const SILENCE: u32 = 300_000;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Host and port, as `host:port`.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A second handle to a connected socket, to bound its waits.
enum Handle {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Handle {
    fn limit(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(time),
            Self::Unix(stream) => stream.set_read_timeout(time),
        }
    }
}

fn connect(address: &Address) -> io::Result<(Box<dyn Connection>, Handle)> {
    match address {
        Address::Tcp(address) => {
            let stream = connect_tcp(address)?;
            stream.set_nodelay(true)?;
            // A server may take its time to answer, but its system must be there.
            sockopt::set_socket_keepalive(&stream, true)?;
            sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
            sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
            sockopt::set_tcp_user_timeout(&stream, SILENCE)?;
            Ok((Box::new(stream.try_clone()?), Handle::Tcp(stream)))
        }
        Address::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            Ok((Box::new(stream.try_clone()?), Handle::Unix(stream)))
        }
    }
}

fn connect_tcp(address: &str) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Drives a negotiation until something is decided.
fn negotiate(connection: &mut dyn Connection, config: HandshakeConfig) -> ClientResult<Event> {
    let mut handshake = Handshake::new(config);
    let mut buffer = [0; 4096];
    loop {
        let event = handshake.poll()?;
        connection.write_all(&handshake.take_output())?;
        match event {
            Event::NeedInput => match connection.read(&mut buffer).map_err(told)? {
                0 => {
                    let text = "the server closed the connection".to_owned();
                    return Err(ClientError::Refused(text));
                }
                n => handshake.handle_input(&buffer[..n]),
            },
            Event::Refused(reply, text) => {
                return Err(ClientError::Refused(format!("{reply:?}: {text}")));
            }
            decided => return Ok(decided),
        }
    }
}

/// A wait that took too long, in words.
fn told(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            let text = "the server accepted the connection and says nothing; it may be busy with \
                        another client";
            io::Error::new(io::ErrorKind::TimedOut, text)
        }
        _ => error,
    }
}

fn unasked() -> ClientError {
    ProtocolError("an answer that was not asked for".into()).into()
}

impl Client {
    /// Connects to a server's export.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn connect(address: &Address, options: &ClientOptions) -> ClientResult<Self> {
        let (mut connection, handle) = connect(address)?;
        handle.limit(Some(NEGOTIATE))?;
        let config = HandshakeConfig {
            goal: Goal::Use(options.export.clone()),
            mode: options.mode,
            contexts: options.contexts.clone(),
        };
        let Event::Transmit(session) = negotiate(&mut *connection, config)? else {
            return Err(unasked());
        };
        handle.limit(None)?;
        let input = session.rest.to_vec();
        Ok(Self { connection, session: *session, input, cookie: 0, in_flight: BTreeMap::new() })
    }

    /// Connects over TCP.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn connect_tcp(address: &str, options: &ClientOptions) -> ClientResult<Self> {
        Self::connect(&Address::Tcp(address.to_owned()), options)
    }

    /// Connects over a Unix socket.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn connect_unix(path: &Path, options: &ClientOptions) -> ClientResult<Self> {
        Self::connect(&Address::Unix(path.to_owned()), options)
    }

    /// Names of the exports that a server tells.
    ///
    /// # Errors
    /// As [`ClientError`] says; `Refused` where the server does not list exports.
    pub fn list_exports(address: &Address) -> ClientResult<Vec<String>> {
        let (mut connection, handle) = connect(address)?;
        handle.limit(Some(NEGOTIATE))?;
        let config =
            HandshakeConfig { goal: Goal::List, mode: Mode::Structured, contexts: Vec::new() };
        match negotiate(&mut *connection, config)? {
            Event::Listed(exports) => Ok(exports.into_iter().map(|(name, _)| name).collect()),
            _ => Err(unasked()),
        }
    }

    /// The metadata contexts of an export that match `query`: a name, or a namespace with its colon.
    ///
    /// # Errors
    /// As [`ClientError`] says; `Refused` also where the server cannot list contexts.
    pub fn list_contexts(
        address: &Address,
        export: &str,
        query: &str,
    ) -> ClientResult<Vec<String>> {
        let (mut connection, handle) = connect(address)?;
        handle.limit(Some(NEGOTIATE))?;
        let config = HandshakeConfig {
            goal: Goal::Contexts(export.to_owned()),
            mode: Mode::Structured,
            contexts: vec![query.to_owned()],
        };
        match negotiate(&mut *connection, config)? {
            Event::Contexts(names) => Ok(names),
            _ => Err(unasked()),
        }
    }
}
