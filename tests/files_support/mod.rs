//! A machine whose disk has files on it: a partition that is read, and one that is not.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::{Random, ok, text};
use super::workflow_support::{Hub, Vm, encoded};

const MIB: u64 = 1 << 20;
/// The partition that is read: where it begins, and its length in MiB.
const FIRST: u64 = 1;
const LENGTH: u64 = 40;
/// Bytes of the disk.
const DISK: u64 = 64 * MIB;
/// Bytes of `big.bin`.
pub const BIG: usize = 9 << 20;
/// Bytes of `holes.img`, nearly all of them in a hole.
pub const HOLES: u64 = 3 << 30;
/// Files in `many`.
pub const MANY: usize = 2500;
/// The volume that is read, and the one that is refused.
pub const VOLUME: &str = "/disk0-p1";
pub const REFUSED: &str = "disk0-p2";
/// A name that is no UTF-8, and one that would steer a terminal.
pub const LATIN: &[u8] = b"caf\xe9";
pub const NASTY: &str = "a\u{1b}[2J\nb";

/// What the tests need beside the hub.
pub const PROGRAMS: [&str; 2] = ["mke2fs", "sgdisk"];

/// A hub with one backup of such a machine.
pub struct Site {
    pub hub: Hub,
    pub vm: Vm,
    pub backup: String,
    pub source: TempDir,
}

impl Site {
    pub fn new() -> Self {
        // A slow machine may take its time between the data and `complete`.
        Self::on(Hub::configured("reconnect_seconds = 60\n", ""))
    }

    pub fn on(hub: Hub) -> Self {
        let source = tempfile::tempdir().unwrap();
        let vm = Vm::new(&hub, "files", &[DISK]);
        fill(source.path());
        make_disk(source.path(), &vm.disk(0));
        let done = hub.back_up(&vm, "full");
        let backup = done["backup_id"].as_str().unwrap().to_owned();
        Self { hub, vm, backup, source }
    }

    /// A file of the source.
    pub fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.source.path().join(path)).unwrap()
    }

    /// Mounts the backup; the mount's id.
    pub fn mount(&self) -> String {
        let made = self.hub.post("restore/mount", &json!({"backup_id": self.backup}));
        assert_eq!(made["status"], "mounted", "{made}\n{}", self.hub.log());
        made["mount_id"].as_str().unwrap().to_owned()
    }

    /// What a mount says of a path.
    pub fn ask(&self, mount: &str, what: &str, path: &str) -> (u16, Value) {
        self.hub.request("GET", &address(mount, what, path), None)
    }

    pub fn answer(&self, mount: &str, what: &str, path: &str) -> Value {
        self.hub.get(&address(mount, what, path))
    }

    /// A request whose answer is no JSON.
    pub fn raw(&self, method: &str, address: &str, headers: &[(&str, &str)]) -> Answer {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/api/v1/{address}", self.hub.api))
            .header("authorization", format!("Bearer {}", self.hub.token));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = agent.run(request.body(()).unwrap()).unwrap();
        let header =
            |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let names = [
            "content-length",
            "content-range",
            "etag",
            "accept-ranges",
            "content-type",
            "content-disposition",
            "x-content-type-options",
        ];
        let headers = names.map(|name| (name, header(name).unwrap_or_default())).into();
        let status = answer.status().as_u16();
        let mut body = Vec::new();
        let whole = answer.into_body().into_reader().read_to_end(&mut body).is_ok();
        Answer { status, headers, body, whole }
    }

    /// Runs sendense-ctl.
    pub fn ctl(&self, arguments: &[&str]) -> std::process::Output {
        self.program(arguments).output().unwrap()
    }

    pub fn program(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sendense-ctl"));
        command
            .args(["--url", &self.hub.api, "--token", &self.hub.token])
            .args(arguments)
            .env_remove("SENDENSE_TOKEN_FILE");
        command
    }
}

/// An answer with its bytes.
pub struct Answer {
    pub status: u16,
    headers: std::collections::BTreeMap<&'static str, String>,
    pub body: Vec<u8>,
    /// The body did not break off.
    pub whole: bool,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        &self.headers[name]
    }
}

/// The address of something in a mount.
pub fn address(mount: &str, what: &str, path: &str) -> String {
    format!("restore/{mount}/{what}?path={}", encoded(path))
}

/// Files of all kinds.
fn fill(root: &Path) {
    let mut random = Random::new(99);
    let make = |path: &str| fs::create_dir_all(root.join(path)).unwrap();
    let write = |path: &str, bytes: &[u8]| fs::write(root.join(path), bytes).unwrap();
    make("etc/empty");
    write("etc/hostname", b"guest\n");
    write("etc/nothing", b"");
    write("big.bin", &random.bytes(BIG));
    make("many");
    for number in 0..MANY {
        write(&format!("many/file-{number:04}"), number.to_string().as_bytes());
    }
    symlink("hostname", root.join("etc/name")).unwrap();
    symlink("/etc/hostname", root.join("etc/absolute")).unwrap();
    symlink("../../../../../../etc/passwd", root.join("etc/escape")).unwrap();
    symlink("loop", root.join("etc/loop")).unwrap();
    write(NASTY, b"nasty");
    fs::write(root.join(OsStr::from_bytes(LATIN)), b"latin").unwrap();
    let holes = File::create_new(root.join("holes.img")).unwrap();
    holes.set_len(HOLES).unwrap();
    holes.write_all_at(b"end", HOLES - 3).unwrap();
}

/// A disk with a GPT: these files in an ext4, and something encrypted.
fn make_disk(files: &Path, disk: &Path) {
    let file = File::create(disk).unwrap();
    file.set_len(DISK).unwrap();
    let disk = text(disk);
    let first = format!("1:{}:+{LENGTH}M", FIRST * 2048);
    ok("sgdisk", &["-o", "-n", &first, "-n", "2:0:+8M", disk]);
    let offset = format!("offset={}", FIRST * MIB);
    let blocks = (LENGTH * 1024).to_string() + "k";
    let arguments =
        ["-q", "-F", "-t", "ext4", "-L", "files", "-E", &offset, "-d", text(files), disk, &blocks];
    ok("mke2fs", &arguments);
    // The header of LUKS 2.
    let luks = [&b"LUKS\xba\xbe\0\x02"[..], &[0; 504]].concat();
    file.write_all_at(&luks, (FIRST + LENGTH) * MIB).unwrap();
}

/// A path below a directory of the test, as an argument.
pub fn at(directory: &TempDir, name: &str) -> (PathBuf, String) {
    let path = directory.path().join(name);
    let argument = text(&path).to_owned();
    (path, argument)
}
