//! Account of which clusters of a disk came in, and which of those are durable.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Clusters per word.
const BITS: u64 = 64;

/// Two bits per cluster: 32 MiB of memory for 8 TiB of disk in clusters of 64 KiB. The durable ones
/// are kept in a file too, for a capture that goes on after the hub was killed.
#[derive(Debug)]
pub(super) struct Received {
    came: Vec<AtomicU64>,
    durable: Vec<AtomicU64>,
    /// Whether anything was ever written, however little of it is durable.
    begun: AtomicBool,
    file: File,
}

impl Received {
    /// The account in the file at `path`, which is made where it is not there; of no clusters yet.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let begun = AtomicBool::new(file.metadata()?.len() > 0);
        Ok(Self { came: Vec::new(), durable: Vec::new(), begun, file })
    }

    /// The same for a disk of `clusters`.
    pub(super) fn load(self, clusters: u64) -> io::Result<Self> {
        let words = usize::try_from(clusters.div_ceil(BITS)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; words * 8];
        let mut have = 0;
        while have < bytes.len() {
            match self.file.read_at(&mut bytes[have..], have as u64)? {
                0 => break,
                n => have += n,
            }
        }
        let (entries, _) = bytes.as_chunks::<8>();
        let load = || entries.iter().map(|b| AtomicU64::new(u64::from_le_bytes(*b))).collect();
        Ok(Self { came: load(), durable: load(), ..self })
    }

    /// Notes that something is about to be written; the file says so, too.
    pub(super) fn begin(&self) -> io::Result<()> {
        if !self.begun.load(Ordering::Acquire) {
            self.file.set_len(self.durable.len() as u64 * 8 + 1)?;
            self.begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether anything was ever written.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Notes that the clusters `from .. to` came in whole.
    pub(super) fn note(&self, from: u64, to: u64) {
        each_word(from, to, |index, mask| {
            if let Some(word) = self.came.get(index) {
                word.fetch_or(mask, Ordering::AcqRel);
            }
        });
    }

    /// What came in up to now, for [`settle`](Self::settle).
    pub(super) fn snapshot(&self) -> Vec<u64> {
        self.came.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Notes that what `snapshot` has is durable: it was taken before a flush that is over.
    pub(super) fn settle(&self, snapshot: &[u64]) -> io::Result<()> {
        for (index, word) in snapshot.iter().enumerate() {
            let before = self.durable[index].fetch_or(*word, Ordering::AcqRel);
            if before | word != before {
                self.file.write_all_at(&(before | word).to_le_bytes(), index as u64 * 8)?;
            }
        }
        Ok(())
    }

    /// Whether cluster `index` is durable.
    pub(super) fn is_durable(&self, index: u64) -> bool {
        let word = usize::try_from(index / BITS).ok().and_then(|at| self.durable.get(at));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (index % BITS) & 1 == 1)
    }
}

fn each_word(from: u64, to: u64, mut visit: impl FnMut(usize, u64)) {
    let mut at = from;
    while at < to {
        let end = ((at / BITS + 1) * BITS).min(to);
        let mask = (u64::MAX >> (BITS - (end - at))) << (at % BITS);
        visit(usize::try_from(at / BITS).unwrap_or(usize::MAX), mask);
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_before_a_flush_is_durable_and_that_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        let received = Received::open(&path).unwrap().load(1000).unwrap();
        assert!(!Received::open(&path).unwrap().load(1000).unwrap().has_begun());
        received.begin().unwrap();
        assert!(Received::open(&path).unwrap().load(1000).unwrap().has_begun());
        received.note(60, 200);
        let before = received.snapshot();
        received.note(300, 301);
        received.settle(&before).unwrap();
        let found = |received: &Received| {
            (0..1000).filter(|index| received.is_durable(*index)).collect::<Vec<_>>()
        };
        assert_eq!(found(&received), (60..200).collect::<Vec<_>>());
        assert_eq!(
            found(&Received::open(&path).unwrap().load(1000).unwrap()),
            (60..200).collect::<Vec<_>>()
        );
        assert!(!received.is_durable(u64::MAX));
    }
}
