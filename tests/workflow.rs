//! Backups from request to restore point, with an agent that does what the real one does.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use serde_json::json;
use support::missing;
use workflow_support::appliance::Appliance;
use workflow_support::{Hub, Vm, export_of, image_of};

const MIB: u64 = 1 << 20;

/// A hub with an appliance, and a VM whose credential it has.
fn with_appliance(backups: &str, sizes: &[u64]) -> (Hub, Appliance, Vm) {
    let appliance = Appliance::start();
    let hub = Hub::configured(backups, &appliance.section());
    let vm = Vm::new(&hub, "web 01", sizes);
    hub.post(
        "credentials",
        &json!({"name": "vc", "vcenter_host": "vc.local", "username": "backup",
            "password": "s\u{e4}cret"}),
    );
    let mut view = hub.get("vms/web%2001");
    view["credential_id"] = json!("vc");
    view["vm_path"] = json!("/dc/vm/web 01");
    hub.ok("PUT", "vms/web%2001", Some(&view));
    appliance.serve(vm.directory.path(), &hub.api, &[]);
    (hub, appliance, vm)
}

fn start(hub: &Hub, kind: &str) -> String {
    let backup = hub.post("backups", &json!({"vm_name": "web 01", "backup_type": kind}));
    assert_eq!(backup["status"], "running", "{backup}");
    backup["backup_id"].as_str().unwrap().to_owned()
}

#[test]
fn a_full_and_five_incrementals_of_three_disks_are_equal_at_every_point() {
    if missing(&["qemu-img", "nbdsh"]) {
        return;
    }
    let (hub, appliance, mut vm) = with_appliance("", &[70 * MIB, 5 * MIB + 512, 33 * MIB]);
    for turn in 0..=5 {
        let kind = if turn == 0 { "full" } else { "incremental" };
        if turn == 3 {
            appliance.serve(vm.directory.path(), &hub.api, &["complete-twice"]);
        }
        let id = start(&hub, kind);
        let backup = hub.ended(&id);
        assert_eq!(backup["status"], "completed", "{backup}\n{}", hub.log());
        assert_eq!(backup["backup_type"], kind, "{backup}");
        assert!(backup["bytes_transferred"].as_u64().unwrap() > 0);
        vm.remember(&backup);
        vm.change(6);
    }
    vm.compare_all(&hub);
    hub.assert_tidy();
    let starts = appliance.calls("/api/v1/backup/start");
    assert_eq!(starts.len(), 6, "one call for each backup of all disks");
    assert_eq!(starts[0]["vcenter_password"], "s\u{e4}cret");
    assert_eq!(starts[0]["previous_change_id"], "");
    assert!(starts[1]["previous_change_id"].as_str().unwrap().contains('/'));
    assert_eq!(starts[0]["nbd_targets"].as_str().unwrap().split(',').count(), 3);
    let chain = hub.get("backups/web%2001/chain?disk_id=2");
    assert_eq!(chain["backup_count"], 6);
    assert_eq!(hub.get("backup/chain?vm_name=web%2001")["backup_count"], 6);
    let list = hub.get("backups?vm_name=web%2001");
    assert_eq!(list["total"], 6, "each backup is listed once");
    let stats = hub.get("backups/stats?vm_name=web%2001");
    assert_eq!(stats["backup_count"], 6);
}

#[test]
fn an_agent_that_copies_everything_into_an_incremental_does_no_harm() {
    if missing(&["qemu-img", "nbdsh"]) {
        return;
    }
    let (hub, appliance, mut vm) = with_appliance("", &[40 * MIB]);
    let full = hub.ended(&start(&hub, "full"));
    vm.remember(&full);
    vm.change(3);
    appliance.serve(vm.directory.path(), &hub.api, &["ignore-changeid"]);
    let backup = hub.ended(&start(&hub, "incremental"));
    vm.remember(&backup);
    vm.compare_all(&hub);
    let stored = backup["stored_bytes"].as_u64().unwrap();
    assert!(stored < MIB, "only what differs is stored, not {stored}");
    assert!(backup["bytes_transferred"].as_u64().unwrap() > stored);
}

