//! The API: who may do what, what is refused and how, and what clients of the old hub rely on.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Value, json};
use workflow_support::{Hub, Vm, export_of, free_port, image_of};

const MIB: u64 = 1 << 20;

fn token(hub: &Hub, role: &str) -> String {
    let made = hub.post("tokens", &json!({"name": role, "role": role}));
    made["token"].as_str().unwrap().to_owned()
}

#[test]
fn each_role_does_what_it_may_and_no_more() {
    let hub = Hub::start();
    hub.enter_vm("web", &[MIB]);
    let (viewer, operator) = (token(&hub, "viewer"), token(&hub, "operator"));
    let wish = json!({"vm_name": "web", "backup_type": "full", "agent": "caller"});
    let calls: [(&str, &str, Option<&Value>, [u16; 4]); 6] = [
        // without a token, viewer, operator, admin
        ("GET", "backups", None, [401, 200, 200, 200]),
        ("GET", "health", None, [200, 200, 200, 200]),
        ("GET", "/metrics", None, [401, 200, 200, 200]),
        ("POST", "backups?dry_run=true", Some(&wish), [401, 403, 200, 200]),
        ("GET", "tokens", None, [401, 403, 403, 200]),
        ("DELETE", "backups/backup-none", None, [401, 403, 403, 404]),
    ];
    for (method, path, body, expected) in calls {
        let tokens =
            [None, Some(viewer.as_str()), Some(operator.as_str()), Some(hub.token.as_str())];
        for (token, expected) in tokens.iter().zip(expected) {
            let (status, answer) = hub.request_as(*token, method, path, body);
            assert_eq!(status, expected, "{method} {path} {token:?}: {answer}");
            if status >= 400 {
                for key in ["error", "details", "timestamp"] {
                    assert!(answer[key].is_string(), "{answer}");
                }
            }
        }
    }
    let (status, _) = hub.request_as(Some("sendense_guess"), "GET", "backups", None);
    assert_eq!(status, 401);
    hub.ok("DELETE", "tokens/viewer", None);
    assert_eq!(hub.request_as(Some(&viewer), "GET", "backups", None).0, 401, "revoked");
    let listed = hub.get("tokens").to_string();
    assert!(!listed.contains("sendense_"), "no secret is told again: {listed}");
    let catalog = std::fs::read(hub.data().join("catalog.db")).unwrap();
    assert!(!catalog.windows(operator.len()).any(|window| window == operator.as_bytes()));
}

#[test]
fn passwords_are_neither_told_nor_readable_in_the_catalog() {
    let hub = Hub::start();
    let secret = "correct horse battery staple";
    let body = json!({"name": "vc", "vcenter_host": "h", "username": "u", "password": secret});
    hub.post("credentials", &body);
    let told = format!("{} {}", hub.get("credentials"), hub.get("events"));
    assert!(!told.contains(secret));
    for file in ["catalog.db", "catalog.db-wal"] {
        let bytes = std::fs::read(hub.data().join(file)).unwrap_or_default();
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{file}");
    }
    use std::os::unix::fs::MetadataExt;
    let mode = |name: &str| std::fs::metadata(hub.data().join(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("secret.key"), mode(".")), (0o600, 0o700));
}

