//! Bodies that a thread makes piece by piece while the client reads them.
//!
//! What must stay true: memory per body is bounded, a client that goes away or takes nothing for too
//! long ends the thread, and a body that was not finished never looks like one that was.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::api::error::ApiError;
use crate::backup::{Failure, FailureKind};

/// Bodies at a time. Each has a thread.
pub(super) const STREAMS: usize = 64;
/// Searches and recursive listings at a time. Each has a thread, and keeps what it found.
pub(super) const WALKS: usize = 16;
/// Pieces that wait to be sent.
const WAITING: usize = 2;
/// Bytes that are collected into a piece, of what comes in small writes.
const PIECE: usize = 256 << 10;
/// Time in which a client must take something.
const STALLED: Duration = Duration::from_secs(15 * 60);

/// The bodies that are being made, and other work that takes a thread for long.
#[derive(Clone)]
pub(in crate::api) struct Streams {
    bodies: Arc<Semaphore>,
    walks: Arc<Semaphore>,
}

impl Default for Streams {
    fn default() -> Self {
        Self { bodies: Arc::new(Semaphore::new(STREAMS)), walks: Arc::new(Semaphore::new(WALKS)) }
    }
}

fn room(of: &Arc<Semaphore>, most: usize, what: &str) -> Result<OwnedSemaphorePermit, ApiError> {
    Arc::clone(of).try_acquire_owned().map_err(|_| {
        let text = format!("{most} {what} run already, the maximum");
        ApiError(Failure::new(FailureKind::Conflict, text, "try again when one has ended"))
    })
}

impl Streams {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        STREAMS.saturating_sub(self.bodies.available_permits())
    }

    /// Room for one more; it is held as long as the body is made.
    pub(super) fn enter(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        room(&self.bodies, STREAMS, "downloads")
    }

    /// Room for one more search or recursive listing; its thread holds it until it ends.
    pub(super) fn enter_walk(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        room(&self.walks, WALKS, "searches and recursive listings")
    }
}

enum Piece {
    Data(Bytes),
    /// The body is whole.
    End,
}

/// Where the thread puts a body.
pub(super) struct Sink {
    pieces: mpsc::Sender<io::Result<Piece>>,
    runtime: Handle,
    collected: Vec<u8>,
}

impl Sink {
    fn put(&self, piece: io::Result<Piece>) -> io::Result<()> {
        let gone = |text| io::Error::new(io::ErrorKind::BrokenPipe, text);
        let sent = async { tokio::time::timeout(STALLED, self.pieces.send(piece)).await };
        match self.runtime.block_on(sent) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(gone("the client is gone")),
            Err(_) => Err(gone("the client takes nothing any more")),
        }
    }

    /// Sends a piece as it is; waits while the client is slow.
    ///
    /// # Errors
    /// When nobody takes it.
    pub(super) fn send(&self, piece: impl Into<Bytes>) -> io::Result<()> {
        self.put(Ok(Piece::Data(piece.into())))
    }

    /// Tells whether somebody still takes the body; for work that may send nothing for long.
    pub(super) fn taken(&self) -> impl Fn() -> bool + use<> {
        let pieces = self.pieces.clone();
        move || !pieces.is_closed()
    }

    fn pass_on(&mut self) -> io::Result<()> {
        if self.collected.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.collected, Vec::with_capacity(PIECE));
        self.send(piece)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE.saturating_sub(self.collected.len()).min(bytes.len());
        let (now, _) = bytes.split_at(room);
        self.collected.extend_from_slice(now);
        if self.collected.len() >= PIECE {
            self.pass_on()?;
        }
        Ok(room)
    }

    /// Nothing: pieces go out when they are full, and at the end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A body that `make` writes on a thread of its own. Where it fails, or panics, the connection is
/// broken off.
pub(super) fn body(
    room: OwnedSemaphorePermit,
    make: impl FnOnce(&mut Sink) -> io::Result<()> + Send + 'static,
) -> Body {
    let (pieces, receive) = mpsc::channel(WAITING);
    let mut sink = Sink { pieces, runtime: Handle::current(), collected: Vec::new() };
    tokio::task::spawn_blocking(move || {
        let _room = room;
        let made = make(&mut sink).and_then(|()| sink.pass_on());
        // Nobody is told where nobody is left.
        let _ = match made {
            Ok(()) => sink.put(Ok(Piece::End)),
            Err(error) => {
                tracing::info!(%error, "a download was broken off");
                sink.put(Err(error))
            }
        };
    });
    let pieces = futures_util::stream::unfold(Some(receive), |receive| async move {
        let mut receive = receive?;
        match receive.recv().await {
            Some(Ok(Piece::Data(bytes))) => Some((Ok(bytes), Some(receive))),
            Some(Ok(Piece::End)) => None,
            Some(Err(error)) => Some((Err(error), None)),
            None => Some((Err(io::Error::other("the download was not finished")), None)),
        }
    });
    Body::from_stream(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    async fn collect(body: Body) -> (Vec<u8>, bool) {
        let mut stream = body.into_data_stream();
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(_) => return (bytes, false),
            }
        }
        (bytes, true)
    }

    #[tokio::test]
    async fn small_writes_arrive_whole_and_in_order() {
        let streams = Streams::default();
        let expected: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let sent = expected.clone();
        let body = body(streams.enter().unwrap(), move |sink| {
            sent.chunks(777).try_for_each(|chunk| sink.write_all(chunk))
        });
        assert_eq!(collect(body).await, (expected, true));
    }

    #[tokio::test]
    async fn a_body_that_fails_or_panics_does_not_look_finished() {
        let streams = Streams::default();
        let failing = body(streams.enter().unwrap(), |sink| {
            sink.send(vec![1])?;
            Err(io::Error::other("damaged"))
        });
        assert_eq!(collect(failing).await, (vec![1], false));
        let panicking = body(streams.enter().unwrap(), |_| panic!("on purpose"));
        assert_eq!(collect(panicking).await, (vec![], false));
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_the_work() {
        let streams = Streams::default();
        let (tell, told) = tokio::sync::oneshot::channel();
        let body = body(streams.enter().unwrap(), move |sink| {
            let ended = loop {
                if let Err(error) = sink.send(vec![0; 10]) {
                    break error;
                }
            };
            let _ = tell.send(ended.kind());
            Err(ended)
        });
        assert_eq!(streams.count(), 1);
        drop(body);
        assert_eq!(told.await, Ok(io::ErrorKind::BrokenPipe));
    }

    #[tokio::test]
    async fn work_that_sends_nothing_learns_that_its_client_is_gone() {
        let streams = Streams::default();
        let (tell, told) = tokio::sync::oneshot::channel();
        let body = body(streams.enter().unwrap(), move |sink| {
            let taken = sink.taken();
            while taken() {
                std::thread::yield_now();
            }
            let _ = tell.send(());
            Ok(())
        });
        drop(body);
        assert!(told.await.is_ok());
    }

    #[tokio::test]
    async fn there_are_no_more_bodies_at_a_time_than_threads_for_them() {
        let streams = Streams::default();
        let held: Vec<_> = (0..STREAMS).map(|_| streams.enter().unwrap()).collect();
        assert!(streams.enter().is_err());
        drop(held);
        assert!(streams.enter().is_ok());
        let held: Vec<_> = (0..WALKS).map(|_| streams.enter_walk().unwrap()).collect();
        assert!(streams.enter_walk().is_err() && streams.enter().is_ok());
        drop(held);
        assert!(streams.enter_walk().is_ok());
    }
}
