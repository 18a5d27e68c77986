//! A bounded pool of threads for device calls on large payloads, shared by all connections.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    added: Condvar,
}

/// The pool. Dropping it waits for every job.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start(count: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let threads = (0..count)
            .map(|number| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("nbd-io-{number}"))
                    .spawn(move || run(&shared))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Adds a job; jobs start in order. The queue is bounded by what the callers' memory shares
    /// allow.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.jobs.push_back(Box::new(job));
        drop(queue);
        self.shared.added.notify_one();
    }
}

fn run(shared: &Shared) {
    loop {
        let job = {
            let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.closed {
                    return;
                }
                queue = shared.added.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        };
        // A defect in one request must not take the thread from all others.
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!(
                "a device call panicked; this is a defect of the hub, please report it"
            );
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.added.notify_all();
        // The last owner may be a job.
        let own = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != own) {
            let _ = thread.join();
        }
    }
}
