//! A hub as a process, its API, a capture appliance, and VMs whose disks are files.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

pub mod appliance;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nbd_proto::{CommandFlags, CommandType};
use sendense_hub::nbd::client::{Client, ClientOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest wait for anything.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A hub with its data in a directory that outlives the process.
pub struct Hub {
    pub directory: TempDir,
    child: Option<Child>,
    pub api: String,
    pub nbd: String,
    pub token: String,
    config: String,
}

/// A port that is free, below those that the system gives to outgoing connections: it stays free
/// while the hub is away.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = std::process::id()
            .wrapping_mul(61)
            .wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(7));
        let port = 20_000 + u16::try_from(number % 12_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The program, which must have been built.
pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_sendense-hub")
}

impl Hub {
    /// A hub with the defaults of a test.
    pub fn start() -> Self {
        Self::configured("", "")
    }

    /// A hub with more in `[backups]`, and more sections.
    pub fn configured(backups: &str, sections: &str) -> Self {
        Self::in_directory(tempfile::tempdir().unwrap(), backups, sections)
    }

    /// A hub with more in `[api]`.
    pub fn with_api(api: &str) -> Self {
        Self::made(tempfile::tempdir().unwrap(), "", "", api)
    }

    pub fn in_directory(directory: TempDir, backups: &str, sections: &str) -> Self {
        Self::made(directory, backups, sections, "")
    }

    fn made(directory: TempDir, backups: &str, sections: &str, more: &str) -> Self {
        let (api, nbd) = (free_port(), free_port());
        let nbd_section = if sections.contains("[nbd]") { "" } else { "[nbd]\n" };
        let config = format!(
            "[api]\nagent_listen = \"127.0.0.1:{api}\"\n{more}\
             [backups]\n{}{}{backups}\n\
             {nbd_section}{}",
            if backups.contains("min_free") { "" } else { "min_free = \"1M\"\n" },
            if backups.contains("reconnect") { "" } else { "reconnect_seconds = 60\n" },
            if nbd_section.is_empty() {
                sections.replace("[nbd]", &format!("[nbd]\nlisten = [\"127.0.0.1:{nbd}\"]"))
            } else {
                format!("listen = [\"127.0.0.1:{nbd}\"]\n{sections}")
            }
        );
        let mut hub = Self {
            directory,
            child: None,
            api: format!("http://127.0.0.1:{api}"),
            nbd: format!("127.0.0.1:{nbd}"),
            token: String::new(),
            config,
        };
        hub.restart();
        hub
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn repository(&self) -> PathBuf {
        self.data().join("repository")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Starts the process (again) with the same data and the same addresses.
    pub fn restart(&mut self) {
        let config = self.directory.path().join("hub.toml");
        fs::write(&config, &self.config).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))
            .unwrap();
        let mut child = Command::new(program())
            .args(["serve", "--config", config.to_str().unwrap(), "--data-dir"])
            .arg(self.data())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        loop {
            let line = lines.next().unwrap_or_else(|| panic!("no start: {}", self.log())).unwrap();
            if let Some((_, token)) = line.split_once("told this once: ") {
                self.token = token.to_owned();
            }
            if line == "ready" {
                break;
            }
        }
        self.child = Some(child);
    }

    /// SIGKILL, as a crash does.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGKILL without waiting, for whoever has it borrowed.
    pub fn kill_now(&self) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    /// Waits for the end of a process that was killed.
    pub fn reap(&mut self) {
        self.child.take().unwrap().wait().unwrap();
    }

