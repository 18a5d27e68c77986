//! Where a disk is sent to.

use std::fmt;
use std::time::Duration;

use nbd_proto::client::Session;
use nbd_proto::{Mode, SENDENSE_DURABLE, STATE_DURABLE, TransmissionFlags};

use super::CLUSTER;
use super::error::CaptureError;
use super::ranges::Ranges;
use crate::nbd::client::{Address, Client, ClientError, ClientOptions, ClientResult};

/// Most connections of one copy.
const MAX_CONNECTIONS: usize = 16;
/// Longest request, in bytes.
const MAX_REQUEST: u64 = 32 << 20;
/// Longest range that one block status request asks for, in bytes.
const STATUS: u64 = 1 << 30;

/// An export of the hub, and how to send to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Host and port, as `host:port`.
    pub address: String,
    /// Name of the export.
    pub export: String,
    /// Connections at a time, 1 to 16; fewer where the server allows fewer.
    pub connections: usize,
    /// Longest request in bytes; used as a multiple of 64 KiB up to 32 MiB.
    pub request: u32,
    /// Bytes of data after which a flush is sent; more often after cuts.
    pub flush_every: u64,
    /// How long a cut connection is tried again.
    pub reconnect: Duration,
    /// The export is new and reads as zeroes: a copy of everything need not send zeroes. Of no
    /// account for changes, which may be zeroes over something.
    pub reads_as_zeroes: bool,
}

impl Target {
    /// An export with four connections, requests of 1 MiB, a flush each 256 MiB, one minute to come
    /// back after a cut, that does not read as zeroes.
    pub fn new(address: &str, export: &str) -> Self {
        Self {
            address: address.to_owned(),
            export: export.to_owned(),
            connections: 4,
            request: 1 << 20,
            flush_every: 256 << 20,
            reconnect: Duration::from_secs(60),
            reads_as_zeroes: false,
        }
    }

    fn connect_one(&self) -> ClientResult<Client> {
        let contexts = vec![SENDENSE_DURABLE.to_owned()];
        let mode = Mode::Extended;
        let options = ClientOptions { mode, contexts, ..ClientOptions::new(&self.export) };
        Client::connect_tcp(&self.address, &options)
    }

    /// Connects as often as the target allows and the amount of `work` in bytes is worth; at least
    /// once.
    pub(super) fn connect(&self, work: u64) -> ClientResult<Vec<Client>> {
        let first = self.connect_one()?;
        let multi = first.session().flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        let requests = usize::try_from(work / self.request_within(first.session())).unwrap_or(16);
        let count = if multi { self.connections.min(MAX_CONNECTIONS).min(requests) } else { 1 };
        let mut clients = vec![first];
        while clients.len() < count {
            match self.connect_one() {
                Ok(client) => clients.push(client),
                // One is enough to work with.
                Err(ClientError::Refused(_)) => break,
                Err(error) => return Err(error),
            }
        }
        // A flush on one connection covers the others only if they lead to the same server. Those
        // that still answer after the last one was made were not left over from before a restart.
        if let Some((_, earlier)) = clients.split_last_mut() {
            for client in earlier {
                if client.session().flags.contains(TransmissionFlags::SEND_FLUSH) {
                    client.flush()?;
                }
            }
        }
        Ok(clients)
    }

    /// Whether a disk of `size` bytes can go into the export.
    pub(super) fn check(&self, session: &Session, size: u64) -> Result<(), CaptureError> {
        if session.size != size {
            return Err(CaptureError::Size { from: size, into: session.size });
        }
        let unfit = |cause: &str| {
            Err(CaptureError::Unfit { target: self.to_string(), cause: cause.to_owned() })
        };
        if session.flags.contains(TransmissionFlags::READ_ONLY) {
            return unfit("the export is read-only; begin a backup that opens it for writing");
        }
        if !session.flags.contains(TransmissionFlags::SEND_FLUSH) {
            return unfit("the server knows no flush, so nothing would ever be durable");
        }
        Ok(())
    }

    /// Length of the longest request in bytes: whole clusters.
    pub(super) fn request_within(&self, session: &Session) -> u64 {
        let most = u64::from(self.request.min(session.block.maximum)).min(MAX_REQUEST);
        (most / CLUSTER * CLUSTER).max(CLUSTER)
    }

    /// What the server says is durable between two bytes; `None` where it does not tell.
    pub(super) fn durable(
        client: &mut Client,
        (from, to): (u64, u64),
    ) -> ClientResult<Option<Ranges>> {
        let contexts = &client.session().contexts;
        let Some(id) = contexts.iter().find(|(_, n)| n == SENDENSE_DURABLE).map(|(id, _)| *id)
        else {
            return Ok(None);
        };
        let minimum = u64::from(client.session().block.minimum);
        let mut durable = Ranges::default();
        let mut at = from / minimum * minimum;
        while at < to {
            let length = STATUS.min(client.size() - at);
            let start = at;
            for (_, extents) in client.block_status(at, length)?.iter().filter(|(c, _)| *c == id) {
                for (length, state) in extents {
                    let end = at.saturating_add(*length).min(client.size());
                    if state & STATE_DURABLE != 0 {
                        durable.insert((at, end));
                    }
                    at = end;
                }
            }
            if at == start {
                break;
            }
        }
        Ok(Some(durable))
    }
}

/// Names of the exports that the NBD server at `address` (`host:port`) tells: it is there, and
/// negotiates.
///
/// # Errors
/// `Connect` with what happened.
pub fn list_exports(address: &str) -> Result<Vec<String>, CaptureError> {
    Client::list_exports(&Address::Tcp(address.to_owned()))
        .map_err(|cause| CaptureError::Connect { target: address.to_owned(), cause })
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' at {}", self.export, self.address)
    }
}
