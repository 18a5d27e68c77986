//! What is still to be done, and what a flush has made sure of.

use super::ranges::Ranges;

/// The account of one copy. A range leaves `todo` when nothing can undo it any more.
#[derive(Debug)]
pub(super) struct Ledger {
    /// Everything that is not sure.
    todo: Ranges,
    /// Everything that was ever sent.
    sent: Ranges,
    /// Answered, and not covered by a flush that has begun.
    answered: Ranges,
    /// Bytes of data answered since the last flush began.
    unflushed: u64,
    /// Flushes answered.
    flushes: u64,
}

impl Ledger {
    /// For a copy of `todo`.
    pub(super) fn new(todo: Ranges) -> Self {
        let (sent, answered) = (Ranges::default(), Ranges::default());
        Self { todo, sent, answered, unflushed: 0, flushes: 0 }
    }

    pub(super) fn todo(&self) -> &Ranges {
        &self.todo
    }

    pub(super) fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Where something was sent: from its first byte to its last.
    pub(super) fn sent_bounds(&self) -> Option<(u64, u64)> {
        self.sent.bounds()
    }

    /// The target reads the same there already.
    pub(super) fn skip(&mut self, range: (u64, u64)) {
        self.todo.remove(range);
    }

    /// A request for the range is about to be sent.
    pub(super) fn send(&mut self, range: (u64, u64)) {
        self.sent.insert(range);
    }

    /// A request for the range was answered; `data` bytes went with it.
    pub(super) fn answer(&mut self, range: (u64, u64), data: u64) {
        self.answered.insert(range);
        self.unflushed += data;
    }

    /// Whether `bytes` of data or more wait for a flush.
    pub(super) fn is_due(&self, bytes: u64) -> bool {
        self.unflushed >= bytes
    }

    /// A flush is about to be sent: what it covers.
    pub(super) fn begin_flush(&mut self) -> Ranges {
        self.unflushed = 0;
        std::mem::take(&mut self.answered)
    }

    /// The flush that covers these was answered.
    pub(super) fn end_flush(&mut self, covered: &Ranges) {
        self.todo.remove_all(covered);
        self.flushes += 1;
    }

    /// The connections are gone: what no flush covers may be lost. Where the server can tell what is
    /// `durable`, that is believed instead, of what was sent. What is to be sent is widened to
    /// multiples of `grain`.
    pub(super) fn cut(&mut self, durable: Option<&Ranges>, grain: u64, size: u64) {
        self.answered = Ranges::default();
        self.unflushed = 0;
        if let Some(durable) = durable {
            let mut lost = self.sent.clone();
            lost.remove_all(durable);
            // What was sent and is durable is done, whether or not its flush was answered.
            self.todo.remove_all(&self.sent);
            self.todo.insert_all(&lost);
        }
        self.todo = self.todo.widened(grain, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(of: &[(u64, u64)]) -> Ranges {
        let mut ranges = Ranges::default();
        of.iter().for_each(|range| ranges.insert(*range));
        ranges
    }

    /// Sent 0..60: a flush covers 0..20, 20..40 are answered; 60..70 are skipped.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(ranges(&[(0, 100)]));
        ledger.skip((60, 70));
        ledger.send((0, 60));
        ledger.answer((0, 20), 20);
        assert!(ledger.is_due(20));
        let covered = ledger.begin_flush();
        ledger.answer((20, 40), 20);
        ledger.end_flush(&covered);
        ledger
    }

    #[test]
    fn after_a_cut_everything_since_the_last_flush_is_to_be_sent_again() {
        let mut ledger = ledger();
        ledger.cut(None, 1, 100);
        assert_eq!(*ledger.todo(), ranges(&[(20, 60), (70, 100)]));
        assert!(!ledger.is_due(1));
    }

    #[test]
    fn what_the_server_says_is_durable_is_not_sent_again() {
        let mut ledger = ledger();
        ledger.cut(Some(&ranges(&[(0, 35), (50, 55)])), 1, 100);
        assert_eq!(*ledger.todo(), ranges(&[(35, 50), (55, 60), (70, 100)]));
    }

    #[test]
    fn what_the_server_lost_in_spite_of_a_flush_is_sent_again() {
        let mut ledger = ledger();
        ledger.cut(Some(&ranges(&[(10, 20)])), 1, 100);
        assert_eq!(*ledger.todo(), ranges(&[(0, 10), (20, 60), (70, 100)]));
    }

    #[test]
    fn what_is_durable_but_was_never_sent_by_this_copy_is_sent() {
        let mut ledger = ledger();
        ledger.cut(Some(&ranges(&[(0, 100)])), 1, 100);
        assert_eq!(*ledger.todo(), ranges(&[(70, 100)]));
    }

    #[test]
    fn what_is_left_is_widened_to_the_grain() {
        let mut ledger = ledger();
        ledger.cut(Some(&ranges(&[(0, 35)])), 8, 100);
        assert_eq!(*ledger.todo(), ranges(&[(32, 64), (64, 100)]));
    }
}
