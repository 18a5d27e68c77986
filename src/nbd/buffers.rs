//! Memory for payloads: one budget for the process, taken before a buffer exists, and aligned
//! buffers that are used again.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::limits::{ALIGNMENT, PIECE};

/// Buffers that are kept for use again, in all.
const KEPT: usize = 64;

/// A number of bytes that many take from and give back to, in order of arrival.
#[derive(Debug)]
pub struct Budget {
    state: Mutex<BudgetState>,
    returned: Condvar,
    total: usize,
}

#[derive(Debug)]
struct BudgetState {
    free: usize,
    next_ticket: u64,
    waiting: VecDeque<u64>,
    lowest: usize,
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
        let state =
            BudgetState { free: total, next_ticket: 0, waiting: VecDeque::new(), lowest: total };
        Arc::new(Self { state: Mutex::new(state), returned: Condvar::new(), total })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BudgetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes`, after everybody who came before; more than the whole budget counts as all
    /// of it.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Share {
        let bytes = bytes.min(self.total);
        let mut state = self.lock();
        if !state.waiting.is_empty() || state.free < bytes {
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            state.waiting.push_back(ticket);
            while state.waiting.front() != Some(&ticket) || state.free < bytes {
                state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting.pop_front();
        }
        state.free -= bytes;
        state.lowest = state.lowest.min(state.free);
        drop(state);
        self.returned.notify_all();
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
        self.budget.lock().free += self.bytes;
        self.budget.returned.notify_all();
    }
}

/// Page-aligned buffers of [`PIECE`] bytes (and a page to shift in).
#[derive(Debug, Default)]
pub struct Pool {
    kept: Mutex<Vec<Vec<u8>>>,
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
    /// A buffer for `length` (at most [`PIECE`]) bytes of the disk from `offset` on, paid for with
    /// `share`.
    pub fn piece(self: &Arc<Self>, offset: u64, length: usize, share: Arc<Share>) -> Piece {
        debug_assert!(length <= PIECE, "a piece is bounded");
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = kept.unwrap_or_else(|| vec![0; PIECE + 2 * ALIGNMENT]);
        let aligned = memory.as_ptr().align_offset(ALIGNMENT);
        #[allow(clippy::cast_possible_truncation, reason = "a remainder")]
        let start = aligned + (offset % ALIGNMENT as u64) as usize;
        Piece { memory, start, length, pool: Arc::clone(self), _share: share }
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
        let mut kept = self.pool.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.memory));
        }
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
    fn a_large_taker_is_served_before_small_ones_that_came_later() {
        let budget = Budget::new(100);
        let first = budget.take(60);
        let order = Arc::new(Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for bytes in [80, 10] {
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
        assert_eq!(*order.lock().unwrap(), [80, 10]);
    }
}
