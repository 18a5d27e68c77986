//! Directories and files as one archive, streamed: tar.gz or ZIP.
//!
//! What must stay true:
//!
//! * Unpacking it as anybody writes nothing outside the directory where it is unpacked: names are
//!   relative, without `..`; links that lead out are not in it; modes are masked to 0777; devices, pipes
//!   and sockets are not in it.
//! * Memory does not grow with the number of entries or their size, and nothing is made ahead of what
//!   `out` takes. Of directories with very many names only so many names and links are kept in memory.
//! * A link never stands where a directory or file of the archive goes, on systems that do not tell case
//!   apart either; see `levels`.
//! * It ends soon when nobody takes it any more, whatever the trees hold.
//! * What is missing or changed has a line in `RESTORE-ERRORS.txt`, the last entry.
//! * Only [`write()`] returning `Ok` makes an archive whole: an error or a panic leaves it without its end.

mod content;
mod deflate;
mod levels;
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
use self::levels::{Level, Levels, Link, Place};
pub use self::report::Report;
use super::names;
use super::walk::{DEPTH, Step, Walk};
use crate::pages::PageBuffer;

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

/// What an archive is made of.
pub struct Order<'o> {
    /// What goes into it.
    pub parts: &'o [Part<'o>],
    /// What should be in it and cannot be: its name, and why.
    pub missing: &'o [(String, String)],
    /// Its bounds.
    pub limits: Limits,
    /// Whether somebody still takes it; asked at every step.
    pub alive: &'o dyn Fn() -> bool,
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
    /// Whether an entry more and the report fit in.
    fn has_room(&self) -> bool {
        true
    }
    fn directory(&mut self, meta: &Meta<'_>) -> io::Result<()>;
    fn link(&mut self, meta: &Meta<'_>, target: &[u8]) -> io::Result<()>;
    fn begin(&mut self, meta: &Meta<'_>) -> io::Result<()>;
    fn data(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn zeroes(&mut self, count: u64) -> io::Result<()>;
    fn end(&mut self) -> io::Result<()>;
    fn finish(&mut self) -> io::Result<()>;
}

/// Writes an archive. `scratch` is a directory on a disk for a file without a name, which a
/// ZIP's list of entries needs until its end (about 120 bytes and the path for each).
///
/// # Errors
/// Where `out` or the scratch file fails, or nobody takes it any more (`BrokenPipe`); the archive is then incomplete and does not look complete.
/// What cannot be read is in the report instead.
pub fn write(
    format: Format,
    order: &Order<'_>,
    scratch: &Path,
    out: &mut dyn Write,
) -> io::Result<Report> {
    match format {
        Format::TarGz => fill(&mut tar::Tar::new(out)?, format, order),
        Format::Zip => fill(&mut zip::Zip::new(out, scratch)?, format, order),
    }
}

fn fill(container: &mut dyn Container, format: Format, order: &Order<'_>) -> io::Result<Report> {
    let mut making = Making {
        container,
        format,
        limits: order.limits,
        alive: order.alive,
        report: Report::default(),
        buffer: PageBuffer::new(0, READ),
        left: order.limits.entries,
        levels: Levels::new(),
        full: false,
    };
    for (name, why) in order.missing {
        making.report.add("UNREADABLE", name.as_bytes(), why);
    }
    let mut tops: Vec<Vec<u8>> = Vec::new();
    for part in order.parts {
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
    alive: &'c dyn Fn() -> bool,
    report: Report,
    buffer: PageBuffer,
    left: u64,
    /// The directories that the walk is in.
    levels: Levels,
    /// No further entry fits in.
    full: bool,
}

impl Making<'_> {
    /// Ends it where nobody takes it.
    fn check(&self) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "nobody takes the archive");
        (self.alive)().then_some(()).ok_or_else(gone)
    }

    /// Whether one more entry fits in; the first that does not has a line.
    fn fits(&mut self, shown: &[u8]) -> bool {
        if !self.full && !self.container.has_room() {
            self.full = true;
            let why = "the list of entries is as long as it may be; nothing more is in the archive";
            self.report.add("CUT", shown, why);
        }
        !self.full
    }

    fn part(&mut self, part: &Part<'_>, top: &[u8]) -> io::Result<()> {
        self.check()?;
        if !self.fits(top) {
            return Ok(());
        }
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
        self.levels.enter(top.to_vec(), top.to_vec(), Place::Own);
        let mut walk = Walk::new(part.tree, part.node, self.left, self.limits.depth);
        while let Some(step) = walk.next().filter(|_| !self.full) {
            self.check()?;
            match step {
                Ok(step) => {
                    if !self.step(part.tree, top, &step)? {
                        walk.pass_over(&step);
                    }
                }
                Err(trouble) => {
                    let word = if walk.was_cut() { "CUT" } else { "INCOMPLETE" };
                    let path = join(top, &trouble.path);
                    self.report.add(word, &path, &trouble.error.message);
                }
            }
        }
        self.left = walk.left();
        self.leave(part.tree, 0)
    }

    /// Leaves directories until so many are left. Their links are written then.
    fn leave(&mut self, tree: &dyn Tree, depth: usize) -> io::Result<()> {
        while self.levels.depth() > depth {
            let Some(mut level) = self.levels.leave() else { break };
            let depth = self.levels.depth() + 1;
            for link in std::mem::take(&mut level.links) {
                self.check()?;
                self.link(tree, &mut level, &link, depth)?;
            }
        }
        Ok(())
    }

    fn link(
        &mut self,
        tree: &dyn Tree,
        level: &mut Level,
        link: &Link,
        depth: usize,
    ) -> io::Result<()> {
        let shown = join(&level.shown, &link.name);
        if !self.fits(&shown) {
            return Ok(());
        }
        if let Some(why) = level.refuses(link.written()) {
            self.report.add("SKIPPED", &shown, why);
            return Ok(());
        }
        self.renamed(&shown, link.safe.as_deref());
        let path = join(&level.path, link.written());
        self.entry(tree, link.node, &link.attributes, &path, &shown, depth)
    }

    fn renamed(&mut self, shown: &[u8], safe: Option<&[u8]>) {
        if let Some(name) = safe {
            self.report.add("RENAMED", shown, &names::line(name));
        }
    }

    /// Writes what the walk found. Gives whether the walk is to go into it.
    fn step(&mut self, tree: &dyn Tree, top: &[u8], step: &Step) -> io::Result<bool> {
        self.leave(tree, step.depth)?;
        let shown = join(top, &step.path);
        if !self.fits(&shown) {
            return Ok(false);
        }
        let attributes = match &step.listed.attributes {
            Ok(attributes) => attributes,
            Err(error) => {
                self.report.add("UNREADABLE", &shown, &error.message);
                return Ok(false);
            }
        };
        let name = match self.format {
            Format::TarGz => None,
            Format::Zip => match safe_name(tree, step) {
                Ok(name) => name,
                Err(error) => {
                    self.report.add("UNREADABLE", &shown, &error.message);
                    return Ok(false);
                }
            },
        };
        let node = step.listed.node;
        if attributes.file_type == FileType::Symlink {
            let attributes = attributes.clone();
            let link = Link { node, name: step.listed.name.clone(), safe: name, attributes };
            if !self.levels.wait(link) {
                self.report.add("SKIPPED", &shown, "a link among too many links");
            }
            return Ok(false);
        }
        let written = name.as_deref().unwrap_or(&step.listed.name);
        let mut place = Place::Own;
        if matches!(attributes.file_type, FileType::Directory | FileType::File) {
            place = self.levels.take(written);
            if place == Place::Taken {
                self.report.add("SKIPPED", &shown, "a name that the directory has twice");
                return Ok(false);
            }
        }
        let path = join(self.levels.path(), written);
        self.renamed(&shown, name.as_deref());
        if attributes.file_type == FileType::Directory {
            self.levels.enter(path.clone(), shown.clone(), place);
        }
        self.entry(tree, node, attributes, &path, &shown, step.depth)?;
        Ok(true)
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
        let mut content = Content::new(tree, node, meta.size, self.alive);
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
            self.check()?;
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
