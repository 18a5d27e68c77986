//! Memory for payloads: one budget for the process, taken before a buffer exists, and aligned
//! buffers that are used again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::limits::{ALIGNMENT, PIECE};

/// Bytes of buffers that are kept for use again, in all.
const KEPT: usize = 32 << 20;
/// Smallest buffer in bytes.
const SMALLEST: usize = 16 << 10;

/// A number of bytes that many take from and give back to, in order of arrival.
#[derive(Debug)]
pub struct Budget {
    state: Mutex<BudgetState>,
    total: usize,
}

#[derive(Debug)]
struct BudgetState {
    free: usize,
    waiting: VecDeque<Waiting>,
    lowest: usize,
}

/// Somebody who waits for so many bytes.
#[derive(Debug)]
struct Waiting {
    bytes: usize,
    turn: Arc<Turn>,
}

/// Each has one of its own: whoever gives back wakes those that get something, and nobody else.
#[derive(Debug, Default)]
struct Turn {
    came: Condvar,
    has_come: AtomicBool,
}

impl BudgetState {
    fn give(&mut self, bytes: usize) {
        self.free -= bytes;
        self.lowest = self.lowest.min(self.free);
    }

    /// Gives to those who wait, as long as there is enough for the first.
    fn serve(&mut self) {
        while let Some(first) = self.waiting.pop_front_if(|first| first.bytes <= self.free) {
            self.give(first.bytes);
            first.turn.has_come.store(true, Ordering::Relaxed);
            first.turn.came.notify_one();
        }
    }
}

/// Bytes taken from a [`Budget`]; given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// A budget of `total` bytes.
    pub fn new(total: usize) -> Arc<Self> {
        let state = BudgetState { free: total, waiting: VecDeque::new(), lowest: total };
        Arc::new(Self { state: Mutex::new(state), total })
    }

    fn lock(&self) -> MutexGuard<'_, BudgetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes`, after everybody who came before; more than the whole budget counts as all
    /// of it.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Share {
        let bytes = bytes.min(self.total);
        let mut state = self.lock();
        if state.waiting.is_empty() && state.free >= bytes {
            state.give(bytes);
        } else {
            let turn = Arc::<Turn>::default();
            state.waiting.push_back(Waiting { bytes, turn: Arc::clone(&turn) });
            while !turn.has_come.load(Ordering::Relaxed) {
                state = turn.came.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        Share { budget: Arc::clone(self), bytes }
    }

    /// Whether somebody waits.
    pub fn is_short(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Most bytes that were ever taken at once.
    pub fn peak(&self) -> usize {
        self.total - self.lock().lowest
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.budget.lock();
        state.free += self.bytes;
        state.serve();
    }
}

/// Bytes of memory that a payload of `length` (at most [`PIECE`]) takes: what to take from the
/// budget for it.
pub fn footprint(length: usize) -> usize {
    // A page to align in, and a page to shift in.
    length.next_power_of_two().clamp(SMALLEST, PIECE) + 2 * ALIGNMENT
}

/// Page-aligned buffers in sizes of powers of two.
#[derive(Debug, Default)]
pub struct Pool {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: usize,
    /// By size.
    buffers: BTreeMap<usize, Vec<Vec<u8>>>,
}

/// A part of a pooled buffer whose address is congruent to a disk offset, page by page.
#[derive(Debug)]
pub struct Piece {
    memory: Vec<u8>,
    start: usize,
    length: usize,
    pool: Arc<Pool>,
    /// Given back with the last buffer that it pays for.
    _share: Arc<Share>,
}

impl Pool {
    /// A buffer for `length` (at most [`PIECE`]) bytes of the disk from `offset` on; `share` has
    /// paid its [`footprint`].
    pub fn piece(self: &Arc<Self>, offset: u64, length: usize, share: Arc<Share>) -> Piece {
        debug_assert!(length <= PIECE, "a piece is bounded");
        let size = footprint(length);
        let memory = self.lock().take(size).unwrap_or_else(|| vec![0; size]);
        let aligned = memory.as_ptr().align_offset(ALIGNMENT);
        #[allow(clippy::cast_possible_truncation, reason = "a remainder")]
        let start = aligned + (offset % ALIGNMENT as u64) as usize;
        Piece { memory, start, length, pool: Arc::clone(self), _share: share }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn take(&mut self, size: usize) -> Option<Vec<u8>> {
        let buffer = self.buffers.get_mut(&size)?.pop()?;
        self.bytes -= size;
        Some(buffer)
    }

    fn keep(&mut self, buffer: Vec<u8>) {
        if self.bytes + buffer.len() <= KEPT {
            self.bytes += buffer.len();
            self.buffers.entry(buffer.len()).or_default().push(buffer);
        }
    }
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, for filling.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.pool.lock().keep(std::mem::take(&mut self.memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn pieces_lie_in_memory_as_they_lie_on_the_disk() {
        let pool = Arc::new(Pool::default());
        let budget = Budget::new(10 << 20);
        for offset in [0, 512, 4096, 1_000_448] {
            let piece = pool.piece(offset, 1000, Arc::new(budget.take(1000)));
            assert_eq!(piece.bytes().as_ptr().addr() as u64 % 4096, offset % 4096);
            assert_eq!(piece.bytes().len(), 1000);
        }
        assert_eq!(budget.peak(), 1000);
    }

    #[test]
    fn a_buffer_fits_its_payload_wherever_it_starts_and_is_used_again() {
        let pool = Arc::new(Pool::default());
        let budget = Budget::new(10 << 20);
        for length in [1, 512, 16 << 10, (16 << 10) + 1, 100_000, PIECE - 1, PIECE] {
            let share = || Arc::new(budget.take(footprint(length)));
            let mut piece = pool.piece(4095, length, share());
            piece.bytes_mut().fill(7);
            assert_eq!(piece.bytes().len(), length);
            let address = piece.bytes().as_ptr().addr();
            drop(piece);
            assert_eq!(pool.piece(4095, length, share()).bytes().as_ptr().addr(), address);
        }
    }

    #[test]
    fn a_large_taker_is_served_before_small_ones_that_came_later() {
        let budget = Budget::new(100);
        let first = budget.take(60);
        let order = Arc::new(Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for bytes in [80, 30] {
                let (budget, order) = (Arc::clone(&budget), Arc::clone(&order));
                let waiting = budget.lock().waiting.len();
                let taker = Arc::clone(&budget);
                scope.spawn(move || {
                    let share = taker.take(bytes);
                    order.lock().unwrap().push(bytes);
                    drop(share);
                });
                while budget.lock().waiting.len() == waiting {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            assert!(budget.is_short());
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), [80, 30]);
    }
}
