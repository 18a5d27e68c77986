//! Finds a node by its path, inside one file system.
//!
//! Nothing outside of the volume is ever looked at: a symbolic link starts where it lies or at the
//! volume's root, and no `..` leads above that root.

use crate::error::{Error, ErrorKind, Result};
use crate::fs::{Attributes, FileSystem, FileType, Node};

/// Bytes of a path, or of a link's target.
pub const PATH_MAX: usize = 64 << 10;
/// Bytes of one name.
pub const NAME_MAX: usize = 1024;
/// Directories above a node.
pub const DEPTH_MAX: usize = 4096;
/// Symbolic links that are followed for one path.
pub const HOPS_MAX: usize = 40;
/// Names that are looked up for one path, those of link targets included.
const STEPS_MAX: usize = 4 * DEPTH_MAX;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The node.
    pub node: Node,
    /// The absolute path without links, `.` and `..`: `/` for the root.
    pub path: Vec<u8>,
    /// What is known of the node.
    pub attributes: Attributes,
}

/// Where a walk stands: the names from the root, and what each of them is.
struct Walk {
    root: (Node, Attributes),
    below: Vec<(Vec<u8>, Node, Attributes)>,
}

impl Walk {
    fn node(&self) -> Node {
        self.below.last().map_or(self.root.0, |(_, node, _)| *node)
    }

    fn attributes(&self) -> &Attributes {
        self.below.last().map_or(&self.root.1, |(_, _, attributes)| attributes)
    }

    fn path(&self) -> Vec<u8> {
        let mut path = Vec::new();
        for (name, ..) in &self.below {
            path.push(b'/');
            path.extend(name);
        }
        if path.is_empty() {
            path.push(b'/');
        }
        path
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.path()).into_owned()
    }
}

/// Finds `path` from the root on; empty names and `.` count for nothing. Symbolic links on the way are
/// followed inside the volume, and one at the end where `follow_last` says so.
///
/// # Errors
/// `NotFound` where a name is missing; `NotADirectory` where something else is on the way;
/// `Unsupported` for a path with `..` or NUL; `Limit` for more than the bounds above; whatever the file
/// system fails with.
pub fn resolve(fs: &dyn FileSystem, path: &[u8], follow_last: bool) -> Result<Resolved> {
    let mut pending = Vec::new();
    add_names(&mut pending, path)?;
    if pending.iter().any(|name| name == b"..") {
        return Err(Error::unsupported("a path with `..` is not looked up"));
    }
    let root = fs.root();
    let mut walk = Walk { root: (root, fs.stat(root)?), below: Vec::new() };
    let (mut hops, mut steps) = (0, 0);
    while let Some(name) = pending.pop() {
        steps += 1;
        if steps > STEPS_MAX {
            return Err(Error::limit(format!("a path of more than {STEPS_MAX} names")));
        }
        if walk.attributes().file_type != FileType::Directory {
            let message = format!("{} is not a directory", walk.shown());
            return Err(Error::new(ErrorKind::NotADirectory, message));
        }
        if name == b".." {
            walk.below.pop();
            continue;
        }
        let found = fs.lookup(walk.node(), &name)?;
        let node = found.ok_or_else(|| missing(&walk, &name))?;
        let attributes = fs.stat(node)?;
        if attributes.file_type == FileType::Symlink && (follow_last || !pending.is_empty()) {
            hops += 1;
            if hops > HOPS_MAX {
                let message = format!("too many levels of symbolic links: more than {HOPS_MAX}");
                return Err(Error::limit(message));
            }
            let target = fs.read_link(node)?;
            if target.is_empty() {
                return Err(missing(&walk, &name));
            }
            if target.starts_with(b"/") {
                walk.below.clear();
            }
            add_names(&mut pending, &target)?;
        } else {
            if walk.below.len() >= DEPTH_MAX {
                return Err(Error::limit(format!("more than {DEPTH_MAX} directories deep")));
            }
            walk.below.push((name, node, attributes));
        }
    }
    Ok(Resolved { node: walk.node(), path: walk.path(), attributes: walk.attributes().clone() })
}

/// Puts the names of `path` before those that are `pending`, which is kept with the next one last.
fn add_names(pending: &mut Vec<Vec<u8>>, path: &[u8]) -> Result<()> {
    if path.len() > PATH_MAX {
        return Err(Error::limit(format!("a path of more than {PATH_MAX} bytes")));
    }
    if path.contains(&0) {
        return Err(Error::unsupported("a path with a NUL byte is not looked up"));
    }
    let names = path.split(|&b| b == b'/').filter(|name| !name.is_empty() && *name != b".");
    for name in names.rev() {
        if name.len() > NAME_MAX {
            return Err(Error::limit(format!("a name of more than {NAME_MAX} bytes")));
        }
        pending.push(name.to_vec());
    }
    Ok(())
}

