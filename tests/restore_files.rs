//! Mounts: files of restore points, and what a crash of worker or hub leaves (nothing).
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::{Cursor, ErrorKind, Tree};
use sendense_hub::backup::{Backups, FailureKind, Settings};
use sendense_hub::catalog::Catalog;
use sendense_hub::nbd::handshake::Pending;
use sendense_hub::nbd::publisher::Publisher;
use sendense_hub::nbd::server::Server;
use sendense_hub::restore::{self, MountSettings, MountStatus, MountWish, Mounts, Restores, Using};
use sendense_hub::secrets::Secrets;
use sendense_hub::worker::{Limits, Program};
use tempfile::TempDir;
use workflow_support::{Hub, LIMIT, Vm};

const MIB: u64 = 1 << 20;
/// Says to a copy of a test where the hub's data is.
const DATA: &str = "RESTORE_FILES_DATA";
/// Bytes of the large file.
const LARGE: usize = 5_000_000;

/// A hub's data with restore points of a machine, after the hub has ended.
struct Place {
    directory: TempDir,
    ids: Vec<String>,
    /// Tests count the workers of their process.
    _alone: MutexGuard<'static, ()>,
}

fn large() -> Vec<u8> {
    support::Random::new(5).bytes(LARGE)
}

/// A partition with ext4 on `disk`, whose files are made from `version`.
fn format(disk: &Path, version: &str) {
    let tree = tempfile::tempdir().unwrap();
    std::fs::create_dir(tree.path().join("etc")).unwrap();
    std::fs::write(tree.path().join("etc/hostname"), format!("{version}\n")).unwrap();
    std::fs::write(tree.path().join("large"), large()).unwrap();
    std::os::unix::fs::symlink("etc/hostname", tree.path().join("name")).unwrap();
    let script = "printf 'label: dos\\n2048,,L\\n' | sfdisk -q \"$0\" && \
                  mke2fs -q -F -t ext4 -E offset=1048576 -d \"$1\" \"$0\" 15M";
    support::ok("sh", &["-c", script, disk.to_str().unwrap(), tree.path().to_str().unwrap()]);
}

impl Place {
    /// With a restore point of each version.
    fn new(versions: &[&str]) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hub = Hub::configured("reconnect_seconds = 60\n", "");
        let mut vm = Vm::new(&hub, "web", &[16 * MIB, MIB]);
        let mut ids = Vec::new();
        for version in versions {
            format(&vm.disk(0), version);
            let backup = hub.back_up(&vm, "full");
            ids.push(backup["backup_id"].as_str().unwrap().to_owned());
            vm.remember(&backup);
        }
        hub.stop();
        let directory = std::mem::replace(&mut hub.directory, tempfile::tempdir().unwrap());
        Self { directory, ids, _alone: alone }
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }
}

/// What a hub has of it once it runs again.
struct Open {
    backups: Arc<Backups>,
    _runtime: tokio::runtime::Runtime,
}

fn open(data: &Path) -> Open {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let server = Server::new(sendense_hub::nbd::limits::Limits::default()).unwrap();
    let pending = Arc::new(Pending::default());
    let publisher = Publisher::new(server, pending, runtime.handle().clone(), None);
    let catalog = Arc::new(Catalog::open(&data.join("catalog.db")).unwrap());
    let secrets = Arc::new(Secrets::open(&data.join("secret.key")).unwrap());
    let backups = Backups::new(catalog, Arc::new(publisher), secrets, Settings::default());
    let backups = Arc::new(backups);
    let settings = restore::Settings {
        exports: 1,
        idle: Duration::from_secs(60),
        overlays: data.join("overlays"),
    };
    Restores::new(Arc::clone(&backups), settings).unwrap();
    Open { backups, _runtime: runtime }
}

fn settings() -> MountSettings {
    MountSettings {
        mounts: 3,
        idle: Duration::from_secs(3600),
        program: Program::at(env!("CARGO_BIN_EXE_sendense-hub")),
        limits: Limits::default(),
        root: std::env::temp_dir().join(format!("sendense-mounts-{}", std::process::id())),
    }
}

fn mounts(open: &Open, settings: MountSettings) -> Mounts {
    Mounts::new(Arc::clone(&open.backups), settings).unwrap()
}

fn wish(id: &str) -> MountWish {
    MountWish { backup_id: id.to_owned(), ..MountWish::default() }
}

fn read(tree: &dyn Tree, path: &str) -> guest::Result<Vec<u8>> {
    let found = tree.resolve(path.as_bytes(), true)?;
    let (mut bytes, mut buf) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        match tree.read_at(found.node, &mut buf, bytes.len() as u64)? {
            0 => return Ok(bytes),
            n => bytes.extend(&buf[..n]),
        }
    }
}

fn hostname(using: &Using) -> String {
    let tree = using.tree("disk0-p1").unwrap();
    String::from_utf8(read(&*tree, "/name").unwrap()).unwrap()
}

