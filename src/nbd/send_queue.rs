//! Replies on their way out: whoever finishes a request sends its reply, without ever waiting for
//! the peer; what the socket does not take at once is left to the connection's own sender thread.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::buffers::{Budget, Piece};
use super::limits::Limits;
use super::socket::Socket;

/// Messages sent with one call.
const BATCH: usize = 32;
/// How often a sender that waits for the peer looks whether it should give up.
pub(super) const TICK: Duration = Duration::from_millis(500);

/// A header and, maybe, the payload behind it.
#[derive(Debug)]
pub(super) struct Message {
    /// Encoded header or headers.
    pub(super) header: Vec<u8>,
    /// What follows it.
    pub(super) payload: Option<Piece>,
    /// A window that opens again once this is sent, by being dropped.
    #[expect(dead_code, reason = "held, not read")]
    pub(super) window: Option<Arc<WindowShare>>,
}

impl Message {
    /// A header alone.
    pub(super) fn header(header: Vec<u8>) -> Self {
        Self { header, payload: None, window: None }
    }

    fn len(&self) -> usize {
        self.header.len() + self.payload.as_ref().map_or(0, |p| p.bytes().len())
    }
}

/// Bytes of one connection that are read or unsent. Bounds what a peer that does not take its
/// replies can hold.
pub(super) type WindowShare = super::buffers::Share;

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Message>,
    /// Bytes of the first message that are sent.
    sent: usize,
    /// Somebody is in a send call; the queue is theirs.
    sending: bool,
    /// The socket is full: only the sender thread may send.
    full: bool,
    has_thread: bool,
    closing: bool,
    failed: bool,
    /// Threads that wait for a change: waking nobody costs a system call too.
    waiting: usize,
}

impl State {
    fn unsent(&self) -> usize {
        self.queue.iter().map(Message::len).sum()
    }
}

/// The outgoing side of a connection.
pub(super) struct SendQueue {
    socket: Arc<Socket>,
    state: Mutex<State>,
    changed: Condvar,
    stall: Duration,
    stall_under_pressure: Duration,
    pressure: Arc<Budget>,
}

