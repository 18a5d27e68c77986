//! What an export did: bytes and requests by kind, errors, latency.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// Buckets of the latency histogram: bucket *n* counts requests that took below 2^*n* microseconds.
const BUCKETS: usize = 32;

/// Kinds of requests that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`
    Write,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_WRITE_ZEROES`
    Zero,
    /// `NBD_CMD_BLOCK_STATUS`
    Status,
    /// `NBD_CMD_CACHE`
    Cache,
}

/// Number of kinds.
const KINDS: usize = 7;

/// Counters of one export or one connection; updated without locks.
#[derive(Debug)]
pub struct Stats {
    requests: [AtomicU64; KINDS],
    bytes: [AtomicU64; KINDS],
    errors: AtomicU64,
    latency: [AtomicU64; BUCKETS],
    /// Time of all requests, in microseconds.
    total_latency: AtomicU64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            requests: std::array::from_fn(|_| AtomicU64::new(0)),
            bytes: std::array::from_fn(|_| AtomicU64::new(0)),
            errors: AtomicU64::new(0),
            latency: std::array::from_fn(|_| AtomicU64::new(0)),
            total_latency: AtomicU64::new(0),
        }
    }
}

/// A moment's view of [`Stats`].
#[derive(Debug, Clone, Default, Serialize)]
pub struct Snapshot {
    /// Requests answered, by kind.
    pub reads: u64,
    /// As above.
    pub writes: u64,
    /// As above.
    pub flushes: u64,
    /// As above.
    pub trims: u64,
    /// As above.
    pub zeroes: u64,
    /// As above.
    pub block_status: u64,
    /// As above.
    pub caches: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes zeroed.
    pub bytes_zeroed: u64,
    /// Bytes trimmed.
    pub bytes_trimmed: u64,
    /// Requests answered with an error, of any kind.
    pub errors: u64,
    /// Half of the requests took less, in microseconds (a power of two).
    pub latency_p50_us: u64,
    /// 99 of 100 requests took less, in microseconds (a power of two).
    pub latency_p99_us: u64,
}

impl Stats {
    /// Counts one answered request.
    pub fn record(&self, kind: Kind, bytes: u64, ok: bool, took: Duration) {
        self.requests[kind as usize].fetch_add(1, Ordering::Relaxed);
        if ok {
            self.bytes[kind as usize].fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.total_latency.fetch_add(micros, Ordering::Relaxed);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.latency[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request that was refused before it had a kind.
    pub fn record_refusal(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let requests = |kind: Kind| self.requests[kind as usize].load(Ordering::Relaxed);
        let bytes = |kind: Kind| self.bytes[kind as usize].load(Ordering::Relaxed);
        Snapshot {
            reads: requests(Kind::Read),
            writes: requests(Kind::Write),
            flushes: requests(Kind::Flush),
            trims: requests(Kind::Trim),
            zeroes: requests(Kind::Zero),
            block_status: requests(Kind::Status),
            caches: requests(Kind::Cache),
            bytes_read: bytes(Kind::Read),
            bytes_written: bytes(Kind::Write),
            bytes_zeroed: bytes(Kind::Zero),
            bytes_trimmed: bytes(Kind::Trim),
            errors: self.errors.load(Ordering::Relaxed),
            latency_p50_us: self.quantile(50),
            latency_p99_us: self.quantile(99),
        }
    }

    /// Requests that took up to so many seconds, for growing bounds, and the time of all.
    pub fn latency_histogram(&self) -> (Vec<(f64, u64)>, f64) {
        const MICRO: f64 = 1e-6;
        let mut count = 0;
        let buckets = self.latency.iter().zip(0_i32..).map(|(bucket, power)| {
            count += bucket.load(Ordering::Relaxed);
            (2_f64.powi(power) * MICRO, count)
        });
        #[allow(clippy::cast_precision_loss, reason = "a sum of times")]
        let total = self.total_latency.load(Ordering::Relaxed) as f64 * MICRO;
        (buckets.collect(), total)
    }

    fn quantile(&self, percent: u64) -> u64 {
        let counts: Vec<u64> = self.latency.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let mut seen = 0;
        for (bucket, count) in counts.iter().enumerate() {
            seen += count;
            if total > 0 && seen * 100 >= total * percent {
                return 1 << bucket;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_upper_bounds_of_their_buckets() {
        let stats = Stats::default();
        for _ in 0..98 {
            stats.record(Kind::Read, 4096, true, Duration::from_micros(10));
        }
        for _ in 0..2 {
            stats.record(Kind::Write, 512, false, Duration::from_millis(3));
        }
        let snapshot = stats.snapshot();
        assert_eq!((snapshot.latency_p50_us, snapshot.latency_p99_us), (16, 4096));
        assert_eq!((snapshot.reads, snapshot.writes, snapshot.errors), (98, 2, 2));
        assert_eq!((snapshot.bytes_read, snapshot.bytes_written), (98 * 4096, 0));
    }
}
