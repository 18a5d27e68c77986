//! What changed on the disk, as changed-block tracking would tell; and reading a backup back.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::disk::read_block;
use crate::nbd::client::{Client, ClientOptions};

/// Granularity of changed-block tracking, in bytes.
const BLOCK: usize = 64 << 10;
/// Longest request, in bytes.
const REQUEST: u64 = 4 << 20;
/// Connections at a time.
const CONNECTIONS: usize = 2;

/// Ranges of the disk: (offset, length), in order.
pub(super) type Extents = Vec<(u64, u64)>;

fn push(extents: &mut Extents, offset: u64, length: u64) {
    match extents.last_mut() {
        Some((start, last)) if *start + *last == offset && *last + length <= REQUEST => {
            *last += length;
        }
        _ => extents.push((offset, length)),
    }
}

fn select(path: &Path, mut wanted: impl FnMut(&[u8]) -> io::Result<bool>) -> io::Result<Extents> {
    let mut file = File::open(path)?;
    let mut extents = Vec::new();
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    loop {
        let length = read_block(&mut file, &mut block)?;
        if length == 0 {
            return Ok(extents);
        }
        if wanted(&block[..length])? {
            push(&mut extents, at, length as u64);
        }
        at += length as u64;
    }
}

/// The blocks that differ from an earlier copy: what changed-block tracking would tell.
pub(super) fn changed_blocks(before: &Path, disk: &Path) -> io::Result<Extents> {
    let mut earlier = File::open(before)?;
    let mut other = vec![0; BLOCK];
    select(disk, |block| {
        let length = read_block(&mut earlier, &mut other)?;
        Ok(other[..length] != *block)
    })
}

/// Reads the whole export and compares it with `disk`; the first byte that differs.
pub(super) fn read_back(address: SocketAddr, export: &str, disk: &Path) -> io::Result<Option<u64>> {
    let file = File::open(disk)?;
    let size = file.metadata()?.len();
    let first = AtomicU64::new(u64::MAX);
    let requests = usize::try_from(size.div_ceil(REQUEST)).unwrap_or(usize::MAX);
    parallel(address, export, requests, |client, number| {
        let offset = number as u64 * REQUEST;
        let length = usize::try_from(REQUEST.min(size - offset)).unwrap_or(usize::MAX);
        let (mut stored, mut bytes) = (vec![0; length], vec![0; length]);
        client.read(&mut stored, offset).map_err(io::Error::other)?;
        file.read_exact_at(&mut bytes, offset)?;
        if let Some(index) = stored.iter().zip(&bytes).position(|(a, b)| a != b) {
            first.fetch_min(offset + index as u64, Ordering::Relaxed);
        }
        Ok(())
    })?;
    let first = first.into_inner();
    Ok((first != u64::MAX).then_some(first))
}

/// Calls `work` with the numbers below `count` on several connections.
fn parallel(
    address: SocketAddr,
    export: &str,
    count: usize,
    work: impl Fn(&mut Client, usize) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let connection = || -> io::Result<()> {
        let options = ClientOptions::new(export);
        let mut client =
            Client::connect_tcp(&address.to_string(), &options).map_err(io::Error::other)?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return client.disconnect().map_err(io::Error::other);
            }
            work(&mut client, number)?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(connection)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a connection's thread failed")))
        })
    })
}
