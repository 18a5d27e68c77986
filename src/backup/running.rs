//! What goes with a backup that runs in this process.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::callbacks::Telemetry;
use super::receive::ReceivingDevice;
use crate::catalog::Backup;
use crate::model::Timestamp;
use crate::nbd::exports::Export;

/// Time over which rates are taken.
const RATE_OVER: Duration = Duration::from_secs(10);
/// Most samples that are kept for that.
const SAMPLES: usize = 32;

/// One disk that is being received.
pub(super) struct RunningDisk {
    pub(super) disk_id: u32,
    pub(super) export: Arc<Export>,
    pub(super) device: Arc<ReceivingDevice>,
}

#[derive(Default)]
struct Signs {
    /// When something moved last.
    moved: Option<Instant>,
    /// What the counters were then.
    counted: u64,
    telemetry: Option<(Telemetry, Timestamp)>,
    polled: Option<Instant>,
    /// Since when a disk that has begun has had no connection.
    alone: Option<Instant>,
    samples: VecDeque<(Instant, u64)>,
}

/// A backup with its open images.
pub(super) struct Running {
    pub(super) id: String,
    pub(super) vm_name: String,
    pub(super) agent: String,
    pub(super) disks: Vec<RunningDisk>,
    /// Whoever changes its state, or that of a disk, holds this.
    turn: Mutex<()>,
    signs: Mutex<Signs>,
    persisted: AtomicU64,
}

/// How far a backup is, by the hub's counters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// Bytes of data that came in.
    pub bytes_transferred: u64,
    /// Bytes that were not stored because the chain has them.
    pub bytes_unchanged: u64,
    /// Bytes of the disks.
    pub total_bytes: u64,
    /// Bytes per second over the last seconds.
    pub rate: u64,
    /// From 0 to 100: of the disks' bytes for a full, of the disks finished for an
    /// incremental.
    pub percent: f64,
    /// Seconds until the end at this rate, for a full.
    pub eta_seconds: Option<u64>,
    /// What the agent said last.
    pub agent_phase: Option<String>,
    /// When the agent said something last.
    pub last_telemetry_at: Option<Timestamp>,
}

impl Running {
    pub(super) fn new(backup: &Backup, disks: Vec<RunningDisk>) -> Self {
        let moved = Some(Instant::now());
        Self {
            id: backup.id.clone(),
            vm_name: backup.vm_name.clone(),
            agent: backup.agent.clone(),
            disks,
            turn: Mutex::new(()),
            signs: Mutex::new(Signs { moved, polled: moved, ..Signs::default() }),
            persisted: AtomicU64::new(u64::MAX),
        }
    }

    /// Waits for the right to change this backup.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signs(&self) -> MutexGuard<'_, Signs> {
        self.signs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn disk(&self, number: u32) -> Option<&RunningDisk> {
        self.disks.iter().find(|disk| disk.disk_id == number)
    }

    /// A sign of life that is none of the counters.
    pub(super) fn lives(&self) {
        self.signs().moved = Some(Instant::now());
    }

    pub(super) fn telemetry(&self, telemetry: Telemetry) {
        let mut signs = self.signs();
        signs.moved = Some(Instant::now());
        signs.telemetry = Some((telemetry, Timestamp::now()));
    }

    fn bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.device.bytes_written()).sum()
    }

    /// Bytes of each disk, where they have changed since this was asked last.
    pub(super) fn changed_counters(&self) -> Option<Vec<(u32, u64)>> {
        let covered = self.disks.iter().map(|disk| disk.device.bytes_covered()).sum();
        (self.persisted.swap(covered, Ordering::Relaxed) != covered).then(|| {
            self.disks.iter().map(|disk| (disk.disk_id, disk.device.bytes_written())).collect()
        })
    }

    pub(super) fn last_telemetry(&self) -> Option<(Telemetry, Timestamp)> {
        self.signs().telemetry.clone()
    }

    /// Looks at the counters; time since something moved last.
    pub(super) fn observe(&self) -> Duration {
        let now = Instant::now();
        let covered: u64 = self.disks.iter().map(|disk| disk.device.bytes_covered()).sum();
        let bytes = self.bytes();
        let mut signs = self.signs();
        if signs.counted != covered {
            signs.counted = covered;
            signs.moved = Some(now);
        }
        signs.samples.push_back((now, bytes));
        while signs.samples.len() > SAMPLES
            || signs.samples.front().is_some_and(|(at, _)| now - *at > RATE_OVER)
        {
            signs.samples.pop_front();
        }
        signs.moved.map_or(Duration::ZERO, |at| now - at)
    }

    /// Whether it is time to ask for the agent again.
    pub(super) fn poll_due(&self, every: Duration) -> bool {
        let mut signs = self.signs();
        let due = signs.polled.is_none_or(|at| at.elapsed() >= every);
        if due {
            signs.polled = Some(Instant::now());
        }
        due
    }

    /// For how long a disk that has begun and is not finished has had no connection.
    pub(super) fn alone_for(&self, unfinished: &[u32]) -> Option<Duration> {
        let deserted = self.disks.iter().any(|disk| {
            unfinished.contains(&disk.disk_id)
                && disk.device.has_begun()
                && disk.export.connections().0 == 0
        });
        let mut signs = self.signs();
        if !deserted {
            signs.alone = None;
            return None;
        }
        Some(signs.alone.get_or_insert_with(Instant::now).elapsed())
    }

    /// How far it is, beside the disks that were finished before: `before` bytes of `total`.
    /// `full` tells whether all bytes of the disks are expected.
    pub(super) fn progress(&self, full: bool, (before, total): (u64, u64)) -> Progress {
        let covered: u64 = self.disks.iter().map(|disk| disk.device.bytes_covered()).sum();
        let signs = self.signs();
        let rate = match (signs.samples.front(), signs.samples.back()) {
            (Some((from, before)), Some((to, after))) if to > from => {
                let millis = (*to - *from).as_millis().max(1);
                u64::try_from(u128::from(after.saturating_sub(*before)) * 1000 / millis)
                    .unwrap_or(u64::MAX)
            }
            _ => 0,
        };
        let covered = before + if full { covered } else { 0 };
        #[allow(clippy::cast_precision_loss, reason = "a percentage")]
        let percent = (covered as f64 * 100.0 / total.max(1) as f64).min(100.0);
        let left = total.saturating_sub(covered);
        Progress {
            bytes_transferred: self.bytes(),
            bytes_unchanged: self.disks.iter().map(|disk| disk.device.bytes_unchanged()).sum(),
            total_bytes: total,
            rate,
            percent,
            eta_seconds: (full && rate > 0).then(|| left / rate),
            agent_phase: signs.telemetry.as_ref().map(|(told, _)| told.current_phase.clone()),
            last_telemetry_at: signs.telemetry.as_ref().map(|(_, at)| *at),
        }
    }
}