/// Workers of this process, or of one that was its parent's: by their command lines.
fn workers_of(parent: u32) -> Vec<u32> {
    let parent = format!("--parent\0{parent}\0");
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&parent)
        })
        .collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let since = Instant::now();
    while !holds() {
        assert!(since.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn missing() -> bool {
    support::missing(&["mke2fs", "sfdisk", "sh"])
}

#[test]
fn files_of_restore_points_are_read_and_those_stay_while_they_are() {
    if missing() {
        return;
    }
    let place = Place::new(&["first", "second"]);
    let open = open(&place.data());
    let mounts = mounts(&open, settings());
    let first = mounts.mount(&wish(&place.ids[0]), "anna").unwrap();
    let same = mounts.mount(&wish(&place.ids[0]), "anna").unwrap();
    let second = mounts.mount(&MountWish { disk: Some(0), ..wish(&place.ids[1]) }, "anna").unwrap();
    assert_eq!(first.status, MountStatus::Mounted);
    assert_eq!((first.vm_name.as_str(), first.created_by.as_str()), ("web", "anna"));
    let names: Vec<_> = first.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["disk0-p1", "disk1"]);
    assert_eq!(second.volumes.len(), 1);
    assert!(first.memory > 0 && first.memory < 64 * MIB, "{}", first.memory);
    for (mount, version) in [(&first, "first\n"), (&same, "first\n"), (&second, "second\n")] {
        assert_eq!(hostname(&mounts.using(&mount.id).unwrap()), version);
    }
    let using = mounts.using(&first.id).unwrap();
    let tree = using.tree("disk0-p1").unwrap();
    assert!(read(&*tree, "large").unwrap() == large());
    let listing = tree.list(tree.root().unwrap(), Cursor(0), 100).unwrap();
    let mut names: Vec<_> =
        listing.entries.iter().map(|entry| String::from_utf8_lossy(&entry.name)).collect();
    names.sort();
    assert_eq!(names, ["etc", "large", "lost+found", "name"]);
    let place_of = tree.layout(tree.resolve(b"/large", true).unwrap().node, 0).unwrap();
    assert_eq!(place_of.pieces.iter().map(|piece| piece.length).sum::<u64>(), LARGE as u64);
    assert_eq!(tree.resolve(b"/nothing", true).unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(using.tree("disk1").err().unwrap().kind, FailureKind::Unprocessable);
    assert_eq!(using.tree("disk9").err().unwrap().kind, FailureKind::NotFound);

    // A fourth is one too many, and says so.
    let failure = mounts.mount(&wish(&place.ids[0]), "anna").unwrap_err();
    assert_eq!(failure.kind, FailureKind::Conflict);
    assert!(failure.message.starts_with("3 restore points are mounted"), "{failure}");

    // What is mounted is not deleted.
    let delete = |id: &str| open.backups.delete(id, "anna");
    assert_eq!(delete(&place.ids[1]).unwrap_err().kind, FailureKind::Conflict);
    mounts.unmount(&second.id, "anna").unwrap();
    delete(&place.ids[1]).unwrap();
    mounts.unmount(&same.id, "anna").unwrap();
    assert_eq!(delete(&place.ids[0]).unwrap_err().kind, FailureKind::Conflict);

    // A mount ends under those who use it.
    mounts.unmount(&first.id, "anna").unwrap();
    assert_eq!(tree.root().unwrap_err().kind, ErrorKind::Io);
    assert_eq!(mounts.unmount(&first.id, "anna").unwrap_err().kind, FailureKind::NotFound);
    assert_eq!(workers_of(std::process::id()), Vec::<u32>::new());
    let events = open.backups.catalog().events(Some(&place.ids[0]), 100).unwrap();
    let count = |action| events.iter().filter(|event| event.action == action).count();
    assert_eq!((count("restore.mounted"), count("restore.unmounted")), (2, 2));
    delete(&place.ids[0]).unwrap();
    assert_eq!(mounts.mount(&wish(&place.ids[0]), "anna").unwrap_err().kind, FailureKind::NotFound);
}

#[test]
fn a_worker_that_dies_fails_its_mount_only_and_the_backup_is_mounted_again_at_once() {
    if missing() {
        return;
    }
    let place = Place::new(&["first", "second"]);
    let open = open(&place.data());
    let mounts = mounts(&open, MountSettings { idle: Duration::from_millis(500), ..settings() });
    let dead = mounts.mount(&wish(&place.ids[0]), "anna").unwrap();
    let worker = workers_of(std::process::id())[0];
    let other = mounts.mount(&wish(&place.ids[1]), "anna").unwrap();
    let held = mounts.using(&other.id).unwrap();
    let using = mounts.using(&dead.id).unwrap();
    let tree = using.tree("disk0-p1").unwrap();
    tree.root().unwrap();
    assert_eq!(workers_of(std::process::id()).len(), 2);
    let pid = rustix::process::Pid::from_raw(worker.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let error = tree.root().unwrap_err();
    assert!(error.message.contains("signal 9"), "{error}");
    let status = mounts.info(&dead.id).unwrap().status;
    assert!(matches!(&status, MountStatus::Failed(why) if why.contains("signal 9")), "{status:?}");
    let failure = mounts.using(&dead.id).err().unwrap();
    assert_eq!(failure.kind, FailureKind::Conflict);
    assert_eq!(mounts.cleanup().failed, 1);
    assert_eq!(hostname(&held), "second\n");
    let again = mounts.mount(&wish(&place.ids[0]), "anna").unwrap();
    assert_eq!(hostname(&mounts.using(&again.id).unwrap()), "first\n");
    drop(using);

    // Idle ones go, failed ones too; one with a request in flight stays however long that takes.
    wait_until("idle mounts stay", || {
        mounts.look();
        mounts.list().len() == 1
    });
    std::thread::sleep(Duration::from_millis(600));
    mounts.look();
    assert_eq!(hostname(&held), "second\n");
    let info = mounts.info(&other.id).unwrap();
    assert_eq!(info.requests_in_flight, 1);
    assert_eq!(mounts.cleanup().ended_idle, 2);
    drop(held);
    wait_until("the last one stays", || {
        mounts.look();
        mounts.list().is_empty()
    });
    assert_eq!(workers_of(std::process::id()), Vec::<u32>::new());
    open.backups.delete(&place.ids[0], "anna").unwrap();
    open.backups.delete(&place.ids[1], "anna").unwrap();
}

#[test]
fn a_mount_that_fails_or_comes_too_late_leaves_nothing() {
    if missing() {
        return;
    }
    let place = Place::new(&["first"]);
    let open = open(&place.data());
    let script = place.directory.path().join("hostile");
    let lies = "#!/bin/sh\nprintf '\\377\\377\\377\\377' >&0\nsleep 60\n";
    std::fs::write(&script, lies).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let hostile = mounts(&open, MountSettings { program: Program::at(script), ..settings() });
    for _ in 0..4 {
        let failure = hostile.mount(&wish(&place.ids[0]), "anna").unwrap_err();
        assert_eq!(failure.kind, FailureKind::Internal);
        assert!(failure.message.contains("broke the protocol"), "{failure}");
    }
    let path = MountWish { mount_path: Some("/mnt/x".into()), ..wish(&place.ids[0]) };
    assert_eq!(hostile.mount(&path, "anna").unwrap_err().kind, FailureKind::Invalid);
    let disk = MountWish { disk: Some(9), ..wish(&place.ids[0]) };
    assert_eq!(hostile.mount(&disk, "anna").unwrap_err().kind, FailureKind::NotFound);
    assert!(hostile.list().is_empty());

    let mounts = mounts(&open, settings());
    mounts.mount(&wish(&place.ids[0]), "anna").unwrap();
    mounts.stop();
    assert_eq!(mounts.mount(&wish(&place.ids[0]), "anna").unwrap_err().kind, FailureKind::Conflict);
    assert!(mounts.list().is_empty());
    assert_eq!(workers_of(std::process::id()), Vec::<u32>::new());
    open.backups.delete(&place.ids[0], "anna").unwrap();
}

#[test]
fn a_hub_that_is_killed_leaves_no_worker_and_no_lease() {
    if let Ok(data) = std::env::var(DATA) {
        // The hub that is to be killed. A thread that is gone mounts, as one of a request does.
        let (data, id) = data.split_once('#').unwrap();
        let open = open(Path::new(data));
        let mounts = mounts(&open, settings());
        std::thread::scope(|scope| {
            scope.spawn(|| mounts.mount(&wish(id), "anna").unwrap()).join().unwrap();
        });
        std::thread::sleep(Duration::from_millis(200));
        let mount = mounts.list().remove(0);
        assert_eq!(hostname(&mounts.using(&mount.id).unwrap()), "first\n");
        println!("\nmounted");
        std::io::stdout().flush().unwrap();
        std::thread::sleep(LIMIT);
        return;
    }
    if missing() {
        return;
    }
    let place = Place::new(&["first"]);
    let name = "a_hub_that_is_killed_leaves_no_worker_and_no_lease";
    let mut hub = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(DATA, format!("{}#{}", place.data().display(), place.ids[0]))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(hub.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "mounted"), "it mounts");
    let workers = workers_of(hub.id());
    assert_eq!(workers.len(), 1);
    hub.kill().unwrap();
    hub.wait().unwrap();
    wait_until("a worker outlives its hub", || workers_of(hub.id()).is_empty());

    let open = open(&place.data());
    let mounts = mounts(&open, settings());
    let mount = mounts.mount(&wish(&place.ids[0]), "anna").unwrap();
    assert_eq!(hostname(&mounts.using(&mount.id).unwrap()), "first\n");
    mounts.stop();
    open.backups.delete(&place.ids[0], "anna").unwrap();
}
