//! The worker as a process: what it may not do, and what a hub does with one that fails.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, missing_docs)]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::ErrorKind;
use sendense_hub::worker::{Limits, Program, Worker, sandbox};

/// Says to a copy of this test that it is to try something from inside the sandbox.
const DEED: &str = "WORKER_TEST_DEED";
const SIGSYS: i32 = 31;

/// Runs the test `name` again, in a process of its own that does `deed`.
fn again(name: &str, deed: &str) -> std::process::Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env_clear().env(DEED, deed);
    command.stdin(Stdio::null()).output().unwrap()
}

fn enter() -> sandbox::Sandbox {
    let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get().cast_unsigned();
    sandbox::enter(1 << 30, parent, &[]).unwrap()
}

fn say(text: &str) {
    std::io::stdout().write_all(text.as_bytes()).unwrap();
}

#[test]
fn a_worker_cannot_reach_anything_but_what_it_has_open() {
    let deeds: [(&str, fn()); 9] = [
        ("open", || drop(std::fs::File::open("/etc/passwd"))),
        ("stat", || drop(std::fs::metadata("/etc/passwd"))),
        ("connect", || drop(std::net::TcpStream::connect("127.0.0.1:1"))),
        ("listen", || drop(std::os::unix::net::UnixListener::bind("/tmp/worker-test"))),
        ("thread", || drop(std::thread::Builder::new().spawn(|| ()))),
        ("fork", || drop(Command::new("/bin/true").spawn())),
        ("kill", || {
            let parent = rustix::process::getppid().unwrap();
            let _ = rustix::process::test_kill_process(parent);
        }),
        ("execute", || {
            use std::os::unix::process::CommandExt;
            drop(Command::new("/bin/true").exec());
        }),
        ("session", || {
            let _ = rustix::process::setsid();
        }),
    ];
    if let Ok(deed) = std::env::var(DEED) {
        let deed = deeds.iter().find(|(name, _)| *name == deed).unwrap().1;
        let held = enter();
        say(&format!("held {held:?}\n"));
        deed();
        say("got away with it\n");
        return;
    }
    for (deed, _) in deeds {
        let output = again("a_worker_cannot_reach_anything_but_what_it_has_open", deed);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("seccomp: true"), "{deed}: {text}");
        assert!(!text.contains("got away"), "{deed}: {text}");
        assert_eq!(output.status.signal(), Some(SIGSYS), "{deed}: {text}");
    }
}

#[test]
fn a_worker_can_read_what_it_has_open_and_use_memory_up_to_its_limit() {
    if std::env::var(DEED).is_ok() {
        let held = enter();
        let mut file = vec![0_u8; 64 << 20];
        file.fill(1);
        let caught = std::panic::catch_unwind(|| panic!("on purpose")).is_err();
        assert!(caught);
        say(&format!("held {held:?} {}\n", file.iter().map(|b| u64::from(*b)).sum::<u64>()));
        let too_much = Vec::<u8>::new().try_reserve_exact(2 << 30).is_err();
        say(&format!("refused {too_much}\n"));
        std::process::exit(0);
    }
    let output = again("a_worker_can_read_what_it_has_open_and_use_memory_up_to_its_limit", "read");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(text.contains(&(64_u64 << 20).to_string()), "{text}");
    assert!(text.contains("refused true") && !text.contains("uid: 0 "), "{text}");
}

#[test]
fn descriptors_that_were_inherited_by_mistake_do_not_reach_a_worker() {
    if std::env::var(DEED).is_ok() {
        let file = std::fs::File::open("/etc/passwd").unwrap();
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        enter();
        let gone = rustix::fs::fstat(&file).is_err();
        say(&format!("gone {gone}\n"));
        std::process::exit(0);
    }
    let output = again("descriptors_that_were_inherited_by_mistake_do_not_reach_a_worker", "fd");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("gone true"), "{text} {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_worker_whose_hub_is_gone_does_not_begin() {
    if std::env::var(DEED).is_ok() {
        let error = sandbox::enter(1 << 30, 1_999_999_999, &[]).unwrap_err();
        say(&format!("refused {error}\n"));
        std::process::exit(0);
    }
    let output = again("a_worker_whose_hub_is_gone_does_not_begin", "orphan");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("refused whoever started this worker is gone"), "{text}");
}

fn hub() -> Program {
    Program::at(env!("CARGO_BIN_EXE_sendense-hub"))
}

