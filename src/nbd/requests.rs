//! Carrying out valid requests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nbd_proto::server::{Command, Request};
use nbd_proto::{Errno, Mode};

use super::buffers::Piece;
use super::limits::{INLINE_READ, INLINE_WRITE, PIECE};
use super::send_queue::{Message, WindowShare};
use super::session::{ActiveGuard, End, Session, Shared};
use super::stats::Kind;
use crate::block::{BlockError, BlockErrorKind, BlockResult, ZeroOptions};
use crate::pages;

/// Shortest run of zeroes that a large structured read sends as a hole, in bytes.
const MIN_HOLE: u64 = 64 << 10;

/// The error number for a failed device call.
fn errno(kind: BlockErrorKind) -> Errno {
    match kind {
        BlockErrorKind::ReadOnly => Errno::Perm,
        BlockErrorKind::OutOfBounds => Errno::Inval,
        BlockErrorKind::NoSpace => Errno::NoSpc,
        BlockErrorKind::Unsupported => Errno::NotSup,
        BlockErrorKind::Closing => Errno::Shutdown,
        BlockErrorKind::Io => Errno::Io,
    }
}

/// The ends of the pieces of `start .. end`: piece boundaries are the same for all requests, so that
/// pieces cover whole clusters but for a request's own edges.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    const STEP: u64 = PIECE as u64;
    let next = move |at: u64| ((at / STEP + 1) * STEP).min(end);
    std::iter::successors(Some((start, next(start))), move |(_, to)| {
        (*to < end).then(|| (*to, next(*to)))
    })
}

#[allow(clippy::cast_possible_truncation, reason = "at most a piece")]
fn length((from, to): (u64, u64)) -> usize {
    (to - from) as usize
}

fn footprint((from, to): (u64, u64)) -> usize {
    pages::footprint(from, length((from, to)))
}

impl Shared {
    fn record(&self, kind: Kind, bytes: u64, ok: bool, since: Instant) {
        let took = since.elapsed();
        self.stats.record(kind, bytes, ok, took);
        self.export.stats.record(kind, bytes, ok, took);
    }

    /// Appends the reply to a request without a payload, and counts it.
    fn reply(
        &self,
        out: &mut Vec<u8>,
        request: &Request,
        kind: Kind,
        result: BlockResult<()>,
        since: Instant,
    ) {
        self.record(kind, request.length, result.is_ok(), since);
        let id = (request.cookie, request.offset);
        match result {
            Ok(()) => self.encoder.done(out, id),
            Err(error) => self.error(out, request, &error),
        }
    }

    fn error(&self, out: &mut Vec<u8>, request: &Request, error: &BlockError) {
        let export = &self.export.name;
        match error.kind {
            BlockErrorKind::Io | BlockErrorKind::NoSpace => {
                tracing::warn!(%export, %error, "a request failed");
            }
            _ => tracing::debug!(%export, %error, "a request failed"),
        }
        // A device may tell of a byte that the request does not name, such as another in the same
        // cluster; clients take an offset outside the request for a broken protocol.
        let Request { cookie, offset, length, .. } = *request;
        let at = error.offset.filter(|at| (offset..offset + length).contains(at));
        self.encoder.error(out, (cookie, offset), errno(error.kind), &error.message, at);
    }

    fn flush_if(&self, fua: bool, result: BlockResult<()>) -> BlockResult<()> {
        result.and_then(|()| if fua { self.export.device.flush() } else { Ok(()) })
    }
}

/// A large request whose pieces are under way.
struct Large {
    shared: Arc<Shared>,
    request: Request,
    since: Instant,
    left: AtomicUsize,
    failure: Mutex<Option<BlockError>>,
    /// Pieces of a read that must be answered in one chunk, by number.
    parts: Mutex<Vec<Option<Piece>>>,
    _active: ActiveGuard,
}

