//! Memory for payloads: one budget for the process, taken before a buffer exists.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::pages::PageBuffer;

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

/// A payload, or a part of one, in memory that a budget has paid for.
#[derive(Debug)]
pub struct Piece {
    buffer: PageBuffer,
    /// Given back with the last buffer that it pays for.
    _share: Arc<Share>,
}

impl Piece {
    /// Memory for `length` bytes (at most a [`PIECE`](super::limits::PIECE)) of the disk from `offset` on;
    /// `share` has paid its [`footprint`](crate::pages::footprint).
    pub fn new(offset: u64, length: usize, share: Arc<Share>) -> Self {
        Self { buffer: PageBuffer::new(offset, length), _share: share }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// The bytes, for filling.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_share_is_given_back_with_the_last_piece_that_it_pays_for() {
        let budget = Budget::new(10 << 20);
        let share = Arc::new(budget.take(10 << 20));
        let [first, last] = [0, 1 << 20].map(|at| Piece::new(at, 1000, Arc::clone(&share)));
        drop((share, first));
        assert_eq!(budget.lock().free, 0);
        drop(last);
        assert_eq!(budget.lock().free, 10 << 20);
        assert_eq!(budget.peak(), 10 << 20);
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
