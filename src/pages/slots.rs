//! Slots of memory in huge pages, shared by the whole process.
//!
//! A transfer around the page cache is described to the disk page by page. In pages of 4 KiB a transfer of
//! 1 MiB has 256 parts, each of which the disk, or whoever plays the disk of a virtual machine, has to look
//! at; in a huge page it has one.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{Advice, MmapMut};

use super::{PAGE, in_page};

/// Bytes of the largest slot.
pub const LARGEST: usize = 1 << 20;
/// The sizes of slots in bytes, ascending, and how many bytes there are of each: of the larger ones as many
/// as there may be payloads of writes, and some for what is read.
const CLASSES: [(usize, usize); 3] =
    [(64 << 10, 32 << 20), (256 << 10, 64 << 20), (LARGEST, 96 << 20)];
/// Bytes of a huge page. Where huge pages are larger than this, slots lie in small ones.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of slots that are made at a time.
const STEP: usize = 4 * HUGE_PAGE;

static FREE: [Mutex<Free>; CLASSES.len()] =
    [const { Mutex::new(Free { slots: Vec::new(), mapped: 0 }) }; CLASSES.len()];

/// The slots of one class that nobody has.
#[derive(Debug)]
struct Free {
    /// What was given back last is taken first: it is more likely to be in a cache, and what is seldom
    /// needed seldom takes memory.
    slots: Vec<&'static mut [u8]>,
    mapped: usize,
}

impl Free {
    fn take(&mut self, (size, most): (usize, usize)) -> Option<&'static mut [u8]> {
        if self.slots.is_empty() && self.mapped < most {
            // Without address space there is other memory.
            self.slots = map(size).ok()?;
            self.mapped += STEP;
        }
        self.slots.pop()
    }
}

/// Address space for more slots. Memory comes with first use and is kept: parts of a mapping can be handed
/// out because it is there for ever.
fn map(size: usize) -> io::Result<Vec<&'static mut [u8]>> {
    let memory = MmapMut::map_anon(STEP + HUGE_PAGE)?;
    // A kernel without huge pages gives small ones.
    let _ = memory.advise(Advice::HugePage);
    let memory = Box::leak(Box::new(memory));
    let skip = memory.as_ptr().align_offset(HUGE_PAGE);
    let mut slots: Vec<_> = memory[skip..skip + STEP].chunks_exact_mut(size).collect();
    slots.reverse();
    Ok(slots)
}

fn class_of(bytes: usize) -> Option<usize> {
    CLASSES.iter().position(|(size, _)| bytes <= *size)
}

fn free(class: usize) -> MutexGuard<'static, Free> {
    FREE[class].lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says in the log where the kernel is told to give no huge pages.
pub fn warn_if_small() {
    const FOR_ALL: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    const FOR_THESE: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";
    let [all, these] =
        [FOR_ALL, FOR_THESE].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    if are_off(&all, &these) {
        tracing::warn!("{FOR_ALL} is 'never': large transfers are slower; 'madvise' is enough");
    }
}

/// Judges the setting for all sizes of pages, and that for the size in question, which newer kernels have.
fn are_off(all: &str, these: &str) -> bool {
    let decides = if these.is_empty() || these.contains("[inherit]") { all } else { these };
    decides.contains("[never]")
}

/// Bytes of memory that a buffer of `length` bytes for the disk from `offset` on takes at most.
pub fn footprint(offset: u64, length: usize) -> usize {
    let bytes = length.saturating_add(in_page(offset));
    // A page to align in.
    class_of(bytes).map_or(bytes, |class| CLASSES[class].0).saturating_add(PAGE)
}

/// Memory for one buffer; given back when dropped.
#[derive(Debug, Default)]
pub(super) struct Slot(Memory);

#[derive(Debug)]
enum Memory {
    Huge {
        class: usize,
        bytes: &'static mut [u8],
    },
    /// Where all slots are taken, or for more than a slot has.
    Plain(Vec<u8>),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Plain(Vec::new())
    }
}