    /// SIGTERM; the process must end well.
    pub fn stop(&mut self) {
        let mut child = self.child.take().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let since = Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(since.elapsed() < LIMIT, "does not end: {}", self.log()),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "{status}: {}", self.log());
    }

    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.request_as(Some(&self.token), method, path, body)
    }

    pub fn request_as(
        &self,
        token: Option<&str>,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> (u16, Value) {
        self.try_request(token, method, path, body)
            .unwrap_or_else(|| panic!("{method} {path}: no answer\n{}", self.log()))
    }

    /// The same; nothing where the connection failed.
    pub fn try_request(
        &self,
        token: Option<&str>,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Option<(u16, Value)> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(LIMIT))
            .build()
            .into();
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/api/v1/{path}") };
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.api))
            .header("content-type", "application/json");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let text = body.map(Value::to_string).unwrap_or_default();
        let mut answer = agent.run(request.body(text).unwrap()).ok()?;
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string().ok()?;
        let status = answer.status().as_u16();
        Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }

    /// A request that must be answered with success.
    pub fn ok(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let (status, value) = self.request(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {value}\n{}", self.log());
        value
    }

    pub fn get(&self, path: &str) -> Value {
        self.ok("GET", path, None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Value {
        self.ok("POST", path, Some(body))
    }

    /// Enters a VM with disks of these sizes.
    pub fn enter_vm(&self, name: &str, sizes: &[u64]) {
        let disks: Vec<Value> = sizes
            .iter()
            .enumerate()
            .map(|(number, size)| json!({"disk_id": number, "capacity_bytes": size}))
            .collect();
        self.ok("PUT", &format!("vms/{}", encoded(name)), Some(&json!({"disks": disks})));
    }

    /// Starts a backup whose data this test sends.
    pub fn start_backup(&self, vm: &str, kind: &str) -> Value {
        self.post("backups", &json!({"vm_name": vm, "backup_type": kind, "agent": "caller"}))
    }

    pub fn backup(&self, id: &str) -> Value {
        self.get(&format!("backups/{id}"))
    }

    /// Waits until a backup has ended; what it is then.
    pub fn ended(&self, id: &str) -> Value {
        let since = Instant::now();
        loop {
            let backup = self.backup(id);
            if !["running", "pending"].contains(&backup["status"].as_str().unwrap()) {
                return backup;
            }
            assert!(since.elapsed() < LIMIT, "{backup}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn complete(&self, id: &str, disk: u32, change_id: &str) -> (u16, Value) {
        let body = json!({"change_id": change_id, "disk_id": disk, "bytes_transferred": 0});
        self.request_as(None, "POST", &format!("backups/{id}/complete"), Some(&body))
    }

    /// Connects to an export.
    pub fn connect(&self, export: &str) -> Client {
        self.try_connect(export).unwrap_or_else(|e| panic!("{export}: {e}\n{}", self.log()))
    }

    pub fn try_connect(&self, export: &str) -> Result<Client, String> {
        Client::connect_tcp(&self.nbd, &ClientOptions::new(export)).map_err(|e| e.to_string())
    }

    /// A whole backup of the VM, its data sent from here. `changed` per disk, or everything.
    pub fn back_up(&self, vm: &Vm, kind: &str) -> Value {
        let backup = self.start_backup(&vm.name, kind);
        let id = backup["backup_id"].as_str().unwrap();
        for number in 0..vm.disks() {
            self.send(vm, &backup, number);
            let (status, answer) = self.complete(id, number, &vm.change_id(number));
            assert_eq!(status, 200, "{answer}\n{}", self.log());
        }
        let backup = self.backup(id);
        assert_eq!(backup["status"], "completed", "{backup}");
        backup
    }

    /// Sends what the hub asks for of one disk.
    pub fn send(&self, vm: &Vm, backup: &Value, number: u32) {
        let query = format!("backups/changeid?vm_name={}&disk_id={number}", encoded(&vm.name));
        let (status, told) = self.request_as(None, "GET", &query, None);
        assert_eq!(status, 200, "{told}");
        let everything = told["change_id"] == "";
        let export = export_of(backup, number);
        let mut client = self.connect(&export);
        let source = File::open(vm.disk(number)).unwrap();
        let size = source.metadata().unwrap().len();
        let extents = if everything { vec![(0, size)] } else { vm.changes(number) };
        for (offset, length) in extents {
            let mut at = offset;
            while at < offset + length {
                let step = (4 << 20).min(offset + length - at);
                let mut bytes = vec![0; usize::try_from(step).unwrap()];
                source.read_exact_at(&mut bytes, at).unwrap();
                if bytes.iter().all(|byte| *byte == 0) {
                    let none = CommandFlags::empty();
                    client.command(CommandType::WriteZeroes, none, at, step).unwrap();
                } else {
                    client.write(&bytes, at, CommandFlags::empty()).unwrap();
                }
                at += step;
            }
        }
    }

    /// Files in the repository that belong to no restore point.
    pub fn strays(&self) -> Vec<String> {
        let mut found = Vec::new();
        walk(&self.repository(), &mut |path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.ends_with(".partial") || name.ends_with(".durable") || name.ends_with(".new") {
                found.push(name.to_owned());
            }
        });
        found
    }

    /// Nothing is left of what is not a restore point: no file, export, port or running row, and
    /// catalog and repository agree.
    pub fn assert_tidy(&self) {
        let since = Instant::now();
        loop {
            let exports = self.get("nbd/exports");
            let jobs = self.get("jobs");
            let ports = self.get("nbd/ports/status");
            let tidy = exports["total"] == 0 && jobs["total"] == 0 && ports["allocated"] == 0;
            if tidy && self.strays().is_empty() {
                break;
            }
            assert!(since.elapsed() < LIMIT, "{exports} {jobs} {ports} {:?}", self.strays());
            std::thread::sleep(Duration::from_millis(20));
        }
        let checked = self.ok("POST", "catalog/check", None);
        assert_eq!(checked["findings"], json!([]), "{}", self.log());
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn walk(directory: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { walk(&path, visit) } else { visit(&path) }
    }
}

/// A name as a part of an address.
pub fn encoded(name: &str) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let each =
        |byte| if keep(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(each).collect()
}

/// Name of the export of a disk of a backup.
pub fn export_of(backup: &Value, disk: u32) -> String {
    backup["disk_results"][disk as usize]["nbd_export_name"].as_str().unwrap().to_owned()
}

/// Path of the image of a disk of a backup.
pub fn image_of(backup: &Value, disk: u32) -> String {
    backup["disk_results"][disk as usize]["qcow2_path"].as_str().unwrap().to_owned()
}

/// A VM whose disks are files here, with changed-block tracking.
pub struct Vm {
    pub name: String,
    pub directory: TempDir,
    serial: u64,
    random: super::support::Random,
    changes: Vec<Vec<(u64, u64)>>,
    /// Copies of the disks as they were: restore point and files.
    points: Vec<(String, Vec<PathBuf>)>,
}

impl Vm {
    /// A VM with disks of these sizes, some data in each, entered into the hub.
    pub fn new(hub: &Hub, name: &str, sizes: &[u64]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut vm = Self {
            name: name.to_owned(),
            directory,
            serial: 1,
            random: super::support::Random::new(name.len() as u64 + 77),
            changes: vec![Vec::new(); sizes.len()],
            points: Vec::new(),
        };
        for (number, size) in sizes.iter().enumerate() {
            let number = u32::try_from(number).unwrap();
            File::create_new(vm.disk(number)).unwrap().set_len(*size).unwrap();
        }
        hub.enter_vm(name, sizes);
        vm.change(12);
        vm
    }

    pub fn disks(&self) -> u32 {
        u32::try_from(self.changes.len()).unwrap()
    }

    pub fn disk(&self, number: u32) -> PathBuf {
        self.directory.path().join(format!("disk-{number}.raw"))
    }

    pub fn changes(&self, number: u32) -> Vec<(u64, u64)> {
        self.changes[number as usize].clone()
    }

    pub fn change_id(&self, number: u32) -> String {
        format!("52 3c ec 11 9e 2c 4c 3d-87 4a c3 4e 85 f2 ea 9{number}/{}", self.serial)
    }

    /// Writes into the disks; changes are tracked from the last remembered restore point on.
    pub fn change(&mut self, count: u64) {
        self.serial += 1;
        for number in 0..self.disks() {
            let file = File::options().write(true).open(self.disk(number)).unwrap();
            let size = file.metadata().unwrap().len();
            let mut changes = self.changes[number as usize].clone();
            for turn in 0..count {
                let at = self.random.below(size) / 512 * 512;
                let length = (1 + self.random.below(200)).min((size - at) / 512) * 512;
                let mut bytes = self.random.bytes(usize::try_from(length).unwrap());
                if turn % 4 == 3 {
                    bytes.fill(0);
                }
                file.write_all_at(&bytes, at).unwrap();
                // Tracking has a granularity of its own.
                let first = at / 65536 * 65536;
                let end = (at + length).div_ceil(65536) * 65536;
                changes.push((first, end.min(size) - first));
            }
            let text = serde_json::to_string(&changes).unwrap();
            fs::write(self.directory.path().join(format!("disk-{number}.cbt")), text).unwrap();
            self.changes[number as usize] = changes;
        }
        fs::write(self.directory.path().join("serial"), self.serial.to_string()).unwrap();
    }

    /// Remembers the disks as they are as the content of a restore point.
    pub fn remember(&mut self, backup: &Value) {
        let id = backup["backup_id"].as_str().unwrap().to_owned();
        let copies = (0..self.disks()).map(|number| {
            let copy = self.directory.path().join(format!("{id}-{number}"));
            fs::copy(self.disk(number), &copy).unwrap();
            copy
        });
        let copies = copies.collect();
        self.points.push((id, copies));
        self.changes.iter_mut().for_each(Vec::clear);
    }

    pub fn last_remembered(&self) -> Option<&str> {
        self.points.last().map(|(id, _)| id.as_str())
    }

    pub fn forget_last(&mut self) {
        self.points.pop();
    }

    /// Every restore point that is remembered must be there, byte for byte, by qemu's word.
    pub fn compare_all(&self, hub: &Hub) {
        for (id, copies) in &self.points {
            let backup = hub.backup(id);
            assert_eq!(backup["status"], "completed", "{backup}");
            for (number, copy) in copies.iter().enumerate() {
                let image = image_of(&backup, u32::try_from(number).unwrap());
                compare(&image, copy);
            }
        }
    }
}

/// `qemu-img check` and `qemu-img compare`.
pub fn compare(image: &str, raw: &Path) {
    super::support::ok("qemu-img", &["check", "-q", image]);
    let raw = raw.to_str().unwrap();
    // A disk that has no whole sectors is longer in the image.
    super::support::ok("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", raw, image]);
}
