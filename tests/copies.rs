//! Copies in other repositories, and what policies delete.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use serde_json::{Value, json};
use workflow_support::{Hub, LIMIT, Vm, compare, image_of};

const MIB: u64 = 1 << 20;

fn id_of(backup: &Value) -> String {
    backup["backup_id"].as_str().unwrap().to_owned()
}

fn second_repository(hub: &Hub, more: &Value) -> std::path::PathBuf {
    let path = hub.directory.path().join("second");
    let mut body = json!({"name": "second", "config": {"path": path}});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    hub.post("repositories", &body);
    path
}

/// Waits until no copy of a backup is under way; the copies.
fn copies(hub: &Hub, id: &str) -> Vec<Value> {
    let since = std::time::Instant::now();
    loop {
        let found = hub.get(&format!("backups/{id}/copies"))["copies"].as_array().unwrap().clone();
        let open = |copy: &Value| copy["status"] == "pending" || copy["status"] == "copying";
        if !found.iter().any(open) {
            return found;
        }
        assert!(since.elapsed() < LIMIT, "{found:?}\n{}", hub.log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_copy_brings_all_that_it_builds_on_and_is_equal_and_a_hub_of_its_own_can_use_it() {
    if support::missing(&["qemu-img"]) {
        return;
    }
    let hub = Hub::start();
    let mut vm = Vm::new(&hub, "web", &[3 * MIB, MIB + 512]);
    let mut backups = Vec::new();
    for kind in ["full", "incremental", "incremental"] {
        let backup = hub.back_up(&vm, kind);
        vm.remember(&backup);
        backups.push(backup);
        vm.change(3);
    }
    let second = second_repository(&hub, &json!({}));
    let (middle, wish) = (id_of(&backups[1]), json!({"repository_id": "second"}));
    let asked = hub.post(&format!("backups/{middle}/copy"), &wish);
    assert_eq!(asked["status"], "pending");
    let made = copies(&hub, &middle);
    assert_eq!(made[0]["status"], "completed", "{made:?}");
    assert!(made[0]["bytes_copied"].as_u64().unwrap() > 0);
    assert_eq!(copies(&hub, &id_of(&backups[0])).len(), 1, "the full came along");
    assert_eq!(copies(&hub, &id_of(&backups[2])).len(), 0);
    let (status, body) = hub.request("POST", &format!("backups/{middle}/copy"), Some(&wish));
    assert_eq!(status, 409, "it is there: {body}");
    let local = json!({"repository_id": "local"});
    assert_eq!(hub.request("POST", &format!("backups/{middle}/copy"), Some(&local)).0, 409);
    hub.assert_tidy();
    // Another hub finds them, and they are what the disks were.
    let other = Hub::start();
    let moved = other.directory.path().join("moved");
    support::ok("cp", &["-r", second.to_str().unwrap(), moved.to_str().unwrap()]);
    let report = other.post("repositories/import", &json!({"path": moved}));
    assert_eq!(report["imported"].as_array().unwrap().len(), 2, "{report}");
    for (number, backup) in backups.iter().take(2).enumerate() {
        let there = other.backup(&id_of(backup));
        for disk in 0..2 {
            let raw = vm.directory.path().join(format!("{}-{disk}", id_of(backup)));
            compare(&image_of(&there, disk), &raw);
        }
        assert_eq!(there["backup_type"], if number == 0 { "full" } else { "incremental" });
    }
    // A backup takes its copies with it.
    for backup in backups.iter().rev() {
        hub.ok("DELETE", &format!("backups/{}", id_of(backup)), None);
    }
    assert_eq!(std::fs::read_dir(&second).unwrap().count(), 1, "the identity only");
    hub.assert_tidy();
}

#[test]
fn a_copy_that_fails_says_so_leaves_nothing_and_can_be_asked_for_again() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[2 * MIB]);
    let id = id_of(&hub.back_up(&vm, "full"));
    let second = second_repository(&hub, &json!({}));
    let away = second.with_extension("away");
    std::fs::rename(&second, &away).unwrap();
    let wish = json!({"repository_id": "second"});
    hub.post(&format!("backups/{id}/copy"), &wish);
    let failed = copies(&hub, &id);
    assert_eq!(failed[0]["status"], "failed", "{failed:?}");
    assert!(failed[0]["error_message"].as_str().unwrap().contains("repository"));
    std::fs::rename(&away, &second).unwrap();
    hub.post(&format!("backups/{id}/copy"), &wish);
    assert_eq!(copies(&hub, &id)[0]["status"], "completed");
    hub.assert_tidy();
}

#[test]
fn a_copy_that_a_crash_cut_off_is_made_when_the_hub_is_back() {
    let mut hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[8 * MIB]);
    let id = id_of(&hub.back_up(&vm, "full"));
    second_repository(&hub, &json!({}));
    hub.post(&format!("backups/{id}/copy"), &json!({"repository_id": "second"}));
    // Wherever the hub dies, at once or in the middle: it is made once it is back.
    hub.kill();
    hub.restart();
    assert_eq!(copies(&hub, &id)[0]["status"], "completed");
    hub.assert_tidy();
    hub.ok("DELETE", &format!("backups/{id}"), None);
    hub.assert_tidy();
}

