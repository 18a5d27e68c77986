//! The hub's side of a worker: starts it, asks it, and ends it.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use guest::{Error, ErrorKind, Result, Tree, VolumeAbout};
use rustix::process::Resource;
use serde::de::DeserializeOwned;

use super::plain::Plain;
use super::protocol::{Disk, Disks, FILES, FileAbout, Opened, Request, SENTENCE};
use super::remote::RemoteTree;
use super::{check, frames, spawner};

/// The command by which this program becomes a worker.
const COMMAND: &str = "guest-worker";
/// How the message of every failure begins that is one of a worker which is gone.
const ENDED: &str = "the worker ended";
/// Descriptors of the hub that are left for everything else.
const OTHERS: u64 = 512;
/// Time that a process which was killed has to be gone.
const KILLED: Duration = Duration::from_secs(2);
/// Bytes of a worker's last words that are read, and those of them that are told.
const WORDS: (u64, usize) = (64 << 10, 1024);

/// The program that is started as a worker.
#[derive(Debug, Clone)]
pub struct Program(PathBuf);

impl Program {
    /// The program that runs here, even where its file has been replaced.
    pub fn own() -> Self {
        Self("/proc/self/exe".into())
    }

    /// The program at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
}

/// What a worker may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: u64,
    /// Time for one answer.
    pub request: Duration,
    /// Time to open all disks and find what is on them.
    pub open: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: 1 << 30, request: Duration::from_secs(30), open: Duration::from_secs(60) }
    }
}

/// The process, until it has been waited for.
struct Process {
    child: Option<Child>,
    words: Option<ChildStderr>,
}

/// A running worker. Dropping it ends it.
pub struct Worker {
    pid: u32,
    limits: Limits,
    volumes: Vec<VolumeAbout>,
    notes: Vec<String>,
    /// One question at a time.
    channel: Mutex<UnixStream>,
    process: Mutex<Process>,
    /// What is read around it.
    pub(super) plain: Plain,
    /// Why it is no more.
    ended: OnceLock<String>,
}

fn failed(what: &str) -> impl Fn(io::Error) -> Error {
    move |e| Error::new(ErrorKind::Io, format!("{what}: {e}"))
}

impl Worker {
    /// Starts a worker and opens `disks` in it: numbers and top images of a machine's disks.
    ///
    /// # Errors
    /// `Io` where an image cannot be opened or the worker fails, with the reason.
    pub fn start(program: &Program, disks: &[(u32, PathBuf)], limits: &Limits) -> Result<Self> {
        let chains = disks.iter().map(|disk| open_chain(&disk.1)).collect::<Result<Vec<_>>>()?;
        let files: Vec<_> = chains.iter().flatten().collect();
        if files.len() > FILES {
            let text = format!("the disks have {} files; {FILES} are the most", files.len());
            return Err(Error::limit(text));
        }
        // A second descriptor each, where this process can have so many.
        let many = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let can = many >= 2 * files.len() as u64 + OTHERS;
        let about = |file: &qcow2::ChainFile| FileAbout {
            path: file.path.as_os_str().as_bytes().to_vec(),
            name: file.name.clone(),
            direct: can && file.file.direct_reads().is_some(),
        };
        let disk = |((number, _), chain): (&(u32, PathBuf), &Vec<qcow2::ChainFile>)| Disk {
            number: *number,
            files: chain.iter().map(about).collect(),
        };
        let told = Disks(disks.iter().zip(&chains).map(disk).collect());
        let mut fds = Vec::new();
        for file in &files {
            fds.push(file.file.file().as_fd());
            if can {
                fds.extend(file.file.direct_reads().map(AsFd::as_fd));
            }
        }

        let plain = Plain::new(disks);
        let mut worker =
            Self::spawn(program, limits, plain).map_err(failed("cannot start a worker"))?;
        let deadline = Instant::now() + limits.open;
        let opened = worker.talk(|channel| {
            frames::send(channel, &told)?;
            frames::send_files(channel, &fds)?;
            let opened: Result<Opened> = frames::receive(channel, Some(deadline))?;
            if let Ok(opened) = &opened {
                check::volumes(&opened.volumes).map_err(violation)?;
                check::notes(&opened.notes).map_err(violation)?;
            }
            Ok(opened)
        })?;
        let Opened { sandbox, volumes, notes } = opened.map_err(shown)?;
        tracing::info!(
            worker = worker.pid,
            volumes = volumes.len(),
            seccomp = sandbox.seccomp,
            landlock = sandbox.landlock,
            uid = sandbox.uid,
            "a worker reads disks"
        );
        (worker.volumes, worker.notes) = (volumes, notes);
        Ok(worker)
    }

