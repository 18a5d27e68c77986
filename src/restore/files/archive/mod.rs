//! Directories and files as one archive, streamed: tar.gz or ZIP.
//!
//! What must stay true:
//!
//! * Unpacking it as anybody writes nothing outside the directory where it is unpacked: names are
//!   relative, without `..`; links that lead out are not in it; modes are masked to 0777; devices, pipes
//!   and sockets are not in it.
//! * Memory does not grow with the number of entries or their size, and nothing is made ahead of what
//!   `out` takes.
//! * What is missing or changed has a line in `RESTORE-ERRORS.txt`, the last entry.
//! * Only [`write()`] returning `Ok` makes an archive whole: an error or a panic leaves it without its end.

mod content;
mod deflate;
mod report;
mod safe;
mod tar;
#[cfg(test)]
mod tests;
mod zip;

use std::io::{self, Write};
use std::path::Path;

use guest::tree::READ;
use guest::{Attributes, Error, FileType, Node, Time, Tree};

use self::content::{Content, Piece};
pub use self::report::Report;
use super::names;
use super::walk::{DEPTH, Step, Walk};

/// Name of the entry that tells what is missing.
pub const ERRORS: &str = "RESTORE-ERRORS.txt";

/// Form of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// tar with PAX headers, compressed with gzip.
    TarGz,
    /// ZIP with DEFLATE.
    Zip,
}

/// Bounds of an archive. What is beyond has a line in the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most names.
    pub entries: u64,
    /// Most bytes of files as they unpack, holes included; a file that does not fit is left out.
    pub bytes: u64,
    /// Most levels below a part's top.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 10_000_000, bytes: 64 << 40, depth: DEPTH }
    }
}

/// What goes into an archive: a directory with all below it, or one file.
pub struct Part<'t> {
    /// Its name at the top of the archive; made safe where it is not.
    pub name: Vec<u8>,
    /// The tree it is in.
    pub tree: &'t dyn Tree,
    /// The directory or file.
    pub node: Node,
}

/// What an entry says of itself.
struct Meta<'a> {
    path: &'a [u8],
    mode: u32,
    uid: u32,
    gid: u32,
    modified: Option<Time>,
    size: u64,
}

impl<'a> Meta<'a> {
    fn new(path: &'a [u8], attributes: &Attributes) -> Self {
        let file = attributes.file_type == FileType::File;
        Self {
            path,
            mode: attributes.mode & 0o777,
            uid: attributes.uid,
            gid: attributes.gid,
            modified: attributes.modified,
            size: if file { attributes.size } else { 0 },
        }
    }
}

