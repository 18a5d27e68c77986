//! Restore points as disks: exports, differences, whole disks.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use nbd_proto::CommandFlags;
use serde_json::{Value, json};
use workflow_support::{Hub, LIMIT, Vm};

const MIB: u64 = 1 << 20;

fn id_of(backup: &Value) -> String {
    backup["backup_id"].as_str().unwrap().to_owned()
}

/// A VM with a full and two incrementals, and its disk at each.
fn chain(hub: &Hub) -> (Vm, Vec<(String, Vec<u8>)>) {
    let mut vm = Vm::new(hub, "web", &[5 * MIB + 512]);
    let mut points = Vec::new();
    for kind in ["full", "incremental", "incremental"] {
        let backup = hub.back_up(&vm, kind);
        points.push((id_of(&backup), std::fs::read(vm.disk(0)).unwrap()));
        vm.remember(&backup);
        vm.change(4);
    }
    (vm, points)
}

fn export(hub: &Hub, id: &str, writable: bool) -> String {
    let body = json!({"backup_id": id, "writable": writable});
    let made = hub.post("restore/export", &body);
    let name = made["export_name"].as_str().unwrap().to_owned();
    assert_eq!(made["nbd_uri"], format!("nbd://{}/{name}", hub.nbd));
    name
}

#[test]
fn every_restore_point_can_be_read_as_a_disk_and_stays_while_it_is() {
    let hub = Hub::start();
    let (_vm, points) = chain(&hub);
    let names: Vec<_> = points.iter().map(|(id, _)| export(&hub, id, false)).collect();
    for (name, (_, disk)) in names.iter().zip(&points) {
        let mut client = hub.connect(name);
        let mut found = vec![0; disk.len()];
        client.read(&mut found, 0).unwrap();
        assert!(found == *disk);
        assert!(client.write(&[1; 512], 0, CommandFlags::empty()).is_err());
    }
    assert_eq!(hub.get("restore/exports")["total"], 3);
    let newest = format!("backups/{}", points[2].0);
    let (status, body) = hub.request("DELETE", &newest, None);
    assert_eq!(status, 409, "{body}");
    for name in &names {
        hub.ok("DELETE", &format!("restore/exports/{name}"), None);
    }
    hub.assert_tidy();
    hub.ok("DELETE", &newest, None);
    let gone = json!({"backup_id": points[2].0});
    assert_eq!(hub.request("POST", "restore/export", Some(&gone)).0, 404);
}

#[test]
fn what_is_written_to_a_writable_export_is_thrown_away_with_it() {
    let mut hub = Hub::start();
    let (vm, points) = chain(&hub);
    let (id, disk) = &points[1];
    let name = export(&hub, id, true);
    let mut client = hub.connect(&name);
    client.write(&[7; 70_000], 12_345, CommandFlags::empty()).unwrap();
    let mut found = vec![0; 70_000];
    client.read(&mut found, 12_345).unwrap();
    assert!(found.iter().all(|byte| *byte == 7));
    let mut rest = vec![0; 4096];
    client.read(&mut rest, 3 << 20).unwrap();
    assert_eq!(rest, disk[3 << 20..(3 << 20) + 4096]);
    let overlays = hub.data().join("overlays");
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 1);
    hub.ok("DELETE", &format!("restore/exports/{name}"), None);
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0);
    hub.ok("POST", &format!("backups/{id}/verify"), None);

    // After a crash nothing is left, and the same restore point is there again at once.
    let name = export(&hub, id, true);
    hub.connect(&name).write(&[9; 4096], 0, CommandFlags::empty()).unwrap();
    hub.kill();
    hub.restart();
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0);
    assert_eq!(hub.get("restore/exports")["total"], 0);
    let name = export(&hub, id, true);
    let mut start = vec![0; 4096];
    hub.connect(&name).read(&mut start, 0).unwrap();
    assert_eq!(start, disk[..4096]);
    hub.stop();
    assert_eq!(std::fs::read_dir(&overlays).unwrap().count(), 0, "an orderly end takes it away");
    hub.restart();
    hub.assert_tidy();
    if !support::missing(&["qemu-img"]) {
        vm.compare_all(&hub);
    }
}

