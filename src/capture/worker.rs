//! One connection of a copy: reads pieces of the source, judges them, and sends what is needed, with
//! several requests in flight.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use nbd_proto::{CommandFlags, CommandType, Errno, TransmissionFlags};

use super::copy::Job;
use super::error::CaptureError;
use super::plan::{Feeder, Verdict, Verdicts, clusters};
use super::ranges::Ranges;
use crate::nbd::client::{Client, ClientError, MAX_IN_FLIGHT};

/// Requests in flight on one connection.
const IN_FLIGHT: usize = 8;

const _: () = assert!(IN_FLIGHT <= MAX_IN_FLIGHT, "the client carries them");

/// Why a round ended early.
#[derive(Debug)]
pub(super) enum End {
    /// A connection failed, or the server is about to end: it is worth trying again.
    Cut(ClientError),
    /// Anything else.
    Final(CaptureError),
}

impl From<CaptureError> for End {
    fn from(error: CaptureError) -> Self {
        Self::Final(error)
    }
}

impl End {
    /// Whether to try again after `cause`, which came up in `what`.
    pub(super) fn of(job: &Job<'_>, what: &str, cause: ClientError) -> Self {
        match cause {
            ClientError::Io(_) => Self::Cut(cause),
            _ if is_shutdown(&cause) => Self::Cut(cause),
            _ => Self::Final(CaptureError::Failed {
                target: job.target.to_string(),
                what: what.to_owned(),
                cause,
            }),
        }
    }
}

/// Whether the server answered that it is about to end, or that the export is closed.
pub(super) fn is_shutdown(cause: &ClientError) -> bool {
    matches!(cause, ClientError::Failed { errno: Errno::Shutdown, .. })
}

/// From the first connection of a copy, or the first after a cut, to the next cut or the end.
pub(super) struct Round<'a> {
    pub(super) job: &'a Job<'a>,
    feeder: Mutex<Feeder>,
    /// Bytes of data between flushes.
    flush_every: u64,
    /// The failure that ends it.
    end: Mutex<Option<End>>,
}

impl<'a> Round<'a> {
    pub(super) fn new(job: &'a Job<'a>, feeder: Feeder, flush_every: u64) -> Self {
        Self { job, feeder: Mutex::new(feeder), flush_every, end: Mutex::default() }
    }

    /// Sends everything over these connections, and gives them back.
    pub(super) fn run(self, clients: Vec<Client>, request: u64) -> Result<Vec<Client>, End> {
        let round = &self;
        let done: Vec<Client> = std::thread::scope(|scope| {
            let threads: Vec<_> = clients
                .into_iter()
                .map(|client| scope.spawn(move || Worker::new(round, client, request).run()))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Option<Client>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().filter_map(join).collect()
        });
        match self.end.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(end) => Err(end),
            None => Ok(done),
        }
    }

    fn is_ended(&self) -> bool {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Ends the round. A cut gives way to a reason that makes trying again useless.
    fn fail(&self, failure: End) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.is_none() || matches!((&*end, &failure), (Some(End::Cut(_)), End::Final(_))) {
            *end = Some(failure);
        }
    }
}

/// A request that waits for its answer.
enum Waiting {
    /// A range of data.
    Data((u64, u64)),
    /// A range of zeroes.
    Zeroes((u64, u64)),
    /// A flush, and what it covers.
    Flush(Ranges),
}

struct Worker<'a> {
    round: &'a Round<'a>,
    client: Client,
    waiting: HashMap<u64, Waiting>,
    /// A request's worth of the source.
    buffer: Vec<u8>,
    request: u64,
    zeroes: bool,
}

impl<'a> Worker<'a> {
    fn new(round: &'a Round<'a>, client: Client, request: u64) -> Self {
        let zeroes = client.session().flags.contains(TransmissionFlags::SEND_WRITE_ZEROES);
        Self { round, client, waiting: HashMap::new(), buffer: Vec::new(), request, zeroes }
    }

    /// Works until there is no more to do; gives the connection back where the round goes well.
    fn run(mut self) -> Option<Client> {
        match self.work() {
            Ok(()) => Some(self.client),
            Err(end) => {
                self.round.fail(end);
                None
            }
        }
    }

    fn work(&mut self) -> Result<(), End> {
        let job = self.round.job;
        while !self.round.is_ended() {
            if job.observer.is_cancelled() {
                return Err(CaptureError::Cancelled.into());
            }
            let next = {
                let mut feeder = self.round.feeder.lock().unwrap_or_else(PoisonError::into_inner);
                feeder.next(job.source)?
            };
            let Some(stretch) = next else { break };
            let range = (stretch.from, stretch.to);
            match stretch.zero {
                true => self.pass_zeroes(range)?,
                false => self.pass_data(range)?,
            }
            self.flush_if_due()?;
        }
        while self.client.in_flight() > 0 {
            self.settle()?;
        }
        Ok(())
    }