/// A form of archive. A file is `begin`, what it holds, `end`; what is less than its size then is made
/// good as the form needs it.
trait Container {
    fn directory(&mut self, meta: &Meta<'_>) -> io::Result<()>;
    fn link(&mut self, meta: &Meta<'_>, target: &[u8]) -> io::Result<()>;
    fn begin(&mut self, meta: &Meta<'_>) -> io::Result<()>;
    fn data(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn zeroes(&mut self, count: u64) -> io::Result<()>;
    fn end(&mut self) -> io::Result<()>;
    fn finish(&mut self) -> io::Result<()>;
}

/// Writes an archive of `parts`. `scratch` is a directory on a disk for a file without a name, which a
/// ZIP's list of entries needs until its end (about 120 bytes and the path for each).
///
/// # Errors
/// Where `out` or the scratch file fails; the archive is then incomplete and does not look complete.
/// What cannot be read is in the report instead.
pub fn write(
    format: Format,
    parts: &[Part<'_>],
    limits: &Limits,
    scratch: &Path,
    out: &mut dyn Write,
) -> io::Result<Report> {
    match format {
        Format::TarGz => fill(&mut tar::Tar::new(out)?, format, parts, limits),
        Format::Zip => fill(&mut zip::Zip::new(out, scratch)?, format, parts, limits),
    }
}

fn fill(
    container: &mut dyn Container,
    format: Format,
    parts: &[Part<'_>],
    limits: &Limits,
) -> io::Result<Report> {
    let mut making = Making {
        container,
        format,
        limits: *limits,
        report: Report::default(),
        buffer: vec![0; READ],
        left: limits.entries,
        dirs: Vec::new(),
    };
    let mut tops: Vec<Vec<u8>> = Vec::new();
    for part in parts {
        let top = top_name(&part.name, &tops);
        making.part(part, &top)?;
        tops.push(top);
    }
    making.finish(&tops)
}

/// A name for the top of an archive that is one safe component and not among `taken`.
fn top_name(name: &[u8], taken: &[Vec<u8>]) -> Vec<u8> {
    let safe = safe::windows(name).unwrap_or_else(|| name.to_vec());
    let safe = if super::walk::proper(&safe) { safe } else { b"files".to_vec() };
    let mut unique = safe.clone();
    let mut number = 2;
    while taken.contains(&unique) {
        unique = [&safe, format!("-{number}").as_bytes()].concat();
        number += 1;
    }
    unique
}

/// An archive in the making.
struct Making<'c> {
    container: &'c mut dyn Container,
    format: Format,
    limits: Limits,
    report: Report,
    buffer: Vec<u8>,
    left: u64,
    /// Paths in the archive of the directories that the walk is in, the top first.
    dirs: Vec<Vec<u8>>,
}

impl Making<'_> {
    fn part(&mut self, part: &Part<'_>, top: &[u8]) -> io::Result<()> {
        let attributes = match part.tree.stat(part.node) {
            Ok(attributes) => attributes,
            Err(error) => {
                self.report.add("UNREADABLE", top, &error.message);
                return Ok(());
            }
        };
        if attributes.file_type != FileType::Directory {
            return self.entry(part.tree, part.node, &attributes, top, top, 0);
        }
        self.container.directory(&Meta::new(top, &attributes))?;
        self.report.entries += 1;
        self.dirs = vec![top.to_vec()];
        let mut walk = Walk::new(part.tree, part.node, self.left, self.limits.depth);
        while let Some(step) = walk.next() {
            match step {
                Ok(step) => self.step(part.tree, top, &step)?,
                Err(trouble) => {
                    let word = if walk.was_cut() { "CUT" } else { "INCOMPLETE" };
                    let path = join(top, &trouble.path);
                    self.report.add(word, &path, &trouble.error.message);
                }
            }
        }
        self.left = walk.left();
        Ok(())
    }

    fn step(&mut self, tree: &dyn Tree, top: &[u8], step: &Step) -> io::Result<()> {
        let shown = join(top, &step.path);
        let attributes = match &step.listed.attributes {
            Ok(attributes) => attributes,
            Err(error) => {
                self.report.add("UNREADABLE", &shown, &error.message);
                return Ok(());
            }
        };
        self.dirs.truncate(step.depth);
        let name = match self.format {
            Format::TarGz => None,
            Format::Zip => match safe_name(tree, step) {
                Ok(name) => name,
                Err(error) => {
                    self.report.add("UNREADABLE", &shown, &error.message);
                    return Ok(());
                }
            },
        };
        let above = self.dirs.last().map_or(top, Vec::as_slice);
        let path = join(above, name.as_deref().unwrap_or(&step.listed.name));
        if let Some(name) = name {
            self.report.add("RENAMED", &shown, &names::line(&name));
        }
        if attributes.file_type == FileType::Directory {
            self.dirs.push(path.clone());
        }
        self.entry(tree, step.listed.node, attributes, &path, &shown, step.depth)
    }

    /// Writes one entry. `shown` is its path for people.
    fn entry(
        &mut self,
        tree: &dyn Tree,
        node: Node,
        attributes: &Attributes,
        path: &[u8],
        shown: &[u8],
        depth: usize,
    ) -> io::Result<()> {
        let meta = Meta::new(path, attributes);
        // A directory's name ends with a slash.
        if self.format == Format::Zip && path.len() >= usize::from(u16::MAX) {
            self.report.add("SKIPPED", shown, "its path is too long for a ZIP archive");
            return Ok(());
        }
        let why = match attributes.file_type {
            FileType::Directory => {
                self.container.directory(&meta)?;
                self.report.entries += 1;
                return Ok(());
            }
            FileType::File => return self.file(tree, node, &meta, shown),
            FileType::Symlink => match tree.read_link(node) {
                Ok(target) if depth > 0 && safe::link_stays_inside(&target, depth - 1) => {
                    self.container.link(&meta, &target)?;
                    self.report.entries += 1;
                    return Ok(());
                }
                Ok(target) => {
                    let target = target.get(..1024).unwrap_or(&target);
                    format!("a link out of what is archived, to {}", names::line(target))
                }
                Err(error) => error.message,
            },
            FileType::CharDevice => "a character device".to_owned(),
            FileType::BlockDevice => "a block device".to_owned(),
            FileType::Fifo => "a pipe".to_owned(),
            FileType::Socket => "a socket".to_owned(),
            FileType::Opaque => {
                attributes.note.clone().unwrap_or_else(|| "it cannot be read here".to_owned())
            }
        };
        self.report.add("SKIPPED", shown, &why);
        Ok(())
    }

    fn file(
        &mut self,
        tree: &dyn Tree,
        node: Node,
        meta: &Meta<'_>,
        shown: &[u8],
    ) -> io::Result<()> {
        if meta.size > self.limits.bytes - self.report.bytes {
            let why = format!("{} bytes are more than an archive may have", meta.size);
            self.report.add("CUT", shown, &why);
            return Ok(());
        }
        let mut content = Content::new(tree, node, meta.size);
        // What cannot be read from its beginning is not in the archive at all.
        let mut piece = match content.next(&mut self.buffer) {
            Ok(piece) => piece,
            Err(error) => {
                self.report.add("UNREADABLE", shown, &error.message);
                return Ok(());
            }
        };
        self.container.begin(meta)?;
        while let Some(part) = piece {
            match part {
                Piece::Data(count) => {
                    self.container.data(self.buffer.get(..count).unwrap_or_default())?;
                }
                Piece::Zeroes(count) => self.container.zeroes(count)?,
            }
            piece = match content.next(&mut self.buffer) {
                Ok(piece) => piece,
                Err(error) => {
                    self.damaged(shown, content.at(), &error);
                    None
                }
            };
        }
        self.container.end()?;
        self.report.entries += 1;
        self.report.bytes += meta.size;
        Ok(())
    }

    fn damaged(&mut self, shown: &[u8], at: u64, error: &Error) {
        let rest = match self.format {
            Format::TarGz => "is zeroes here",
            Format::Zip => "is missing",
        };
        let why = format!("what follows byte {at} {rest}: {}", error.message);
        self.report.add("DAMAGED", shown, &why);
    }

    fn finish(self, tops: &[Vec<u8>]) -> io::Result<Report> {
        if !self.report.is_clean() {
            let text = self.report.text();
            let name = top_name(ERRORS.as_bytes(), tops);
            let size = text.len() as u64;
            let (mode, modified) = (0o644, Some(now()));
            let meta = Meta { path: &name, mode, uid: 0, gid: 0, modified, size };
            self.container.begin(&meta)?;
            self.container.data(text.as_bytes())?;
            self.container.end()?;
        }
        self.container.finish()?;
        Ok(self.report)
    }
}

fn now() -> Time {
    Time { seconds: jiff::Timestamp::now().as_second(), nanoseconds: 0 }
}

fn join(above: &[u8], name: &[u8]) -> Vec<u8> {
    if name.is_empty() {
        return above.to_vec();
    }
    [above, b"/", name].concat()
}

/// The name for a ZIP archive where it must differ. One that is in the directory as it is goes before
/// one that was changed: that gets `%~2`, which no changed name has.
fn safe_name(tree: &dyn Tree, step: &Step) -> Result<Option<Vec<u8>>, Error> {
    let Some(safe) = safe::windows(&step.listed.name) else { return Ok(None) };
    let mut name = safe.clone();
    for number in 2..100 {
        if tree.lookup(step.parent, &name)?.is_none() {
            return Ok(Some(name));
        }
        name = [&safe, format!("%~{number}").as_bytes()].concat();
    }
    Err(Error::limit("no safe name is free for it"))
}
