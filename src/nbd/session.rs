//! One connection in the transmission phase: its thread receives requests, answers the small ones
//! itself, and hands the pieces of large ones to the workers.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nbd_proto::server::{
    Command, Negotiated, Parsed, Rejection, ReplyEncoder, Request, Transmission,
};

use super::buffers::Budget;
use super::exports::{Control, Export, Slot};
use super::limits::{INLINE_READ, INLINE_WRITE};
use super::send_queue::{SendQueue, TICK};
use super::server::Server;
use super::socket::Socket;
use super::stats::Stats;

/// Bytes of the receive buffer: a request that is answered inline fits with its header.
const INPUT: usize = INLINE_WRITE + (32 << 10);
/// Replies that are gathered before they are sent, in bytes.
const BATCH: usize = 256 << 10;
/// Unsent bytes of inline replies at which no more requests are taken.
const UNSENT: usize = 256 << 10;
/// Read and unsent bytes of one connection where replies may come in pieces.
const STRUCTURED_WINDOW: usize = 8 << 20;

/// Longest time of asking for the next request before sleeping.
const POLL: Duration = Duration::from_micros(50);
/// A request that comes within this time comes soon.
const SOON: Duration = Duration::from_micros(100);
/// Requests in a row that came soon, from which on asking is worth it.
const SOON_IN_A_ROW: u32 = 4;

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// `NBD_CMD_DISC`, or the peer closed between requests.
    Normal,
    /// The socket failed, the peer closed inside a request or stalled.
    Broken(io::Error),
    /// The peer broke the protocol.
    Protocol(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Whether asking for the next request before sleeping has been worth it.
#[derive(Default)]
struct Poll {
    /// Sleeps in a row that ended soon.
    soon: u32,
}

impl Poll {
    fn worthwhile(&self) -> bool {
        self.soon >= SOON_IN_A_ROW
    }

    fn slept(&mut self, time: Duration) {
        self.soon = if time < SOON { self.soon.saturating_add(1) } else { 0 };
    }

    fn missed(&mut self) {
        self.soon = 0;
    }
}

/// Requests that are being worked on.
#[derive(Default)]
pub(super) struct Active {
    count: Mutex<Count>,
    changed: Condvar,
}

#[derive(Default)]
struct Count {
    requests: usize,
    /// Threads that wait for a change: waking nobody costs a system call too.
    waiting: usize,
}

impl Active {
    fn wait(&self, below: usize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while count.requests >= below {
            count.waiting += 1;
            count = self.changed.wait(count).unwrap_or_else(PoisonError::into_inner);
            count.waiting -= 1;
        }
    }

    fn requests(&self) -> usize {
        self.count.lock().unwrap_or_else(PoisonError::into_inner).requests
    }

    pub(super) fn enter(self: &Arc<Self>) -> ActiveGuard {
        self.count.lock().unwrap_or_else(PoisonError::into_inner).requests += 1;
        ActiveGuard(Arc::clone(self))
    }
}

/// One request; leaves when dropped.
pub(super) struct ActiveGuard(Arc<Active>);

impl Drop for ActiveGuard {
    fn drop(&mut self) {
        let mut count = self.0.count.lock().unwrap_or_else(PoisonError::into_inner);
        count.requests -= 1;
        if count.waiting > 0 {
            self.0.changed.notify_all();
        }
    }
}

/// What the workers need of a connection.
pub(super) struct Shared {
    pub(super) server: Arc<Server>,
    pub(super) export: Arc<Export>,
    pub(super) encoder: ReplyEncoder,
    pub(super) queue: Arc<SendQueue>,
    pub(super) stats: Stats,
    pub(super) active: Arc<Active>,
}

/// The receiving side of a connection.
pub(super) struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) socket: Arc<Socket>,
    control: Arc<Control>,
    transmission: Transmission,
    /// Names of the metadata contexts in use; ids are positions plus one.
    pub(super) contexts: Vec<String>,
    /// Bounds what is read and unsent.
    pub(super) window: Arc<Budget>,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Replies that are ready but not yet sent.
    pub(super) batch: Vec<u8>,
    /// The last request had a large payload: receive headers alone, to copy nothing.
    pub(super) exact_headers: bool,
    poll: Poll,
    /// Waits for input are short, because memory is held meanwhile that others may need.
    alert: bool,
}

impl Shared {
    /// One wait for input.
    fn wait_time(&self, alert: bool) -> Duration {
        let limits = &self.server.limits;
        match alert {
            true => TICK.min(limits.stall).min(limits.stall_under_pressure),
            false => limits.stall,
        }
    }

    /// Whether a peer may go on being silent inside a request, after so many waits.
    fn bears(&self, alert: bool, waits: u32) -> bool {
        let limits = &self.server.limits;
        let silent = self.wait_time(alert).saturating_mul(waits);
        let pressed = alert && self.server.write_memory.is_short();
        silent < limits.stall && !(pressed && silent >= limits.stall_under_pressure)
    }
}