#[test]
fn an_agent_that_dies_fails_its_backup_and_nothing_else() {
    if missing(&["qemu-img", "nbdsh"]) {
        return;
    }
    let (hub, appliance, mut vm) = with_appliance("reconnect_seconds = 2\n", &[40 * MIB, 8 * MIB]);
    let full = hub.ended(&start(&hub, "full"));
    vm.remember(&full);
    vm.change(3);
    appliance.serve(vm.directory.path(), &hub.api, &["die-at-disk=1"]);
    let failed = hub.ended(&start(&hub, "incremental"));
    assert_eq!(failed["status"], "failed");
    let error = failed["error_message"].as_str().unwrap();
    assert!(error.contains("agent"), "{error}");
    hub.assert_tidy();
    vm.compare_all(&hub);
    let cleanups = || appliance.calls("/api/v1/cleanup").len();
    let since = std::time::Instant::now();
    while cleanups() == 0 && since.elapsed() < workflow_support::LIMIT {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(cleanups(), 1, "the agent is told to take its snapshot away");
    // The same where the appliance says that it lives, though it does not.
    appliance.be_blind(true);
    let failed = hub.ended(&start(&hub, "incremental"));
    assert!(failed["error_message"].as_str().unwrap().contains("connections"), "{failed}");
    appliance.be_blind(false);
    appliance.serve(vm.directory.path(), &hub.api, &[]);
    let backup = hub.ended(&start(&hub, "incremental"));
    assert_eq!(backup["status"], "completed", "{backup}");
    vm.remember(&backup);
    vm.compare_all(&hub);
    hub.assert_tidy();
}

#[test]
fn an_appliance_that_refuses_or_is_not_there_leaves_nothing_behind() {
    if missing(&["qemu-img", "nbdsh"]) {
        return;
    }
    let (hub, appliance, _vm) = with_appliance("", &[MIB]);
    appliance.refuse(Some((500, "no snapshot possible")));
    let wish = json!({"vm_name": "web 01", "backup_type": "full"});
    let (status, body) = hub.request("POST", "backups", Some(&wish));
    assert_eq!(status, 502, "{body}");
    assert!(body["error"].as_str().unwrap().contains("no snapshot possible"), "{body}");
    let failed = &hub.get("backups?status=failed")["backups"][0];
    assert!(failed["error_message"].as_str().unwrap().contains("no snapshot possible"));
    hub.assert_tidy();
    let hub = Hub::configured("", "[agent]\nurl = \"http://127.0.0.1:1\"\n");
    hub.enter_vm("x", &[MIB]);
    let (status, body) =
        hub.request("POST", "backups", Some(&json!({"vm_name": "x", "backup_type": "full"})));
    assert_eq!(status, 422, "{body}");
    hub.assert_tidy();
}

#[test]
fn a_hub_that_is_killed_goes_on_with_agents_that_have_lost_nothing() {
    if missing(&["qemu-img", "nbdsh"]) {
        return;
    }
    let (mut hub, appliance, mut vm) = with_appliance("", &[8 * MIB, 8 * MIB]);
    // Killed between two disks: the first is sealed, the second was not begun.
    appliance.serve(vm.directory.path(), &hub.api, &["pause-at-disk=1"]);
    let id = start(&hub, "full");
    wait_for(&vm, "paused");
    hub.kill();
    hub.restart();
    assert_eq!(hub.backup(&id)["status"], "running", "{}", hub.log());
    assert_eq!(hub.get("nbd/exports")["total"], 1);
    std::fs::write(vm.directory.path().join("go"), "").unwrap();
    let backup = hub.ended(&id);
    assert_eq!(backup["status"], "completed", "{backup}\n{}", hub.log());
    vm.remember(&backup);
    vm.compare_all(&hub);
    hub.assert_tidy();

    // Killed in the middle of a disk: the agent does not come back.
    for mark in ["go", "paused"] {
        std::fs::remove_file(vm.directory.path().join(mark)).unwrap();
    }
    vm.change(5);
    appliance.serve(vm.directory.path(), &hub.api, &["pause-in-disk=1"]);
    let id = start(&hub, "incremental");
    wait_for(&vm, "paused");
    hub.kill();
    hub.restart();
    let failed = hub.backup(&id);
    assert_eq!(failed["status"], "failed", "told at once: {failed}");
    hub.assert_tidy();
    vm.compare_all(&hub);
}

fn wait_for(vm: &Vm, mark: &str) {
    let since = std::time::Instant::now();
    while !vm.directory.path().join(mark).exists() {
        assert!(since.elapsed() < workflow_support::LIMIT, "no {mark}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_disk_that_has_grown_is_incremental_and_one_that_was_replaced_makes_a_full() {
    if missing(&["qemu-img"]) {
        return;
    }
    let hub = Hub::start();
    let mut vm = Vm::new(&hub, "db", &[5 * MIB, 3 * MIB]);
    vm.remember(&hub.back_up(&vm, "full"));
    for number in 0..2 {
        let file = std::fs::File::options().write(true).open(vm.disk(number)).unwrap();
        file.set_len(if number == 0 { 9 * MIB + 1536 } else { 3 * MIB }).unwrap();
    }
    vm.change(4);
    hub.enter_vm("db", &[9 * MIB + 1536, 3 * MIB]);
    let grown = hub.back_up(&vm, "incremental");
    assert_eq!(grown["backup_type"], "incremental", "{grown}");
    vm.remember(&grown);
    vm.compare_all(&hub);
    // Another key: another disk.
    let disks = json!([{"disk_id": 0, "disk_key": 2000, "capacity_bytes": 9 * MIB + 1536},
        {"disk_id": 1, "disk_key": 2009, "capacity_bytes": 3 * MIB}]);
    hub.ok("PUT", "vms/db", Some(&json!({"disks": disks})));
    let plan = hub.post(
        "backups?dry_run=true",
        &json!({"vm_name": "db", "backup_type": "incremental", "agent": "caller"}),
    );
    assert_eq!(plan["backup_type"], "full");
    assert!(plan["full_reason"].as_str().unwrap().contains("replaced"), "{plan}");
    let full = hub.back_up(&vm, "incremental");
    assert_eq!(
        (&full["backup_type"], &full["requested_type"]),
        (&json!("full"), &json!("incremental"))
    );
    vm.remember(&full);
    vm.compare_all(&hub);
    hub.assert_tidy();
}

#[test]
fn change_ids_are_each_disks_own_and_a_full_is_asked_for_everything() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "two", &[MIB, MIB]);
    let ask = |disk: u32| {
        let path = format!("backups/changeid?vm_name=two&disk_id={disk}");
        hub.request_as(None, "GET", &path, None)
    };
    assert_eq!(ask(0).0, 404, "nobody asked for a backup");
    hub.back_up(&vm, "full");
    let next = hub.start_backup("two", "incremental");
    assert_eq!(ask(0).1["change_id"], vm.change_id(0));
    assert_eq!(ask(1).1["change_id"], vm.change_id(1));
    assert_eq!(ask(2).0, 404);
    hub.post(&format!("backups/{}/cancel", next["backup_id"].as_str().unwrap()), &json!({}));
    hub.start_backup("two", "full");
    let (status, told) = ask(1);
    assert_eq!((status, &told["change_id"]), (200, &json!("")), "no delta into an empty image");
    assert!(told.as_object().unwrap().values().all(serde_json::Value::is_string), "{told}");
}

#[test]
fn completing_a_disk_waits_for_no_idle_connection_and_ends_writing() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[2 * MIB, MIB]);
    let backup = hub.start_backup("web", "full");
    let id = backup["backup_id"].as_str().unwrap();
    let mut idle = hub.connect(&export_of(&backup, 0));
    hub.send(&vm, &backup, 0);
    let (status, _) = hub.complete(id, 0, "c/1");
    assert_eq!(status, 200);
    assert_eq!(hub.complete(id, 0, "c/1").0, 200, "repeated");
    let refused = idle.write(&[1; 512], 0, nbd_proto::CommandFlags::empty());
    assert!(refused.unwrap_err().to_string().contains("complete"));
    assert_eq!(hub.backup(id)["status"], "running", "one disk is not the VM");
    let telemetry =
        json!({"status": "completed", "current_phase": "done", "progress_percent": 140});
    let path = format!("telemetry/backup/{id}");
    assert_eq!(hub.request_as(None, "POST", &path, Some(&telemetry)).0, 200);
    assert_eq!(hub.backup(id)["status"], "running", "telemetry is a sign of life only");
    hub.send(&vm, &backup, 1);
    assert_eq!(hub.complete(id, 1, "c/1").0, 200);
    assert_eq!(hub.backup(id)["status"], "completed");
    assert_eq!(hub.complete(id, 1, "c/1").0, 200, "repeated after the end");
    assert_eq!(hub.request_as(None, "POST", &path, Some(&telemetry)).0, 200);
    drop(idle);
    hub.assert_tidy();
}