impl Large {
    fn new(shared: &Arc<Shared>, request: &Request, count: usize) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::clone(shared),
            request: request.clone(),
            since: Instant::now(),
            left: AtomicUsize::new(count),
            failure: Mutex::new(None),
            parts: Mutex::new(Vec::new()),
            _active: shared.active.enter(),
        })
    }

    /// Keeps the failure of the piece at `piece`, unless an earlier byte failed too.
    fn fail(&self, mut error: BlockError, piece: u64) {
        error.offset.get_or_insert(piece);
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = failure.as_ref().is_none_or(|f| error.offset < f.offset);
        if earlier {
            *failure = Some(error);
        }
    }

    fn failure(&self) -> Option<BlockError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Counts `count` pieces as done; whether they were the last.
    fn finish(&self, count: usize) -> bool {
        self.left.fetch_sub(count, Ordering::AcqRel) == count
    }

    fn id(&self) -> (u64, u64) {
        (self.request.cookie, self.request.offset)
    }
}

impl Session {
    pub(super) fn write_inline(&mut self, request: &Request, fua: bool) -> Result<(), End> {
        let since = Instant::now();
        #[allow(clippy::cast_possible_truncation, reason = "at most INLINE_WRITE")]
        let length = request.length as usize;
        self.fill(length)?;
        let shared = Arc::clone(&self.shared);
        let written = shared.export.write(self.buffered(length), request.offset);
        self.consume(length);
        let result = shared.flush_if(fua, written);
        shared.reply(&mut self.batch, request, Kind::Write, result, since);
        Ok(())
    }

    /// Receives a large payload piece by piece; each is on its way to the disk while the next comes.
    pub(super) fn write_pieces(&mut self, request: &Request, fua: bool) -> Result<(), End> {
        self.flush_batch();
        self.exact_headers = true;
        self.set_alert(true)?;
        let end = request.offset + request.length;
        // One more than the pieces, so that no piece is the last before all are received.
        let count = pieces(request.offset, end).count() + 1;
        let large = Large::new(&self.shared, request, count);
        let server = Arc::clone(&self.shared.server);
        for (done, range) in pieces(request.offset, end).enumerate() {
            let share = Arc::new(server.write_memory.take(footprint(range)));
            let mut piece = Piece::new(range.0, length(range), share);
            if let Err(end) = self.receive_into(piece.bytes_mut()) {
                // What came is written, but this write must never be answered as done.
                large.fail(BlockError::new(BlockErrorKind::Io, "the payload ended early"), range.0);
                large.finish(count - done);
                return Err(end);
            }
            let large = Arc::clone(&large);
            self.shared.export.workers.submit(move || {
                if let Err(error) = large.shared.export.write(piece.bytes(), range.0) {
                    large.fail(error, range.0);
                }
                drop(piece);
                complete_write(&large, fua);
            });
        }
        complete_write(&large, fua);
        Ok(())
    }

    pub(super) fn read_inline(&mut self, request: &Request) -> Result<(), End> {
        let since = Instant::now();
        let shared = Arc::clone(&self.shared);
        let id = (request.cookie, request.offset);
        if request.length == 0 {
            shared.reply(&mut self.batch, request, Kind::Read, Ok(()), since);
            return Ok(());
        }
        #[allow(clippy::cast_possible_truncation, reason = "at most INLINE_READ")]
        let length = request.length as usize;
        let before = self.batch.len();
        shared.encoder.data(&mut self.batch, id, request.offset, length, true);
        let data = self.batch.len();
        self.batch.resize(data + length, 0);
        let result = shared.export.read(&mut self.batch[data..], request.offset);
        shared.record(Kind::Read, request.length, result.is_ok(), since);
        if let Err(error) = result {
            self.batch.truncate(before);
            shared.error(&mut self.batch, request, &error);
        }
        Ok(())
    }

