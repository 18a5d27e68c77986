//! What differs between two restore points, file by file; and the trees of mounts in a directory.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod files_support;
#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use files_support::{BIG, PROGRAMS, Site, VOLUME};
use serde_json::{Value, json};
use support::{ok, text};
use workflow_support::Hub;

/// Where the file system lies on the disk: the first partition of [`Site`].
const PARTITION: &str = "offset=1048576,sizelimit=41943040";

/// Whether these tests cannot run here: they mount a small file system.
fn unable() -> bool {
    support::missing(&PROGRAMS) || support::not_root()
}

/// The machine's own mount of its first partition.
struct Running(PathBuf);

impl Running {
    fn of(disk: &Path) -> Self {
        let at = disk.with_extension("mounted");
        fs::create_dir_all(&at).unwrap();
        ok("mount", &["-o", &format!("loop,{PARTITION}"), text(disk), text(&at)]);
        Self(at)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

/// What a day does to the machine's files.
fn change(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::write(at("etc/hostname"), b"other\n").unwrap();
    fs::remove_file(at("etc/nothing")).unwrap();
    fs::create_dir(at("new")).unwrap();
    fs::write(at("new/inside"), b"inside").unwrap();
    fs::write(at("grown"), vec![7; 100_000]).unwrap();
    fs::set_permissions(at("many/file-0007"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(at("etc/name")).unwrap();
    std::os::unix::fs::symlink("hosts", at("etc/name")).unwrap();
    // As long as it was, in the middle, and as old as it was.
    let big = fs::File::options().write(true).open(at("big.bin")).unwrap();
    let modified = big.metadata().unwrap().modified().unwrap();
    big.write_all_at(b"changed", BIG as u64 / 2).unwrap();
    big.set_modified(modified).unwrap();
    fs::remove_file(at("many/file-0001")).unwrap();
    fs::create_dir(at("many/file-0001")).unwrap();
}

fn told(found: &Value) -> BTreeSet<(String, String)> {
    let changes = found["changes"].as_array().unwrap().iter();
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let inside = |path: String| path.strip_prefix(VOLUME).unwrap().to_owned();
    changes.map(|change| (word(&change["change"]), inside(word(&change["path"])))).collect()
}

#[test]
fn files_that_differ_are_told_and_what_is_the_same_is_not_read() {
    if unable() {
        return;
    }
    let hub = Hub::configured("reconnect_seconds = 60\n", "[restore]\nmounts = 2\n");
    let site = Site::on(hub);
    {
        let running = Running::of(&site.vm.disk(0));
        change(&running.0);
    }
    let second = site.hub.back_up(&site.vm, "full")["backup_id"].as_str().unwrap().to_owned();
    let diff = |from: &str, to: &str| format!("restore/diff/files?from={from}&to={to}");

    let found = site.hub.get(&diff(&site.backup, &second));
    let expected = [
        ("changed", "/etc/hostname"),
        ("removed", "/etc/nothing"),
        ("added", "/new"),
        ("added", "/grown"),
        ("metadata", "/many/file-0007"),
        ("changed", "/etc/name"),
        ("changed", "/big.bin"),
        ("changed", "/many/file-0001"),
    ];
    let expected: BTreeSet<_> = expected.map(|(a, b)| (a.to_owned(), b.to_owned())).into();
    assert_eq!(told(&found), expected, "{found}");
    assert_eq!((&found["added"], &found["removed"]), (&json!(2), &json!(1)), "{found}");
    assert_eq!((&found["changed"], &found["metadata"]), (&json!(4), &json!(1)), "{found}");
    // The other volume is not shown, and so not compared.
    assert_eq!((&found["more"], found["notes"].as_array().unwrap().len()), (&json!(true), 2));
    assert!(found["notes"][0].as_str().unwrap().contains("luks2"), "{found}");
    let read = found["bytes_read"].as_u64().unwrap();
    assert!(read > 0 && read < 1 << 20, "{read} bytes were read");

    let same = site.hub.get(&diff(&second, &second));
    assert_eq!((&same["changes"], &same["bytes_read"]), (&json!([]), &json!(0)), "{same}");
    assert!(same["files_compared"].as_u64().unwrap() > 2000, "{same}");
    let back = site.hub.get(&format!("{}&limit=3", diff(&second, &site.backup)));
    assert_eq!(back["changes"].as_array().unwrap().len(), 3);
    assert_eq!((&back["added"], &back["removed"]), (&json!(1), &json!(2)), "{back}");
    assert_eq!(back["more"], true);

    let shown = site.ctl(&["restore", "diff", &site.backup, &second, "--files"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("/disk0-p1/big.bin") && shown.contains("2 added"), "{shown}");

    // It takes two mounts, gives them back, and takes nobody's.
    assert_eq!(site.hub.get("restore/mounts")["total"], 0);
    site.mount();
    let (status, answer) = site.hub.request("GET", &diff(&site.backup, &second), None);
    assert_eq!(status, 409, "{answer}");
    assert_eq!(site.hub.get("restore/mounts")["total"], 1);
}

#[test]
fn a_disk_that_was_copied_while_it_was_in_use_is_replayed() {
    if unable() {
        return;
    }
    let mut site = Site::new();
    let disk = site.vm.disk(0);
    let copy = disk.with_extension("copy");
    {
        let running = Running::of(&disk);
        let file = running.0.join("etc/late");
        fs::write(&file, b"in the journal").unwrap();
        fs::File::open(&file).unwrap().sync_all().unwrap();
        ok("cp", &[text(&disk), text(&copy)]);
    }
    fs::rename(&copy, &disk).unwrap();
    site.backup = site.hub.back_up(&site.vm, "full")["backup_id"].as_str().unwrap().to_owned();
    let mount = site.mount();
    let volumes = site.hub.get(&format!("restore/{mount}/volumes"));
    assert_eq!(volumes["volumes"][0]["status"], "replayed", "{volumes}");
    let path = files_support::address(&mount, "download", &format!("{VOLUME}/etc/late"));
    assert_eq!(site.raw("GET", &path, &[]).body, b"in the journal");
}

/// Mounts below this directory, by the kernel's own list.
fn mounted(below: &Path) -> Vec<String> {
    let below = text(below);
    let list = fs::read_to_string("/proc/self/mounts").unwrap();
    let places = list.lines().filter_map(|line| line.split(' ').nth(1));
    places.filter(|at| at.starts_with(below)).map(str::to_owned).collect()
}

#[test]
fn a_mount_shows_its_files_in_a_directory_and_a_killed_hub_leaves_none() {
    if unable() {
        return;
    }
    assert!(Path::new("/dev/fuse").exists(), "FUSE is needed");
    let mut site = Site::new();
    let root = site.hub.data().join("mounts");
    let wish = |site: &Site, path: &str| {
        let wish = json!({"backup_id": site.backup, "mount_path": path});
        site.hub.request("POST", "restore/mount", Some(&wish))
    };
    for path in ["../look", "/etc/look", "a/b", ".look", "..", "l ook"] {
        let (status, answer) = wish(&site, path);
        assert_eq!(status, 400, "{path}: {answer}");
    }
    let (status, made) = wish(&site, "look");
    assert_eq!(status, 201, "{made}\n{}", site.hub.log());
    let at = root.join("look");
    assert_eq!(made["mount_path"], text(&at), "{made}");
    let volume = at.join(VOLUME.trim_start_matches('/'));
    assert_eq!(fs::read(volume.join("big.bin")).unwrap(), site.read("big.bin"));
    ok("diff", &["-r", text(&volume.join("many")), text(&site.source.path().join("many"))]);
    // A link that leads out of the guest leads back into it.
    assert!(fs::read(volume.join("etc/escape")).is_err());
    assert_eq!(fs::read(volume.join("etc/absolute")).unwrap(), b"guest\n");
    assert!(fs::write(volume.join("etc/hostname"), b"x").is_err(), "it is read-only");
    let (status, answer) = wish(&site, "look");
    assert_eq!(status, 422, "{answer}");

    let open = fs::File::open(volume.join("holes.img")).unwrap();
    let id = made["mount_id"].as_str().unwrap();
    let listed = site.hub.get("restore/mounts");
    assert_eq!(listed["mounts"][0]["mount_id"], id);
    site.hub.ok("DELETE", &format!("restore/{id}"), None);
    assert!(!at.exists() && mounted(&root).is_empty());
    assert!(open.read_at(&mut [0; 10], 1 << 30).is_err());

    assert_eq!(wish(&site, "look").0, 201);
    assert_eq!(mounted(&root), [text(&at)]);
    site.hub.kill();
    site.hub.restart();
    assert!(mounted(&root).is_empty() && !at.exists());
    assert_eq!(wish(&site, "look").0, 201);
    assert_eq!(fs::read(volume.join("etc/hostname")).unwrap(), b"guest\n");
    site.hub.stop();
    assert!(mounted(&root).is_empty() && !at.exists());
}
