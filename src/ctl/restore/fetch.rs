//! Reading a restore point over several connections, and comparing each cluster with its checksum
//! on the way.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::sink::Sink;
use crate::capture::CLUSTER;
use crate::checksum::{Checksum, LENGTH};
use crate::ctl::error::{CtlError, CtlResult};
use crate::ctl::output::Output;
use crate::ctl::progress::Display;
use crate::nbd::client::{Client, ClientOptions};

/// Bytes of a request: whole clusters.
const REQUEST: u64 = 2 << 20;

/// Bytes of a cluster.
#[allow(clippy::cast_possible_truncation, reason = "64 KiB")]
const STEP: usize = CLUSTER as usize;

/// What is read.
pub(super) struct Fetch {
    /// Where the hub serves NBD.
    pub(super) address: String,
    /// Name of the export.
    pub(super) export: String,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Checksums by cluster, encoded; zeroes for what reads as zeroes.
    pub(super) sums: Vec<[u8; LENGTH]>,
    /// Connections at a time.
    pub(super) connections: usize,
}

impl Fetch {
    /// Reads everything into `sink`; bytes of data that were read.
    pub(super) fn run(&self, sink: &Sink, out: Output) -> CtlResult<u64> {
        let progress = Display::new(out);
        let (next, data, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let failed = AtomicBool::new(false);
        let work = || -> CtlResult<()> {
            let options = ClientOptions::new(&self.export);
            let mut client = Client::connect_tcp(&self.address, &options).map_err(|e| {
                let next = "say where the hub serves NBD: --nbd HOST:PORT";
                CtlError::failed(format!("cannot read from {}: {e}", self.address), next)
            })?;
            while !failed.load(Ordering::Relaxed) {
                let offset = next.fetch_add(REQUEST, Ordering::Relaxed);
                if offset >= self.size {
                    break;
                }
                let length = REQUEST.min(self.size - offset);
                data.fetch_add(self.part(&mut client, sink, offset, length)?, Ordering::Relaxed);
                let now = done.fetch_add(length, Ordering::Relaxed) + length;
                if !sink.is_stream() {
                    progress.at("restoring", now, self.size);
                }
            }
            Ok(())
        };
        let guarded = || {
            let result = work();
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            result
        };
        let result = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.connections).map(|_| scope.spawn(guarded)).collect();
            let mut result = Ok(());
            for thread in threads {
                let ended = thread.join().unwrap_or_else(|_| {
                    Err(CtlError::failed("a connection's thread failed", "please report this"))
                });
                result = result.and(ended);
            }
            result
        });
        progress.end();
        result?;
        let unfinished = |e| CtlError::failed(format!("cannot finish the restored disk: {e}"), "");
        sink.finish().map_err(unfinished)?;
        Ok(data.into_inner())
    }

    /// Moves one part; bytes of data in it.
    fn part(&self, client: &mut Client, sink: &Sink, offset: u64, length: u64) -> CtlResult<u64> {
        let first = usize::try_from(offset / CLUSTER).unwrap_or(usize::MAX);
        let count = usize::try_from(length.div_ceil(CLUSTER)).unwrap_or(usize::MAX);
        let sums = self.sums.get(first..first + count).unwrap_or(&[]);
        let empty = sums.len() == count && sums.iter().all(|sum| *sum == [0; LENGTH]);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        if !empty {
            client.read(&mut bytes, offset).map_err(|e| {
                CtlError::failed(format!("cannot read byte {offset}: {e}"), "verify the backup")
            })?;
        }
        let data = verify(&bytes, offset, sums)?;
        let write = |from: usize, to: usize| {
            let at = offset + from as u64;
            sink.write(&bytes[from..to], at).map_err(|e| {
                CtlError::failed(format!("cannot write the restored disk at byte {at}: {e}"), "")
            })
        };
        if !sink.is_zero() {
            write(0, bytes.len())?;
            return Ok(data);
        }
        let mut from = None;
        for (index, sum) in sums.iter().enumerate() {
            match (from, *sum == [0; LENGTH]) {
                (None, false) => from = Some(index * STEP),
                (Some(start), true) => {
                    write(start, index * STEP)?;
                    from = None;
                }
                _ => {}
            }
        }
        if let Some(start) = from {
            write(start, bytes.len())?;
        }
        Ok(data)
    }
}

/// Compares bytes of the disk from `offset` on with their checksums; how many are not zeroes.
fn verify(bytes: &[u8], offset: u64, sums: &[[u8; LENGTH]]) -> CtlResult<u64> {
    let mut data = 0;
    for ((sum, part), at) in sums.iter().zip(bytes.chunks(STEP)).zip(offset / CLUSTER..) {
        let same = match Checksum::decode(*sum) {
            None => part.iter().all(|byte| *byte == 0),
            Some(sum) => {
                data += part.len() as u64;
                Checksum::of(part) == sum
            }
        };
        if !same {
            let cause = format!("the data at byte {} is not what was backed up", at * CLUSTER);
            return Err(CtlError::failed(cause, "restore from another restore point"));
        }
    }
    Ok(data)
}
