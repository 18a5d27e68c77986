//! Who works where: overlapping operations on one image wait for each other, in order of arrival.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What an operation does to its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reads through the mapping.
    Read,
    /// Overwrites allocated bytes; the mapping stays.
    InPlace,
    /// Changes the mapping.
    Remap,
}

impl Access {
    /// Whether the two must not overlap in time. Reads may meet in-place writes: the outcome is
    /// either content, as on any disk.
    fn conflicts(self, other: Self) -> bool {
        use Access::{InPlace, Read};
        !matches!((self, other), (Read, Read | InPlace) | (InPlace, Read))
    }
}

struct Entry {
    ticket: u64,
    range: Range<u64>,
    access: Access,
}

#[derive(Default)]
struct State {
    next_ticket: u64,
    entries: Vec<Entry>,
    waiting: usize,
}

/// The operations in flight. Few at a time, so a list is the fastest structure.
#[derive(Default)]
pub(crate) struct Ranges {
    state: Mutex<State>,
    left: Condvar,
}

/// Leaves the range when dropped.
pub(crate) struct RangeGuard<'a> {
    ranges: &'a Ranges,
    ticket: u64,
}

impl Ranges {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters `range`, after every conflicting operation that came before has left. An operation
    /// holds one guard at a time, so nothing can wait in a circle.
    pub(crate) fn enter(&self, range: Range<u64>, access: Access) -> RangeGuard<'_> {
        let mut state = self.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.entries.push(Entry { ticket, range: range.clone(), access });
        let blocked = |state: &State| {
            state.entries.iter().any(|e| {
                e.ticket < ticket
                    && e.access.conflicts(access)
                    && e.range.start < range.end
                    && range.start < e.range.end
            })
        };
        while blocked(&state) {
            state.waiting += 1;
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        RangeGuard { ranges: self, ticket }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.ranges.lock();
        if let Some(at) = state.entries.iter().position(|e| e.ticket == self.ticket) {
            state.entries.swap_remove(at);
        }
        if state.waiting > 0 {
            self.ranges.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn only_the_pairs_that_cannot_harm_each_other_overlap() {
        use Access::{InPlace, Read, Remap};
        for (a, b, conflict) in [
            (Read, Read, false),
            (Read, InPlace, false),
            (InPlace, InPlace, true),
            (Remap, Read, true),
            (Remap, InPlace, true),
            (Remap, Remap, true),
        ] {
            assert_eq!(a.conflicts(b), conflict, "{a:?} {b:?}");
            assert_eq!(b.conflicts(a), conflict, "{b:?} {a:?}");
        }
    }

    #[test]
    fn remaps_of_one_range_exclude_each_other() {
        let ranges = Ranges::default();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _guard = ranges.enter(10..20, Access::Remap);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }

    #[test]
    fn disjoint_remaps_hold_at_once() {
        let ranges = Ranges::default();
        let _a = ranges.enter(0..10, Access::Remap);
        let _b = ranges.enter(10..20, Access::Remap);
    }
}
