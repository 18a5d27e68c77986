//! Shared by the tests that run the real program against real foreign ones.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../../qcow2/tests/support/readers.rs"]
mod readers;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest run of one foreign program.
const PROGRAM_LIMIT: &str = "90";
/// Longest wait for the server to start or end.
const SERVER_LIMIT: Duration = Duration::from_secs(30);

/// Whether one of the programs is missing; says so loudly, and fails where none may be missing.
pub fn missing(programs: &[&str]) -> bool {
    let known = |program: &&&str| {
        let found = Command::new("sh")
            .env("PATH", path_with_sbin())
            .args(["-c", &format!("command -v {program}")])
            .output()
            .unwrap();
        !found.status.success()
    };
    let missing: Vec<_> = programs.iter().filter(known).collect();
    assert!(
        missing.is_empty() || std::env::var_os("CI").is_none(),
        "{missing:?} must be installed: ./test does that"
    );
    if !missing.is_empty() {
        println!("SKIPPED: {missing:?} missing; ./test installs what the tests need");
    }
    !missing.is_empty()
}

/// Whether the test may not mount file systems here.
pub fn not_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "this test must run as root");
    if !root {
        println!("SKIPPED: mounting a small file system needs root");
    }
    !root
}

fn path_with_sbin() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Runs a program under a time limit, whatever its exit code.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout")
        .env("PATH", path_with_sbin())
        .env("LC_ALL", "C")
        .args(["-k", "5", PROGRAM_LIMIT, program])
        .args(arguments)
        .output()
        .unwrap()
}

/// Standard output and error of a program.
pub fn both(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// Runs a program that must succeed; its standard output.
pub fn ok(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A path as a program's argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory for one test.
pub fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Numbers that look random and are the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(length).collect()
    }
}

/// Makes a disk in a file: data in places, zeroes in others.
pub fn make_disk(path: &Path, size: u64, seed: u64) {
    let file = File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    let mut random = Random::new(seed);
    let mut at = 0;
    while at < size {
        let length = (1 + random.below(600_000)).min(size - at);
        if random.below(3) > 0 {
            file.write_all_at(&random.bytes(usize::try_from(length).unwrap()), at).unwrap();
        }
        at += length + random.below(200_000);
    }
}

/// A running `sendense-hub export`; killed when dropped.
pub struct Hub {
    child: Child,
    uris: Vec<String>,
    log: PathBuf,
    _log_directory: TempDir,
}

/// The program under test.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sendense-hub"));
    command.env("SENDENSE_LOG", "debug");
    command
}

/// Runs the program under test to its end.
pub fn hub(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

impl Hub {
    /// Serves on a free TCP port.
    pub fn start(arguments: &[&str]) -> Self {
        let exports = arguments.iter().filter(|a| a.contains('=')).count();
        Self::spawn(&[&["--listen", "127.0.0.1:0"], arguments].concat(), exports)
    }

    /// Serves as the arguments say; waits for `uris` URIs.
    pub fn spawn(arguments: &[&str], uris: usize) -> Self {
        let log_directory = directory();
        let log = log_directory.path().join("log");
        let mut child = program()
            .arg("export")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut lines = Vec::new();
        while lines.len() < uris.max(1) {
            let mut line = String::new();
            if out.read_line(&mut line).unwrap() == 0 {
                let log = std::fs::read_to_string(&log).unwrap();
                panic!("the server ended before it served: {log}");
            }
            lines.push(line.trim().to_owned());
        }
        // Nothing more is printed, but a full pipe must never stop the server.
        std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        Self { child, uris: lines, log, _log_directory: log_directory }
    }

    /// URI of the first export.
    pub fn uri(&self) -> &str {
        &self.uris[0]
    }

    /// URIs of all exports.
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// Host and port of the first URI.
    pub fn address(&self) -> &str {
        self.uri().trim_start_matches("nbd://").split('/').next().unwrap()
    }

    /// The port of the first URI.
    pub fn port(&self) -> &str {
        self.address().rsplit(':').next().unwrap()
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the server logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has a text.
    pub fn wait_for_log(&self, wanted: &str) {
        let since = Instant::now();
        while !self.log().contains(wanted) {
            assert!(since.elapsed() < SERVER_LIMIT, "no '{wanted}' in the log: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        ok("kill", &["-s", name, &self.pid().to_string()]);
    }

    /// Waits for the end; the exit code, if it ended by itself.
    pub fn wait(&mut self) -> Option<i32> {
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(since.elapsed() < SERVER_LIMIT, "the server does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the server as systemd would; it must end cleanly.
    pub fn stop(mut self) -> String {
        self.signal("TERM");
        let code = self.wait();
        let log = self.log();
        assert_eq!(code, Some(0), "{log}");
        assert!(!log.contains("panicked"), "{log}");
        log
    }

    /// Kills the server without any warning.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The image must be clean for qemu and for us, and read the same by everyone.
pub fn check_clean(image: &Path) {
    ok("qemu-img", &["check", "-q", text(image)]);
    let output = hub(&["image", "check", text(image)]);
    assert!(output.status.success(), "{}", both(&output));
    readers::agree(image);
}

/// The disks must be equal, says qemu.
pub fn compare(raw: &Path, image: &Path) {
    ok("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", text(raw), text(image)]);
}