#[test]
fn an_immutable_repository_keeps_copies_and_so_their_backups() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[MIB]);
    let id = id_of(&hub.back_up(&vm, "full"));
    second_repository(&hub, &json!({"is_immutable": true, "min_retention_days": 3}));
    hub.post(&format!("backups/{id}/copy"), &json!({"repository_id": "second"}));
    assert_eq!(copies(&hub, &id)[0]["status"], "completed");
    let (status, body) = hub.request("DELETE", &format!("backups/{id}"), None);
    assert_eq!(status, 409, "{body}");
}

#[test]
fn a_policy_deletes_what_it_does_not_keep_and_keeps_the_newest() {
    let hub = Hub::start();
    let policy = hub.post(
        "policies",
        &json!({"name": "none", "primary_repository_id": "local", "retention_days": 0}),
    );
    let mut vm = Vm::new(&hub, "web", &[MIB]);
    let run = |hub: &Hub, vm: &Vm, kind: &str| {
        let wish = json!({"vm_name": "web", "backup_type": kind, "agent": "caller",
            "policy_id": policy["id"]});
        let backup = hub.post("backups", &wish);
        let id = id_of(&backup);
        hub.send(vm, &backup, 0);
        assert_eq!(hub.complete(&id, 0, &vm.change_id(0)).0, 200);
        id
    };
    let full = run(&hub, &vm, "full");
    vm.change(1);
    let increment = run(&hub, &vm, "incremental");
    let nothing = hub.post("policies/apply", &json!({}));
    assert_eq!(nothing["deleted"], json!([]), "the newest stays, and what it builds on");
    let newest = run(&hub, &vm, "full");
    let told = hub.post("policies/apply?dry_run=true", &json!({}));
    assert_eq!(told["deleted"], json!([increment, full]));
    assert_eq!(hub.get("backups")["total"], 3);
    hub.post("policies/apply", &json!({}));
    let left = hub.get("backups");
    assert_eq!((&left["total"], id_of(&left["backups"][0])), (&json!(1), newest));
    hub.assert_tidy();
}

#[test]
fn a_policy_copies_what_it_says_and_a_rule_that_cannot_be_followed_is_refused() {
    let hub = Hub::start();
    second_repository(&hub, &json!({}));
    let policy = |mode: &str, to: &str| {
        let rules = json!([{"destination_repository_id": to, "copy_mode": mode}]);
        let body = json!({"name": mode, "primary_repository_id": "local", "retention_days": 30,
            "copy_rules": rules});
        hub.request("POST", "policies", Some(&body))
    };
    assert_eq!(policy("scheduled", "second").0, 422);
    assert_eq!(policy("immediate", "local").0, 400);
    assert_eq!(policy("immediate", "nowhere").0, 404);
    let (status, made) = policy("immediate", "second");
    assert_eq!(status, 201, "{made}");
    let vm = Vm::new(&hub, "web", &[MIB]);
    let wish = json!({"vm_name": "web", "backup_type": "full", "agent": "caller",
        "repository_id": "local", "policy_id": made["id"]});
    let backup = hub.post("backups", &wish);
    let id = id_of(&backup);
    hub.send(&vm, &backup, 0);
    assert_eq!(hub.complete(&id, 0, "c/1").0, 200);
    let made = copies(&hub, &id);
    assert_eq!((made.len(), &made[0]["status"]), (1, &json!("completed")), "{made:?}");
    hub.assert_tidy();
}