#[test]
fn exports_of_restore_points_are_bounded_and_idle_ones_go_away() {
    let hub = Hub::configured("", "[restore]\nexports = 2\nidle_seconds = 5\n");
    let (_vm, points) = chain(&hub);
    let used = export(&hub, &points[0].0, false);
    let client = hub.connect(&used);
    let held = hub.connect(&export(&hub, &points[1].0, true));
    let body = json!({"backup_id": points[2].0});
    let (status, answer) = hub.request("POST", "restore/export", Some(&body));
    assert_eq!(status, 409, "{answer}");
    drop(held);
    let since = std::time::Instant::now();
    while hub.get("restore/exports")["total"] != 1 {
        assert!(since.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(hub.get("restore/exports")["exports"][0]["export_name"], used.as_str());
    drop(client);
    while hub.get("restore/exports")["total"] != 0 {
        assert!(since.elapsed() < LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    hub.assert_tidy();
}

#[test]
fn a_difference_names_the_clusters_that_differ_and_no_others() {
    let hub = Hub::start();
    let (_vm, points) = chain(&hub);
    for (from, to) in [(0, 1), (1, 2), (0, 2), (2, 0), (1, 1)] {
        let ((a, before), (b, after)) = (&points[from], &points[to]);
        let expected: BTreeSet<u64> = before
            .chunks(65536)
            .zip(after.chunks(65536))
            .zip(0..)
            .filter_map(|((x, y), index)| (x != y).then_some(index))
            .collect();
        let told = hub.get(&format!("restore/diff?from={a}&to={b}"));
        let mut found = BTreeSet::new();
        for range in told["ranges"].as_array().unwrap() {
            let first = range["offset"].as_u64().unwrap() / 65536;
            found.extend(first..first + range["length"].as_u64().unwrap() / 65536);
        }
        assert_eq!(found, expected);
        assert_eq!(told["changed_bytes"].as_u64().unwrap(), expected.len() as u64 * 65536);
    }
    let few = hub.get(&format!("restore/diff?from={}&to={}&limit=1", points[0].0, points[2].0));
    assert_eq!((few["ranges"].as_array().unwrap().len(), &few["more"]), (1, &json!(true)));
}

fn ctl(hub: &Hub, arguments: &[&str]) -> std::process::Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_sendense-ctl"))
        .args(["--url", &hub.api, "--token", &hub.token, "--quiet"])
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_whole_disk_comes_back_as_a_file_an_image_a_stream_or_onto_another_server() {
    let hub = Hub::start();
    let (_vm, points) = chain(&hub);
    let (id, disk) = &points[1];
    let directory = tempfile::tempdir().unwrap();
    let to = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let restore = |arguments: &[&str]| {
        let output = ctl(&hub, &[&["restore", "disk", "--backup-id", id], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    restore(&["--to", &to("disk.raw")]);
    assert!(std::fs::read(to("disk.raw")).unwrap() == *disk);
    let allocated = std::fs::metadata(to("disk.raw")).unwrap().blocks() * 512;
    assert!(allocated < disk.len() as u64, "zeroes are holes: {allocated}");
    assert!(restore(&["--to", "-"]) == *disk);
    restore(&["--to", &to("disk.qcow2"), "--format", "qcow2"]);
    if !support::missing(&["qemu-img"]) {
        workflow_support::compare(&to("disk.qcow2"), to("disk.raw").as_ref());
    }
    let again = ctl(&hub, &["restore", "disk", "--backup-id", id, "--to", &to("disk.raw")]);
    assert_eq!(again.status.code(), Some(1), "a file that is there is not overwritten");
    // Onto another server: another VM's disk that is being received stands for it.
    hub.enter_vm("other", &[disk.len() as u64]);
    let other = hub.start_backup("other", "full");
    let target = format!("nbd://{}/{}", hub.nbd, workflow_support::export_of(&other, 0));
    restore(&["--to", &target]);
    assert_eq!(hub.complete(&id_of(&other), 0, "c/1").0, 200);
    let told = hub.get("restore/exports");
    assert_eq!(told["total"], 0, "nothing is left open");
    let copy = export(&hub, &id_of(&other), false);
    let mut found = vec![0; disk.len()];
    hub.connect(&copy).read(&mut found, 0).unwrap();
    assert!(found == *disk);
}

#[test]
fn a_damaged_image_is_noticed_while_it_is_restored() {
    use std::os::unix::fs::FileExt;
    let hub = Hub::start();
    let (_vm, points) = chain(&hub);
    let full = hub.backup(&points[0].0);
    let image = workflow_support::image_of(&full, 0);
    let file = std::fs::File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    // In the middle of the last cluster that it stores.
    let at = file.metadata().unwrap().len() - 30_000;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("disk.raw");
    let to = to.to_str().unwrap();
    let output = ctl(&hub, &["restore", "disk", "--backup-id", &points[0].0, "--to", to]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("not what was backed up"), "{said}");
}
