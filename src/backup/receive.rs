//! The image of a disk while it is being received.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use qcow2::Repair;

use super::received::Received;
use crate::block::{
    BlockDevice, BlockError, BlockErrorKind, BlockResult, DeviceInfo, Extent, ZeroOptions,
};
use crate::checksum::Checksum;
use crate::export::Qcow2Device;
use crate::pages::PageBuffer;
use crate::repository::{Checksums, DiskFiles, RepositoryError, complete_checksums};

/// Range of the disk that is changed by one thread at a time, in bytes: data and checksum of a
/// cluster must tell of the same write.
const BLOCK: u64 = 1 << 20;
/// Locks for such ranges.
const LOCKS: usize = 1024;

/// What a sealed image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) root_hash: String,
    pub(super) stored_bytes: u64,
    pub(super) file_bytes: u64,
    pub(super) cluster_size: u32,
}

/// A block device over an unfinished image. It computes checksums as data arrives, does not store
/// what the chain below has already, counts, and takes no more writes once it is sealed.
pub(super) struct ReceivingDevice {
    info: DeviceInfo,
    cluster: u64,
    inner: Qcow2Device,
    files: DiskFiles,
    sums: Checksums,
    received: Received,
    /// Compare with the chain before storing.
    skip_unchanged: bool,
    /// Whether the image takes no more writes. Held shared by each change.
    sealed: RwLock<bool>,
    /// Held shared by writes, and alone by what changes long ranges.
    order: RwLock<()>,
    locks: Vec<Mutex<()>>,
    bytes_written: AtomicU64,
    bytes_zeroed: AtomicU64,
    bytes_unchanged: AtomicU64,
    failure: Mutex<Option<String>>,
}

fn sums_failed(error: &std::io::Error) -> BlockError {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    let kind = match error.kind() {
        StorageFull | QuotaExceeded => BlockErrorKind::NoSpace,
        _ => BlockErrorKind::Io,
    };
    BlockError::new(kind, format!("cannot keep the checksums: {error}"))
}

impl ReceivingDevice {
    /// Opens the unfinished image of `files`. Where the image was received into before, what is
    /// durable is known, and all checksums are computed again when it is sealed.
    pub(super) fn open(files: DiskFiles, skip_unchanged: bool) -> BlockResult<Self> {
        let failed = |e: RepositoryError| {
            let kind = if e.is_no_space() { BlockErrorKind::NoSpace } else { BlockErrorKind::Io };
            BlockError::new(kind, e.to_string())
        };
        let path = DiskFiles::partial(&files.image());
        let received = Received::open(&files.durable()).map_err(|e| sums_failed(&e))?;
        if received.has_begun() {
            // What was allocated and not mapped when the hub was killed is free again.
            let report = qcow2::check(&path, Repair::Leaks)
                .map_err(|e| BlockError::new(BlockErrorKind::Io, e.to_string()))?;
            if report.corruptions > 0 {
                let text = format!("the image is corrupt: {:?}", report.findings.first());
                return Err(BlockError::new(BlockErrorKind::Io, text));
            }
        }
        let inner = Qcow2Device::open(&path, false)?;
        let cluster = inner.image().cluster_size();
        let size = inner.info().size;
        let sums = Checksums::create(&DiskFiles::partial(&files.checksums()), size, cluster)
            .map_err(failed)?;
        let received =
            received.load(size.div_ceil(u64::from(cluster))).map_err(|e| sums_failed(&e))?;
        let info = DeviceInfo { tells_durable: true, ..inner.info().clone() };
        Ok(Self {
            cluster: u64::from(cluster),
            skip_unchanged: skip_unchanged && inner.image().has_backing(),
            info,
            inner,
            files,
            sums,
            received,
            sealed: RwLock::new(false),
            order: RwLock::new(()),
            locks: (0..LOCKS).map(|_| Mutex::new(())).collect(),
            bytes_written: AtomicU64::new(0),
            bytes_zeroed: AtomicU64::new(0),
            bytes_unchanged: AtomicU64::new(0),
            failure: Mutex::new(None),
        })
    }

    /// Whether anything was ever written, in this process or before.
    pub(super) fn has_begun(&self) -> bool {
        self.received.has_begun()
    }