fn missing(walk: &Walk, name: &[u8]) -> Error {
    let name = String::from_utf8_lossy(name);
    Error::not_found(format!("there is no `{name}` in {}", walk.shown()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryFs;

    fn tree() -> MemoryFs {
        let mut fs = MemoryFs::new();
        fs.file("etc/passwd", "root");
        fs.file("a/b/c", "deep");
        fs.file(b"a/\xff\xfe", "no UTF-8");
        fs.symlink("a/rel", "b/./c");
        fs.symlink("a/up", "../etc/passwd");
        fs.symlink("a/escape", "../../../../../etc/passwd");
        fs.symlink("a/abs", "/etc");
        fs.symlink("a/dangling", "nowhere");
        fs.symlink("a/empty", "");
        fs.symlink("a/through-file", "b/c/../c");
        fs.symlink("loop-a", "loop-b");
        fs.symlink("loop-b", "loop-a");
        fs.symlink("self", "self/x");
        fs
    }

    fn path_of(path: &[u8]) -> String {
        String::from_utf8(resolve(&tree(), path, true).unwrap().path).unwrap()
    }

    fn kind_of(path: &[u8]) -> ErrorKind {
        resolve(&tree(), path, true).unwrap_err().kind
    }

    #[test]
    fn names_are_found_from_the_root_on() {
        for path in [&b""[..], b"/", b"//./", b"."] {
            assert_eq!(path_of(path), "/");
        }
        assert_eq!(path_of(b"a//b/./c/"), "/a/b/c");
        assert_eq!(resolve(&tree(), b"a/\xff\xfe", true).unwrap().path, b"/a/\xff\xfe");
    }

    #[test]
    fn links_are_followed_inside_the_volume_and_never_above_its_root() {
        assert_eq!(path_of(b"a/rel"), "/a/b/c");
        assert_eq!(path_of(b"a/up"), "/etc/passwd");
        assert_eq!(path_of(b"a/escape"), "/etc/passwd");
        assert_eq!(path_of(b"a/abs/passwd"), "/etc/passwd");
    }

    #[test]
    fn a_link_at_the_end_is_followed_only_where_that_is_asked_for() {
        let found = resolve(&tree(), b"a/abs", false).unwrap();
        assert_eq!(found.attributes.file_type, FileType::Symlink);
        assert_eq!(found.path, b"/a/abs");
        assert_eq!(resolve(&tree(), b"a/abs/passwd", false).unwrap().path, b"/etc/passwd");
    }

    #[test]
    fn what_is_not_there_or_no_directory_is_told() {
        for path in [&b"nothing"[..], b"a/nothing/x", b"a/dangling", b"a/empty"] {
            assert_eq!(kind_of(path), ErrorKind::NotFound);
        }
        for path in [&b"etc/passwd/x"[..], b"a/through-file"] {
            assert_eq!(kind_of(path), ErrorKind::NotADirectory);
        }
    }

    #[test]
    fn dots_that_lead_up_and_nul_are_refused_in_a_given_path() {
        for path in [&b".."[..], b"a/../etc", b"/../x", b"a/b\0c"] {
            assert_eq!(kind_of(path), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn loops_and_endless_paths_end_at_a_bound() {
        for path in [&b"loop-a"[..], b"loop-a/x", b"self", b"self/y"] {
            let error = resolve(&tree(), path, true).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Limit);
            assert!(error.message.contains("too many levels of symbolic links"));
        }
        assert_eq!(kind_of(&vec![b'x'; NAME_MAX + 1]), ErrorKind::Limit);
        assert_eq!(kind_of(&b"x/".repeat(PATH_MAX)), ErrorKind::Limit);
        let mut fs = MemoryFs::new();
        fs.symlink("spin", "d/../".repeat(12_000));
        fs.dir("d");
        assert_eq!(resolve(&fs, b"spin", true).unwrap_err().kind, ErrorKind::Limit);
    }

    #[test]
    fn exactly_forty_links_are_followed() {
        let mut fs = MemoryFs::new();
        fs.file("0", "end");
        for number in 1..=41 {
            fs.symlink(number.to_string(), (number - 1).to_string());
        }
        assert_eq!(resolve(&fs, b"40", true).unwrap().path, b"/0");
        assert_eq!(resolve(&fs, b"41", true).unwrap_err().kind, ErrorKind::Limit);
    }

    #[test]
    fn a_directory_that_holds_itself_ends_at_the_depth() {
        let mut fs = MemoryFs::new();
        let dir = fs.dir("d");
        fs.link(dir, "d", dir);
        let path = b"d/".repeat(DEPTH_MAX + 1);
        assert_eq!(resolve(&fs, &path, true).unwrap_err().kind, ErrorKind::Limit);
        assert!(resolve(&fs, &path[2..], true).is_ok());
    }
}