impl SendQueue {
    /// For `socket`; `pressure` is the budget whose shortage shortens patience.
    pub(super) fn new(socket: Arc<Socket>, limits: &Limits, pressure: Arc<Budget>) -> Arc<Self> {
        Arc::new(Self {
            socket,
            state: Mutex::default(),
            changed: Condvar::new(),
            stall: limits.stall,
            stall_under_pressure: limits.stall_under_pressure,
            pressure,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_change<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    fn tell(&self, state: &State) {
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Adds messages, to be sent by the next [`Self::kick`]. Never blocks for long: callers may
    /// hold a lock that decides the order of their messages.
    pub(super) fn add(&self, messages: impl IntoIterator<Item = Message>) {
        let mut state = self.lock();
        if !state.failed {
            state.queue.extend(messages.into_iter().filter(|m| m.len() > 0));
        }
    }

    /// Sends what the socket takes at once.
    pub(super) fn kick(self: &Arc<Self>) {
        let state = self.lock();
        if state.failed || state.sending || state.full {
            return;
        }
        let (mut state, stopped) = self.drain(state);
        if stopped && !state.failed {
            self.hand_over(&mut state);
        }
    }

    /// Adds messages and sends what the socket takes at once.
    pub(super) fn send(self: &Arc<Self>, messages: impl IntoIterator<Item = Message>) {
        self.add(messages);
        self.kick();
    }

    /// Sends gathered headers and leaves `replies` empty. Where nothing else is on its way they go
    /// straight from there.
    pub(super) fn send_replies(self: &Arc<Self>, replies: &mut Vec<u8>) {
        let mut state = self.lock();
        if state.sending || state.full || !state.queue.is_empty() {
            drop(state);
            return self.send([Message::header(std::mem::take(replies))]);
        }
        if state.failed {
            return replies.clear();
        }
        state.sending = true;
        drop(state);
        let sent = self.socket.send_now(&[IoSlice::new(replies)]);
        state = self.lock();
        state.sending = false;
        self.tell(&state);
        match sent {
            Ok(n) if n < replies.len() => {
                // What others added meanwhile comes behind the rest of this.
                state.queue.push_front(Message::header(replies.split_off(n)));
            }
            Ok(_) => {}
            Err(_) => self.fail(&mut state),
        }
        replies.clear();
        if !state.queue.is_empty() {
            drop(state);
            self.kick();
        }
    }

    /// Sends until the queue is empty (`false`) or the socket is full or broken (`true`).
    fn drain<'a>(&'a self, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, bool) {
        state.sending = true;
        let mut stopped = false;
        while !stopped && !state.queue.is_empty() {
            let count = state.queue.len().min(BATCH);
            let mut batch: VecDeque<Message> = state.queue.drain(..count).collect();
            let mut sent = state.sent;
            drop(state);
            let result = send_batch(&self.socket, &mut batch, &mut sent);
            state = self.lock();
            state.sent = sent;
            for message in batch.into_iter().rev() {
                state.queue.push_front(message);
            }
            match result {
                Ok(full) => stopped = full,
                Err(_) => {
                    self.fail(&mut state);
                    stopped = true;
                }
            }
        }
        state.sending = false;
        self.tell(&state);
        (state, stopped)
    }

    fn fail(&self, state: &mut State) {
        state.failed = true;
        state.queue.clear();
        self.socket.shut(Shutdown::Both);
        self.tell(state);
    }

    /// Leaves the rest to the sender thread, which is started when it is first needed.
    fn hand_over(self: &Arc<Self>, state: &mut State) {
        state.full = true;
        if !state.has_thread {
            let queue = Arc::clone(self);
            let spawned = std::thread::Builder::new()
                .name("nbd-send".into())
                .stack_size(super::STACK)
                .spawn(move || queue.run());
            if spawned.is_err() {
                return self.fail(state);
            }
            state.has_thread = true;
        }
        self.tell(state);
    }

    /// The sender thread: waits for a full socket to take bytes again.
    fn run(self: Arc<Self>) {
        let mut state = self.lock();
        loop {
            while !state.full && !state.failed && !state.closing {
                state = self.wait_change(state);
            }
            if state.failed || (state.closing && !state.full) {
                break;
            }
            drop(state);
            let writable = self.wait();
            state = self.lock();
            if !writable {
                self.fail(&mut state);
                break;
            }
            let (after, stopped) = self.drain(state);
            state = after;
            state.full = stopped && !state.failed;
        }
        state.has_thread = false;
        state.full = false;
        self.tell(&state);
    }

    /// Waits until the peer takes bytes; `false` when patience or the connection is at its end.
    fn wait(&self) -> bool {
        let since = Instant::now();
        loop {
            match self.socket.wait_writable(TICK) {
                Ok(true) => return true,
                Err(_) => return false,
                Ok(false) => {}
            }
            let waited = since.elapsed();
            let pressed = self.pressure.is_short() && waited >= self.stall_under_pressure;
            if waited >= self.stall || pressed {
                tracing::info!(?waited, "a peer does not take its replies; connection dropped");
                return false;
            }
        }
    }

    /// Waits while more than `bytes` are unsent; `false` where nothing can be sent any more.
    pub(super) fn wait_below(&self, bytes: usize) -> bool {
        let mut state = self.lock();
        while !state.failed && state.unsent() > bytes {
            state = self.wait_change(state);
        }
        !state.failed
    }

    /// Waits until everything is sent, or cannot be; `false` in the latter case.
    pub(super) fn finish(&self) -> bool {
        let mut state = self.lock();
        state.closing = true;
        self.tell(&state);
        while !state.failed && (state.sending || !state.queue.is_empty()) {
            state = self.wait_change(state);
        }
        !state.failed
    }
}

/// Sends a batch; `true` where the socket became full before its end. Removes what is sent.
fn send_batch(
    socket: &Socket,
    batch: &mut VecDeque<Message>,
    sent: &mut usize,
) -> io::Result<bool> {
    while !batch.is_empty() {
        let mut skip = *sent;
        let mut parts = Vec::with_capacity(2 * batch.len());
        for message in batch.iter() {
            let payload = message.payload.as_ref().map_or(&[][..], Piece::bytes);
            for part in [&message.header[..], payload] {
                let start = skip.min(part.len());
                skip -= start;
                if start < part.len() {
                    parts.push(IoSlice::new(&part[start..]));
                }
            }
        }
        let n = socket.send_now(&parts)?;
        drop(parts);
        *sent += n;
        while let Some(message) = batch.front() {
            if *sent < message.len() {
                break;
            }
            *sent -= message.len();
            batch.pop_front();
        }
        if n == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}