/// An image of a disk without anything that is known.
fn blank(directory: &Path) -> (u32, PathBuf) {
    let path = directory.join("disk.qcow2");
    qcow2::create(&path, &qcow2::CreateOptions::new(64 << 20)).unwrap();
    (0, path)
}

#[test]
fn a_worker_tells_what_is_on_its_disks_and_ends_with_its_hub_side() {
    let directory = tempfile::tempdir().unwrap();
    let image = blank(directory.path());
    let worker = Worker::start(&hub(), &[image.clone(), (7, image.1)], &Limits::default()).unwrap();
    assert!(worker.is_alive() && worker.memory() > 0);
    assert!(
        worker.volumes().iter().all(|volume| matches!(volume.status, guest::Status::Refused(_)))
    );
    let pid = worker.pid();
    let first_to_go = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert_eq!(first_to_go.trim(), "1000");
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    assert!(environment.is_empty());
    drop(worker);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_worker_that_is_killed_fails_with_the_reason_and_another_can_start_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let image = blank(directory.path());
    let start = || Worker::start(&hub(), std::slice::from_ref(&image), &Limits::default());
    let worker = Arc::new(start().unwrap());
    let tree = worker.tree(0);
    assert_ne!(tree.root().unwrap_err().kind, ErrorKind::Io);
    let pid = rustix::process::Pid::from_raw(worker.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    for _ in 0..2 {
        let error = tree.root().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Io);
        assert!(error.message.contains("the worker ended: it died of signal 9"), "{error}");
    }
    assert!(!worker.is_alive());
    assert!(start().unwrap().is_alive());
}

#[test]
fn an_image_that_is_missing_or_held_by_a_writer_starts_no_worker() {
    let directory = tempfile::tempdir().unwrap();
    let image = blank(directory.path());
    let nothing = directory.path().join("nothing");
    assert!(Worker::start(&hub(), &[(0, nothing)], &Limits::default()).is_err());
    let writer = qcow2::Image::open(&image.1, &qcow2::OpenOptions::new()).unwrap();
    let error =
        Worker::start(&hub(), std::slice::from_ref(&image), &Limits::default()).err().unwrap();
    assert!(error.message.contains("in use"), "{error}");
    drop(writer);
    let worker = Worker::start(&hub(), std::slice::from_ref(&image), &Limits::default()).unwrap();
    // As long as it reads, nobody writes.
    assert!(qcow2::Image::open(&image.1, &qcow2::OpenOptions::new()).is_err());
    drop(worker);
    assert!(qcow2::Image::open(&image.1, &qcow2::OpenOptions::new()).is_ok());
}

/// A worker that has been taken over: a script with the channel as its standard input.
fn hostile(directory: &Path, script: &str) -> Program {
    let path = directory.join("hostile");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Program::at(path)
}

fn start_hostile(script: &str, open: Duration) -> (guest::Error, Duration) {
    let directory = tempfile::tempdir().unwrap();
    let image = blank(directory.path());
    let program = hostile(directory.path(), script);
    let limits = Limits { open, ..Limits::default() };
    let since = Instant::now();
    let error = Worker::start(&program, &[image], &limits).err().unwrap();
    (error, since.elapsed())
}

#[test]
fn a_worker_that_says_what_it_should_not_is_ended() {
    for (script, word) in [
        (r"printf '\377\377\377\377' >&0; sleep 60", "broke the protocol: a message of 4294967295"),
        (r"printf '\002\000\000\000\007\007' >&0; sleep 60", "broke the protocol"),
        // Nothing but an announcement.
        (r"printf '\020\000\000\000\000' >&0", "it ended with exit status: 0"),
        (r"echo 'thread panicked at a disk' >&2; exit 101", "it said: thread panicked at a disk"),
        // A flood of last words must not fill memory, or stop anything.
        (r"head -c 1000000 /dev/zero | tr '\0' 'x' >&2 & sleep 0.2; exit 3", "exit status: 3"),
    ] {
        let (error, _) = start_hostile(script, Duration::from_secs(20));
        assert_eq!(error.kind, ErrorKind::Io);
        assert!(error.message.contains(word), "{script}: {error}");
        assert!(error.message.len() < 4096);
    }
}

#[test]
fn a_worker_that_gives_no_answer_is_killed_at_its_deadline() {
    // One that says nothing, and one that always says a little.
    for script in
        ["exec sleep 60", r"printf '\377\000\000\000' >&0; while printf x >&0; do sleep 0.1; done"]
    {
        let (error, took) = start_hostile(script, Duration::from_millis(500));
        assert!(error.message.contains("no answer in time"), "{error}");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
}
