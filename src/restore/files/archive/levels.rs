//! The directories that the walk is in, with the names that are in them so far.
//!
//! A link must not take the place of a directory: what comes into that directory later would go where
//! the link points, and links in it would then be judged for another place than theirs. That happens with
//! names that are there twice, and on systems that do not tell `A` from `a`. So links wait until the rest
//! of their directory is written, and those that share their name with something are left out. In a
//! directory that may be unpacked into another one, no links are written at all.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};

use guest::{Attributes, Node};

use super::super::names;

/// Most names that are remembered, in all levels.
const NAMES: usize = 500_000;
/// Most bytes of links that wait, in all levels.
const LINKS: usize = 16 << 20;
/// Bytes that a link counts for besides its names.
const EACH: usize = 256;

/// A link that waits.
pub(super) struct Link {
    pub(super) node: Node,
    pub(super) name: Vec<u8>,
    /// Its name in the archive, where that is another.
    pub(super) safe: Option<Vec<u8>>,
    pub(super) attributes: Attributes,
}

impl Link {
    fn weight(&self) -> usize {
        EACH + self.name.len() + self.safe.as_ref().map_or(0, Vec::len)
    }

    /// Its name in the archive.
    pub(super) fn written(&self) -> &[u8] {
        self.safe.as_ref().unwrap_or(&self.name)
    }
}

/// How a name goes with those that are in the directory already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// It is its own.
    Own,
    /// Some systems may take it for another one.
    Shared,
    /// It is there already.
    Taken,
}

/// A directory that the walk is in.
pub(super) struct Level {
    /// Its path in the archive.
    pub(super) path: Vec<u8>,
    /// Its path for people.
    pub(super) shown: Vec<u8>,
    pub(super) links: Vec<Link>,
    exact: HashSet<u64>,
    /// Without case, and without links.
    folded: HashSet<u64>,
    state: RandomState,
    /// All its names are remembered.
    whole: bool,
    /// Nothing on the way to it shares its name.
    own: bool,
}

impl Level {
    /// Why a link may not be written here; nothing where it may, and then its name is taken.
    pub(super) fn refuses(&mut self, name: &[u8]) -> Option<&'static str> {
        if !self.own {
            return Some("a link in a directory that some systems take for another one");
        }
        if !self.whole {
            return Some("a link among too many names to tell whether it shares its name");
        }
        if self.folded.contains(&self.state.hash_one(folded(name))) {
            return Some("a link that shares its name, but for its case, with something else");
        }
        let new = self.exact.insert(self.state.hash_one(name));
        (!new).then_some("a name that the directory has twice")
    }
}

/// All directories that the walk is in, the top first.
pub(super) struct Levels {
    stack: Vec<Level>,
    state: RandomState,
    names: usize,
    links: usize,
}

impl Levels {
    pub(super) fn new() -> Self {
        Self { stack: Vec::new(), state: RandomState::new(), names: 0, links: 0 }
    }

    pub(super) fn depth(&self) -> usize {
        self.stack.len()
    }

    /// The innermost one's path in the archive.
    pub(super) fn path(&self) -> &[u8] {
        self.stack.last().map_or(&[], |level| &level.path)
    }

    /// Goes into a directory, whose name had that place.
    pub(super) fn enter(&mut self, path: Vec<u8>, shown: Vec<u8>, place: Place) {
        let own = place == Place::Own && self.stack.last().is_none_or(|level| level.own);
        self.stack.push(Level {
            path,
            shown,
            links: Vec::new(),
            exact: HashSet::new(),
            folded: HashSet::new(),
            state: self.state.clone(),
            whole: true,
            own,
        });
    }

    /// Leaves the innermost one.
    pub(super) fn leave(&mut self) -> Option<Level> {
        let level = self.stack.pop()?;
        self.names -= level.exact.len();
        self.links -= level.links.iter().map(Link::weight).sum::<usize>();
        Some(level)
    }

    /// Takes the name of a file or directory in the archive.
    pub(super) fn take(&mut self, name: &[u8]) -> Place {
        let Some(level) = self.stack.last_mut() else { return Place::Own };
        let exact = self.state.hash_one(name);
        if level.exact.contains(&exact) {
            return Place::Taken;
        }
        if self.names >= NAMES {
            level.whole = false;
            return Place::Shared;
        }
        self.names += 1;
        level.exact.insert(exact);
        let alone = level.folded.insert(self.state.hash_one(folded(name)));
        if alone && level.whole { Place::Own } else { Place::Shared }
    }

    /// Lets a link wait, unless too many do.
    pub(super) fn wait(&mut self, link: Link) -> bool {
        let links = self.links + link.weight();
        match self.stack.last_mut() {
            Some(level) if links <= LINKS => {
                level.links.push(link);
                self.links = links;
                true
            }
            _ => false,
        }
    }
}

/// A name as systems see it that tell neither case nor what is behind it apart.
fn folded(name: &[u8]) -> String {
    names::shown(name).trim_end_matches(['.', ' ']).to_uppercase().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_their_own_shared_or_taken() {
        let mut levels = Levels::new();
        levels.enter(b"top".to_vec(), b"top".to_vec(), Place::Own);
        for (name, place) in [
            ("a", Place::Own),
            ("A", Place::Shared),
            ("a", Place::Taken),
            ("A.", Place::Shared),
            ("gr\u{dc}n", Place::Own),
            ("gr\u{fc}n", Place::Shared),
        ] {
            assert_eq!(levels.take(name.as_bytes()), place, "{name}");
        }
        levels.enter(b"top/A".to_vec(), b"top/A".to_vec(), Place::Shared);
        levels.enter(b"top/A/b".to_vec(), b"top/A/b".to_vec(), Place::Own);
        assert!(levels.leave().unwrap().refuses(b"x").is_some());
        levels.leave().unwrap();
        let mut top = levels.leave().unwrap();
        assert!(top.refuses(b"B").is_none() && top.refuses(b"b").is_none());
        assert!(top.refuses(b"b").is_some() && top.refuses(b"GR\xc3\x9cN").is_some());
        assert_eq!((levels.names, levels.links), (0, 0));
    }
}