    pub(super) fn read_pieces(&mut self, request: &Request, whole: bool) -> Result<(), End> {
        self.flush_batch();
        if whole || self.shared.encoder.mode() == Mode::Simple {
            self.read_whole(request);
            return Ok(());
        }
        let ranges = match self.data_and_holes(request) {
            Ok(ranges) => ranges,
            Err(error) => {
                self.shared.record(Kind::Read, request.length, false, Instant::now());
                self.shared.error(&mut self.batch, request, &error);
                return Ok(());
            }
        };
        let large = Large::new(&self.shared, request, ranges.len());
        for (range, hole) in ranges {
            if hole {
                #[allow(clippy::cast_possible_truncation, reason = "at most max_payload")]
                let bytes = (range.1 - range.0) as u32;
                finish_read(&large, |header, last| {
                    self.shared.encoder.hole(header, large.id(), range.0, bytes, last);
                    None
                });
                continue;
            }
            let window = Arc::new(self.window.take(length(range)));
            let share = Arc::new(self.shared.server.read_memory.take(footprint(range)));
            let large = Arc::clone(&large);
            self.shared.export.workers.submit(move || {
                let piece = Piece::new(range.0, length(range), share);
                read_piece(&large, piece, range.0, window);
            });
        }
        Ok(())
    }

    /// Splits a read into holes and pieces of data.
    fn data_and_holes(&self, request: &Request) -> BlockResult<Vec<((u64, u64), bool)>> {
        let (start, end) = (request.offset, request.offset + request.length);
        let mut zeroes: Vec<(u64, u64)> = Vec::new();
        self.shared.export.device.extents(start, request.length, &mut |extent| {
            if extent.zero {
                let to = (extent.offset + extent.length).min(end);
                match zeroes.last_mut() {
                    Some((_, last)) if *last == extent.offset => *last = to,
                    _ => zeroes.push((extent.offset, to)),
                }
            }
            true
        })?;
        let mut ranges = Vec::new();
        let mut at = start;
        for (from, to) in zeroes.into_iter().filter(|(from, to)| to - from >= MIN_HOLE) {
            if at < from {
                ranges.extend(pieces(at, from).map(|piece| (piece, false)));
            }
            ranges.push(((from, to), true));
            at = to;
        }
        if at < end {
            ranges.extend(pieces(at, end).map(|piece| (piece, false)));
        }
        Ok(ranges)
    }

    /// A read that is answered in one chunk: nothing is sent before all of it is there.
    fn read_whole(&mut self, request: &Request) {
        let end = request.offset + request.length;
        let count = pieces(request.offset, end).count();
        #[allow(clippy::cast_possible_truncation, reason = "at most max_payload")]
        let bytes = request.length as usize;
        let window = Arc::new(self.window.take(bytes));
        let memory = pieces(request.offset, end).map(footprint).sum();
        let share = Arc::new(self.shared.server.read_memory.take(memory));
        let large = Large::new(&self.shared, request, count);
        large.parts.lock().unwrap_or_else(PoisonError::into_inner).resize_with(count, || None);
        for (number, range) in pieces(request.offset, end).enumerate() {
            let (large, share, window) =
                (Arc::clone(&large), Arc::clone(&share), Arc::clone(&window));
            self.shared.export.workers.submit(move || {
                let mut piece = Piece::new(range.0, length(range), share);
                match large.shared.export.read(piece.bytes_mut(), range.0) {
                    Ok(()) => {
                        let mut parts = large.parts.lock().unwrap_or_else(PoisonError::into_inner);
                        parts[number] = Some(piece);
                    }
                    Err(error) => large.fail(error, range.0),
                }
                if large.finish(1) {
                    send_whole(&large, &window);
                }
            });
        }
    }

