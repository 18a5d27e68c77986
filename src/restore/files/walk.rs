//! Everything below a directory, in the order of its listings, a directory before what is in it.
//!
//! Memory is one page of names per level, whatever is in the tree. What must stay true: the walk ends,
//! on every tree; a name that it gives is one component and nothing else; links are not followed; what
//! could not be walked is told as a [`Trouble`] and never just missing.

use std::vec;

use guest::{Cursor, Error, FileType, Node, Tree, tree::Listed};

/// Most levels below the start.
pub const DEPTH: usize = 256;
/// Names that are asked for at once.
const PAGE: usize = 256;
/// Most bytes of a name.
const NAME: usize = 1024;

/// One thing that was found.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its path from where the walk started, without `/` at the beginning.
    pub path: Vec<u8>,
    /// Levels below the start; 1 for what is directly in it.
    pub depth: usize,
    /// The directory it is in.
    pub parent: Node,
    /// Its name and what is known of it.
    pub listed: Listed,
}

/// What could not be walked, and why.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// Its path from where the walk started; empty for the start itself.
    pub path: Vec<u8>,
    /// What is wrong.
    pub error: Error,
}

/// A directory that is being walked.
struct Level {
    node: Node,
    page: vec::IntoIter<Listed>,
    next: Option<Cursor>,
    /// Length of its path.
    path: usize,
}

/// A walk; an iterator over what is found.
pub struct Walk<'t> {
    tree: &'t dyn Tree,
    levels: Vec<Level>,
    path: Vec<u8>,
    depth: usize,
    left: u64,
    trouble: Option<Trouble>,
    cut: bool,
}

impl<'t> Walk<'t> {
    /// Starts below `directory`: at most `entries` names, and `depth` levels ([`DEPTH`] at most).
    pub fn new(tree: &'t dyn Tree, directory: Node, entries: u64, depth: usize) -> Self {
        let start =
            Level { node: directory, page: Vec::new().into_iter(), next: Some(Cursor(0)), path: 0 };
        Self {
            tree,
            levels: vec![start],
            path: Vec::new(),
            depth: depth.min(DEPTH),
            left: entries,
            trouble: None,
            cut: false,
        }
    }

    /// Whether there was more than the number of names allowed.
    pub fn was_cut(&self) -> bool {
        self.cut
    }

    /// Names that may still come.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Does not go into what the last step found.
    pub fn pass_over(&mut self, step: &Step) {
        // A directory that is to be gone into has a level already.
        self.levels.truncate(step.depth);
    }

    fn trouble(&self, error: Error) -> Trouble {
        Trouble { path: self.path.clone(), error }
    }

    /// Reads on in the innermost directory.
    fn turn(&mut self) -> Result<(), Trouble> {
        let Some(level) = self.levels.last_mut() else { return Ok(()) };
        self.path.truncate(level.path);
        let Some(cursor) = level.next.take() else {
            self.levels.pop();
            return Ok(());
        };
        let error = match self.tree.list(level.node, cursor, PAGE) {
            Ok(listing) if listing.next.is_some() && listing.entries.is_empty() => {
                Error::corrupt("a listing goes on without names")
            }
            Ok(listing) => {
                level.next = listing.next;
                level.page = listing.entries.into_iter();
                return Ok(());
            }
            Err(error) => error,
        };
        self.levels.pop();
        Err(self.trouble(error))
    }