#[test]
fn bad_requests_are_refused_with_status_and_reason() {
    let hub = Hub::start();
    hub.enter_vm("web", &[MIB]);
    let start = |body: Value| hub.request("POST", "backups", Some(&body));
    for (body, expected, word) in [
        (json!({}), 422, "vm_name"),
        (json!({"vm_name": "web", "backup_type": "weekly"}), 422, "weekly"),
        (json!({"vm_name": "web", "backup_type": "full", "disk_id": 1}), 422, "disk_id"),
        (json!({"vm_name": "nobody", "backup_type": "full"}), 404, "nobody"),
        (json!({"vm_name": "web", "backup_type": "full"}), 422, "credential"),
        (json!({"vm_name": "web", "backup_type": "full", "agent": "me"}), 400, "me"),
        (
            json!({"vm_name": "web", "backup_type": "full", "agent": "caller",
            "repository_id": "nowhere"}),
            404,
            "nowhere",
        ),
        (
            json!({"vm_name": "web", "backup_type": "full", "agent": "caller",
            "policy_id": "none"}),
            404,
            "policy",
        ),
    ] {
        let (status, answer) = start(body.clone());
        assert_eq!(status, expected, "{body}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(word), "{answer}");
    }
    for (path, expected) in [
        ("backups?status=nonsense", 400),
        ("backups/changeid", 400),
        ("nothing/here", 404),
        ("backups/backup-x/disks", 404),
        ("vms/nobody", 404),
    ] {
        let (status, answer) = hub.request("GET", path, None);
        assert_eq!(status, expected, "{path}: {answer}");
        assert!(answer["error"].is_string(), "{answer}");
    }
    assert_eq!(hub.request("PATCH", "backups", None).0, 405);
    // Whoever is still sending may find the connection closed before the answer is read.
    let long = json!({"vm_name": "x".repeat(2 << 20), "backup_type": "full"});
    if let Some((status, _)) = hub.try_request(Some(&hub.token), "POST", "backups", Some(&long)) {
        assert_eq!(status, 413);
    }
    assert_eq!(hub.request("GET", "health", None).0, 200);
    for disks in [
        json!([{"disk_id": 0, "capacity_bytes": 512}, {"disk_id": 0, "capacity_bytes": 512}]),
        json!([{"disk_id": 0, "disk_key": 2000, "capacity_bytes": 512},
            {"disk_id": 1, "disk_key": 2000, "capacity_bytes": 512}]),
        json!([{"disk_id": 0, "capacity_bytes": 0}]),
    ] {
        let (status, answer) = hub.request("PUT", "vms/bad", Some(&json!({"disks": disks})));
        assert_eq!(status, 409, "{answer}");
    }
    assert_eq!(hub.request("GET", "vms/bad", None).0, 404, "nothing was entered");
}

#[test]
fn the_description_of_the_api_is_true() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let made = sendense_hub::api::document().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(made == kept, "docs/openapi.json is old: UPDATE_OPENAPI=1 cargo test --test api");
    let hub = Hub::start();
    assert_eq!(hub.get("openapi.json"), serde_json::from_str::<Value>(&made).unwrap());
    let page = hub.get("reference");
    let page = page.as_str().unwrap();
    assert!(page.contains("openapi.json") && !page.contains("https://"), "works offline");
}

#[test]
fn every_answer_has_what_clients_of_the_old_hub_read() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[MIB, MIB]);
    let backup = hub.back_up(&vm, "full");
    for key in [
        "backup_id",
        "vm_context_id",
        "vm_name",
        "disk_results",
        "nbd_targets_string",
        "backup_type",
        "repository_id",
        "status",
        "file_path",
        "bytes_transferred",
        "total_bytes",
        "disks_count",
        "change_id",
        "current_phase",
        "transfer_speed_bps",
        "progress_percent",
        "created_at",
        "started_at",
        "completed_at",
        "tags",
    ] {
        assert!(!backup[key].is_null(), "{key}: {backup}");
    }
    for key in ["disk_id", "nbd_port", "nbd_export_name", "qcow2_path", "status"] {
        assert!(!backup["disk_results"][1][key].is_null(), "{key}");
    }
    let targets = backup["nbd_targets_string"].as_str().unwrap();
    let first = format!("2000:nbd://{}/{}", hub.nbd, export_of(&backup, 0));
    assert!(targets.starts_with(&format!("{first},2001:nbd://")), "{targets}");
    assert!(targets.ends_with("disk1"));
    for key in ["service", "status", "timestamp", "version", "database"] {
        assert!(hub.get("health")[key].is_string());
    }
    let id = backup["backup_id"].as_str().unwrap();
    assert_eq!(hub.get(&format!("backups/{id}/copies"))["total"], 0);
    assert_eq!(hub.get(&format!("backups/{id}/disks"))["total"], 2);
    let storage = hub.get("repositories/local/storage");
    assert_eq!(storage["backup_count"], 1);
    assert!(storage["used_bytes"].as_u64().unwrap() > 0);
    assert_eq!(hub.get("jobs")["total"], 0);
    assert_eq!(hub.get(&format!("jobs/{id}"))["status"], "completed");
    let actions: Vec<String> = hub.get(&format!("events?subject={id}"))["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["action"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(actions, ["backup.completed", "disk.sealed", "disk.sealed", "backup.requested"]);
}

