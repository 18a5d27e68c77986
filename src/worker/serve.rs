//! The worker's side: opens what it got, and answers until the hub goes.

use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use guest::local::LocalTree;
use guest::{Error, ErrorKind, Guest, Node, Result, Status, Tree, VolumeAbout, tree};
use serde::Serialize;

use super::disk::Received;
use super::protocol::{Call, Disks, FILES, MESSAGE, NOTES, Opened, Request, SENTENCE};
use super::sandbox::Sandbox;
use super::{disk, frames, sandbox};
use crate::pages::PageBuffer;

/// Reads in a row at which the next one is done before it is asked for.
const SEQUENTIAL: u32 = 2;

/// Serves whoever holds the other end of standard input, with `memory` bytes at most. Ends with it.
///
/// # Errors
/// What the sandbox needs and is not there; a hub that does not keep to the protocol.
pub fn serve(memory: u64, parent: u32) -> io::Result<()> {
    let channel = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Whoever fails again and again does not wait for somebody to read it.
    rustix::io::ioctl_fionbio(io::stderr(), true)?;
    let sandbox = sandbox::enter(memory, parent, &[channel.as_raw_fd()])?;
    match answer(&channel, sandbox) {
        // The hub closed the channel.
        Err(e) if [io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe].contains(&e.kind()) => {
            Ok(())
        }
        result => result,
    }
}

fn answer(channel: &UnixStream, sandbox: Sandbox) -> io::Result<()> {
    let guest = match open(channel)? {
        Ok(guest) => guest,
        Err(error) => return frames::send(channel, &Err::<Opened, _>(error)),
    };
    let volumes = guest.volumes.iter().map(|volume| fit(volume.about.clone())).collect();
    let opened: Result<Opened> = Ok(Opened { sandbox, volumes, notes: fit_notes(&guest.notes) });
    frames::send(channel, &opened)?;
    let mut reader = Reader::default();
    loop {
        let request: Request = frames::receive(channel, None)?;
        let most = request.call.most();
        let index = usize::try_from(request.volume).unwrap_or(usize::MAX);
        let tree = guest.volumes.get(index).map_or_else(
            || Err(Error::not_found(format!("there is no volume {index}"))),
            LocalTree::new,
        );
        let tree = match tree {
            Ok(tree) => tree,
            Err(error) => {
                reply(channel, most, Err::<(), _>(error))?;
                continue;
            }
        };
        match request.call {
            Call::Root => reply(channel, most, tree.root())?,
            Call::Stat(node) => reply(channel, most, tree.stat(node))?,
            Call::List { directory, cursor, limit } => {
                let limit = usize::try_from(limit).unwrap_or(tree::LISTING);
                reply(channel, most, tree.list(directory, cursor, limit))?;
            }
            Call::Lookup { directory, name } => {
                reply(channel, most, tree.lookup(directory, &name))?;
            }
            Call::Resolve { path, follow } => reply(channel, most, tree.resolve(&path, follow))?,
            Call::Read { file, offset, length } => {
                let place = Read { volume: index, file, offset, length };
                reader.answer(channel, &tree, place)?;
            }
            Call::ReadLink(link) => reply(channel, most, tree.read_link(link))?,
            Call::Xattrs(node) => reply(channel, most, tree.xattrs(node))?,
            Call::Layout { file, from } => reply(channel, most, tree.layout(file, from))?,
        }
    }
}