#[test]
fn callbacks_for_what_is_not_running_are_refused_and_change_nothing() {
    let hub = Hub::start();
    Vm::new(&hub, "web", &[MIB]);
    assert_eq!(hub.complete("backup-none", 0, "c").0, 404);
    let telemetry = json!({"status": "running"});
    let path = "telemetry/backup/backup-none";
    assert_eq!(hub.request_as(None, "POST", path, Some(&telemetry)).0, 404);
    let backup = hub.start_backup("web", "full");
    let id = backup["backup_id"].as_str().unwrap();
    assert_eq!(hub.complete(id, 7, "c").0, 404, "no such disk");
    assert_eq!(hub.complete(id, 0, &"c".repeat(5000)).0, 400);
    hub.post(&format!("backups/{id}/cancel"), &json!({}));
    assert_eq!(hub.complete(id, 0, "c").0, 409);
    assert_eq!(hub.backup(id)["status"], "cancelled");
    let again = hub.request("POST", &format!("backups/{id}/cancel"), Some(&json!({})));
    assert_eq!(again.0, 409);
    hub.assert_tidy();
}

#[test]
fn a_vm_has_one_running_backup_and_others_are_not_touched_by_its_end() {
    let hub = Hub::start();
    let vms: Vec<Vm> = (0..6).map(|n| Vm::new(&hub, &format!("vm-disk{n}"), &[MIB, MIB])).collect();
    let backups: Vec<_> = vms.iter().map(|vm| hub.start_backup(&vm.name, "full")).collect();
    let wish = json!({"vm_name": "vm-disk0", "backup_type": "full", "agent": "caller"});
    let (status, body) = hub.request("POST", "backups", Some(&wish));
    assert_eq!(status, 409, "{body}");
    assert!(body["error"].as_str().unwrap().contains("running backup"));
    std::thread::scope(|scope| {
        for (number, (vm, backup)) in vms.iter().zip(&backups).enumerate() {
            let hub = &hub;
            scope.spawn(move || {
                let id = backup["backup_id"].as_str().unwrap();
                if number % 2 == 1 {
                    hub.send(vm, backup, 0);
                    hub.post(&format!("backups/{id}/cancel"), &json!({}));
                    return;
                }
                for disk in 0..2 {
                    hub.send(vm, backup, disk);
                    assert_eq!(hub.complete(id, disk, "c/1").0, 200);
                }
            });
        }
    });
    for (number, backup) in backups.iter().enumerate() {
        let expected = if number % 2 == 1 { "cancelled" } else { "completed" };
        assert_eq!(hub.backup(backup["backup_id"].as_str().unwrap())["status"], expected);
    }
    assert_eq!(hub.get("backups")["total"], 6);
    hub.assert_tidy();
}

