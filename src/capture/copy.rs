//! A copy from its first connection to its last flush.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::CaptureError;
use super::ledger::Ledger;
use super::observer::Observer;
use super::plan::{Changes, Feeder};
use super::source::Source;
use super::target::Target;
use super::worker::{End, Round, is_shutdown};
use crate::nbd::client::{Client, ClientError};

/// Time before a cut connection is tried for the first time; doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest time between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How often the observer is asked while waiting.
const TICK: Duration = Duration::from_millis(50);
/// Cuts in a row without any flush answered between them after which the copy is given up.
const FRUITLESS_CUTS: u32 = 16;
/// Answers in a row that the server is about to end, after which the export is taken for closed: one
/// that does end lets nobody connect.
const CLOSED: u32 = 3;

/// What a copy did. What was sent again after a cut counts again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes read from the source; holes are not read.
    pub bytes_read: u64,
    /// Bytes of data sent and answered.
    pub bytes_sent: u64,
    /// Bytes of zeroes written without sending them.
    pub bytes_zeroed: u64,
    /// Bytes that the target reads the same already.
    pub bytes_skipped: u64,
    /// Times that the copy came back after a cut.
    pub reconnects: u32,
}

/// Counters of a copy.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) read: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) zeroed: AtomicU64,
    skipped: AtomicU64,
}

/// One copy, as its threads see it.
pub(super) struct Job<'a> {
    pub(super) source: &'a Source,
    pub(super) target: &'a Target,
    pub(super) changes: &'a Changes,
    pub(super) observer: &'a dyn Observer,
    pub(super) counts: Counts,
    ledger: Mutex<Ledger>,
    /// Granularity in bytes of what is sent again.
    grain: u64,
}

impl Job<'_> {
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a range that need not be sent.
    pub(super) fn skip(&self, (from, to): (u64, u64)) {
        self.ledger().skip((from, to));
        self.counts.skipped.fetch_add(to - from, Ordering::Relaxed);
        self.observer.done(to - from);
    }

    /// Sends what is to be done over these connections, and flushes.
    fn round(&self, clients: Vec<Client>, flush_every: u64) -> Result<(), End> {
        let Some(first) = clients.first() else { return Ok(()) };
        let request = self.target.request_within(first.session());
        let feeder = Feeder::new(self.ledger().todo().clone(), request);
        let mut clients = Round::new(self, feeder, flush_every).run(clients, request)?;
        let covered = self.ledger().begin_flush();
        if let Some(client) = clients.first_mut() {
            client.flush().map_err(|cause| End::of(self, "the last flush", cause))?;
        }
        self.ledger().end_flush(&covered);
        for client in clients {
            // Everything is durable; how the connection ends makes no difference.
            let _ = client.disconnect();
        }
        Ok(())
    }

    /// Tries to come back after a cut; what is left to be done is known then.
    fn reconnect(&self, cause: ClientError) -> Result<Vec<Client>, CaptureError> {
        let since = Instant::now();
        let mut lost = self.lost(since, cause);
        let mut wait = FIRST_WAIT;
        let mut closed = 0;
        loop {
            self.observer.cut(&lost);
            let left = self.target.reconnect.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(lost);
            }
            self.wait(wait.min(left))?;
            wait = (wait * 2).min(LONGEST_WAIT);
            match self.resume() {
                Ok(clients) => return Ok(clients),
                Err(End::Cut(cause)) => {
                    closed = if is_shutdown(&cause) { closed + 1 } else { 0 };
                    if closed >= CLOSED {
                        return Err(self.closed(cause));
                    }
                    lost = self.lost(since, cause);
                }
                Err(End::Final(error)) => return Err(error),
            }
        }
    }

    fn lost(&self, since: Instant, cause: ClientError) -> CaptureError {
        CaptureError::Lost { target: self.target.to_string(), tried: since.elapsed(), cause }
    }

    fn closed(&self, cause: ClientError) -> CaptureError {
        CaptureError::Closed { target: self.target.to_string(), cause }
    }

    fn resume(&self) -> Result<Vec<Client>, End> {
        let work = self.ledger().todo().total();
        let mut clients = self.target.connect(work).map_err(|cause| match cause {
            // A server that is starting again may not have the export yet.
            ClientError::Refused(_) => End::Cut(cause),
            _ => End::of(self, "connecting", cause),
        })?;
        let size = self.source.size();
        let mut durable = None;
        if let Some(client) = clients.first_mut() {
            self.target.check(client.session(), size)?;
            let sent = self.ledger().sent_bounds().unwrap_or((0, 0));
            durable = Target::durable(client, sent)
                .map_err(|cause| End::of(self, "asking what is durable", cause))?;
        }
        self.ledger().cut(durable.as_ref(), self.grain, size);
        Ok(clients)
    }

    fn wait(&self, time: Duration) -> Result<(), CaptureError> {
        let since = Instant::now();
        loop {
            if self.observer.is_cancelled() {
                return Err(CaptureError::Cancelled);
            }
            let left = time.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(TICK));
        }
    }

    fn summary(&self, reconnects: u32) -> Summary {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Summary {
            bytes_read: count(&self.counts.read),
            bytes_sent: count(&self.counts.sent),
            bytes_zeroed: count(&self.counts.zeroed),
            bytes_skipped: count(&self.counts.skipped),
            reconnects,
        }
    }
}

/// Copies `changes` of a source into a target of the same size, and flushes. Blocks until the last
/// flush was answered. A connection that is cut, and a server that says it is about to end, is tried
/// again as long as the target says; an error of the source, or another one that the target answers,
/// ends the copy.
///
/// # Errors
/// As [`CaptureError`] says. What is in the target then is incomplete.
pub fn copy(
    source: &Source,
    target: &Target,
    changes: &Changes,
    observer: &dyn Observer,
) -> Result<Summary, CaptureError> {
    let size = source.size();
    // The work is known once the target's block size is.
    let mut clients = target
        .connect(size)
        .map_err(|cause| CaptureError::Connect { target: target.to_string(), cause })?;
    let mut minimum = source.minimum();
    for client in &clients {
        target.check(client.session(), size)?;
        minimum = minimum.max(u64::from(client.session().block.minimum));
    }
    let grain = changes.grain(minimum);
    let todo = changes.ranges(grain, size)?;
    observer.planned(todo.total());
    let (counts, ledger) = (Counts::default(), Mutex::new(Ledger::new(todo)));
    let job = Job { source, target, changes, observer, counts, ledger, grain };
    let mut reconnects = 0;
    let mut fruitless = 0;
    let mut closed = 0;
    loop {
        // What a cut costs is what was sent since the last flush: less each time in a row.
        let flush_every = (target.flush_every >> fruitless).max(1);
        let flushes = job.ledger().flushes();
        let cause = match job.round(clients, flush_every) {
            Ok(()) => return Ok(job.summary(reconnects)),
            Err(End::Final(error)) => return Err(error),
            Err(End::Cut(cause)) => cause,
        };
        let fruitful = job.ledger().flushes() > flushes;
        closed = if is_shutdown(&cause) && !fruitful { closed + 1 } else { 0 };
        if closed >= CLOSED {
            return Err(job.closed(cause));
        }
        fruitless = if fruitful { 0 } else { fruitless + 1 };
        if fruitless >= FRUITLESS_CUTS {
            let target = target.to_string();
            return Err(CaptureError::Unstable { target, cuts: fruitless, cause });
        }
        clients = job.reconnect(cause)?;
        reconnects += 1;
    }
}
