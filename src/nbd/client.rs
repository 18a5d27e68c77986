//! A blocking NBD client: one request at a time on one connection, or several writes in flight
//! ([`Client::submit`]).
//!
//! It carries captures, the demonstration and the tests of the server.

mod connect;
mod pipeline;

use std::collections::BTreeMap;
use std::io::{self, IoSlice, Read, Write};

use nbd_proto::client::{Chunk, Reply, Session, decode_reply, encode_request};
use nbd_proto::{CommandFlags, CommandType, Errno, Mode, ProtocolError};

pub use connect::Address;
pub use pipeline::MAX_IN_FLIGHT;

/// Longest header of a reply before data: extended header and offset.
const REPLY_HEADER: usize = 40;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed.
    #[error("the connection to the NBD server failed: {0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// The server refused the negotiation.
    #[error("the NBD server refused: {0}")]
    Refused(String),
    /// The server answered with an error.
    #[error("the NBD server answered {errno:?}: {text}")]
    Failed {
        /// The error.
        errno: Errno,
        /// The server's sentence; empty with simple replies.
        text: String,
        /// The byte at which it struck.
        at: Option<u64>,
    },
}

/// Result of a client call.
pub type ClientResult<T> = Result<T, ClientError>;

trait Connection: Read + Write + Send {}
impl<T: Read + Write + Send> Connection for T {}

/// How to negotiate.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Export name.
    pub export: String,
    /// The most capable mode to ask for.
    pub mode: Mode,
    /// Metadata contexts to ask for.
    pub contexts: Vec<String>,
}

impl ClientOptions {
    /// For `export`, with structured replies and no contexts.
    pub fn new(export: &str) -> Self {
        Self { export: export.to_owned(), mode: Mode::Structured, contexts: Vec::new() }
    }
}

/// Extents of a metadata context: (length, flags).
pub type Extents = Vec<(u64, u64)>;

/// A connection to an export.
pub struct Client {
    connection: Box<dyn Connection>,
    session: Session,
    input: Vec<u8>,
    cookie: u64,
    /// Requests in flight, with the failure that was told of one so far.
    in_flight: BTreeMap<u64, Option<ClientError>>,
}

impl Client {
    /// What was negotiated.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.session.size
    }

    fn send(
        &mut self,
        command: CommandType,
        flags: CommandFlags,
        range: (u64, u64),
        payload: &[u8],
    ) -> ClientResult<()> {
        self.cookie += 1;
        let mut header = Vec::with_capacity(32);
        encode_request(self.session.mode, command, flags, self.cookie, range, &mut header);
        let mut sent = 0;
        while sent < header.len() {
            let parts = [IoSlice::new(&header[sent..]), IoSlice::new(payload)];
            match self.connection.write_vectored(&parts)? {
                0 => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                n => sent += n,
            }
        }
        Ok(self.connection.write_all(&payload[sent - header.len()..])?)
    }

    fn receive(&mut self, buf: &mut [u8]) -> ClientResult<()> {
        let here = buf.len().min(self.input.len());
        let (head, tail) = buf.split_at_mut(here);
        head.copy_from_slice(&self.input[..here]);
        self.input.drain(..here);
        Ok(self.connection.read_exact(tail)?)
    }

    fn reply(&mut self) -> ClientResult<Reply> {
        loop {
            let decoded = decode_reply(self.session.mode, self.session.block.maximum, &self.input)?;
            if let Some((reply, length)) = decoded {
                self.input.drain(..length);
                return Ok(reply);
            }
            let mut buffer = [0; REPLY_HEADER];
            match self.connection.read(&mut buffer)? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                n => self.input.extend_from_slice(&buffer[..n]),
            }
        }
    }

    /// Receives all chunks of one reply; `data` takes what a read brings, from `start` on.
    fn finish(&mut self, data: &mut [u8], start: u64) -> ClientResult<Vec<(u32, Extents)>> {
        let mut statuses = Vec::new();
        let mut failure = None;
        loop {
            let (found, done) = match self.reply()? {
                Reply::Simple { cookie, error: None } => {
                    self.receive(data)?;
                    (cookie, true)
                }
                Reply::Simple { cookie, error: Some(errno) } => {
                    failure = Some(ClientError::Failed { errno, text: String::new(), at: None });
                    (cookie, true)
                }
                Reply::Chunk { cookie, done, chunk } => {
                    self.chunk(chunk, data, start, &mut statuses, &mut failure)?;
                    (cookie, done)
                }
            };
            if found != self.cookie {
                return Err(ProtocolError(format!("reply to unknown request {found}")).into());
            }
            if done {
                return failure.map_or(Ok(statuses), Err);
            }
        }
    }

    fn chunk(
        &mut self,
        chunk: Chunk,
        data: &mut [u8],
        start: u64,
        statuses: &mut Vec<(u32, Extents)>,
        failure: &mut Option<ClientError>,
    ) -> ClientResult<()> {
        let part = |offset: u64, length: u64| {
            let from = usize::try_from(offset.checked_sub(start)?).ok()?;
            Some(from..from.checked_add(usize::try_from(length).ok()?)?)
        };
        let outside = || ProtocolError("a chunk lies outside its request".into());
        match chunk {
            Chunk::None => {}
            Chunk::Data { offset, length } => {
                let range = part(offset, length).ok_or_else(outside)?;
                self.receive(data.get_mut(range).ok_or_else(outside)?)?;
            }
            Chunk::Hole { offset, length } => {
                let range = part(offset, u64::from(length)).ok_or_else(outside)?;
                data.get_mut(range).ok_or_else(outside)?.fill(0);
            }
            Chunk::Error { errno, text, at } => {
                *failure = Some(ClientError::Failed { errno, text, at });
            }
            Chunk::Status { context, extents } => statuses.push((context, extents)),
        }
        Ok(())
    }

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> ClientResult<()> {
        let range = (offset, buf.len() as u64);
        self.send(CommandType::Read, CommandFlags::empty(), range, &[])?;
        self.finish(buf, offset).map(drop)
    }

    /// Stores `buf` at byte `offset`.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn write(&mut self, buf: &[u8], offset: u64, flags: CommandFlags) -> ClientResult<()> {
        self.send(CommandType::Write, flags, (offset, buf.len() as u64), buf)?;
        self.finish(&mut [], 0).map(drop)
    }

    /// Sends a command without a payload and waits for its end.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn command(
        &mut self,
        command: CommandType,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> ClientResult<()> {
        self.send(command, flags, (offset, length), &[])?;
        self.finish(&mut [], 0).map(drop)
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn flush(&mut self) -> ClientResult<()> {
        self.command(CommandType::Flush, CommandFlags::empty(), 0, 0)
    }

    /// The extents of every negotiated context in a range, by context id.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn block_status(&mut self, offset: u64, length: u64) -> ClientResult<Vec<(u32, Extents)>> {
        self.send(CommandType::BlockStatus, CommandFlags::empty(), (offset, length), &[])?;
        self.finish(&mut [], 0)
    }

    /// Says goodbye; the server finishes what it has.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn disconnect(mut self) -> ClientResult<()> {
        self.send(CommandType::Disc, CommandFlags::empty(), (0, 0), &[])
    }
}