    fn spawn(program: &Program, limits: &Limits, plain: Plain) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_write_timeout(Some(limits.request))?;
        let mut command = Command::new(&program.0);
        command
            .arg(COMMAND)
            .args(["--memory", &limits.memory.to_string()])
            .args(["--parent", &std::process::id().to_string()])
            .env_clear()
            .current_dir("/")
            // What is typed at the hub's terminal is for the hub.
            .process_group(0)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = spawner::spawn(command)?;
        let words = child.stderr.take();
        if let Some(words) = &words {
            rustix::io::ioctl_fionbio(words, true)?;
        }
        Ok(Self {
            pid: child.id(),
            limits: *limits,
            volumes: Vec::new(),
            notes: Vec::new(),
            channel: Mutex::new(ours),
            process: Mutex::new(Process { child: Some(child), words }),
            plain,
            ended: OnceLock::new(),
        })
    }

    /// The machine's volumes.
    pub fn volumes(&self) -> &[VolumeAbout] {
        &self.volumes
    }

    /// What people should know of the machine as a whole.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The tree of a volume, by its place among [`Worker::volumes`].
    pub fn tree(self: &Arc<Self>, volume: usize) -> Arc<dyn Tree> {
        let volume = u32::try_from(volume).unwrap_or(u32::MAX);
        Arc::new(RemoteTree { worker: Arc::clone(self), volume })
    }

    /// Whether it still runs. Asks the process, not the worker, and does not wait for it.
    pub fn is_alive(&self) -> bool {
        if self.ended.get().is_some() {
            return false;
        }
        if self.plain.hangs(self.limits.request) {
            self.end_because("its disk gives no answer");
            return false;
        }
        let exited = match &mut self.process().child {
            Some(child) => child.try_wait().ok().flatten().is_some(),
            None => true,
        };
        if exited {
            self.end_because("it went away");
        }
        !exited
    }

    /// Why it runs no more.
    pub fn ended(&self) -> Option<&str> {
        self.ended.get().map(String::as_str)
    }

    /// Whether a failure is that the worker is gone, and not what it found on a disk.
    pub fn is_end(error: &Error) -> bool {
        error.kind == ErrorKind::Io && error.message.starts_with(ENDED)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Bytes of memory that it has now; 0 where that cannot be told.
    pub fn memory(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        let text = text.unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes =
            line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kibibytes.unwrap_or(0) * 1024
    }

    /// Ends it, even in the middle of an answer.
    pub fn end(&self) {
        self.end_because("the mount was ended");
    }

    /// Asks for something that `check` must find in order.
    pub(super) fn ask<T: DeserializeOwned>(
        &self,
        request: &Request,
        check: impl FnOnce(&mut T) -> std::result::Result<(), String>,
    ) -> Result<T> {
        let answer = self.talk(|channel| {
            // From now on: whoever waited for others has as much time as they had.
            let deadline = Instant::now() + self.limits.request;
            send(channel, request)?;
            let most = request.call.most();
            let mut answer: Result<T> = frames::receive_up_to(most, channel, Some(deadline))?;
            if let Ok(found) = &mut answer {
                check(found).map_err(violation)?;
            }
            Ok(answer)
        })?;
        answer.map_err(shown)
    }

    /// Asks for bytes of a file.
    pub(super) fn read(&self, request: &Request, buf: &mut [u8]) -> Result<usize> {
        let answer = self.talk(|channel| {
            // From now on: whoever waited for others has as much time as they had.
            let deadline = Instant::now() + self.limits.request;
            send(channel, request)?;
            let most = request.call.most();
            let answer: Result<u32> = frames::receive_up_to(most, channel, Some(deadline))?;
            let Ok(length) = &answer else { return Ok(answer.map(|_| 0)) };
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            let Some(part) = buf.get_mut(..length) else {
                return Err(violation(format!("{length} bytes came, more than were asked for")));
            };
            frames::fill(channel, part, Some(deadline))?;
            Ok(Ok(length))
        })?;
        answer.map_err(shown)
    }

    /// Talks to the worker; whatever goes wrong with that ends it.
    fn talk<T>(&self, talk: impl FnOnce(&UnixStream) -> io::Result<T>) -> Result<T> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ended.get().is_none() {
            match talk(&channel) {
                Ok(answer) => return Ok(answer),
                // Too long a question was never sent.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    return Err(Error::limit(error.to_string()));
                }
                Err(error) => self.end_because(&reason(&error)),
            }
        }
        self.check_alive()?;
        Err(Error::new(ErrorKind::Io, format!("{ENDED}: unknown")))
    }

    /// Fails where it runs no more, as far as that is known.
    pub(super) fn check_alive(&self) -> Result<()> {
        match self.ended.get() {
            Some(why) => Err(Error::new(ErrorKind::Io, format!("{ENDED}: {why}"))),
            None => Ok(()),
        }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the process where it still runs, waits for it, and remembers why. The disks are let go of.
    fn end_because(&self, why: &str) {
        self.end_process(why);
        self.plain.end();
    }

    fn end_process(&self, why: &str) {
        let mut process = self.process();
        let Some(mut child) = process.child.take() else { return };
        let died = died_by_itself(&mut child, why);
        let _ = child.kill();
        let status = wait(child);
        let words = process.words.take().map(last_words).unwrap_or_default();
        let mut text = match (died, status) {
            (true, Some(status)) => told(status),
            _ => why.to_owned(),
        };
        if !words.is_empty() {
            text = format!("{text}; it said: {words}");
        }
        tracing::info!(worker = self.pid, reason = %text, "a worker ended");
        let _ = self.ended.set(text);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

fn open_chain(image: &Path) -> Result<Vec<qcow2::ChainFile>> {
    qcow2::chain_files(image, &qcow2::OpenOptions::new())
        .map_err(|e| Error::new(ErrorKind::Io, e.to_string()))
}

/// Sends a question. One that is too long for a message is `InvalidInput`.
fn send(mut channel: &UnixStream, request: &Request) -> io::Result<()> {
    use std::io::Write;
    let frame = frames::encode(request);
    let frame = frame.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
    channel.write_all(&frame)
}

fn violation(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// A worker's own words, as far as people can bear them.
fn shown(mut error: Error) -> Error {
    error.message = printable(&error.message, SENTENCE);
    error
}

/// At most `most` bytes of a text, without what terminals act on.
pub(super) fn printable(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for c in text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if shown.len() + c.len_utf8() > most {
            break;
        }
        shown.push(c);
    }
    shown
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "it gave no answer in time".into(),
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => "it went away".into(),
        io::ErrorKind::InvalidData => {
            format!("it broke the protocol: {}", printable(&error.to_string(), SENTENCE))
        }
        _ => format!("the channel failed: {error}"),
    }
}

/// Whether nobody needs to kill it. One whose channel is closed is on its way out.
fn died_by_itself(child: &mut Child, why: &str) -> bool {
    let until = Instant::now() + if why == "it went away" { KILLED } else { Duration::ZERO };
    loop {
        match child.try_wait() {
            Ok(Some(_)) => return true,
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(2)),
            _ => return false,
        }
    }
}