impl Slot {
    /// `bytes` or more of memory with any content, from the start of a page on or with room to align.
    pub(super) fn take(bytes: usize) -> Self {
        let slot =
            class_of(bytes).and_then(|class| Some((class, free(class).take(CLASSES[class])?)));
        Self(match slot {
            Some((class, bytes)) => Memory::Huge { class, bytes },
            None => Memory::Plain(vec![0; bytes.saturating_add(PAGE)]),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Memory::Huge { class, bytes } = &mut self.0 {
            free(*class).slots.push(std::mem::take(bytes));
        }
    }
}

impl Deref for Slot {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Huge { bytes, .. } => bytes,
            Memory::Plain(bytes) => bytes,
        }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Huge { bytes, .. } => bytes,
            Memory::Plain(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Held by tests that take all slots, and by those that need one.
    fn turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_huge(slot: &Slot) -> bool {
        matches!(slot.0, Memory::Huge { .. })
    }

    #[test]
    fn slots_are_aligned_and_no_two_share_a_byte() {
        let _turn = turn();
        let mut taken = Vec::new();
        for (size, most) in CLASSES {
            let mut slots: Vec<_> = (0..most / size).map(|_| Slot::take(size)).collect();
            slots.retain(is_huge);
            // Other modules' tests may have some.
            assert!(!slots.is_empty());
            assert!(slots.iter().all(|slot| slot.as_ptr().addr().is_multiple_of(size)));
            assert!(slots.iter().all(|slot| slot.len() == size));
            taken.extend(slots);
        }
        let mut ranges: Vec<_> =
            taken.iter().map(|slot| (slot.as_ptr().addr(), slot.len())).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0));
    }

    #[test]
    fn the_kernel_is_asked_for_huge_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return eprintln!("SKIPPED: a kernel without huge pages");
        }
        let _turn = turn();
        let slot = Slot::take(LARGEST);
        assert!(is_huge(&slot));
        let address = slot.as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            let first = line.split(' ').next().unwrap();
            if let Some((from, to)) = first.split_once('-') {
                let bound = |text| usize::from_str_radix(text, 16).unwrap();
                inside = (bound(from)..bound(to)).contains(&address);
            } else if inside && first == "VmFlags:" {
                return assert!(line.split(' ').any(|flag| flag == "hg"), "{line}");
            }
        }
        panic!("no mapping has it");
    }

    #[test]
    fn only_never_means_no_huge_pages_and_the_size_in_question_decides() {
        const NEVER: &str = "always madvise [never]\n";
        assert!(are_off(NEVER, ""));
        assert!(are_off(NEVER, "always [inherit] madvise never\n"));
        assert!(are_off("[always] madvise never\n", "always inherit madvise [never]\n"));
        assert!(!are_off(NEVER, "always inherit [madvise] never\n"));
        assert!(!are_off("always [madvise] never\n", ""));
        assert!(!are_off("", ""));
    }

    #[test]
    fn more_than_there_is_comes_from_elsewhere() {
        let _turn = turn();
        let (size, most) = CLASSES[2];
        let slots: Vec<_> = (0..=most / size).map(|_| Slot::take(size)).collect();
        assert!(!slots.iter().all(is_huge));
        assert!(slots.iter().all(|slot| slot.len() >= size));
        assert!(Slot::take(LARGEST + 1).len() > LARGEST);
    }

    #[test]
    fn a_footprint_covers_what_is_taken() {
        for length in [1, 4096, (64 << 10) - 1, 64 << 10, 100_000, LARGEST - 5, LARGEST] {
            for offset in [0, 1, 512, 4095, 1 << 40] {
                let taken = Slot::take(length + in_page(offset)).len();
                assert!(taken <= footprint(offset, length), "{length} at {offset}");
            }
        }
    }
}