/// Serves a negotiated connection until its end. Blocks.
pub(super) fn serve(
    server: Arc<Server>,
    socket: Socket,
    slot: &Slot,
    negotiated: &Negotiated,
    peer: &str,
) {
    let export = Arc::clone(slot.export());
    let socket = Arc::new(socket);
    let (entered, control) = export.enter(&socket);
    let started = Instant::now();
    tracing::info!(export = %export.name, peer, mode = ?negotiated.mode, "connection opened");

    let queue =
        SendQueue::new(Arc::clone(&socket), &server.limits, Arc::clone(&server.read_memory));
    let encoder = ReplyEncoder::new(negotiated.mode);
    let window = match negotiated.mode {
        nbd_proto::Mode::Simple => server.limits.buffered_per_connection,
        _ => STRUCTURED_WINDOW.min(server.limits.buffered_per_connection),
    };
    let shared = Arc::new(Shared {
        server,
        export: Arc::clone(&export),
        encoder,
        queue,
        stats: Stats::default(),
        active: Arc::default(),
    });
    let mut input = vec![0; INPUT];
    let rest = &negotiated.rest[..negotiated.rest.len().min(INPUT)];
    input[..rest.len()].copy_from_slice(rest);
    let mut session = Session {
        shared: Arc::clone(&shared),
        socket: Arc::clone(&socket),
        control,
        transmission: negotiated.transmission(),
        contexts: negotiated.contexts.clone(),
        window: Budget::new(window),
        input,
        start: 0,
        end: rest.len(),
        batch: Vec::new(),
        exact_headers: false,
        poll: Poll::default(),
        alert: false,
    };
    let end = if rest.len() < negotiated.rest.len() {
        End::Protocol("more was sent after the negotiation than one receive can hold".into())
    } else {
        session.run()
    };

    // Whatever was accepted is finished and, if the peer still listens, answered.
    shared.active.wait(1);
    session.flush_batch();
    shared.queue.finish();
    socket.shut(Shutdown::Both);
    drop(entered);
    let stats = shared.stats.snapshot();
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(
        export = %export.name, peer, seconds,
        read = stats.bytes_read, written = stats.bytes_written, zeroed = stats.bytes_zeroed,
        requests = stats.reads + stats.writes + stats.flushes + stats.zeroes + stats.trims
            + stats.block_status + stats.caches,
        errors = stats.errors, p99_us = stats.latency_p99_us, end = %describe(&end),
        "connection closed"
    );
}

fn describe(end: &End) -> String {
    match end {
        End::Normal => "normal".into(),
        End::Broken(e) => format!("broken: {e}"),
        End::Protocol(e) => format!("protocol violation: {e}"),
    }
}

impl Session {
    fn run(&mut self) -> End {
        loop {
            match self.next_request() {
                Ok(true) => {}
                Ok(false) => return End::Normal,
                Err(end) => return end,
            }
        }
    }

    /// Handles one request; `false` at the regular end.
    fn next_request(&mut self) -> Result<bool, End> {
        let header = self.transmission.header_length();
        if !self.receive_header(header)? {
            return Ok(false);
        }
        self.control.begin_request();
        if self.control.is_shutting_down() {
            self.transmission.begin_shutdown();
        }
        let bytes = &self.input[self.start..self.end];
        let parsed = self.transmission.handle_header(bytes).map_err(|e| End::Protocol(e.0))?;
        self.start += header;
        self.exact_headers = false;
        let go_on = self.handle(parsed)?;
        self.control.end_request();
        if self.batch.len() > BATCH {
            self.flush_batch();
        }
        Ok(go_on)
    }

    fn handle(&mut self, parsed: Parsed) -> Result<bool, End> {
        match parsed {
            Parsed::Disconnect => return Ok(false),
            // A whole header is there.
            Parsed::Incomplete => {}
            Parsed::Accept(request) => self.accept(request)?,
            Parsed::Reject(rejection) => self.reject(&rejection)?,
            Parsed::NeedFilter { request, payload } => {
                self.fill(payload)?;
                let filter = &self.input[self.start..self.start + payload];
                let parsed = self.transmission.handle_filter(request, filter);
                self.start += payload;
                return self.handle(parsed);
            }
        }
        Ok(true)
    }

    fn accept(&mut self, request: Request) -> Result<(), End> {
        self.shared.active.wait(self.shared.server.limits.requests_per_connection);
        match request.command {
            Command::Write { fua } if self.is_inline(&request, INLINE_WRITE) => {
                self.write_inline(&request, fua)
            }
            Command::Write { fua } => self.write_pieces(&request, fua),
            Command::Read { .. } if self.is_inline(&request, INLINE_READ) => {
                self.read_inline(&request)
            }
            Command::Read { whole } => self.read_pieces(&request, whole),
            _ => self.other(&request),
        }
    }

