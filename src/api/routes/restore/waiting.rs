//! Whether somebody still waits for an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Says that nobody waits any more, once it is dropped.
pub(super) struct Waiting(Arc<AtomicBool>);

impl Waiting {
    /// What the request holds, and what its work asks.
    pub(super) fn new() -> (Self, impl Fn() -> bool + Send + 'static) {
        let gone = Arc::new(AtomicBool::new(false));
        let waiting = Self(Arc::clone(&gone));
        (waiting, move || !gone.load(Ordering::Relaxed))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_once_the_request_is_gone() {
        let (waiting, go_on) = Waiting::new();
        assert!(go_on());
        drop(waiting);
        assert!(!go_on());
    }
}
