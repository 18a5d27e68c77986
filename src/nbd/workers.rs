//! The threads of one export that make device calls for large payloads. A disk that hangs holds
//! those of its own export, and nobody else's.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time without work after which a thread ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Threads that wait for a job.
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    added: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads, started as they are needed.
pub(super) struct Workers {
    shared: Arc<Shared>,
    most: usize,
}

impl Workers {
    /// Threads for one export, at most `most` of them.
    pub(super) fn new(most: usize) -> Self {
        Self { shared: Arc::default(), most }
    }

    /// Adds a job; jobs start in order. The queue is bounded by what the callers' memory shares
    /// allow. Where the system gives no thread at all, the caller's does the work.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.lock();
        state.jobs.push_back(Box::new(job));
        if state.jobs.len() > state.idle && state.threads < self.most {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("nbd-io".into()).stack_size(super::STACK);
            match thread.spawn(move || run(&shared)) {
                Ok(_) => state.threads += 1,
                Err(error) => tracing::error!(%error, "no thread for disk I/O"),
            }
        }
        let (idle, threads) = (state.idle, state.threads);
        let alone = if threads == 0 { state.jobs.pop_front() } else { None };
        drop(state);
        if idle > 0 {
            self.shared.added.notify_one();
        }
        if let Some(job) = alone {
            guarded(job);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Jobs hold their export, and with it this: there are none any more.
        self.shared.lock().closed = true;
        self.shared.added.notify_all();
    }
}

fn run(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            guarded(job);
            state = shared.lock();
            continue;
        }
        if state.closed {
            break;
        }
        state.idle += 1;
        let waited = shared.added.wait_timeout(state, IDLE);
        let (after, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        state = after;
        state.idle -= 1;
        if timeout.timed_out() && state.jobs.is_empty() {
            break;
        }
    }
    state.threads -= 1;
}

/// How long small device calls take, as a moving average.
#[derive(Default)]
pub(super) struct Pace(AtomicU64);

impl Pace {
    /// Time in nanoseconds from which on another thread's help is worth its way.
    const SLOW: u64 = 50_000;
    /// One of so many parts of the average is the last call.
    const SHARE: u64 = 8;

    /// Makes a small call and counts its time.
    pub(super) fn measure<T>(&self, call: impl FnOnce() -> T) -> T {
        let since = Instant::now();
        let result = call();
        let took = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // Lost updates do not matter.
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before - before / Self::SHARE + took / Self::SHARE, Ordering::Relaxed);
        result
    }

    /// Whether small calls wait for the disk.
    pub(super) fn is_slow(&self) -> bool {
        self.0.load(Ordering::Relaxed) > Self::SLOW
    }
}

/// A defect in one request must not take the thread from all others.
fn guarded(job: Job) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        tracing::error!("a device call panicked; this is a defect of the hub, please report it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    #[test]
    fn every_job_is_done_by_no_more_threads_than_allowed() {
        let workers = Workers::new(3);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (done, all) = mpsc::channel();
        for number in 0..100 {
            let (running, most, done) = (Arc::clone(&running), Arc::clone(&most), done.clone());
            workers.submit(move || {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::yield_now();
                running.fetch_sub(1, Ordering::SeqCst);
                done.send(number).unwrap();
            });
        }
        let mut numbers: Vec<i32> = all.iter().take(100).collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..100));
        assert!((1..=3).contains(&most.load(Ordering::SeqCst)));
    }

    #[test]
    fn a_disk_that_lets_calls_wait_is_slow_until_it_does_not() {
        let pace = Pace::default();
        assert!(!pace.is_slow());
        for _ in 0..4 {
            pace.measure(|| std::thread::sleep(Duration::from_millis(1)));
        }
        assert!(pace.is_slow());
        // A busy machine lets even a call that does nothing wait now and then.
        assert!((0..10_000).any(|_| {
            pace.measure(|| ());
            !pace.is_slow()
        }));
    }

    #[test]
    fn a_job_that_panics_takes_no_thread_with_it() {
        let workers = Workers::new(1);
        workers.submit(|| panic!("as the test wants"));
        let (done, result) = mpsc::channel();
        workers.submit(move || done.send(7).unwrap());
        assert_eq!(result.recv().unwrap(), 7);
    }
}