#[test]
fn progress_is_told_as_it_happens_until_the_end() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[4 * MIB]);
    let backup = hub.start_backup("web", "full");
    let id = backup["backup_id"].as_str().unwrap().to_owned();
    let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
    let answer = agent
        .get(format!("{}/api/v1/backups/{id}/events", hub.api))
        .header("authorization", format!("Bearer {}", hub.token))
        .call()
        .unwrap();
    let mut lines = BufReader::new(answer.into_body().into_reader()).lines();
    let mut next = || loop {
        let line = lines.next()?.unwrap();
        if let Some(data) = line.strip_prefix("data: ") {
            return Some(serde_json::from_str::<Value>(data).unwrap());
        }
    };
    assert_eq!(next().unwrap()["current_phase"], "receiving");
    hub.send(&vm, &backup, 0);
    hub.complete(&id, 0, "c/1");
    let mut last = Value::Null;
    while let Some(event) = next() {
        last = event;
    }
    assert_eq!((&last["status"], &last["progress_percent"]), (&json!("completed"), &json!(100.0)));
}

#[test]
fn ports_belong_to_one_export_and_come_back_with_it_after_a_start() {
    let mut hub = Hub::configured("", "[nbd]\nport_per_export = true\npool = \"42100-42140\"\n");
    let vm = Vm::new(&hub, "web", &[MIB, MIB]);
    let body = json!({"job_id": "other", "export_name": "other", "disk_count": 2});
    let aside = hub.post("nbd/ports/allocate", &body);
    assert_eq!(aside["allocated_ports"].as_array().unwrap().len(), 2);
    let backup = hub.start_backup("web", "full");
    let ports = |backup: &Value| -> Vec<u64> {
        let disks = backup["disk_results"].as_array().unwrap();
        disks.iter().map(|disk| disk["nbd_port"].as_u64().unwrap()).collect()
    };
    let own = ports(&backup);
    assert_ne!(own[0], own[1]);
    for taken in aside["allocated_ports"].as_array().unwrap() {
        assert!(!own.contains(&taken["port"].as_u64().unwrap()), "{aside} {own:?}");
    }
    assert_eq!(hub.get("nbd/ports/status")["allocated"], 4);
    let connect = |port: u64, export: &str| {
        let options = sendense_hub::nbd::client::ClientOptions::new(export);
        let address = format!("127.0.0.1:{port}");
        sendense_hub::nbd::client::Client::connect_tcp(&address, &options)
    };
    assert!(connect(own[0], &export_of(&backup, 0)).is_ok());
    assert!(connect(own[0], &export_of(&backup, 1)).is_err(), "another disk's port");
    hub.kill();
    hub.restart();
    let id = backup["backup_id"].as_str().unwrap();
    let again = ports(&hub.backup(id));
    assert!(connect(again[1], &export_of(&backup, 1)).is_ok());
    assert_eq!(hub.get("nbd/ports/status")["allocated"], 4);
    for disk in 0..2 {
        hub.send(&vm, &backup, disk);
        assert_eq!(hub.complete(id, disk, "c/1").0, 200);
    }
    let released = hub.post("nbd/ports/release", &json!({"job_id": "other"}));
    assert_eq!(released, json!({"success": true, "released_count": 2}));
    hub.assert_tidy();
}