/// Receives the disks and finds what is on them.
fn open(channel: &UnixStream) -> io::Result<Result<Guest>> {
    let Disks(disks) = frames::receive(channel, None)?;
    let count: usize = disks.iter().map(|disk| disk.files.len()).sum();
    if count > FILES {
        return Err(io::Error::other(format!("{count} files; {FILES} are the most")));
    }
    let twice = disks.iter().flat_map(|disk| &disk.files).filter(|file| file.direct).count();
    let mut fds = frames::receive_files(channel, count + twice)?.into_iter();
    let mut sources = Vec::new();
    for disk in disks {
        let number = usize::try_from(disk.number).unwrap_or(usize::MAX);
        let chain = disk.files.into_iter().map_while(|about| {
            let file = fds.next()?;
            let direct = if about.direct { Some(fds.next()?) } else { None };
            Some(Received { about, file, direct })
        });
        match disk::open(disk.number, chain.collect()) {
            Ok(source) => sources.push((number, source)),
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(Guest::open_numbered(&sources)))
}

fn reply<T: Serialize>(channel: &UnixStream, most: usize, answer: Result<T>) -> io::Result<()> {
    let answer = answer.map_err(shorten);
    match frames::encode_up_to(most, &answer) {
        Ok(frame) => (&*channel).write_all(&frame),
        Err(error) => {
            let error = Error::limit(format!("the answer cannot be sent: {error}"));
            frames::send(channel, &Err::<T, _>(error))
        }
    }
}

fn shorten(mut error: Error) -> Error {
    cut(&mut error.message);
    error
}

/// Cuts a text that is too long to be sent.
fn cut(text: &mut String) {
    if text.len() > SENTENCE {
        let end = (0..=SENTENCE).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
    }
}

/// What is known of a volume, as far as it is told.
fn fit(mut about: VolumeAbout) -> VolumeAbout {
    let VolumeAbout { place, kind, label, uuid, status, .. } = &mut about;
    [place, kind, label, uuid].into_iter().for_each(cut);
    if let Status::Stale(why) | Status::Refused(why) = status {
        cut(why);
    }
    about
}

/// The notes that are told, and how many are not.
fn fit_notes(notes: &[String]) -> Vec<String> {
    let mut told: Vec<_> = notes.iter().take(NOTES).cloned().collect();
    told.iter_mut().for_each(cut);
    if let Some(last) = told.last_mut().filter(|_| notes.len() > NOTES) {
        *last = format!("{} more notes are not told", notes.len() - NOTES + 1);
    }
    told
}

/// Where a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Read {
    volume: usize,
    file: Node,
    offset: u64,
    length: u32,
}

/// Reads files. Whoever reads one in a row finds the next part read already.
#[derive(Default)]
struct Reader {
    buf: PageBuffer,
    /// What `buf` holds, and how many bytes of it.
    ahead: Option<(Read, usize)>,
    /// What would go on where the last one ended, and how many did so.
    next: Option<Read>,
    row: u32,
}

impl Reader {
    fn answer(&mut self, channel: &UnixStream, tree: &impl Tree, read: Read) -> io::Result<()> {
        let found = match self.ahead.take() {
            Some((known, length)) if known == read => Ok(length),
            _ => self.read(tree, read),
        };
        let length = match found {
            Ok(length) => length,
            Err(error) => return reply(channel, MESSAGE, Err::<u32, _>(error)),
        };
        let told = u32::try_from(length).unwrap_or(u32::MAX);
        let head = frames::encode(&Ok::<_, Error>(told))?;
        send_both(channel, &head, &self.buf[..length])?;
        self.row = if self.next == Some(read) { self.row + 1 } else { 0 };
        let next = Read { offset: read.offset.saturating_add(u64::from(told)), ..read };
        self.next = Some(next);
        if self.row >= SEQUENTIAL && told == read.length {
            // What fails now fails again when it is asked for.
            self.ahead = self.read(tree, next).ok().map(|length| (next, length));
        }
        Ok(())
    }

    fn read(&mut self, tree: &impl Tree, read: Read) -> Result<usize> {
        let length = usize::try_from(read.length).unwrap_or(usize::MAX);
        if length > tree::READ {
            return Err(Error::new(ErrorKind::Limit, format!("a read of {length} bytes")));
        }
        self.buf.fit(read.offset, length);
        tree.read_at(read.file, &mut self.buf, read.offset)
    }
}

/// Writes two pieces, together as far as the socket takes them.
fn send_both(mut channel: &UnixStream, head: &[u8], body: &[u8]) -> io::Result<()> {
    let sent = channel.write_vectored(&[IoSlice::new(head), IoSlice::new(body)])?;
    match sent.checked_sub(head.len()) {
        Some(sent) => channel.write_all(&body[sent..]),
        None => {
            channel.write_all(&head[sent..])?;
            channel.write_all(body)
        }
    }
}