#[test]
fn backups_beyond_the_limit_wait_for_their_turn() {
    let hub = Hub::configured("running = 1", "");
    let (a, b) = (Vm::new(&hub, "a", &[MIB]), Vm::new(&hub, "b", &[MIB]));
    let first = hub.start_backup("a", "full");
    let second = hub.start_backup("b", "full");
    assert_eq!((&first["status"], &second["status"]), (&json!("running"), &json!("pending")));
    let id = |backup: &serde_json::Value| backup["backup_id"].as_str().unwrap().to_owned();
    hub.send(&a, &first, 0);
    assert_eq!(hub.complete(&id(&first), 0, "c").0, 200);
    let since = std::time::Instant::now();
    while hub.backup(&id(&second))["current_phase"] != "receiving" {
        assert!(since.elapsed() < workflow_support::LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    hub.send(&b, &second, 0);
    assert_eq!(hub.complete(&id(&second), 0, "c").0, 200);
    hub.assert_tidy();
}

#[test]
fn both_names_of_an_export_lead_to_its_disk() {
    let hub = Hub::start();
    Vm::new(&hub, "web", &[2 * MIB]);
    let backup = hub.start_backup("web", "full");
    let alias = backup["disk_results"][0]["nbd_export_alias"].as_str().unwrap();
    assert!(alias.len() <= 64 && alias.starts_with("backup-ctx-web"), "{alias}");
    let mut client = hub.connect(alias);
    client.write(&[7; 4096], 8192, nbd_proto::CommandFlags::empty()).unwrap();
    let mut found = [0; 4096];
    hub.connect(&export_of(&backup, 0)).read(&mut found, 8192).unwrap();
    assert_eq!(found, [7; 4096]);
}

#[test]
fn a_backup_that_is_the_base_of_others_cannot_be_deleted_and_files_go_with_rows() {
    let hub = Hub::start();
    let mut vm = Vm::new(&hub, "web", &[MIB]);
    let full = hub.back_up(&vm, "full");
    vm.change(2);
    let increment = hub.back_up(&vm, "incremental");
    let path =
        |backup: &serde_json::Value| format!("backups/{}", backup["backup_id"].as_str().unwrap());
    let (status, body) = hub.request("DELETE", &path(&full), None);
    assert_eq!(status, 409, "{body}");
    assert!(body["error"].as_str().unwrap().contains(increment["backup_id"].as_str().unwrap()));
    for backup in [&increment, &full] {
        hub.ok("DELETE", &path(backup), None);
        assert!(!std::path::Path::new(&image_of(backup, 0)).exists());
        assert_eq!(hub.request("GET", &path(backup), None).0, 404);
    }
    assert_eq!(hub.request("GET", "backups/web/chain", None).0, 404);
    let kept = std::fs::read_dir(hub.repository()).unwrap().count();
    assert_eq!(kept, 1, "the identity of the repository only");
    hub.assert_tidy();
}

#[test]
fn an_immutable_repository_keeps_its_backups() {
    let hub = Hub::start();
    let directory = hub.directory.path().join("kept");
    hub.post(
        "repositories",
        &json!({"name": "kept", "type": "local", "config": {"path": directory},
            "is_immutable": true, "min_retention_days": 30}),
    );
    let vm = Vm::new(&hub, "web", &[MIB]);
    let wish = json!({"vm_name": "web", "backup_type": "full", "agent": "caller",
        "repository_id": "kept"});
    let backup = hub.post("backups", &wish);
    let id = backup["backup_id"].as_str().unwrap();
    hub.send(&vm, &backup, 0);
    assert_eq!(hub.complete(id, 0, "c").0, 200);
    let (status, body) = hub.request("DELETE", &format!("backups/{id}"), None);
    assert_eq!(status, 409, "{body}");
    let (status, _) = hub.request("DELETE", "repositories/kept", None);
    assert_eq!(status, 409, "it holds a backup");
}

#[test]
fn a_bare_repository_tells_a_new_hub_everything() {
    if missing(&["qemu-img"]) {
        return;
    }
    let hub = Hub::start();
    let name = "web/srv \u{fc}";
    let mut vm = Vm::new(&hub, name, &[3 * MIB, MIB]);
    for kind in ["full", "incremental", "incremental"] {
        let backup = hub.back_up(&vm, kind);
        vm.remember(&backup);
        vm.change(3);
    }
    let before = hub.get("backups");
    let moved = tempfile::tempdir().unwrap();
    support::ok("cp", &["-r", hub.repository().to_str().unwrap(), moved.path().to_str().unwrap()]);
    drop(hub);
    let new = Hub::start();
    let path = moved.path().join("repository");
    let report = new.post("repositories/import", &json!({"path": path}));
    assert_eq!(report["imported"].as_array().unwrap().len(), 3, "{report}");
    assert_eq!(report["findings"], json!([]));
    let again = new.post("repositories/import", &json!({"path": path}));
    assert_eq!((&again["imported"], &again["known"]), (&json!([]), &json!(3)));
    let after = new.get("backups");
    for (a, b) in
        before["backups"].as_array().unwrap().iter().zip(after["backups"].as_array().unwrap())
    {
        for key in [
            "backup_id",
            "vm_context_id",
            "vm_name",
            "backup_type",
            "change_id",
            "created_at",
            "total_bytes",
            "bytes_transferred",
            "stored_bytes",
            "tags",
        ] {
            assert_eq!(a[key], b[key], "{key}");
        }
    }
    vm.compare_all(&new);
    let wish = json!({"vm_name": name, "backup_type": "incremental", "agent": "caller",
        "repository_id": report["repository_id"]});
    let next = new.post("backups", &wish);
    assert_eq!(next["backup_type"], "incremental", "the chain goes on: {next}");
    let id = next["backup_id"].as_str().unwrap();
    new.post(&format!("backups/{id}/cancel"), &json!({}));
    new.assert_tidy();
}

#[test]
fn a_backup_on_which_nobody_works_fails_and_one_that_gives_a_sign_of_life_does_not() {
    let hub = Hub::configured("stall_seconds = 6\nreconnect_seconds = 60\nquarantine = true\n", "");
    let vm = Vm::new(&hub, "idle", &[MIB, MIB]);
    Vm::new(&hub, "dead", &[MIB]);
    let idle = hub.start_backup("idle", "full");
    let dead = hub.start_backup("dead", "full");
    let id = |backup: &serde_json::Value| backup["backup_id"].as_str().unwrap().to_owned();
    // The later disk has no connection yet, and that is well: the agent talks of the first one.
    let telemetry = json!({"status": "running", "current_phase": "reading"});
    let path = format!("telemetry/backup/{}", id(&idle));
    let since = std::time::Instant::now();
    while hub.backup(&id(&dead))["status"] == "running" {
        assert_eq!(hub.request_as(None, "POST", &path, Some(&telemetry)).0, 200);
        assert!(since.elapsed() < workflow_support::LIMIT);
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let failed = hub.backup(&id(&dead));
    assert!(failed["error_message"].as_str().unwrap().contains("nothing moved"), "{failed}");
    assert_eq!(hub.backup(&id(&idle))["status"], "running");
    for disk in 0..2 {
        hub.send(&vm, &idle, disk);
        assert_eq!(hub.complete(&id(&idle), disk, "c/1").0, 200);
    }
    let kept = hub.repository().join(".quarantine").join(id(&dead)).join("disk-0.qcow2");
    assert!(kept.exists(), "what came in is put aside where that is configured");
    hub.assert_tidy();
}

#[test]
fn a_client_that_dies_in_the_middle_fails_its_backup_with_the_reason() {
    let hub = Hub::configured("reconnect_seconds = 1", "");
    let vm = Vm::new(&hub, "web", &[MIB]);
    let backup = hub.start_backup("web", "full");
    hub.send(&vm, &backup, 0);
    // Its connections are closed, and it never says that the disk is complete.
    let failed = hub.ended(backup["backup_id"].as_str().unwrap());
    assert!(failed["error_message"].as_str().unwrap().contains("connections"), "{failed}");
    hub.assert_tidy();
}

#[test]
fn a_vm_without_disks_and_a_disk_of_no_bytes_are_refused_before_anything_is_made() {
    let hub = Hub::start();
    hub.ok("PUT", "vms/empty", Some(&json!({"disks": []})));
    let wish = json!({"vm_name": "empty", "backup_type": "full", "agent": "caller"});
    let (status, body) = hub.request("POST", "backups", Some(&wish));
    assert_eq!(status, 422, "{body}");
    assert!(body["details"].as_str().unwrap().contains("disks"), "{body}");
    assert_eq!(hub.get("backups")["total"], 0);
    hub.assert_tidy();
}

#[test]
fn a_backup_that_is_cancelled_while_it_is_prepared_leaves_nothing() {
    let hub = Hub::start();
    hub.enter_vm("wide", &[MIB; 40]);
    for turn in 0..4_u64 {
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| {
                let wish = json!({"vm_name": "wide", "backup_type": "full", "agent": "caller"});
                hub.request("POST", "backups", Some(&wish)).0
            });
            let since = std::time::Instant::now();
            let id = loop {
                let jobs = hub.get("jobs");
                if let Some(id) = jobs["backups"][0]["backup_id"].as_str() {
                    break id.to_owned();
                }
                assert!(since.elapsed() < workflow_support::LIMIT);
            };
            std::thread::sleep(std::time::Duration::from_millis(turn * 7));
            hub.post(&format!("backups/{id}/cancel"), &json!({}));
            starting.join().unwrap();
            assert_eq!(hub.backup(&id)["status"], "cancelled");
        });
        hub.assert_tidy();
    }
}