    /// Bytes of data that came in.
    pub(super) fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    /// Bytes of the disk that came in, as data or as zeroes.
    pub(super) fn bytes_covered(&self) -> u64 {
        self.bytes_written() + self.bytes_zeroed.load(Ordering::Relaxed)
    }

    /// Bytes that came in and were not stored because the chain has them.
    pub(super) fn bytes_unchanged(&self) -> u64 {
        self.bytes_unchanged.load(Ordering::Relaxed)
    }

    /// The last failure of a write, in words.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Refuses changes from now on, waits for those that are under way, and brings image and
    /// checksums to disk. Repeating it gives the error again, or the same answer.
    pub(super) fn seal(&self) -> Result<Sealed, RepositoryError> {
        self.refuse_changes();
        let image = self.inner.image();
        let partial = DiskFiles::partial(&self.files.image());
        image.flush()?;
        complete_checksums(image, &self.sums, &DiskFiles::partial(&self.files.checksums()))?;
        self.sums.sync()?;
        let (root_hash, stored) = self.sums.root_hash()?;
        image.close()?;
        let meta = std::fs::metadata(&partial).map_err(|source| RepositoryError::Io {
            what: "cannot read",
            path: partial,
            source,
        })?;
        Ok(Sealed {
            root_hash,
            stored_bytes: stored * self.cluster,
            file_bytes: meta.len(),
            cluster_size: self.info.preferred_block,
        })
    }

    /// Refuses changes from now on, and waits for those that are under way.
    pub(super) fn refuse_changes(&self) {
        *self.sealed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// The image while it is being received.
    pub(super) fn path(&self) -> PathBuf {
        DiskFiles::partial(&self.files.image())
    }

    fn enter(&self) -> BlockResult<RwLockReadGuard<'_, bool>> {
        let sealed = self.sealed.read().unwrap_or_else(PoisonError::into_inner);
        if *sealed {
            let text = "this disk of the backup is complete and takes no more writes";
            return Err(BlockError::new(BlockErrorKind::Closing, text));
        }
        self.received.begin().map_err(|e| sums_failed(&e))?;
        Ok(sealed)
    }

