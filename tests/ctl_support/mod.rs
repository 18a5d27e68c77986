//! A whole hub in this process, the program that controls it, and a disk that waits to be read.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};

use sendense_hub::app::{Hub as App, Reachable};
use sendense_hub::block::{BlockDevice, BlockResult, DeviceInfo, Extent, ZeroOptions};
use sendense_hub::config::HubConfig;
use sendense_hub::export::memory::MemoryDevice;
use serde_json::Value;

use super::support::{both, text};

/// A running hub; ended in order when dropped.
pub struct TestHub {
    pub reachable: Reachable,
    pub token: String,
    data: PathBuf,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl TestHub {
    /// On free ports.
    pub fn start(directory: &Path) -> Self {
        let data = directory.join("data");
        Self::listen(&data, "127.0.0.1:0", "127.0.0.1:0", "", None)
    }

    /// On free ports, with an admins' door that speaks TLS.
    pub fn with_tls(directory: &Path, certificate: &str, key: &str) -> Self {
        let more = format!(
            "admin_listen = \"127.0.0.1:0\"\ntls_certificate = \"{certificate}\"\n\
             tls_key = \"{key}\"\n"
        );
        Self::listen(&directory.join("data"), "127.0.0.1:0", "127.0.0.1:0", &more, None)
    }

    fn listen(data: &Path, nbd: &str, api: &str, more: &str, token: Option<String>) -> Self {
        let config = format!(
            "[nbd]\nlisten = [\"{nbd}\"]\n[api]\nagent_listen = \"{api}\"\n{more}\
             [agent]\nurl = \"http://127.0.0.1:1\"\n[backups]\nmin_free = \"1M\"\n"
        );
        let config = HubConfig::parse(&config).unwrap();
        let (tell, told) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let directory = data.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread();
            let runtime = { runtime }.worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let hub = App::start(&config, &directory).await.unwrap();
                tell.send(hub.reachable().clone()).unwrap();
                let _ = stopped.await;
                hub.stop().await;
            });
        });
        let reachable: Reachable = told.recv().unwrap();
        let token = token.or_else(|| reachable.first_token.clone()).unwrap();
        let (stop, thread) = (Some(stop), Some(thread));
        Self { reachable, token, data: data.to_owned(), stop, thread }
    }

    /// Ends it, calls `between`, and starts it again where it was.
    pub fn restart(&mut self, between: impl FnOnce()) {
        self.end();
        between();
        let (nbd, api) = (self.reachable.nbd[0].to_string(), self.reachable.agent.to_string());
        *self = Self::listen(&self.data.clone(), &nbd, &api, "", Some(self.token.clone()));
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.reachable.agent)
    }

    /// The program, without anything that the environment says.
    pub fn program(&self, arguments: &[&str]) -> Command {
        let mut command = bare(arguments);
        command.env("SENDENSE_URL", self.url()).env("SENDENSE_TOKEN", &self.token);
        command
    }

    /// Runs the program to its end.
    pub fn ctl(&self, arguments: &[&str]) -> Output {
        self.program(arguments).output().unwrap()
    }

    /// Runs a command that must succeed; what it prints.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", both(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let printed = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {printed}"))
    }

    /// Runs a command that must fail with an exit code; what it says.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", both(&output));
        both(&output)
    }

    /// Starts a command in the background.
    pub fn spawn(&self, arguments: &[&str]) -> Background {
        let mut command = self.program(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Background(Some(command.spawn().unwrap()))
    }

    /// Runs a command with something on its standard input.
    pub fn with_input(&self, arguments: &[&str], input: &str) -> Output {
        let mut command = self.program(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// The image of a disk of a backup.
    pub fn image(&self, id: &str, disk: usize) -> PathBuf {
        let backup = self.json(&["backup", "show", id]);
        backup["disk_results"][disk]["qcow2_path"].as_str().unwrap().into()
    }
}

impl Drop for TestHub {
    fn drop(&mut self) {
        self.end();
    }
}

/// The program, with no hub named.
pub fn bare(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sendense-ctl"));
    for name in ["SENDENSE_URL", "SENDENSE_TOKEN", "SENDENSE_TOKEN_FILE"] {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// A command that runs; killed when dropped.
pub struct Background(Option<Child>);

impl Background {
    pub fn interrupt(&self) {
        let pid = self.0.as_ref().unwrap().id().to_string();
        super::support::ok("kill", &["-s", "INT", &pid]);
    }

    pub fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    /// Its exit code, and all it said.
    pub fn wait(mut self) -> (Option<i32>, String) {
        let output = self.0.take().unwrap().wait_with_output().unwrap();
        (output.status.code(), both(&output))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A disk in memory that lets so many reads through, and makes the others wait.
pub struct Gated {
    pub memory: MemoryDevice,
    pub waiting: AtomicUsize,
    left: Mutex<usize>,
    opened: Condvar,
}

impl Gated {
    pub fn new(size: usize, reads: usize) -> Arc<Self> {
        let memory = MemoryDevice::new(size, false);
        let (left, waiting) = (Mutex::new(reads), AtomicUsize::new(0));
        Arc::new(Self { memory, waiting, left, opened: Condvar::new() })
    }

    pub fn open(&self) {
        *self.left.lock().unwrap() = usize::MAX;
        self.opened.notify_all();
    }

    /// Lets one more read through.
    pub fn allow(&self) {
        *self.left.lock().unwrap() += 1;
        self.opened.notify_all();
    }
}

impl BlockDevice for Gated {
    fn info(&self) -> &DeviceInfo {
        self.memory.info()
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> BlockResult<()> {
        let mut left = self.left.lock().unwrap();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while *left == 0 {
            left = self.opened.wait(left).unwrap();
        }
        *left -= 1;
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        drop(left);
        self.memory.read(buf, offset)
    }

    fn write(&self, buf: &[u8], offset: u64) -> BlockResult<()> {
        self.memory.write(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64, options: ZeroOptions) -> BlockResult<()> {
        self.memory.write_zeroes(offset, length, options)
    }

    fn discard(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.discard(offset, length)
    }

    fn flush(&self) -> BlockResult<()> {
        self.memory.flush()
    }

    fn cache(&self, offset: u64, length: u64) -> BlockResult<()> {
        self.memory.cache(offset, length)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        visit: &mut dyn FnMut(Extent) -> bool,
    ) -> BlockResult<()> {
        self.memory.extents(offset, length, visit)
    }

    fn close(&self) -> BlockResult<()> {
        self.memory.close()
    }
}

/// The path of a file in a directory, as an argument.
pub fn path(directory: &Path, name: &str) -> String {
    text(&directory.join(name)).to_owned()
}
