//! `sendense-ctl` against a whole hub: disks in, restore points out, and an exit code that is true.
#![allow(clippy::unwrap_used, missing_docs)]

mod ctl_support;
mod hub_support;
mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ctl_support::{Gated, TestHub, bare, path};
use sendense_hub::block::BlockDevice;
use sendense_hub::nbd::limits::Limits;
use serde_json::Value;
use support::{both, check_clean, compare, directory, make_disk, missing, ok, text};

const MIB: u64 = 1 << 20;

fn id_of(result: &Value) -> String {
    result["backup"]["backup_id"].as_str().unwrap().to_owned()
}

fn write(path: &str, bytes: &[u8], at: u64) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// A hub, a source in another server that waits after so many reads, and its URI.
fn gated(directory: &Path, reads: usize) -> (TestHub, hub_support::Hub, Arc<Gated>, String) {
    let disk = Gated::new(16 << 20, reads);
    let byte = |i: u32| u8::try_from(i / 4096 % 251 + 1).unwrap();
    let pattern: Vec<u8> = (0..16 << 20).map(byte).collect();
    disk.memory.write(&pattern, 0).unwrap();
    let source =
        hub_support::Hub::with(Limits::default(), Arc::clone(&disk) as Arc<dyn BlockDevice>);
    let uri = format!("nbd://{}/disk", source.address);
    (TestHub::start(directory), source, disk, uri)
}

fn wait_for_reader(source: &hub_support::Hub, disk: &Gated) {
    source.wait_until(|_| disk.waiting.load(Ordering::SeqCst) > 0);
}

#[test]
fn every_restore_point_of_a_file_is_the_file_as_it_was_then() {
    if missing(&["qemu-img"]) {
        return;
    }
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let disk = path(dir.path(), "disk.raw");
    make_disk(disk.as_ref(), 12 * MIB + 512, 71);
    let run = |more: &[&str]| {
        hub.json(&[&["backup", "run", "--vm", "web 1", "--disk", &disk], more].concat())
    };
    let saved = |name: &str| {
        let copy = dir.path().join(name);
        std::fs::copy(&disk, &copy).unwrap();
        copy
    };

    let full = run(&["--tag", "why=first"]);
    let at_full = saved("full.raw");
    assert_eq!(full["backup"]["backup_type"], "full");
    assert_eq!(full["backup"]["tags"]["why"], "first");
    assert_eq!(full["disks"][0]["mode"], "everything");
    assert_eq!(full["disks"][0]["bytes_zeroed"], 0, "a new image reads as zeroes");

    write(&disk, &[7; 5000], 3 * MIB - 100);
    write(&disk, &[0; 300_000], 5 * MIB);
    write(&disk, &[9; 512], 12 * MIB);
    let first = run(&["--type", "incremental"]);
    let at_first = saved("first.raw");
    assert_eq!(first["backup"]["backup_type"], "incremental");
    assert_eq!(first["disks"][0]["mode"], "checksums");
    let sent = first["bytes_sent"].as_u64().unwrap();
    assert!((1..MIB).contains(&sent), "{first}");

    let nothing = run(&[]);
    assert_eq!(nothing["bytes_sent"], 0, "{nothing}");
    assert_eq!(nothing["disks"][0]["bytes_zeroed"], 0);
    assert_eq!(nothing["backup"]["bytes_transferred"], 0);

    File::options().write(true).open(&disk).unwrap().set_len(13 * MIB).unwrap();
    write(&disk, &[3; 1000], 13 * MIB - 1000);
    let grown = run(&[]);
    let at_grown = saved("grown.raw");
    assert_eq!(grown["backup"]["backup_type"], "incremental");
    assert!(grown["bytes_sent"].as_u64().unwrap() <= 2 << 16, "{grown}");

    for (backup, copy) in
        [(&full, &at_full), (&first, &at_first), (&nothing, &at_first), (&grown, &at_grown)]
    {
        let id = id_of(backup);
        let image = hub.image(&id, 0);
        compare(copy, &image);
        ok("qemu-img", &["check", "-q", text(&image)]);
        assert!(hub.ok(&["backup", "verify", &id]).contains("as they were written"));
        assert!(hub.ok(&["backup", "show", &id]).contains(&id));
    }

    let listed = hub.json(&["backup", "list", "--vm", "web 1", "--type", "incremental"]);
    assert_eq!(listed["total"], 3);
    let chain = hub.json(&["backup", "chain", "web 1"]);
    assert_eq!(chain["backup_count"], 4);
    assert_eq!(chain["full_backup_id"], id_of(&full));
    assert!(hub.ok(&["backup", "list"]).lines().count() == 5);
    assert!(hub.ok(&["backup", "chain", "web 1"]).contains("4 backups"));
    assert!(hub.ok(&["backup", "watch", &id_of(&full)]).contains("is complete"));
    let refused = hub.fails(4, &["backup", "delete", &id_of(&full)]);
    assert!(refused.contains(&id_of(&first)), "{refused}");
    hub.ok(&["backup", "delete", &id_of(&grown)]);
    hub.fails(3, &["backup", "show", &id_of(&grown)]);
}