/// Waits for a process that was killed. One that hangs in the kernel is left to a thread.
fn wait(mut child: Child) -> Option<ExitStatus> {
    let until = Instant::now() + KILLED;
    while Instant::now() < until {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => return None,
        }
    }
    tracing::warn!(worker = child.id(), "a worker that was killed hangs in the kernel");
    let _ = std::thread::Builder::new().name("reaper".into()).spawn(move || child.wait());
    None
}

fn told(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGSYS) => "it called what it may not, and was killed".into(),
        Some(signal) => format!("it died of signal {signal}"),
        None => format!("it ended with {status}"),
    }
}

/// The end of what a process wrote for people.
fn last_words(words: ChildStderr) -> String {
    let mut text = Vec::new();
    // What cannot be read now is not waited for.
    let _ = words.take(WORDS.0).read_to_end(&mut text);
    let start = text.len().saturating_sub(WORDS.1);
    printable(&String::from_utf8_lossy(&text[start..]), WORDS.1)
}

#[cfg(test)]
mod tests {
    use super::super::sandbox::Sandbox;
    use super::*;
    use guest::tree::{Listed, Listing};
    use guest::{Cursor, Node, Status};
    use serde::Serialize;
    use std::os::unix::fs::PermissionsExt;

    fn opened() -> Vec<u8> {
        let volume = VolumeAbout {
            name: "disk0".into(),
            place: "disk 0".into(),
            size: 1 << 20,
            kind: "ext4".into(),
            label: String::new(),
            uuid: String::new(),
            used: None,
            status: Status::Clean,
        };
        let sandbox = Sandbox { seccomp: false, landlock: false, uid: 0 };
        let opened = Opened { sandbox, volumes: vec![volume], notes: Vec::new() };
        frames::encode(&Ok::<_, Error>(opened)).unwrap()
    }

