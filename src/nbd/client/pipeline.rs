//! Several requests in flight on one connection.
//!
//! Replies are small and wait in the socket, so that a client which sends some requests before it
//! asks for an answer cannot block the server and itself.

use nbd_proto::client::{Chunk, Reply};
use nbd_proto::{CommandFlags, CommandType, ProtocolError};

use super::{Client, ClientError, ClientResult};

/// Most requests in flight: their replies, each with the longest error text, fit into the smallest
/// receive buffer that a system gives.
pub const MAX_IN_FLIGHT: usize = 16;

impl Client {
    /// Sends a request without waiting for its end, which [`complete`](Self::complete) tells under
    /// the cookie given here. Not for commands whose replies bring data. `payload` is a write's.
    /// Until all that was submitted is complete, nothing else may be asked on this connection.
    ///
    /// # Errors
    /// As [`ClientError`] says. After an error the connection is of no more use.
    ///
    /// # Panics
    /// With [`MAX_IN_FLIGHT`] requests in flight.
    pub fn submit(
        &mut self,
        command: CommandType,
        flags: CommandFlags,
        range: (u64, u64),
        payload: &[u8],
    ) -> ClientResult<u64> {
        assert!(self.in_flight.len() < MAX_IN_FLIGHT, "too many requests in flight");
        self.send(command, flags, range, payload)?;
        self.in_flight.insert(self.cookie, None);
        Ok(self.cookie)
    }

    /// Requests that were submitted and are not complete.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Waits for the end of any submitted request: its cookie, and what the server answered.
    ///
    /// # Errors
    /// As [`ClientError`] says, but for the server's own errors, which are in the result. After an
    /// error the connection is of no more use.
    pub fn complete(&mut self) -> ClientResult<(u64, Result<(), ClientError>)> {
        loop {
            let (cookie, done, failed) = match self.reply()? {
                Reply::Simple { cookie, error } => {
                    let failed =
                        |errno| ClientError::Failed { errno, text: String::new(), at: None };
                    (cookie, true, error.map(failed))
                }
                Reply::Chunk { cookie, done, chunk: Chunk::None } => (cookie, done, None),
                Reply::Chunk { cookie, done, chunk: Chunk::Error { errno, text, at } } => {
                    (cookie, done, Some(ClientError::Failed { errno, text, at }))
                }
                Reply::Chunk { .. } => {
                    let text = "the reply to a write has data".to_owned();
                    return Err(ProtocolError(text).into());
                }
            };
            let Some(failure) = self.in_flight.get_mut(&cookie) else {
                return Err(ProtocolError(format!("reply to unknown request {cookie}")).into());
            };
            if failed.is_some() {
                *failure = failed;
            }
            if done {
                let failure = self.in_flight.remove(&cookie).flatten();
                return Ok((cookie, failure.map_or(Ok(()), Err)));
            }
        }
    }
}