#[test]
fn all_disks_of_a_vm_are_one_backup_and_what_is_known_of_it_is_kept() {
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let (a, b) = (path(dir.path(), "a.raw"), path(dir.path(), "b.raw"));
    make_disk(a.as_ref(), 2 * MIB, 1);
    make_disk(b.as_ref(), MIB, 2);
    hub.ok(&["vm", "set", "db", "--disk", "0:1M:2016", "--disk", "1:1M", "--path", "/dc/vm/db"]);
    let both_disks = format!("{a},{b}");
    let result = hub.json(&["backup", "run", "--vm", "db", "--disk", &both_disks]);
    assert_eq!(result["disks"].as_array().unwrap().len(), 2);
    let vm = hub.json(&["vm", "show", "db"]);
    assert_eq!(vm["vm_path"], "/dc/vm/db");
    assert_eq!(vm["disks"][0]["disk_key"], 2016);
    assert_eq!(vm["disks"][0]["capacity_bytes"], 2 * MIB, "as the source has it");
    let said = hub.fails(2, &["backup", "run", "--vm", "db", "--disk", &a]);
    assert!(said.contains("disk 1"), "a disk is not dropped silently: {said}");
    let again = hub.json(&["backup", "run", "--vm", "db", "--disk", &a, "--disk", &b]);
    assert_eq!(again["bytes_sent"], 0);
    let full = hub.ok(&["backup", "run", "--vm", "db", "--disk", &both_disks, "--type", "full"]);
    assert!(full.contains("full backup of 'db' is complete"), "{full}");
    assert!(hub.ok(&["event", "list"]).contains("backup.completed"));
}

