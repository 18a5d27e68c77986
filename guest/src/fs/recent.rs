//! What was used last, within a bound: blocks of metadata, layouts of files.
//!
//! Two generations: what is asked for moves to the young one, and when that is full it becomes the old
//! one, whose rest is forgotten. Never more than twice the limit is held.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Values by key, those used last.
pub(crate) struct Recent<K, V> {
    generations: Mutex<Generations<K, V>>,
    limit: usize,
}

struct Generations<K, V> {
    young: HashMap<K, (V, usize)>,
    weight: usize,
    old: HashMap<K, (V, usize)>,
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Holds values of about `limit` to twice `limit` weights.
    pub(crate) fn new(limit: usize) -> Self {
        let generations = Generations { young: HashMap::new(), weight: 0, old: HashMap::new() };
        Self { generations: Mutex::new(generations), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Generations<K, V>> {
        // Every state between two statements is a valid one: a panic elsewhere leaves nothing broken.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of `key`, where it is still held.
    pub(crate) fn get(&self, key: &K) -> Option<V> {
        let mut generations = self.lock();
        if let Some((value, _)) = generations.young.get(key) {
            return Some(value.clone());
        }
        let (key, (value, weight)) = generations.old.remove_entry(key)?;
        generations.put(key, value.clone(), weight, self.limit);
        Some(value)
    }

    /// Holds `value`, which weighs `weight`.
    pub(crate) fn put(&self, key: K, value: V, weight: usize) {
        self.lock().put(key, value, weight, self.limit);
    }
}

impl<K: Eq + Hash, V> Generations<K, V> {
    fn put(&mut self, key: K, value: V, weight: usize, limit: usize) {
        if self.weight.saturating_add(weight) > limit {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        if weight > limit {
            return;
        }
        if let Some((_, replaced)) = self.young.insert(key, (value, weight)) {
            self.weight -= replaced;
        }
        self.weight += weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_what_is_not_goes() {
        let recent = Recent::new(10);
        for key in 0..1000 {
            recent.put(key, key, 1);
            assert_eq!(recent.get(&0), Some(0));
        }
        assert_eq!(recent.get(&500), None);
        assert_eq!(recent.get(&999), Some(999));
        let generations = recent.lock();
        assert!(generations.young.len() <= 10 && generations.old.len() <= 10);
    }

    #[test]
    fn what_weighs_more_than_the_limit_is_not_held() {
        let recent = Recent::new(10);
        recent.put(1, 1, 11);
        assert_eq!(recent.get(&1), None);
    }
}