    /// Whether this thread carries a request out. Small ones, too, go to other threads where the
    /// disk lets them wait and there is more to do meanwhile.
    fn is_inline(&self, request: &Request, most: usize) -> bool {
        let spread = self.shared.export.pace.is_slow()
            && (self.end > self.start || self.shared.active.requests() > 0);
        request.length == 0 || (request.length <= most as u64 && !spread)
    }

    fn reject(&mut self, rejection: &Rejection) -> Result<(), End> {
        self.flush_batch();
        self.skip(rejection.skip)?;
        let Rejection { cookie, offset, errno, text, at, .. } = rejection;
        self.shared.stats.record_refusal();
        self.shared.export.stats.record_refusal();
        self.shared.encoder.error(&mut self.batch, (*cookie, *offset), *errno, text, *at);
        Ok(())
    }

    /// Sends the replies gathered so far.
    pub(super) fn flush_batch(&mut self) {
        if !self.batch.is_empty() {
            self.shared.queue.send_replies(&mut self.batch);
        }
    }

    /// Makes waits for input short, or long again.
    pub(super) fn set_alert(&mut self, alert: bool) -> Result<(), End> {
        if self.alert != alert {
            self.socket.set_receive_timeout(self.shared.wait_time(alert))?;
            self.alert = alert;
        }
        Ok(())
    }

    /// Receives until a header is there; `false` where the peer closed before its first byte.
    fn receive_header(&mut self, length: usize) -> Result<bool, End> {
        if self.end - self.start >= length {
            return Ok(true);
        }
        self.flush_batch();
        if !self.shared.queue.wait_below(UNSENT) {
            return Err(End::Broken(io::ErrorKind::BrokenPipe.into()));
        }
        self.compact();
        let mut waits = 0;
        while self.end < length {
            let limit = if self.exact_headers { length } else { INPUT };
            let polls = !self.exact_headers && self.end == 0;
            match self.receive_polling(polls, limit) {
                Ok(0) if self.end == 0 || self.control.is_ending() => return Ok(false),
                Ok(0) => return Err(End::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    self.end += n;
                    waits = 0;
                }
                // An idle connection may stay; half a request may not.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    waits += 1;
                    if self.end == 0 {
                        self.set_alert(false)?;
                    } else if !self.shared.bears(self.alert, waits) {
                        return Err(End::Broken(io::ErrorKind::TimedOut.into()));
                    }
                }
                // A peer that is gone between requests has just not said goodbye.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset && self.end == 0 => {
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Receives into the input. After small requests that follow each other closely it asks for a
    /// moment before it sleeps: waking up takes longer than they do.
    fn receive_polling(&mut self, polls: bool, limit: usize) -> io::Result<usize> {
        let buf = &mut self.input[self.end..limit];
        if !polls || !self.poll.worthwhile() {
            let since = Instant::now();
            let received = self.socket.receive(buf);
            self.poll.slept(since.elapsed());
            return received;
        }
        let since = Instant::now();
        loop {
            match self.socket.receive_now(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if since.elapsed() >= POLL {
                        self.poll.missed();
                        return self.socket.receive(buf);
                    }
                    std::thread::yield_now();
                }
                received => return received,
            }
        }
    }

    fn compact(&mut self) {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Makes `length` (at most [`INLINE_WRITE`]) bytes available in the input.
    pub(super) fn fill(&mut self, length: usize) -> Result<(), End> {
        if self.end - self.start >= length {
            return Ok(());
        }
        if self.start + length > INPUT {
            self.compact();
        }
        let missing = self.start + length - self.end;
        let end = self.end;
        let (shared, alert) = (&self.shared, self.alert);
        self.socket
            .receive_exact(&mut self.input[end..end + missing], |n| shared.bears(alert, n))?;
        self.end += missing;
        Ok(())
    }

    /// The first `length` bytes of the input, which must be there.
    pub(super) fn buffered(&self, length: usize) -> &[u8] {
        &self.input[self.start..self.start + length]
    }

    pub(super) fn consume(&mut self, length: usize) {
        self.start += length;
    }

    /// Fills `buf` with the next bytes of the stream.
    pub(super) fn receive_into(&mut self, buf: &mut [u8]) -> Result<(), End> {
        let here = buf.len().min(self.end - self.start);
        let (head, tail) = buf.split_at_mut(here);
        head.copy_from_slice(self.buffered(here));
        self.consume(here);
        Ok(self.socket.receive_exact(tail, |waits| self.shared.bears(self.alert, waits))?)
    }

    /// Receives and forgets the payload of a refused request.
    fn skip(&mut self, mut length: u64) -> Result<(), End> {
        while length > 0 {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            }
            #[allow(clippy::cast_possible_truncation, reason = "bounded by the buffer")]
            let part = length.min(INLINE_WRITE as u64) as usize;
            self.fill(part)?;
            self.consume(part);
            length -= part as u64;
        }
        Ok(())
    }
}
