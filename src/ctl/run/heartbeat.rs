//! Signs of life while a backup runs, and looking whether the hub still wants it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use super::stop::Stop;
use crate::capture::{CaptureError, Observer};
use crate::ctl::error::{CtlError, CtlResult, Kind};
use crate::ctl::http::{Api, encode};
use crate::ctl::output::word;
use crate::ctl::progress::Display;
use crate::model::Timestamp;

/// Time between two signs of life. One that fails is made up for by the next.
const EVERY: Duration = Duration::from_secs(3);
/// Time for one.
const ANSWER: Duration = Duration::from_secs(10);

/// How far the backup is, for all threads.
pub(super) struct Pulse {
    display: Display,
    stop: Stop,
    phase: Mutex<String>,
    /// Bytes of the disk that is being copied, and of all that are done with.
    planned: AtomicU64,
    done: AtomicU64,
    sent: AtomicU64,
    /// A cut has been told.
    cut: AtomicBool,
    /// Why the hub wants it no more.
    ended: Mutex<Option<String>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pulse {
    pub(super) fn new(display: Display, stop: Stop) -> Self {
        Self {
            display,
            stop,
            phase: Mutex::new("starting".into()),
            planned: AtomicU64::new(0),
            done: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            cut: AtomicBool::new(false),
            ended: Mutex::default(),
        }
    }

    pub(super) fn display(&self) -> &Display {
        &self.display
    }

    /// What is done from now on.
    pub(super) fn enter(&self, phase: String) {
        *locked(&self.phase) = phase;
        self.planned.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
    }

    /// # Errors
    /// `Interrupted`, or why the hub ended the backup.
    pub(super) fn check(&self) -> CtlResult<()> {
        self.stop.check()?;
        match locked(&self.ended).clone() {
            Some(why) => Err(CtlError::new(Kind::Failed, why, "")),
            None => Ok(()),
        }
    }

    /// Waits, unless there is a reason to end.
    ///
    /// # Errors
    /// Those of [`check`](Self::check).
    pub(super) fn wait(&self, time: Duration) -> CtlResult<()> {
        self.stop.wait(time)?;
        self.check()
    }

    fn show(&self) {
        let planned = self.planned.load(Ordering::Relaxed);
        if planned > 0 {
            let done = self.done.load(Ordering::Relaxed);
            self.display.at(&locked(&self.phase), done, planned);
        }
    }
}

impl Observer for Pulse {
    fn planned(&self, bytes: u64) {
        self.planned.store(bytes, Ordering::Relaxed);
    }

    fn read(&self, _bytes: u64) {}

    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        if self.cut.swap(false, Ordering::Relaxed) {
            self.display.say("the hub is back");
        }
    }

    fn done(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.show();
    }

    fn cut(&self, cause: &CaptureError) {
        if !self.cut.swap(true, Ordering::Relaxed) {
            self.display.say(&format!("{cause}; it is tried again"));
        }
    }

    fn is_cancelled(&self) -> bool {
        self.stop.is_wanted() || locked(&self.ended).is_some()
    }
}

/// Tells the hub now and then that somebody works on the backup, until it is dropped.
pub(super) struct Heartbeat {
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    pub(super) fn start(api: &Api, id: &str, pulse: &Arc<Pulse>) -> CtlResult<Self> {
        let (end, ended) = mpsc::channel::<()>();
        let (api, id, pulse) = (api.clone(), id.to_owned(), Arc::clone(pulse));
        let thread = std::thread::Builder::new().name("heartbeat".into());
        let beat = move || {
            let mut before = (Instant::now(), 0);
            while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                before = beat(&api, &id, &pulse, before);
            }
        };
        let thread = thread
            .spawn(beat)
            .map_err(|e| CtlError::failed(format!("no thread for signs of life: {e}"), ""))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been told; the backup does not need it any more.
            let _ = thread.join();
        }
    }
}

/// One sign of life; the time, and the bytes that were sent until then.
fn beat(api: &Api, id: &str, pulse: &Pulse, before: (Instant, u64)) -> (Instant, u64) {
    let now = Instant::now();
    let sent = pulse.sent.load(Ordering::Relaxed);
    let (done, planned) =
        (pulse.done.load(Ordering::Relaxed), pulse.planned.load(Ordering::Relaxed));
    let millis = u64::try_from(now.duration_since(before.0).as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = sent.saturating_sub(before.1).saturating_mul(1000) / millis;
    let left = planned.saturating_sub(done);
    let telemetry = json!({
        "job_id": id,
        "job_type": "backup",
        "status": "running",
        "current_phase": locked(&pulse.phase).clone(),
        "bytes_transferred": sent,
        "total_bytes": planned,
        "transfer_speed_bps": rate,
        "eta_seconds": left.checked_div(rate).unwrap_or(0),
        "progress_percent": done.min(planned).saturating_mul(100).checked_div(planned).unwrap_or(0),
        "disks": [],
        "timestamp": Timestamp::now(),
    });
    // What the answer is says nothing; the next one follows soon.
    let _ = api.post(&format!("/telemetry/backup/{}", encode(id)), &telemetry, ANSWER);
    pulse.show();
    match api.get(&format!("/backups/{}", encode(id))) {
        Ok(backup) if matches!(backup["status"].as_str(), Some("failed" | "cancelled")) => {
            let (status, error) = (word(&backup, "status"), word(&backup, "error_message"));
            *locked(&pulse.ended) = Some(format!("the backup is {status}: {error}"));
        }
        Err(error) if error.kind == Kind::NotFound => {
            *locked(&pulse.ended) = Some("the backup was deleted".into());
        }
        _ => {}
    }
    (now, sent)
}