#[test]
fn of_a_cancellation_and_a_completion_at_once_one_is_told_the_truth() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[65536]);
    for _ in 0..20 {
        let backup = hub.start_backup("web", "full");
        let id = backup["backup_id"].as_str().unwrap();
        hub.send(&vm, &backup, 0);
        let (cancelled, completed) = std::thread::scope(|scope| {
            let cancel = scope
                .spawn(|| hub.request("POST", &format!("backups/{id}/cancel"), Some(&json!({}))).0);
            let complete = scope.spawn(|| hub.complete(id, 0, "c/1").0);
            (cancel.join().unwrap(), complete.join().unwrap())
        });
        let state = hub.backup(id)["status"].clone();
        match (cancelled, completed) {
            (200, 409) => assert_eq!(state, "cancelled"),
            (409, 200) => {
                assert_eq!(state, "completed");
                hub.ok("POST", &format!("backups/{id}/verify"), None);
            }
            both => panic!("{both:?} {state}"),
        }
    }
    hub.assert_tidy();
}

#[test]
fn an_import_enters_no_restore_point_whose_parent_is_missing_and_no_copy_beside_the_original() {
    let hub = Hub::start();
    let mut vm = Vm::new(&hub, "web", &[MIB]);
    let full = hub.back_up(&vm, "full");
    vm.change(2);
    let increment = hub.back_up(&vm, "incremental");
    let moved = tempfile::tempdir().unwrap();
    support::ok("cp", &["-r", hub.repository().to_str().unwrap(), moved.path().to_str().unwrap()]);
    let copy = moved.path().join("repository");
    let (status, body) = hub.request("POST", "repositories/import", Some(&json!({"path": copy})));
    assert_eq!(status, 409, "{body}");
    let lost =
        image_of(&full, 0).replace(hub.repository().to_str().unwrap(), copy.to_str().unwrap());
    for ending in ["qcow2", "json", "crc"] {
        std::fs::remove_file(lost.replace("qcow2", ending)).unwrap();
    }
    let new = Hub::start();
    let report = new.post("repositories/import", &json!({"path": copy}));
    assert_eq!((&report["imported"], &report["known"]), (&json!([]), &json!(0)));
    let id = increment["backup_id"].as_str().unwrap();
    assert!(report["findings"][0].as_str().unwrap().contains(id), "{report}");
    assert_eq!(new.get("backups")["total"], 0);
}

#[test]
fn the_checksums_of_a_restore_point_are_those_of_its_disk_also_after_it_has_grown() {
    let hub = Hub::start();
    let mut vm = Vm::new(&hub, "web", &[MIB + 512]);
    hub.back_up(&vm, "full");
    std::fs::File::options().write(true).open(vm.disk(0)).unwrap().set_len(2 * MIB).unwrap();
    hub.enter_vm("web", &[2 * MIB]);
    vm.change(1);
    let grown = hub.back_up(&vm, "incremental");
    let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
    let id = grown["backup_id"].as_str().unwrap();
    let told = agent
        .get(format!("{}/api/v1/backups/{id}/disks/0/checksums", hub.api))
        .header("authorization", format!("Bearer {}", hub.token))
        .call()
        .unwrap()
        .body_mut()
        .read_to_vec()
        .unwrap();
    let disk = std::fs::read(vm.disk(0)).unwrap();
    let expected = disk.chunks(65536).flat_map(|cluster| {
        let zero = cluster.iter().all(|byte| *byte == 0);
        if zero { [0; 8] } else { sendense_hub::checksum::Checksum::of(cluster).encode() }
    });
    assert!(told == expected.collect::<Vec<u8>>());
}
