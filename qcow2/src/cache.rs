//! A bounded map of metadata with second-chance eviction; dirty entries stay.

use std::collections::{HashMap, VecDeque};

struct Slot<V> {
    value: V,
    touched: bool,
    /// Epoch of the last change that is not yet on disk.
    dirty: Option<u64>,
}

/// Metadata by number. Clean entries leave when the map is full; dirty ones only once cleaned, so
/// the map may exceed its capacity by what is dirty, which the image bounds by checkpoints.
pub(crate) struct Cache<V> {
    slots: HashMap<u64, Slot<V>>,
    order: VecDeque<u64>,
    capacity: usize,
    dirty: usize,
}

impl<V> Cache<V> {
    /// A cache for `capacity` entries (at least one).
    pub(crate) fn new(capacity: usize) -> Self {
        Self { slots: HashMap::new(), order: VecDeque::new(), capacity: capacity.max(1), dirty: 0 }
    }

    pub(crate) fn contains(&self, key: u64) -> bool {
        self.slots.contains_key(&key)
    }

    pub(crate) fn get(&mut self, key: u64) -> Option<&V> {
        self.slots.get_mut(&key).map(|slot| {
            slot.touched = true;
            &slot.value
        })
    }

    /// The entry for changing: it counts as dirty since `epoch`.
    pub(crate) fn get_dirty(&mut self, key: u64, epoch: u64) -> Option<&mut V> {
        let slot = self.slots.get_mut(&key)?;
        slot.touched = true;
        if slot.dirty.is_none() {
            self.dirty += 1;
        }
        slot.dirty = Some(epoch);
        Some(&mut slot.value)
    }

    /// Adds a clean entry, making room first.
    pub(crate) fn insert(&mut self, key: u64, value: V) {
        self.make_room();
        if self.slots.insert(key, Slot { value, touched: true, dirty: None }).is_none() {
            self.order.push_back(key);
        }
    }

    fn make_room(&mut self) {
        let mut looked = 0;
        while self.slots.len() >= self.capacity && looked < 2 * self.order.len() {
            looked += 1;
            let Some(key) = self.order.pop_front() else {
                return;
            };
            match self.slots.get_mut(&key) {
                Some(slot) if slot.touched || slot.dirty.is_some() => {
                    slot.touched = false;
                    self.order.push_back(key);
                }
                Some(_) => {
                    self.slots.remove(&key);
                }
                None => {}
            }
        }
    }

    /// Number of dirty entries.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Every dirty entry with its number, in ascending order.
    pub(crate) fn dirty_entries(&self) -> Vec<(u64, &V)> {
        let mut entries: Vec<_> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.dirty.is_some())
            .map(|(key, slot)| (*key, &slot.value))
            .collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries
    }

    /// Entries last changed in `epoch` or before are on disk now.
    pub(crate) fn mark_clean(&mut self, keys: impl Iterator<Item = u64>, epoch: u64) {
        for key in keys {
            if let Some(slot) = self.slots.get_mut(&key)
                && slot.dirty.is_some_and(|since| since <= epoch)
            {
                slot.dirty = None;
                self.dirty -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_entries_outlive_a_full_cache_and_clean_ones_leave() {
        let mut cache = Cache::new(2);
        cache.insert(1, "one");
        cache.get_dirty(1, 7);
        for key in 2..10 {
            cache.insert(key, "more");
        }
        assert!(cache.contains(1));
        assert!(cache.len() <= 3);
        cache.mark_clean([1].into_iter(), 6);
        assert_eq!(cache.dirty_count(), 1, "a later change stays dirty");
        cache.mark_clean([1].into_iter(), 7);
        assert_eq!(cache.dirty_count(), 0);
        for key in 10..14 {
            cache.insert(key, "more");
        }
        assert!(!cache.contains(1));
    }
}