    fn ok(answer: impl Serialize) -> Vec<u8> {
        frames::encode(&Ok::<_, Error>(answer)).unwrap()
    }

    /// A worker that was taken over after it opened its disks: it says `answers`, and no more.
    fn hostile(answers: &[u8], request: Duration) -> Arc<Worker> {
        saying(&[&[&opened(), answers].concat()], Duration::ZERO, request)
    }

    /// A worker that says `parts`, and waits for `pause` before the next.
    fn saying(parts: &[&[u8]], pause: Duration, request: Duration) -> Arc<Worker> {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk");
        qcow2::create(&image, &qcow2::CreateOptions::new(1 << 20)).unwrap();
        // All files are open before the first part is said: they may go then.
        let (mut open, mut say) = (String::new(), String::new());
        for (part, fd) in parts.iter().zip(3..) {
            let said = directory.path().join(format!("said{fd}"));
            std::fs::write(&said, part).unwrap();
            open += &format!(" {fd}<{}", said.display());
            say += &format!("cat >&0 <&{fd}; sleep {}\n", pause.as_secs_f64());
        }
        let text = format!("#!/bin/sh\nexec{open}\n{say}exec sleep 60\n");
        let script = directory.path().join("hostile");
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let limits = Limits { request, ..Limits::default() };
        Arc::new(Worker::start(&Program::at(script), &[(0, image)], &limits).unwrap())
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn an_answer_that_breaks_its_promise_ends_the_worker() {
        let entry = |name: &[u8]| Listed {
            name: name.to_vec(),
            node: Node(1),
            attributes: Err(Error::corrupt("damaged")),
            target: None,
        };
        let listing = |names: &[&[u8]]| Listing {
            entries: names.iter().map(|name| entry(name)).collect(),
            next: None,
        };
        for answer in [
            ok(listing(&[b"../../etc/passwd"])),
            ok(listing(&[b"a", b"b", b"c"])),
            ok(listing(&[b"a", b"a"])),
            ok(listing(&[&[b'a'; 1025]])),
            ok(7_u8),
            frames::encode(&Err::<Listing, _>(Error::corrupt("fine")))
                .unwrap()
                .into_iter()
                .map(|byte| byte | 0x80)
                .collect(),
        ] {
            let worker = hostile(&answer, LONG);
            let tree = worker.tree(0);
            let error = tree.list(Node(1), Cursor(0), 2).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Io);
            assert!(error.message.contains("it broke the protocol"), "{error}");
            assert!(!worker.is_alive() && Worker::is_end(&error));
            assert_eq!(tree.root().unwrap_err(), error, "it stays so");
        }
    }

