//! Sets of byte ranges.

use std::collections::BTreeMap;

/// Disjoint ranges, none of them adjacent; start to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// One range.
    pub(super) fn of(from: u64, to: u64) -> Self {
        let mut ranges = Self::default();
        ranges.insert((from, to));
        ranges
    }

    /// The ranges, in order, as (start, end).
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(from, to)| (*from, *to))
    }

    /// Bytes in all ranges.
    pub(super) fn total(&self) -> u64 {
        self.iter().map(|(from, to)| to - from).sum()
    }

    /// The first byte, and the end of the last range.
    pub(super) fn bounds(&self) -> Option<(u64, u64)> {
        Some((*self.0.first_key_value()?.0, *self.0.last_key_value()?.1))
    }

    /// Adds a range.
    pub(super) fn insert(&mut self, (mut from, mut to): (u64, u64)) {
        if from >= to {
            return;
        }
        // Whatever begins at or before the end and ends at or after the start becomes part of it.
        while let Some((start, end)) = self.last_before(to.saturating_add(1)) {
            if end < from {
                break;
            }
            self.0.remove(&start);
            from = from.min(start);
            to = to.max(end);
        }
        self.0.insert(from, to);
    }

    /// Takes a range out.
    pub(super) fn remove(&mut self, (from, to): (u64, u64)) {
        if from >= to {
            return;
        }
        while let Some((start, end)) = self.last_before(to) {
            if end <= from {
                break;
            }
            self.0.remove(&start);
            if end > to {
                self.0.insert(to, end);
            }
            if start < from {
                self.0.insert(start, from);
            }
        }
    }

    /// The last range that begins before `at`.
    fn last_before(&self, at: u64) -> Option<(u64, u64)> {
        self.0.range(..at).next_back().map(|(start, end)| (*start, *end))
    }

    /// Adds all ranges of another set.
    pub(super) fn insert_all(&mut self, other: &Self) {
        other.iter().for_each(|range| self.insert(range));
    }

    /// Takes out all ranges of another set.
    pub(super) fn remove_all(&mut self, other: &Self) {
        other.iter().for_each(|range| self.remove(range));
    }

    /// Takes from the start what lies before the next multiple of `step`.
    pub(super) fn pop(&mut self, step: u64) -> Option<(u64, u64)> {
        let (from, end) = self.0.pop_first()?;
        let to = end.min((from / step).saturating_add(1).saturating_mul(step));
        if to < end {
            self.0.insert(to, end);
        }
        Some((from, to))
    }

    /// The ranges with their ends moved outwards to multiples of `grain`, but not past `size`.
    pub(super) fn widened(&self, grain: u64, size: u64) -> Self {
        let mut wide = Self::default();
        for (from, to) in self.iter() {
            wide.insert((from / grain * grain, to.next_multiple_of(grain).min(size)));
        }
        wide
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same set, byte by byte.
    fn model(ranges: &Ranges) -> Vec<bool> {
        let mut bytes = vec![false; 64];
        for (from, to) in ranges.iter() {
            for at in from..to {
                bytes[usize::try_from(at).unwrap()] = true;
            }
        }
        bytes
    }

    #[test]
    fn inserting_and_removing_do_what_they_do_byte_by_byte() {
        let mut ranges = Ranges::default();
        let mut bytes = vec![false; 64];
        let mut seed = 1u64;
        for _ in 0..4000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (a, b, insert) = ((seed >> 33) % 64, (seed >> 43) % 64, (seed >> 53) & 1 == 0);
            let (from, to) = (a.min(b), a.max(b));
            if insert {
                ranges.insert((from, to));
            } else {
                ranges.remove((from, to));
            }
            for at in from..to {
                bytes[usize::try_from(at).unwrap()] = insert;
            }
            assert_eq!(model(&ranges), bytes);
            assert_eq!(ranges.total(), bytes.iter().filter(|byte| **byte).count() as u64);
            let ends: Vec<_> = ranges.iter().collect();
            assert!(ends.windows(2).all(|pair| pair[0].1 < pair[1].0), "{ends:?}");
        }
    }

    #[test]
    fn ranges_are_taken_in_steps_and_widened_inside_the_disk() {
        let mut ranges = Ranges::of(3, 25);
        ranges.insert((30, 31));
        assert_eq!(ranges.bounds(), Some((3, 31)));
        let wide = ranges.widened(8, 29);
        assert_eq!(wide.iter().collect::<Vec<_>>(), [(0, 29)]);
        let taken: Vec<_> = std::iter::from_fn(|| ranges.pop(10)).collect();
        assert_eq!(taken, [(3, 10), (10, 20), (20, 25), (30, 31)]);
    }
}