#[test]
fn a_dirty_bitmap_is_believed_after_a_backup_that_was_made_with_it() {
    if missing(&["qemu-img", "qemu-io", "qemu-nbd"]) {
        return;
    }
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let (raw, disk) = (path(dir.path(), "disk.raw"), path(dir.path(), "disk.qcow2"));
    let socket = path(dir.path(), "socket");
    make_disk(raw.as_ref(), 8 * MIB, 72);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &disk]);
    let uri = format!("nbd+unix:///?socket={socket}");
    // qemu does not export a bitmap that is being recorded; a run serves one backup.
    let run = |served: bool, asked: &[&str]| {
        let mut arguments =
            vec!["--read-only", "--shared", "8", "--socket", &socket, "-f", "qcow2"];
        if served {
            arguments.extend(["--bitmap", "b"]);
            ok("qemu-img", &["bitmap", "--disable", &disk, "b"]);
        }
        arguments.extend(["--persistent", &disk]);
        let mut server = std::process::Command::new("qemu-nbd").args(arguments).spawn().unwrap();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(server.try_wait().unwrap().is_none(), "qemu-nbd does not start");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let output =
            hub.ctl(&[&["backup", "run", "--json", "--vm", "q", "--disk", &uri], asked].concat());
        server.kill().unwrap();
        server.wait().unwrap();
        std::fs::remove_file(&socket).unwrap();
        if served {
            ok("qemu-img", &["bitmap", "--enable", &disk, "b"]);
        }
        output
    };
    let result = |output: std::process::Output| -> Value {
        assert!(output.status.success(), "{}", both(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let refused = run(false, &["--bitmap", "b"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(both(&refused).contains("no dirty bitmap 'b'"), "{}", both(&refused));
    assert_eq!(hub.json(&["backup", "list"])["total"], 0, "nothing was begun");

    result(run(false, &[]));
    ok("qemu-img", &["bitmap", "--add", &disk, "b"]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 3M 128K", &disk]);
    let doubtful = result(run(true, &["--bitmap", "b"]));
    assert_eq!(doubtful["disks"][0]["mode"], "checksums", "nobody knows since when it is there");

    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 8 5M 64K", &disk]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -z 1M 1M", &disk]);
    let sure = result(run(true, &["--bitmap", "b"]));
    assert_eq!(sure["disks"][0]["mode"], "bitmap");
    let read = sure["bytes_read"].as_u64().unwrap();
    assert!((1..2 * MIB).contains(&read), "{sure}");
    let image = hub.image(&id_of(&sure), 0);
    ok("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", &disk, text(&image)]);
    check_clean(&image);

    // The bitmap begins anew, and the backup with whose state it begins is gone.
    ok("qemu-img", &["bitmap", "--clear", &disk, "b"]);
    hub.ok(&["backup", "delete", &id_of(&sure)]);
    let earlier = result(run(true, &["--bitmap", "b"]));
    assert_eq!(earlier["disks"][0]["mode"], "checksums", "{earlier}");
    let image = hub.image(&id_of(&earlier), 0);
    ok("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "qcow2", &disk, text(&image)]);
}

#[test]
fn ctrl_c_cancels_the_backup_and_leaves_nothing_running() {
    let dir = directory();
    let (hub, source, disk, uri) = gated(dir.path(), 2);
    let arguments = ["backup", "run", "--vm", "slow", "--disk", &uri, "--connections", "1"];
    let mut run = hub.spawn(&arguments);
    wait_for_reader(&source, &disk);
    assert_eq!(hub.json(&["job", "list"])["total"], 1);
    run.interrupt();
    // It looks for the signal between reads; the disk has more than are let through here.
    for _ in 0..12 {
        if run.has_ended() {
            break;
        }
        disk.allow();
        std::thread::sleep(Duration::from_millis(500));
    }
    disk.open();
    let (code, said) = run.wait();
    assert_eq!(code, Some(130), "{said}");
    assert!(said.contains("was cancelled"), "{said}");
    assert_eq!(hub.json(&["job", "list"])["total"], 0);
    let list = hub.json(&["backup", "list", "--status", "cancelled"]);
    assert_eq!(list["total"], 1);
    assert_eq!(hub.json(&["export", "list"])["total"], 0);
}

#[test]
fn a_backup_that_somebody_else_cancels_ends_the_run_that_sends_it() {
    let dir = directory();
    let (hub, source, disk, uri) = gated(dir.path(), 2);
    let run = hub.spawn(&["backup", "run", "--vm", "slow", "--disk", &uri]);
    wait_for_reader(&source, &disk);
    let conflict = hub.fails(4, &["backup", "run", "--vm", "slow", "--disk", &uri]);
    assert!(conflict.contains("running"), "{conflict}");
    let id = hub.json(&["job", "list"])["backups"][0]["backup_id"].as_str().unwrap().to_owned();
    let watch = hub.spawn(&["job", "watch", &id]);
    hub.ok(&["backup", "cancel", &id]);
    disk.open();
    let (code, said) = run.wait();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cancelled by first-admin"), "{said}");
    let (code, said) = watch.wait();
    assert_eq!(code, Some(1), "it did not complete: {said}");
    hub.fails(4, &["backup", "cancel", &id]);
}

#[test]
fn a_hub_that_is_started_again_meanwhile_gets_the_rest() {
    if missing(&["qemu-img"]) {
        return;
    }
    let dir = directory();
    let (mut hub, source, disk, uri) = gated(dir.path(), 6);
    let run = hub.spawn(&[
        "backup",
        "run",
        "--vm",
        "slow",
        "--disk",
        &uri,
        "--json",
        "--connections",
        "2",
    ]);
    wait_for_reader(&source, &disk);
    // All that was read has arrived; the rest is read while nobody is there to take it.
    let since = Instant::now();
    while hub.json(&["job", "list"])["backups"][0]["bytes_transferred"] != 6 * MIB {
        assert!(since.elapsed() < Duration::from_secs(60), "{}", hub.json(&["job", "list"]));
        std::thread::sleep(Duration::from_millis(50));
    }
    hub.restart(|| disk.open());
    let (code, said) = run.wait();
    assert_eq!(code, Some(0), "{said}");
    let start = said.find("{\n").unwrap();
    let mut results = serde_json::Deserializer::from_str(&said[start..]).into_iter::<Value>();
    let result = results.next().unwrap().unwrap();
    assert!(result["disks"][0]["reconnects"].as_u64().unwrap() >= 1, "{result}");
    let raw = dir.path().join("source.raw");
    std::fs::write(&raw, disk.memory.snapshot()).unwrap();
    compare(&raw, &hub.image(&id_of(&result), 0));
}

#[test]
fn exit_codes_tell_what_kind_of_failure_it_was() {
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let said = hub.fails(3, &["backup", "show", "backup-none"]);
    assert!(said.contains("there is no backup 'backup-none'"), "{said}");
    hub.fails(3, &["backup", "start", "--vm", "nobody"]);
    hub.fails(3, &["backup", "watch", "backup-none"]);
    hub.fails(2, &["backup", "start"]);
    hub.fails(2, &["vm", "set", "new"]);
    hub.fails(2, &["vm", "list", "--url", "hub:8082"]);
    hub.fails(2, &["backup", "run", "--vm", "x", "--disk", "nbds://host/disk"]);
    hub.fails(1, &["backup", "run", "--vm", "x", "--disk", "/nowhere/disk.raw"]);
    assert_eq!(hub.json(&["vm", "list"])["total"], 0, "nothing is entered before all is open");
    let said = hub.fails(5, &["vm", "list", "--token", "sendense_wrong"]);
    assert!(said.contains("token") && said.contains("--token-file"), "{said}");
    let unreachable = hub.fails(6, &["vm", "list", "--url", "http://127.0.0.1:1"]);
    assert!(unreachable.contains("sendense-hub serve"), "{unreachable}");
}

#[test]
fn tokens_are_made_used_from_a_file_and_revoked() {
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let token = hub.ok(&["token", "create", "watcher", "--role", "viewer"]);
    let file = path(dir.path(), "token");
    std::fs::write(&file, &token).unwrap();
    let as_viewer = |arguments: &[&str]| {
        let url = hub.url();
        let output = bare(arguments).args(["--url", &url, "--token-file", &file]).output().unwrap();
        (output.status.code(), both(&output))
    };
    assert_eq!(as_viewer(&["vm", "list"]).0, Some(0));
    let (code, said) = as_viewer(&["token", "list"]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("viewer"), "{said}");
    assert_eq!(hub.json(&["token", "list"])["total"], 2);
    hub.ok(&["token", "revoke", "watcher"]);
    assert_eq!(as_viewer(&["vm", "list"]).0, Some(5));
    let without = bare(&["vm", "list", "--url", &hub.url()]).output().unwrap();
    assert_eq!(without.status.code(), Some(5));
}

#[test]
fn a_hub_that_speaks_tls_is_believed_by_the_certificate_that_is_given() {
    if missing(&["openssl"]) {
        return;
    }
    let dir = directory();
    let make = |name: &str, authority: &str| {
        let (key, certificate) =
            (path(dir.path(), &format!("{name}.key")), path(dir.path(), &format!("{name}.pem")));
        let fixed = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
                     -subj /CN=localhost -addext subjectAltName=DNS:localhost \
                     -addext";
        let fixed: Vec<&str> = fixed.split_whitespace().collect();
        let constraints = format!("basicConstraints=critical,CA:{authority}");
        let rest = [&constraints, "-keyout", &key, "-out", &certificate];
        ok("openssl", &[&fixed[..], &rest].concat());
        (certificate, key)
    };
    let ((certificate, key), (other, _)) = (make("hub", "FALSE"), make("other", "FALSE"));
    let hub = TestHub::with_tls(dir.path(), &certificate, &key);
    let url = format!("https://localhost:{}", hub.reachable.admin.unwrap().port());
    hub.ok(&["vm", "list", "--url", &url, "--ca", &certificate]);
    for ca in [&["--ca", &other][..], &[]] {
        let said = hub.fails(6, &[&["vm", "list", "--url", &url], ca].concat());
        assert!(said.contains("--ca"), "{said}");
    }
    let said = hub.fails(2, &["vm", "list", "--url", &url, "--ca", &key]);
    assert!(said.contains("no certificate"), "{said}");
    // Callbacks need a token there: a run sends it.
    let disk = path(dir.path(), "disk.raw");
    make_disk(disk.as_ref(), MIB, 4);
    let run =
        ["backup", "run", "--vm", "web", "--disk", &disk, "--url", &url, "--ca", &certificate];
    hub.ok(&run);
}

#[test]
fn a_vm_with_a_credential_can_be_planned_and_an_appliance_that_is_away_is_told() {
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let arguments = ["credential", "add", "vc", "--host", "vcenter", "--user", "backup"];
    let added = hub.with_input(&arguments, "secret\n");
    assert!(added.status.success(), "{}", both(&added));
    assert_eq!(hub.with_input(&arguments, "\n").status.code(), Some(2), "no password");
    assert!(!hub.ok(&["credential", "list", "--json"]).contains("secret"));
    hub.ok(&["vm", "set", "web", "--disk", "0:1M", "--credential", "vc"]);
    let plan = hub.json(&["backup", "start", "--vm", "web", "--dry-run"]);
    assert_eq!(plan["backup_type"], "full");
    assert!(hub.ok(&["backup", "start", "--vm", "web", "--dry-run"]).contains("full because"));
    let failed = hub.fails(1, &["backup", "start", "--vm", "web", "--tag", "a=b"]);
    assert!(failed.contains("appliance"), "{failed}");
    hub.fails(4, &["credential", "remove", "vc"]);
    let doctor = hub.fails(1, &["doctor"]);
    assert!(doctor.contains("1 failed in the last day"), "{doctor}");
}

#[test]
fn repositories_and_exports_are_managed() {
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let (place, disk) = (path(dir.path(), "second"), path(dir.path(), "disk.raw"));
    std::fs::create_dir(&place).unwrap();
    make_disk(disk.as_ref(), MIB, 3);
    hub.ok(&["repository", "test", &place]);
    hub.ok(&["repository", "add", "second", &place]);
    let both_ways = ["backup", "run", "--vm", "web", "--disk", &disk];
    let said = hub.fails(1, &both_ways);
    assert!(said.contains("say which"), "{said}");
    let result = hub.json(&[&both_ways[..], &["--repository", "second"]].concat());
    assert!(hub.ok(&["repository", "list"]).contains("second"));
    hub.fails(4, &["repository", "remove", "second"]);
    hub.ok(&["repository", "check"]);
    assert_eq!(hub.json(&["catalog", "check"])["findings"], serde_json::json!([]));
    let report = hub.json(&["repository", "import", &place]);
    assert_eq!(report["known"], 1);

    let image = hub.image(&id_of(&result), 0);
    hub.ok(&["export", "add", "look", text(&image)]);
    assert_eq!(hub.json(&["export", "list"])["exports"][0]["name"], "look");
    hub.ok(&["export", "remove", "look"]);
    hub.fails(3, &["export", "remove", "look"]);
    hub.ok(&["policy", "list"]);
    assert!(hub.ok(&["completions", "bash"]).contains("sendense-ctl"));
}

#[test]
fn the_doctor_finds_nothing_in_a_healthy_hub_and_what_is_wrong_in_others() {
    let dir = directory();
    let hub = TestHub::start(dir.path());
    let nbd = hub.reachable.nbd[0].to_string();
    let data = text(hub.data()).to_owned();
    let doctor = |more: &[&str]| {
        let output = hub.ctl(&[&["doctor", "--json", "--data-dir", &data], more].concat());
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), report)
    };
    let bad = |report: &Value| -> Vec<String> {
        let checks = report["checks"].as_array().unwrap().iter();
        // What this machine's SSH server allows is its own affair.
        let ours = checks.filter(|c| c["check"] != "tunnel" && c["check"] != "permitopen");
        let bad = ours.filter(|c| c["state"] == "bad");
        bad.map(|c| c["check"].as_str().unwrap().to_owned()).collect()
    };
    let (_, well) = doctor(&["--nbd", &nbd]);
    assert_eq!(bad(&well), [""; 0], "{well}");
    let (code, wrong_token) = doctor(&["--nbd", &nbd, "--token", "sendense_wrong"]);
    assert_eq!((code, bad(&wrong_token)), (Some(1), vec!["token".to_owned()]));
    let (_, wrong_port) = doctor(&["--nbd", "127.0.0.1:1"]);
    assert_eq!(bad(&wrong_port), ["nbd"]);
    let (code, away) = doctor(&["--nbd", &nbd, "--url", "http://127.0.0.1:1"]);
    assert_eq!((code, bad(&away)), (Some(1), vec!["api".to_owned()]));
    ok("chmod", &["755", &data]);
    let (_, open) = doctor(&["--nbd", &nbd]);
    assert_eq!(bad(&open), ["data"]);
    let words = hub.fails(1, &["doctor", "--nbd", &nbd, "--data-dir", &data]);
    assert!(words.contains("chmod 700"), "{words}");
}
