//! What the page cache has already.
//!
//! Long reads go around the page cache, but what somebody else has read just now is there faster than on
//! any disk. Asking costs nothing where the answer is yes. Where it is no, the system begins to read what
//! was asked for; so a file that is not there is asked for one page, and seldom.

use std::fs::{File, OpenOptions};
use std::io::IoSliceMut;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Advice, fadvise};
use rustix::io::{ReadWriteFlags, preadv2};

use super::direct::{ALIGNMENT, reopen};

/// Reads of a file after which it is asked again whether it is in the page cache.
const AGAIN: u32 = 64;
/// It was there when it was read last.
const WARM: u32 = 0;
/// The next read asks for a page first.
const ASK: u32 = 1;

/// A descriptor of a file whose reads never wait.
#[derive(Debug)]
pub(super) struct Cached {
    file: File,
    /// [`WARM`], [`ASK`], or so many reads before that.
    state: AtomicU32,
}

impl Cached {
    /// Opens `file` once more; `None` where that cannot be done.
    pub(super) fn open(file: &File) -> Option<Self> {
        let file = reopen(file, OpenOptions::new().read(true)).ok()?;
        // Nothing that is asked for makes the system read what follows.
        fadvise(&file, 0, None, Advice::Random).ok()?;
        Some(Self { file, state: AtomicU32::new(ASK) })
    }

    /// Fills `buf` from its start with what the page cache has at `offset`, whole pages of it; returns
    /// their bytes.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> usize {
        let state = self.state.load(Ordering::Relaxed);
        // Lost updates do not matter.
        if state > ASK {
            self.state.store(state - 1, Ordering::Relaxed);
            return 0;
        }
        let page = ALIGNMENT.min(buf.len());
        if state == ASK && self.read_now(&mut buf[..page], offset) < page {
            self.state.store(AGAIN, Ordering::Relaxed);
            return 0;
        }
        let read = self.read_now(buf, offset);
        self.state.store(if read < buf.len() { AGAIN } else { WARM }, Ordering::Relaxed);
        read - read % ALIGNMENT
    }

    fn read_now(&self, buf: &mut [u8], offset: u64) -> usize {
        // Whatever hinders it hinders nobody: the bytes come from the disk.
        preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT)
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_in_the_page_cache_is_read_and_what_is_not_is_left_out() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 256 << 10]).unwrap();
        file.sync_all().unwrap();
        let Some(cached) = Cached::open(&file) else { return };
        let mut buffer = vec![0; 256 << 10];
        match cached.read_at(&mut buffer, 0) {
            // A file system that cannot be asked.
            0 => return eprintln!("SKIPPED: no reads that do not wait here"),
            read => assert!(buffer[..read].iter().all(|byte| *byte == 7)),
        }
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        buffer.fill(0);
        // It may not have gone, or not all of it.
        let read = cached.read_at(&mut buffer, 0);
        assert!(buffer[..read].iter().all(|byte| *byte == 7));
        assert_eq!(read % ALIGNMENT, 0);
        assert_eq!(cached.read_at(&mut buffer, 1 << 30), 0, "past the end");
    }

    #[test]
    fn a_file_that_is_not_there_is_asked_for_seldom() {
        let file = tempfile::tempfile().unwrap();
        let cached = Cached::open(&file).unwrap();
        let mut buffer = vec![0; 8192];
        assert_eq!(cached.read_at(&mut buffer, 0), 0);
        for left in (ASK..AGAIN).rev() {
            assert_eq!(cached.read_at(&mut buffer, 0), 0);
            assert_eq!(cached.state.load(Ordering::Relaxed), left);
        }
    }
}