    /// A range that is known to read as zeroes.
    fn pass_zeroes(&mut self, range: (u64, u64)) -> Result<(), End> {
        let job = self.round.job;
        let mut from = range.0;
        for (to, verdict) in job.changes.judge_zeroes(range, job.target.reads_as_zeroes) {
            match verdict {
                Verdict::Skip => job.skip((from, to)),
                Verdict::Zero | Verdict::Send => self.zero((from, to))?,
            }
            from = to;
        }
        Ok(())
    }

    /// A range of at most a request that has to be read.
    fn pass_data(&mut self, (from, to): (u64, u64)) -> Result<(), End> {
        let job = self.round.job;
        let inside = |at: u64| usize::try_from(at - from).unwrap_or(usize::MAX);
        // Taken out, so that it can be sent from.
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(inside(to), 0);
        job.source.read(&mut buffer, from)?;
        job.counts.read.fetch_add(to - from, Ordering::Relaxed);
        job.observer.read(to - from);
        let mut verdicts = Verdicts::default();
        for (start, end) in clusters(from, to) {
            let bytes = &buffer[inside(start)..inside(end)];
            let fresh = job.target.reads_as_zeroes;
            verdicts.push(end, job.changes.judge(start, bytes, fresh));
        }
        let mut start = from;
        for (end, verdict) in verdicts.0 {
            match verdict {
                Verdict::Skip => job.skip((start, end)),
                Verdict::Zero => self.zero((start, end))?,
                Verdict::Send => self.write((start, end), &buffer[inside(start)..inside(end)])?,
            }
            start = end;
        }
        self.buffer = buffer;
        Ok(())
    }

    fn zero(&mut self, range: (u64, u64)) -> Result<(), End> {
        if self.zeroes {
            return self.submit(CommandType::WriteZeroes, Waiting::Zeroes(range), range, &[]);
        }
        let mut from = range.0;
        while from < range.1 {
            let to = range.1.min((from / self.request + 1) * self.request);
            let bytes = vec![0; usize::try_from(to - from).unwrap_or(usize::MAX)];
            self.write((from, to), &bytes)?;
            from = to;
        }
        Ok(())
    }

    fn write(&mut self, range: (u64, u64), bytes: &[u8]) -> Result<(), End> {
        self.submit(CommandType::Write, Waiting::Data(range), range, bytes)
    }

    fn flush_if_due(&mut self) -> Result<(), End> {
        let covered = {
            let mut ledger = self.round.job.ledger();
            ledger.is_due(self.round.flush_every).then(|| ledger.begin_flush())
        };
        match covered {
            Some(covered) => self.submit(CommandType::Flush, Waiting::Flush(covered), (0, 0), &[]),
            None => Ok(()),
        }
    }

    /// Sends a request; waits for answers only where too many are missing.
    fn submit(
        &mut self,
        command: CommandType,
        waiting: Waiting,
        (from, to): (u64, u64),
        payload: &[u8],
    ) -> Result<(), End> {
        while self.client.in_flight() >= IN_FLIGHT {
            self.settle()?;
        }
        let job = self.round.job;
        job.ledger().send((from, to));
        let flags = CommandFlags::empty();
        let cookie = self
            .client
            .submit(command, flags, (from, to - from), payload)
            .map_err(|cause| End::of(job, waiting.name(), cause))?;
        self.waiting.insert(cookie, waiting);
        Ok(())
    }

    /// Waits for one answer and enters it into the account.
    fn settle(&mut self) -> Result<(), End> {
        let job = self.round.job;
        let (cookie, answer) =
            self.client.complete().map_err(|cause| End::of(job, "a request", cause))?;
        let Some(waiting) = self.waiting.remove(&cookie) else { return Ok(()) };
        answer.map_err(|cause| End::of(job, &waiting.describe(), cause))?;
        match waiting {
            Waiting::Data((from, to)) => {
                job.ledger().answer((from, to), to - from);
                job.counts.sent.fetch_add(to - from, Ordering::Relaxed);
                job.observer.sent(to - from);
                job.observer.done(to - from);
            }
            Waiting::Zeroes((from, to)) => {
                job.ledger().answer((from, to), 0);
                job.counts.zeroed.fetch_add(to - from, Ordering::Relaxed);
                job.observer.done(to - from);
            }
            Waiting::Flush(covered) => job.ledger().end_flush(&covered),
        }
        Ok(())
    }
}

impl Waiting {
    fn name(&self) -> &'static str {
        match self {
            Self::Data(_) => "writing",
            Self::Zeroes(_) => "writing zeroes",
            Self::Flush(_) => "a flush",
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Data((from, to)) | Self::Zeroes((from, to)) => {
                format!("{} {} bytes at {from}", self.name(), to - from)
            }
            Self::Flush(_) => self.name().to_owned(),
        }
    }
}
