//! An observer of copies that does something in the middle of one.
#![allow(unreachable_pub, dead_code, reason = "each test file uses its part")]

use sendense_hub::capture::{CaptureError, Observer, Progress};

/// What an observer was told just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Sent,
    Done,
    Cut,
}

/// Counts, and calls `act` after it has counted.
pub struct Acting<F> {
    pub progress: Progress,
    act: F,
}

impl<F: Fn(&Progress, Told) + Sync> Acting<F> {
    pub fn new(act: F) -> Self {
        Self { progress: Progress::new(), act }
    }
}

impl<F: Fn(&Progress, Told) + Sync> Observer for Acting<F> {
    fn planned(&self, bytes: u64) {
        self.progress.planned(bytes);
    }

    fn read(&self, bytes: u64) {
        self.progress.read(bytes);
    }

    fn sent(&self, bytes: u64) {
        self.progress.sent(bytes);
        (self.act)(&self.progress, Told::Sent);
    }

    fn done(&self, bytes: u64) {
        self.progress.done(bytes);
        (self.act)(&self.progress, Told::Done);
    }

    fn cut(&self, cause: &CaptureError) {
        self.progress.cut(cause);
        (self.act)(&self.progress, Told::Cut);
    }

    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled()
    }
}