    /// Judges a name, and goes into it where it is a directory.
    fn enter(&mut self, listed: Listed) -> Result<Step, Trouble> {
        let (parent, length) = self.levels.last().map_or((Node(0), 0), |l| (l.node, l.path));
        self.path.truncate(length);
        if !proper(&listed.name) {
            let name = super::names::line(listed.name.get(..NAME).unwrap_or(&listed.name));
            return Err(self.trouble(Error::corrupt(format!("a name that is none: \"{name}\""))));
        }
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&listed.name);
        let depth = self.levels.len();
        let directory = matches!(&listed.attributes, Ok(a) if a.file_type == FileType::Directory);
        if directory && self.levels.iter().any(|level| level.node == listed.node) {
            return Err(self.trouble(Error::corrupt("a directory that is inside itself")));
        }
        if directory && depth >= self.depth {
            let text = format!("directories deeper than {} are not entered", self.depth);
            self.trouble = Some(self.trouble(Error::limit(text)));
        } else if directory {
            self.levels.push(Level {
                node: listed.node,
                page: Vec::new().into_iter(),
                next: Some(Cursor(0)),
                path: self.path.len(),
            });
        }
        Ok(Step { path: self.path.clone(), depth, parent, listed })
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Step, Trouble>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(trouble) = self.trouble.take() {
            return Some(Err(trouble));
        }
        loop {
            let Some(listed) = self.levels.last_mut()?.page.next() else {
                match self.turn() {
                    Ok(()) => continue,
                    Err(trouble) => return Some(Err(trouble)),
                }
            };
            if self.left == 0 {
                self.cut = true;
                self.levels.clear();
                self.path.clear();
                return Some(Err(self.trouble(Error::limit("there are more names than allowed"))));
            }
            self.left -= 1;
            return Some(self.enter(listed));
        }
    }
}

/// Whether a name is one component of a path and nothing else.
pub(crate) fn proper(name: &[u8]) -> bool {
    let other = |b: &u8| *b == b'/' || *b == 0;
    !name.is_empty()
        && name.len() <= NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(other)
}

#[cfg(test)]
mod tests {
    use super::super::tree::{Fake, dir, file};
    use super::*;

    fn paths(walk: Walk<'_>) -> Vec<String> {
        walk.map(|step| match step {
            Ok(step) => super::super::names::shown(&step.path),
            Err(trouble) => {
                format!("{}: {}", super::super::names::shown(&trouble.path), trouble.error)
            }
        })
        .collect()
    }

    #[test]
    fn a_directory_comes_before_what_is_in_it() {
        let tree =
            Fake::new(vec![dir("a", vec![file("x", b""), dir("b", vec![])]), file("c", b"")]);
        assert_eq!(paths(Walk::new(&tree, Node(0), 10, DEPTH)), ["a", "a/x", "a/b", "c"]);
    }

    #[test]
    fn bounds_and_damage_are_told() {
        let mut tree = Fake::new(vec![
            dir("a", vec![dir("b", vec![file("x", b"")])]),
            file("..", b""),
            file("z", b""),
        ]);
        let text = paths(Walk::new(&tree, Node(0), 10, 1));
        assert_eq!(text[0], "a");
        assert!(text[1].starts_with("a: directories deeper"), "{text:?}");
        assert!(text[2].contains("a name that is none"), "{text:?}");
        let mut walk = Walk::new(&tree, Node(0), 1, DEPTH);
        assert_eq!(walk.by_ref().filter(Result::is_ok).count(), 1);
        assert!(walk.was_cut());
        let b = tree.find("a/b");
        tree.fail_list(b);
        assert!(paths(Walk::new(&tree, Node(0), 10, DEPTH)).iter().any(|t| t.starts_with("a/b: ")));
    }

    #[test]
    fn what_is_passed_over_is_not_gone_into() {
        let tree = Fake::new(vec![dir("a", vec![file("x", b"")]), dir("b", vec![file("y", b"")])]);
        let mut walk = Walk::new(&tree, Node(0), 10, DEPTH);
        let mut found = Vec::new();
        while let Some(Ok(step)) = walk.next() {
            if step.path == b"a" {
                walk.pass_over(&step);
            }
            found.push(super::super::names::shown(&step.path));
        }
        assert_eq!(found, ["a", "b", "b/y"]);
    }

    #[test]
    fn a_directory_inside_itself_ends() {
        let mut tree = Fake::new(vec![dir("a", vec![dir("b", vec![])])]);
        let (a, b) = (tree.find("a"), tree.find("a/b"));
        tree.link_into(b, "again", a);
        let text = paths(Walk::new(&tree, Node(0), 100, DEPTH));
        assert_eq!(text.len(), 3);
        assert!(text[2].contains("inside itself"), "{text:?}");
    }
}
