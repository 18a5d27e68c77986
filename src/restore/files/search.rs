//! Whole subtrees as a list, and names that match a pattern, both cut at a bound and saying so.

use guest::{Error, Node, Tree, tree::Listed};

use super::names;
use super::walk::{DEPTH, Trouble, Walk};

/// Most characters of a pattern.
const PATTERN: usize = 255;
/// Most troubles that are told.
const TROUBLES: usize = 100;
/// Most bytes of what is told: paths, names, targets of links, notes. As text and as JSON it is a few
/// times as much.
pub const BYTES: usize = 16 << 20;
/// Bytes that count for each thing told, whatever it is called.
const EACH: usize = 256;

/// Bounds of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchLimits {
    /// Most things found.
    pub found: usize,
    /// Most names looked at.
    pub visited: u64,
    /// Most bytes told; see [`BYTES`].
    pub bytes: usize,
}

impl Default for SearchLimits {
    fn default() -> Self {
        Self { found: 1000, visited: 1_000_000, bytes: BYTES }
    }
}

impl SearchLimits {
    /// Bounds of a recursive listing.
    pub const LISTING: Self = Self { found: 10_000, visited: 1_000_000, bytes: BYTES };

    /// What is left for the next tree of the same request.
    #[must_use]
    pub fn after(self, matches: &Matches) -> Self {
        Self {
            found: self.found.saturating_sub(matches.found.len()),
            visited: self.visited.saturating_sub(matches.visited),
            bytes: self.bytes.saturating_sub(matches.bytes),
        }
    }
}

/// A thing that was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its path from where it was searched, without `/` at the beginning.
    pub path: Vec<u8>,
    /// Its name and what is known of it.
    pub listed: Listed,
}

/// What a search gives.
#[derive(Debug, Default)]
pub struct Matches {
    /// What matched, in the order of the tree.
    pub found: Vec<Found>,
    /// Names that were looked at.
    pub visited: u64,
    /// Bytes of what is told.
    pub bytes: usize,
    /// A bound was reached, or it was to go on no longer: there may be more.
    pub more: bool,
    /// What could not be looked at; the first ones.
    pub troubles: Vec<Trouble>,
}

/// What names are searched for: regardless of case, `*` for any characters and `?` for one; without
/// those, a part of the name.
#[derive(Debug, Clone)]
pub struct Pattern {
    wanted: Vec<char>,
    glob: bool,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// `Limit` where it is empty or too long.
    pub fn new(text: &str) -> Result<Self, Error> {
        let wanted: Vec<char> = text.chars().flat_map(char::to_lowercase).collect();
        if wanted.is_empty() || wanted.len() > PATTERN {
            return Err(Error::limit(format!("a pattern has 1 to {PATTERN} characters")));
        }
        Ok(Self { glob: wanted.iter().any(|c| ['*', '?'].contains(c)), wanted })
    }

    /// Whether a name matches.
    pub fn matches(&self, name: &[u8]) -> bool {
        let name: Vec<char> = names::shown(name).chars().flat_map(char::to_lowercase).collect();
        if self.glob {
            glob(&self.wanted, &name)
        } else {
            name.windows(self.wanted.len()).any(|part| part == self.wanted)
        }
    }
}

/// Compares with `*` and `?`: at a mismatch only the last `*` takes one character more.
fn glob(pattern: &[char], name: &[char]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || Some(c) == name.get(n) => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, from)) = star else { return false };
                star = Some((at, from + 1));
                p = at + 1;
                n = from + 1;
            }
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

/// Bytes that a name in a listing counts for, without its path.
pub fn weight(listed: &Listed) -> usize {
    let note = match &listed.attributes {
        Ok(attributes) => attributes.note.as_ref().map_or(0, String::len),
        Err(error) => error.message.len(),
    };
    EACH + listed.name.len() + listed.target.as_ref().map_or(0, Vec::len) + note
}

/// Finds names below a directory. `go_on` is asked at every step.
pub fn search(
    tree: &dyn Tree,
    from: Node,
    pattern: &Pattern,
    limits: SearchLimits,
    go_on: &dyn Fn() -> bool,
) -> Matches {
    collect(tree, from, limits, go_on, |name| pattern.matches(name))
}