    fn lock(&self, block: u64) -> MutexGuard<'_, ()> {
        #[allow(clippy::cast_possible_truncation, reason = "a remainder")]
        let index = (block % LOCKS as u64) as usize;
        self.locks[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note<T>(&self, result: BlockResult<T>) -> BlockResult<T> {
        if let Err(error) = &result {
            let text = error.to_string();
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        }
        result
    }

    /// Stores a part of one block, whose lock is held.
    fn store(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        if !self.skip_unchanged {
            return self.store_changed(buf, offset);
        }
        let mut below = PageBuffer::new(offset, buf.len());
        self.inner.read(&mut below, offset)?;
        // Runs of clusters that differ.
        let mut from = None;
        let mut at = 0;
        while at < buf.len() {
            let in_cluster = (offset + at as u64) % self.cluster;
            let step = usize::try_from(self.cluster - in_cluster).unwrap_or(usize::MAX);
            let end = at.saturating_add(step).min(buf.len());
            if buf[at..end] == below[at..end] {
                self.bytes_unchanged.fetch_add((end - at) as u64, Ordering::Relaxed);
                if let Some(from) = from.take() {
                    self.store_changed(&buf[from..at], offset + from as u64)?;
                }
            } else {
                from.get_or_insert(at);
            }
            at = end;
        }
        match from {
            Some(from) => self.store_changed(&buf[from..], offset + from as u64),
            None => Ok(()),
        }
    }

    fn store_changed(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        let end = offset + buf.len() as u64;
        let (first, last) = (offset / self.cluster, end.div_ceil(self.cluster));
        let whole = self.whole(offset, end);
        // Should the write fail half way, no checksum tells of what is not there.
        if whole != (first, last) {
            self.sums.clear(first, last).map_err(|e| sums_failed(&e))?;
        }
        if let Err(error) = self.inner.write(buf, offset) {
            self.sums.clear(first, last).map_err(|e| sums_failed(&e))?;
            return Err(error);
        }
        if whole.0 < whole.1 {
            let skip = usize::try_from(whole.0 * self.cluster - offset).unwrap_or(usize::MAX);
            let length = usize::try_from(self.cluster).unwrap_or(usize::MAX);
            let count = usize::try_from(whole.1 - whole.0).unwrap_or(usize::MAX);
            let sums: Vec<Checksum> =
                buf[skip..].chunks(length).take(count).map(Checksum::of).collect();
            self.sums.set(whole.0, &sums).map_err(|e| sums_failed(&e))?;
        }
        Ok(())
    }

    /// The clusters that `offset .. end` covers whole; the disk's last one ends with the disk.
    fn whole(&self, offset: u64, end: u64) -> (u64, u64) {
        let from = offset.div_ceil(self.cluster);
        let to =
            if end == self.info.size { end.div_ceil(self.cluster) } else { end / self.cluster };
        (from, to.max(from))
    }

    /// Changes a range that may be long, while nobody writes.
    fn change_range(
        &self,
        offset: u64,
        length: u64,
        change: impl FnOnce() -> BlockResult<()>,
    ) -> BlockResult<()> {
        let _open = self.enter()?;
        let _alone = self.order.write().unwrap_or_else(PoisonError::into_inner);
        let end = offset + length;
        self.sums
            .clear(offset / self.cluster, end.div_ceil(self.cluster))
            .map_err(|e| sums_failed(&e))?;
        change()?;
        let (from, to) = self.whole(offset, end);
        self.received.note(from, to);
        self.bytes_zeroed.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }
}

impl BlockDevice for ReceivingDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        self.inner.read(buf, offset)
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        let _open = self.enter()?;
        let _shared = self.order.read().unwrap_or_else(PoisonError::into_inner);
        let end = offset + buf.len() as u64;
        let mut rest = buf;
        let mut at = offset;
        while at < end {
            let to = ((at / BLOCK + 1) * BLOCK).min(end);
            #[allow(clippy::cast_possible_truncation, reason = "at most BLOCK")]
            let (part, tail) = rest.split_at((to - at) as usize);
            let _lock = self.lock(at / BLOCK);
            self.note(self.store(part, at))?;
            (rest, at) = (tail, to);
        }
        let (from, to) = self.whole(offset, end);
        self.received.note(from, to);
        self.bytes_written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        // Data on its way to the disk is never an excuse to allocate it.
        let options = ZeroOptions { no_hole: false, ..options };
        let change = || self.inner.write_zeroes(offset, length, options);
        self.note(self.change_range(offset, length, change))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        let change = || self.inner.discard(offset, length);
        self.note(self.change_range(offset, length, change))
    }

    fn flush(&self) -> BlockResult<()> {
        let came = self.received.snapshot();
        self.note(self.inner.flush())?;
        self.received.settle(&came).map_err(|e| sums_failed(&e))
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.inner.cache(offset, length)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        self.inner.extents(offset, length, visit)
    }

    fn durable(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(u64, u64, bool) -> bool,
    ) -> BlockResult<()> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let durable = self.received.is_durable(at / self.cluster);
            let mut to = at;
            while to < end && self.received.is_durable(to / self.cluster) == durable {
                to = ((to / self.cluster + 1) * self.cluster).min(end);
            }
            if !visit(at, to - at, durable) {
                break;
            }
            at = to;
        }
        Ok(())
    }

    fn close(&self) -> BlockResult<()> {
        self.refuse_changes();
        self.inner.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::{Root, verify_image};
    use qcow2::{BackingFormat, CreateOptions};

    const SIZE: u64 = (4 << 20) + 512;

    fn receive(directory: &std::path::Path, backup: &str, parent: Option<&str>) -> ReceivingDevice {
        let root = Root::new(directory);
        let files = root.files("ctx", 0, backup);
        std::fs::create_dir_all(&files.directory).unwrap();
        let mut options = CreateOptions::new(SIZE);
        if let Some(parent) = parent {
            let name = root.files("ctx", 0, parent).image_name();
            options = options.backing(name, BackingFormat::Qcow2);
        }
        qcow2::create(&DiskFiles::partial(&files.image()), &options).unwrap();
        ReceivingDevice::open(files, true).unwrap()
    }

    fn bytes(length: u64, seed: u64) -> Vec<u8> {
        let byte = |i: u64| i.wrapping_mul(0x9e37_79b9).wrapping_add(seed).to_le_bytes()[1];
        (0..length).map(byte).collect()
    }

    fn verify(device: &ReceivingDevice) -> u64 {
        let sums = Checksums::open(&DiskFiles::partial(&device.files.checksums())).unwrap();
        verify_image(&device.path(), &sums).unwrap()
    }

    #[test]
    fn every_stored_cluster_has_its_checksum_however_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let full = receive(dir.path(), "full", None);
        full.write(&bytes(3 << 20, 1), 512).unwrap();
        full.write(&bytes(1000, 2), 70_000).unwrap();
        full.write_zeroes(1 << 20, 300_000, ZeroOptions::default()).unwrap();
        full.write(&bytes(512, 3), SIZE - 512).unwrap();
        let sealed = full.seal().unwrap();
        assert_eq!(sealed.stored_bytes, verify(&full));
        assert!(sealed.stored_bytes > 2 << 20);
        let name = full.files.image();
        std::fs::rename(DiskFiles::partial(&name), name).unwrap();

        let incremental = receive(dir.path(), "incremental", Some("full"));
        let mut same = vec![0; 3 << 20];
        incremental.read(&mut same, 0).unwrap();
        same[200_000] ^= 1;
        incremental.write(&same, 0).unwrap();
        assert_eq!(incremental.bytes_unchanged(), (3 << 20) - 65536);
        let sealed = incremental.seal().unwrap();
        assert_eq!((sealed.stored_bytes, verify(&incremental)), (65536, 65536));
    }

    #[test]
    fn a_sealed_image_takes_no_more_writes_and_sealing_can_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let device = receive(dir.path(), "full", None);
        device.write(&bytes(65536, 1), 0).unwrap();
        let first = device.seal().unwrap();
        for result in [
            device.write(&[1], 0),
            device.write_zeroes(0, 512, ZeroOptions::default()),
            device.discard(0, 65536),
        ] {
            assert_eq!(result.unwrap_err().kind, BlockErrorKind::Closing);
        }
        assert!(device.close().is_ok());
        assert_eq!(first.stored_bytes, 65536);
    }

    #[test]
    fn a_flush_makes_durable_what_came_before_it_and_a_new_hub_knows() {
        let dir = tempfile::tempdir().unwrap();
        let device = receive(dir.path(), "full", None);
        device.write(&bytes(2 << 16, 1), 100).unwrap();
        device.flush().unwrap();
        device.write(&bytes(1 << 16, 1), 10 << 16).unwrap();
        let ranges = |device: &ReceivingDevice| {
            let mut ranges = Vec::new();
            device
                .durable(0, SIZE, &mut |at, length, durable| {
                    ranges.push((at, length, durable));
                    true
                })
                .unwrap();
            ranges
        };
        let expected =
            [(0, 1 << 16, false), (1 << 16, 1 << 16, true), (2 << 16, SIZE - (2 << 16), false)];
        assert_eq!(ranges(&device), expected);
        let files = device.files.clone();
        device.close().unwrap();
        drop(device);
        let again = ReceivingDevice::open(files, true).unwrap();
        assert_eq!(ranges(&again), expected);
        again.write(&bytes(SIZE, 5), 0).unwrap();
        again.seal().unwrap();
        assert!(verify(&again) >= 4 << 20);
    }

    #[test]
    fn writes_of_many_threads_leave_checksums_that_fit() {
        let dir = tempfile::tempdir().unwrap();
        let device = receive(dir.path(), "full", None);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let device = &device;
                scope.spawn(move || {
                    for turn in 0..50_u64 {
                        let at = (turn * 7919 + thread * 104_729) % (3 << 20);
                        device.write(&bytes(100_000, thread + turn), at).unwrap();
                        if turn % 10 == 0 {
                            device.write_zeroes(at, 70_000, ZeroOptions::default()).unwrap();
                        }
                    }
                });
            }
        });
        let sealed = device.seal().unwrap();
        assert_eq!(sealed.stored_bytes, verify(&device));
    }
}
