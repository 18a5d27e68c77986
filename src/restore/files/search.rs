//! Whole subtrees as a list, and names that match a pattern, both cut at a bound and saying so.

use guest::{Error, Node, Tree, tree::Listed};

use super::names;
use super::walk::{DEPTH, Trouble, Walk};

/// Most characters of a pattern.
const PATTERN: usize = 255;
/// Most troubles that are told.
const TROUBLES: usize = 100;

/// Bounds of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchLimits {
    /// Most things found.
    pub found: usize,
    /// Most names looked at.
    pub visited: u64,
}

impl Default for SearchLimits {
    fn default() -> Self {
        Self { found: 1000, visited: 1_000_000 }
    }
}

impl SearchLimits {
    /// Bounds of a recursive listing.
    pub const LISTING: Self = Self { found: 10_000, visited: 1_000_000 };
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
    /// A bound was reached: there may be more.
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

/// Finds names below a directory.
pub fn search(tree: &dyn Tree, from: Node, pattern: &Pattern, limits: SearchLimits) -> Matches {
    collect(tree, from, limits, |name| pattern.matches(name))
}

/// All that is below a directory, up to a bound.
pub fn everything(tree: &dyn Tree, from: Node, limits: SearchLimits) -> Matches {
    collect(tree, from, limits, |_| true)
}

fn collect(
    tree: &dyn Tree,
    from: Node,
    limits: SearchLimits,
    wanted: impl Fn(&[u8]) -> bool,
) -> Matches {
    let mut matches = Matches::default();
    let mut walk = Walk::new(tree, from, limits.visited, DEPTH);
    while let Some(step) = walk.next() {
        match step {
            Ok(step) if wanted(&step.listed.name) => {
                if matches.found.len() >= limits.found {
                    matches.more = true;
                    break;
                }
                matches.found.push(Found { path: step.path, listed: step.listed });
            }
            Ok(_) => {}
            Err(_) if walk.was_cut() => matches.more = true,
            Err(trouble) if matches.troubles.len() < TROUBLES => matches.troubles.push(trouble),
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
        let find = |found, visited| {
            search(&tree, Node(0), &Pattern::new("x").unwrap(), SearchLimits { found, visited })
        };
        let all = find(10, 10);
        assert_eq!((all.found.len(), all.visited, all.more), (3, 4, false));
        assert_eq!(all.found[1].path, b"a/x2");
        assert!(find(2, 10).more && find(10, 2).more);
        assert_eq!(everything(&tree, Node(0), SearchLimits::LISTING).found.len(), 4);
    }
}