/// All that is below a directory, up to a bound. `go_on` is asked at every step.
pub fn everything(
    tree: &dyn Tree,
    from: Node,
    limits: SearchLimits,
    go_on: &dyn Fn() -> bool,
) -> Matches {
    collect(tree, from, limits, go_on, |_| true)
}

fn collect(
    tree: &dyn Tree,
    from: Node,
    limits: SearchLimits,
    go_on: &dyn Fn() -> bool,
    wanted: impl Fn(&[u8]) -> bool,
) -> Matches {
    let mut matches = Matches::default();
    let mut walk = Walk::new(tree, from, limits.visited, DEPTH);
    loop {
        if !go_on() {
            matches.more = true;
            break;
        }
        let Some(step) = walk.next() else { break };
        let weight = match &step {
            Ok(step) => step.path.len() + weight(&step.listed),
            Err(trouble) => EACH + trouble.path.len() + trouble.error.message.len(),
        };
        let room = weight <= limits.bytes - matches.bytes;
        match step {
            Ok(step) if wanted(&step.listed.name) => {
                if !room || matches.found.len() >= limits.found {
                    matches.more = true;
                    break;
                }
                matches.bytes += weight;
                matches.found.push(Found { path: step.path, listed: step.listed });
            }
            Ok(_) => {}
            Err(_) if walk.was_cut() => matches.more = true,
            Err(_) if !room => {
                matches.more = true;
                break;
            }
            Err(trouble) if matches.troubles.len() < TROUBLES => {
                matches.bytes += weight;
                matches.troubles.push(trouble);
            }
            Err(_) => {}
        }
    }
    matches.visited = limits.visited - walk.left();
    matches
}

#[cfg(test)]
mod tests {
    use super::super::tree::{Fake, dir, file};
    use super::*;

    #[test]
    fn patterns_are_globs_or_parts_of_names() {
        let matches = |p: &str, name: &str| Pattern::new(p).unwrap().matches(name.as_bytes());
        assert!(matches("host", "etc-HostName"));
        assert!(matches("*.CONF", "a.b.conf"));
        assert!(matches("a*b*c", "aXXbYYbZc"));
        assert!(!matches("a*b", "abc"));
        assert!(matches("?b*", "ab") && !matches("?b", "b"));
        assert!(matches("GRÜN", "grün"));
        assert!(Pattern::new("").is_err() && Pattern::new(&"a".repeat(300)).is_err());
        assert!(!matches(&"*a".repeat(120), &"b".repeat(250)));
    }

    #[test]
    fn a_search_says_where_it_stopped() {
        let tree =
            Fake::new(vec![dir("a", vec![file("x1", b""), file("x2", b"")]), file("x3", b"")]);
        let pattern = Pattern::new("x").unwrap();
        let within = |limits| search(&tree, Node(0), &pattern, limits, &|| true);
        let find = |found, visited| within(SearchLimits { found, visited, bytes: BYTES });
        let all = find(10, 10);
        assert_eq!((all.found.len(), all.visited, all.more), (3, 4, false));
        assert_eq!(all.found[1].path, b"a/x2");
        assert!(find(2, 10).more && find(10, 2).more);
        let few = within(SearchLimits { found: 10, visited: 10, bytes: all.bytes - 1 });
        assert_eq!((few.found.len(), few.more), (2, true));
        let left = SearchLimits { found: 10, visited: 10, bytes: all.bytes }.after(&all);
        assert_eq!(left, SearchLimits { found: 7, visited: 6, bytes: 0 });
        let limits = SearchLimits::LISTING;
        assert_eq!(everything(&tree, Node(0), limits, &|| true).found.len(), 4);
    }

    #[test]
    fn a_search_that_nobody_waits_for_ends_at_the_next_step() {
        let tree = Fake::new((0..100).map(|n| file(format!("{n}"), b"")).collect());
        let steps = std::cell::Cell::new(0);
        let go_on = || {
            steps.set(steps.get() + 1);
            steps.get() <= 3
        };
        let some = everything(&tree, Node(0), SearchLimits::LISTING, &go_on);
        assert_eq!((some.found.len(), some.visited, some.more), (3, 3, true));
    }
}