    #[test]
    fn what_a_listing_says_of_damage_is_printable_and_small_answers_are_small() {
        let attributes = Err(Error::corrupt("red \x1b[31m".repeat(500)));
        let entry = Listed { name: b"a".to_vec(), node: Node(1), attributes, target: None };
        let answer = ok(Listing { entries: vec![entry], next: None });
        let listing = hostile(&answer, LONG).tree(0).list(Node(1), Cursor(0), 2).unwrap();
        let said = &listing.entries[0].attributes.as_ref().unwrap_err().message;
        assert!(said.len() <= SENTENCE && said.starts_with("red  [31m"), "{said:?}");

        let error = hostile(&ok(vec![0_u8; 1 << 20]), LONG).tree(0).read_link(Node(1));
        assert!(error.unwrap_err().message.contains("are the most"));
    }

    #[test]
    fn more_bytes_than_were_asked_for_are_not_taken() {
        let worker = hostile(&[ok(513_u32), vec![7; 513]].concat(), LONG);
        let mut buf = [1; 512];
        let error = worker.tree(0).read_at(Node(1), &mut buf, 0).unwrap_err();
        assert!(error.message.contains("more than were asked for"), "{error}");
        assert_eq!(buf, [1; 512]);
        let worker = hostile(&[ok(3_u32), b"abc".to_vec(), ok(0_u32)].concat(), LONG);
        let tree = worker.tree(0);
        assert_eq!(tree.read_at(Node(1), &mut buf, 0).unwrap(), 3);
        assert_eq!(&buf[..4], b"abc\x01");
        assert_eq!(tree.read_at(Node(1), &mut buf, 3).unwrap(), 0);
    }

    #[test]
    fn an_answer_that_does_not_come_in_time_ends_the_worker() {
        // None, and one of which the bytes are missing.
        for answers in [Vec::new(), [ok(512_u32), vec![7; 100]].concat()] {
            let worker = hostile(&answers, Duration::from_millis(300));
            let error = worker.tree(0).read_at(Node(1), &mut [0; 512], 0).unwrap_err();
            assert!(error.message.contains("no answer in time"), "{error}");
            assert!(!worker.is_alive());
        }
    }

    #[test]
    fn whoever_waits_for_others_has_the_whole_time_for_an_answer() {
        let limit = Duration::from_secs(6);
        let answer = ok(Node(1));
        let worker = saying(&[&opened(), &answer, &answer], limit.mul_f64(0.6), limit);
        std::thread::scope(|scope| {
            let ask = || scope.spawn(|| worker.tree(0).root());
            for waiting in [ask(), ask()] {
                assert_eq!(waiting.join().unwrap().unwrap(), Node(1));
            }
        });
    }

    #[test]
    fn a_worker_that_is_ended_lets_go_of_whoever_waits_for_it() {
        let worker = hostile(&[], LONG);
        let waiting = worker.tree(0);
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| waiting.root());
            worker.end();
            let error = answer.join().unwrap().unwrap_err();
            assert!(error.message.contains("the mount was ended"), "{error}");
        });
    }

    #[test]
    fn what_a_worker_says_is_cut_and_printable() {
        assert_eq!(printable(" a\x1b[31m\nb ", 100), "a [31m b");
        assert_eq!(printable("äääa", 5), "ää");
    }
}