    /// Everything without a large payload.
    pub(super) fn other(&mut self, request: &Request) -> Result<(), End> {
        let since = Instant::now();
        let shared = Arc::clone(&self.shared);
        let device = &shared.export.device;
        let Request { offset, length, .. } = *request;
        let (kind, result) = match &request.command {
            Command::Flush => (Kind::Flush, device.flush()),
            Command::Trim { fua } => {
                (Kind::Trim, shared.flush_if(*fua, device.discard(offset, length)))
            }
            Command::Cache => (Kind::Cache, device.cache(offset, length)),
            Command::WriteZeroes { fua, no_hole, fast } => {
                let options = ZeroOptions { no_hole: *no_hole, fast_only: *fast };
                (Kind::Zero, shared.flush_if(*fua, device.write_zeroes(offset, length, options)))
            }
            Command::BlockStatus { one, filter } => {
                match self.block_status(request, *one, filter) {
                    Ok(()) => {
                        shared.record(Kind::Status, length, true, since);
                        return Ok(());
                    }
                    Err(error) => (Kind::Status, Err(error)),
                }
            }
            Command::Read { .. } | Command::Write { .. } => return Ok(()),
        };
        shared.reply(&mut self.batch, request, kind, result, since);
        Ok(())
    }
}

fn complete_write(large: &Large, fua: bool) {
    if !large.finish(1) {
        return;
    }
    let result = large.failure().map_or(Ok(()), Err);
    let result = large.shared.flush_if(fua, result);
    let mut header = Vec::with_capacity(64);
    large.shared.reply(&mut header, &large.request, Kind::Write, result, large.since);
    large.shared.queue.send([Message::header(header)]);
}

/// Reads one piece of a structured read and sends it.
fn read_piece(large: &Large, mut piece: Piece, at: u64, window: Arc<WindowShare>) {
    let message = match large.shared.export.read(piece.bytes_mut(), at) {
        Ok(()) => Some((piece, window)),
        Err(error) => {
            large.fail(error, at);
            None
        }
    };
    finish_read(large, |header, last| {
        let (piece, window) = message?;
        let bytes = piece.bytes().len();
        large.shared.encoder.data(header, large.id(), at, bytes, last);
        Some((piece, window))
    });
}

/// Sends a chunk of a structured read, which `chunk` encodes, told whether it is the last of the
/// reply. Where the request failed, the error is the last instead.
fn finish_read(
    large: &Large,
    chunk: impl FnOnce(&mut Vec<u8>, bool) -> Option<(Piece, Arc<WindowShare>)>,
) {
    let shared = &large.shared;
    {
        // Which chunk is the last, and which goes out last, is decided in one step.
        let mut failure = large.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let done = large.finish(1);
        let error = if done { failure.take() } else { None };
        let mut header = Vec::with_capacity(64);
        let (payload, window) = chunk(&mut header, done && error.is_none()).unzip();
        shared.queue.add([Message { header, payload, window }]);
        if done {
            shared.record(Kind::Read, large.request.length, error.is_none(), large.since);
        }
        if let Some(error) = error {
            let mut header = Vec::new();
            shared.error(&mut header, &large.request, &error);
            shared.queue.add([Message::header(header)]);
        }
    }
    shared.queue.kick();
}

fn send_whole(large: &Large, window: &Arc<WindowShare>) {
    let shared = &large.shared;
    let failure = large.failure();
    shared.record(Kind::Read, large.request.length, failure.is_none(), large.since);
    let mut header = Vec::with_capacity(64);
    if let Some(error) = failure {
        shared.error(&mut header, &large.request, &error);
        return shared.queue.send([Message::header(header)]);
    }
    #[allow(clippy::cast_possible_truncation, reason = "at most max_payload")]
    let bytes = large.request.length as usize;
    shared.encoder.data(&mut header, large.id(), large.request.offset, bytes, true);
    let parts = std::mem::take(&mut *large.parts.lock().unwrap_or_else(PoisonError::into_inner));
    let mut header = Some(header);
    shared.queue.send(parts.into_iter().map(|payload| Message {
        header: header.take().unwrap_or_default(),
        payload,
        window: Some(Arc::clone(window)),
    }));
}

const _: () = assert!(INLINE_WRITE <= PIECE && INLINE_READ <= PIECE, "inline means small");
const _: () = assert!(PIECE <= pages::LARGEST, "every piece fits a slot");