#[test]
fn an_export_shows_a_finished_image_read_only_and_nothing_else_of_the_host() {
    let mut hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[MIB]);
    let backup = hub.back_up(&vm, "full");
    let image = image_of(&backup, 0);
    let add = |path: &str, read_only: bool| {
        let body = json!({"export_name": "look", "path": path, "read_only": read_only});
        hub.request("POST", "nbd/exports", Some(&body))
    };
    let outside = hub.directory.path().join("outside.qcow2");
    std::fs::copy(&image, &outside).unwrap();
    let link = hub.repository().join("link.qcow2");
    std::os::unix::fs::symlink(&outside, &link).unwrap();
    for path in ["/etc/passwd", outside.to_str().unwrap(), link.to_str().unwrap(), "/nowhere"] {
        let (status, answer) = add(path, true);
        assert_eq!(status, 422, "{path}: {answer}");
    }
    std::fs::remove_file(link).unwrap();
    assert_eq!(add(&image, false).0, 422, "a finished image is never changed");
    assert_eq!(add(&image, true).0, 201);
    assert_eq!(add(&image, true).0, 409, "the name is taken");
    let mut found = vec![0; 1 << 20];
    hub.connect("look").read(&mut found, 0).unwrap();
    assert!(found == std::fs::read(vm.disk(0)).unwrap());
    let id = backup["backup_id"].as_str().unwrap();
    let (status, answer) = hub.request("DELETE", &format!("backups/{id}"), None);
    assert_eq!(status, 409, "it is shown: {answer}");
    hub.kill();
    hub.restart();
    assert_eq!(hub.get("nbd/exports")["exports"][0]["name"], "look", "there again");
    hub.ok("DELETE", "nbd/exports/look", None);
    assert_eq!(hub.request("DELETE", "nbd/exports/look", None).0, 404);
    let running = hub.start_backup("web", "incremental");
    let path = format!("nbd/exports/{}", export_of(&running, 0));
    assert_eq!(hub.request("DELETE", &path, None).0, 409, "a backup needs it");
}

#[test]
fn a_door_that_others_can_reach_needs_tls() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("hub.toml");
    std::fs::write(&config, "[api]\nadmin_listen = \"0.0.0.0:0\"\n").unwrap();
    let refused = support::run(
        workflow_support::program(),
        &["serve", "--check", "--config", config.to_str().unwrap()],
    );
    assert!(!refused.status.success());
    assert!(support::both(&refused).contains("TLS"), "{}", support::both(&refused));
}

#[test]
fn the_admin_door_speaks_tls_and_asks_everybody_for_a_token() {
    if support::missing(&["openssl", "curl"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (key, certificate) =
        (directory.path().join("key.pem"), directory.path().join("certificate.pem"));
    support::ok(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            key.to_str().unwrap(),
            "-out",
            certificate.to_str().unwrap(),
        ],
    );
    let port = free_port();
    // Sections of the same name cannot come twice: this one is inserted at its head.
    let hub = Hub::with_api(&format!(
        "admin_listen = \"127.0.0.1:{port}\"\ntls_certificate = \"{}\"\ntls_key = \"{}\"\n",
        certificate.display(),
        key.display()
    ));
    let curl = |path: &str, token: &str| {
        let output = support::run(
            "curl",
            &[
                "-s",
                "--cacert",
                certificate.to_str().unwrap(),
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-H",
                &format!("Authorization: Bearer {token}"),
                &format!("https://localhost:{port}/api/v1/{path}"),
            ],
        );
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(curl("backups", &hub.token), "200");
    assert_eq!(curl("backups", "none"), "401");
    assert_eq!(curl("health", "none"), "200");
    assert_eq!(curl("backups/changeid?vm_name=x", "none"), "401", "no agents here");
    let plain = std::net::TcpStream::connect(("127.0.0.1", port));
    drop(plain);
    assert_eq!(curl("health", "none"), "200", "a peer that is gone holds up nobody");
}
