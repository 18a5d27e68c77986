//! Inode numbers for what the kernel knows of. Numbers are not used again; what the kernel forgets is
//! forgotten here.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use guest::Node;

/// Number of the directory of volumes.
pub(super) const ROOT: u64 = 1;
/// Most that are known at a time; the kernel has more memory in each than is here.
const MOST: usize = 16 << 20;

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    /// Number of the volume.
    pub(super) volume: usize,
    /// The node in it.
    pub(super) node: Node,
    /// The directory it is in, for directories and links: each is one in each directory that has it, so
    /// that how far it is below the root never changes. 0 for files, which may have several names.
    pub(super) parent: u64,
    /// Directories between it and the root of the volume; 0 for the root itself and what is in it.
    pub(super) depth: usize,
}

struct Known {
    place: Place,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    known: HashMap<u64, Known>,
    numbers: HashMap<Place, u64>,
    last: u64,
}

/// The table of numbers.
#[derive(Default)]
pub(super) struct Inodes(Mutex<Table>);

impl Inodes {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a place, known to the kernel once more than before; `None` when there are too many.
    pub(super) fn look_up(&self, place: Place) -> Option<u64> {
        let mut table = self.table();
        let number = match table.numbers.get(&place) {
            Some(number) => *number,
            None if table.known.len() >= MOST => return None,
            None => {
                table.last = table.last.max(ROOT) + 1;
                let number = table.last;
                table.numbers.insert(place, number);
                table.known.insert(number, Known { place, lookups: 0 });
                number
            }
        };
        if let Some(known) = table.known.get_mut(&number) {
            known.lookups += 1;
        }
        Some(number)
    }

    pub(super) fn place(&self, number: u64) -> Option<Place> {
        self.table().known.get(&number).map(|known| known.place)
    }

    /// The kernel knows it so many times less.
    pub(super) fn forget(&self, number: u64, times: u64) {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(&number) else { return };
        known.lookups = known.lookups.saturating_sub(times);
        if known.lookups == 0 {
            let place = known.place;
            table.known.remove(&number);
            table.numbers.remove(&place);
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.table().known.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_lives_as_long_as_the_kernel_knows_it() {
        let inodes = Inodes::default();
        let place = Place { volume: 0, node: Node(u64::MAX), parent: 0, depth: 3 };
        let number = inodes.look_up(place).unwrap();
        assert!(number > ROOT);
        assert_eq!(inodes.look_up(place), Some(number));
        inodes.forget(number, 1);
        assert_eq!(inodes.place(number), Some(place));
        inodes.forget(number, 5);
        assert_eq!((inodes.place(number), inodes.count()), (None, 0));
        assert_ne!(inodes.look_up(place), Some(number));
    }
}
