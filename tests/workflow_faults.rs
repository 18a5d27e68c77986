//! Backups when things break: crashes, full disks, cut networks, damaged images.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

#[path = "capture_support/observer.rs"]
mod observer;
#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nbd_proto::CommandFlags;
use observer::{Acting, Told};
use sendense_hub::capture::{self, Changes, Progress, Source, Target};
use serde_json::json;
use support::{Random, missing, not_root};
use workflow_support::{Hub, LIMIT, Vm, export_of, image_of};

const MIB: u64 = 1 << 20;

fn id_of(backup: &serde_json::Value) -> String {
    backup["backup_id"].as_str().unwrap().to_owned()
}

/// One backup as far as the hub lives; whether it became a restore point, as the client was told.
fn attempt(hub: &Hub, vm: &Vm, kind: &str, told: &AtomicU64) -> Option<String> {
    let wish = json!({"vm_name": vm.name, "backup_type": kind, "agent": "caller"});
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(LIMIT))
        .build()
        .into();
    let post = |path: String, body: &serde_json::Value| -> Option<serde_json::Value> {
        told.fetch_add(1, Ordering::SeqCst);
        let mut answer = agent
            .post(format!("{}/api/v1/{path}", hub.api))
            .header("authorization", format!("Bearer {}", hub.token))
            .send_json(body)
            .ok()?;
        let value = answer.body_mut().read_json().ok()?;
        (answer.status() == 200).then_some(value)
    };
    let backup = post("backups".into(), &wish)?;
    let id = id_of(&backup);
    let everything = backup["backup_type"] == "full";
    for number in 0..vm.disks() {
        let mut client = hub.try_connect(&export_of(&backup, number)).ok()?;
        let source = std::fs::File::open(vm.disk(number)).unwrap();
        let size = source.metadata().unwrap().len();
        let extents = if everything { vec![(0, size)] } else { vm.changes(number) };
        for (offset, length) in extents {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            source.read_exact_at(&mut bytes, offset).unwrap();
            told.fetch_add(1, Ordering::SeqCst);
            client.write(&bytes, offset, CommandFlags::empty()).ok()?;
        }
        let body = json!({"change_id": vm.change_id(number), "disk_id": number});
        post(format!("backups/{id}/complete"), &body)?;
    }
    Some(id)
}

#[test]
fn a_hub_that_is_killed_at_any_moment_tells_the_truth_when_it_is_back() {
    if missing(&["qemu-img"]) {
        return;
    }
    let mut hub = Hub::start();
    let mut vm = Vm::new(&hub, "web", &[2 * MIB, MIB]);
    let first = hub.back_up(&vm, "full");
    vm.remember(&first);
    let mut random = Random::new(4711);
    let mut ends = std::collections::BTreeMap::<String, u32>::new();
    for turn in 0..24_u32 {
        vm.change(3);
        let told = Arc::new(AtomicU64::new(0));
        let kind = if turn % 5 == 4 { "full" } else { "incremental" };
        // The hub dies a random time after a random number of things the client has asked for.
        let (steps, pause) = (random.below(12), random.below(6000));
        let outcome = std::thread::scope(|scope| {
            let (hub_ref, vm_ref, counter) = (&hub, &vm, Arc::clone(&told));
            let client = scope.spawn(move || attempt(hub_ref, vm_ref, kind, &counter));
            let since = Instant::now();
            while told.load(Ordering::SeqCst) <= steps && !client.is_finished() {
                assert!(since.elapsed() < LIMIT);
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_micros(pause));
            hub.kill_now();
            client.join().unwrap()
        });
        hub.reap();
        hub.restart();
        let newest = hub.get("backups")["backups"][0].clone();
        let id = id_of(&newest);
        let mut status = newest["status"].as_str().unwrap().to_owned();
        if let Some(told) = &outcome {
            assert_eq!((&id, status.as_str()), (told, "completed"), "it was answered with 200");
        }
        if status == "running" {
            // Nobody sends any more.
            hub.post(&format!("backups/{id}/cancel"), &json!({}));
            status = "was running".into();
        }
        if status == "completed" && vm.last_remembered() != Some(id.as_str()) {
            vm.remember(&newest);
        }
        *ends.entry(status).or_default() += 1;
        hub.assert_tidy();
        if turn % 8 == 7 {
            vm.compare_all(&hub);
        }
    }
    println!("{ends:?}");
    assert!(ends.len() >= 2, "the kills came too early or too late: {ends:?}");
    let last = hub.back_up(&vm, "full");
    vm.remember(&last);
    vm.compare_all(&hub);
    hub.assert_tidy();
}

#[test]
fn a_capture_goes_on_after_the_hub_was_killed_and_sends_only_what_is_not_durable() {
    if missing(&["qemu-img"]) {
        return;
    }
    let mut hub = Hub::configured("reconnect_seconds = 60", "");
    let mut vm = Vm::new(&hub, "web", &[64 * MIB]);
    let mut random = Random::new(5);
    let file = std::fs::File::options().write(true).open(vm.disk(0)).unwrap();
    file.write_all_at(&random.bytes(64 << 20), 0).unwrap();
    let backup = hub.start_backup("web", "full");
    let id = id_of(&backup);
    let target = Target {
        flush_every: 4 << 20,
        connections: 2,
        reads_as_zeroes: true,
        ..Target::new(&hub.nbd, &export_of(&backup, 0))
    };
    let (go, changed) = (Mutex::new(false), Condvar::new());
    let held = Acting::new(|progress: &Progress, told| {
        if told == Told::Done && progress.bytes_done() >= 16 << 20 {
            drop(changed.wait_timeout_while(go.lock().unwrap(), LIMIT, |go| !*go).unwrap());
        }
    });
    let source = Source::open(vm.disk(0).to_str().unwrap()).unwrap();
    let summary = std::thread::scope(|scope| {
        let copy = scope.spawn(|| capture::copy(&source, &target, &Changes::Everything, &held));
        let since = Instant::now();
        while held.progress.bytes_done() < 16 << 20 {
            assert!(since.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(1));
        }
        // Not even a copy that is fast is through before the hub is gone.
        hub.kill();
        hub.restart();
        *go.lock().unwrap() = true;
        changed.notify_all();
        assert_eq!(hub.backup(&id)["status"], "running");
        copy.join().unwrap().unwrap()
    });
    assert!(summary.reconnects > 0);
    // In the one disk that the kill may have found finished there is nothing to send again.
    assert!(summary.bytes_sent < 64 * MIB + 48 * MIB, "{summary:?}");
    let (status, answer) = hub.complete(&id, 0, "c/1");
    assert_eq!(status, 200, "{answer}");
    let backup = hub.backup(&id);
    assert_eq!(backup["status"], "completed", "{backup}\n{}", hub.log());
    vm.remember(&backup);
    vm.compare_all(&hub);
    hub.ok("POST", &format!("backups/{id}/verify"), None);
    hub.assert_tidy();
}

#[test]
fn a_network_that_is_cut_again_and_again_delays_a_capture_only() {
    if missing(&["qemu-img"]) {
        return;
    }
    let hub = Hub::configured("reconnect_seconds = 60", "");
    let mut vm = Vm::new(&hub, "web", &[24 * MIB]);
    let mut random = Random::new(6);
    let file = std::fs::File::options().write(true).open(vm.disk(0)).unwrap();
    file.write_all_at(&random.bytes(24 << 20), 0).unwrap();
    let backup = hub.start_backup("web", "full");
    // However the work is shared out: 24 MiB do not fit into two connections of 7 MiB each.
    let proxy = cutting_proxy(&hub.nbd, 7 << 20);
    let target = Target {
        flush_every: 2 << 20,
        connections: 2,
        ..Target::new(&proxy, &export_of(&backup, 0))
    };
    let source = Source::open(vm.disk(0).to_str().unwrap()).unwrap();
    let summary =
        capture::copy(&source, &target, &Changes::Everything, &Progress::default()).unwrap();
    assert!(summary.reconnects > 0, "{summary:?}");
    assert_eq!(hub.complete(&id_of(&backup), 0, "c/1").0, 200);
    vm.remember(&hub.backup(&id_of(&backup)));
    vm.compare_all(&hub);
    hub.assert_tidy();
}

/// A proxy that cuts each connection after `most` bytes from the client.
fn cutting_proxy(to: &str, most: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let to = to.to_owned();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, to) = (client.unwrap(), to.clone());
            std::thread::spawn(move || {
                let Ok(mut server) = TcpStream::connect(to) else { return };
                let (mut back, mut from) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut from, &mut back));
                let mut left = most;
                let mut buffer = vec![0; 64 << 10];
                while left > 0 {
                    match client.read(&mut buffer) {
                        Ok(n) if n > 0 && server.write_all(&buffer[..n]).is_ok() => {
                            left = left.saturating_sub(n as u64);
                        }
                        _ => break,
                    }
                }
                let _ = client.shutdown(std::net::Shutdown::Both);
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}

/// A file system of its own, gone when dropped.
struct Mount(std::path::PathBuf);

impl Mount {
    fn resize(&self, kib: u64) {
        support::ok("mount", &["-o", &format!("remount,size={kib}k"), self.0.to_str().unwrap()]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = support::run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

fn mount_small(directory: &Path, kib: u64) -> Mount {
    std::fs::create_dir_all(directory).unwrap();
    let size = format!("size={kib}k");
    support::ok("mount", &["-t", "tmpfs", "-o", &size, "small", directory.to_str().unwrap()]);
    Mount(directory.to_owned())
}

#[test]
fn a_repository_that_fills_up_at_any_point_fails_the_backup_with_the_cause_and_no_other() {
    if missing(&["qemu-img", "mount"]) || not_root() {
        return;
    }
    let hub = Hub::configured("min_free = \"0\"\nreconnect_seconds = 2\n", "");
    let directory = hub.directory.path().join("small");
    let mount = mount_small(&directory, 64 << 10);
    hub.post("repositories", &json!({"name": "small", "config": {"path": directory}}));
    let mut vm = Vm::new(&hub, "web", &[4 * MIB, 2 * MIB]);
    let mut random = Random::new(8);
    let fill = |vm: &Vm, random: &mut Random| {
        let file = std::fs::File::options().write(true).open(vm.disk(0)).unwrap();
        file.write_all_at(&random.bytes(3 << 20), 512).unwrap();
    };
    fill(&vm, &mut random);
    let wish = |kind: &str| json!({"vm_name": "web", "backup_type": kind, "agent": "caller", "repository_id": "small"});
    let run = |hub: &Hub, vm: &Vm, kind: &str| -> Result<serde_json::Value, String> {
        let (status, backup) = hub.request("POST", "backups", Some(&wish(kind)));
        if status != 200 {
            assert_eq!(status, 507, "{backup}");
            return Err(backup["error"].to_string());
        }
        let id = id_of(&backup);
        for number in 0..2 {
            let mut client = hub.connect(&export_of(&backup, number));
            let bytes = std::fs::read(vm.disk(number)).unwrap();
            for (index, part) in bytes.chunks(100_000).enumerate() {
                let sent = client.write(part, index as u64 * 100_000, CommandFlags::empty());
                if let Err(error) = sent {
                    drop(client);
                    let failed = hub.ended(&id);
                    assert_eq!(failed["status"], "failed");
                    return Err(format!("{error}; {}", failed["error_message"]));
                }
            }
            let (status, answer) = hub.complete(&id, number, &vm.change_id(number));
            // Not before: a disk that nobody is connected to may be given up.
            drop(client);
            if status != 200 {
                assert_eq!(
                    (status, &hub.backup(&id)["status"]),
                    (507, &json!("failed")),
                    "{answer}"
                );
                return Err(answer["error"].to_string());
            }
        }
        Ok(hub.backup(&id))
    };
    let full = run(&hub, &vm, "full").unwrap();
    vm.remember(&full);
    let used = 64 * 1024
        - hub.get("repositories/small/storage")["available_bytes"].as_u64().unwrap() / 1024;
    let mut failures = 0;
    for more in [0, 4, 40, 60, 130, 200, 400, 700, 1100, 1600, 2300, 3100, 4000, 9000] {
        mount.resize(used + more);
        vm.change(2);
        fill(&vm, &mut random);
        match run(&hub, &vm, "full") {
            Ok(backup) => {
                // The next ones need room again.
                vm.remember(&backup);
                vm.compare_all(&hub);
                vm.forget_last();
                hub.ok("DELETE", &format!("backups/{}", id_of(&backup)), None);
            }
            Err(text) => {
                failures += 1;
                let told = text.to_lowercase();
                assert!(told.contains("space") || told.contains("bytes free"), "{text}");
            }
        }
        hub.assert_tidy();
        vm.compare_all(&hub);
    }
    assert!(failures > 5, "only {failures} of the sizes were too small");
}

#[test]
fn a_damaged_image_is_found_and_nothing_more_is_built_on_it() {
    let hub = Hub::start();
    let mut vm = Vm::new(&hub, "web", &[2 * MIB]);
    let full = hub.back_up(&vm, "full");
    vm.change(3);
    let increment = hub.back_up(&vm, "incremental");
    let verify = |backup: &serde_json::Value| {
        hub.request("POST", &format!("backups/{}/verify", id_of(backup)), None)
    };
    assert_eq!((verify(&full).0, verify(&increment).0), (200, 200));
    let image = std::fs::File::options().read(true).write(true).open(image_of(&full, 0)).unwrap();
    let mut byte = [0];
    let middle = image.metadata().unwrap().len() - 70_000;
    image.read_exact_at(&mut byte, middle).unwrap();
    image.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    let (status, body) = verify(&full);
    assert_eq!(status, 409, "{body}");
    assert!(body["error"].as_str().unwrap().contains("damaged"), "{body}");
    let wish = json!({"vm_name": "web", "backup_type": "incremental", "agent": "caller"});
    let plan = hub.post("backups?dry_run=true", &wish);
    assert_eq!(plan["backup_type"], "full", "{plan}");
    assert!(plan["full_reason"].as_str().unwrap().contains("damaged"), "{plan}");
    // Cut off: noticed without reading it.
    image.set_len(middle).unwrap();
    let checked = hub.ok("POST", "catalog/check", None);
    assert!(!checked["findings"].as_array().unwrap().is_empty(), "{checked}");
}

#[test]
fn what_does_not_agree_is_no_parent() {
    let hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[MIB]);
    let full = hub.back_up(&vm, "full");
    let image = image_of(&full, 0);
    let manifest = image.replace(".qcow2", ".json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let wish = json!({"vm_name": "web", "backup_type": "incremental", "agent": "caller"});
    let reason = || {
        let plan = hub.post("backups?dry_run=true", &wish);
        plan["full_reason"].as_str().unwrap_or("").to_owned()
    };
    assert_eq!(reason(), "");
    std::fs::write(&manifest, text.replace("/2\"", "/3\"")).unwrap();
    assert!(reason().contains("damaged"), "{}", reason());
    std::fs::remove_file(&manifest).unwrap();
    assert!(reason().contains("manifest"), "{}", reason());
    std::fs::write(&manifest, text).unwrap();
    std::fs::rename(&image, format!("{image}.away")).unwrap();
    assert!(reason().contains("image"), "{}", reason());
    std::fs::rename(format!("{image}.away"), &image).unwrap();
    assert_eq!(reason(), "");
}

#[test]
fn of_many_starts_at_once_one_wins() {
    let hub = Hub::start();
    Vm::new(&hub, "web", &[MIB]);
    let won = AtomicU64::new(0);
    let wish = json!({"vm_name": "web", "backup_type": "full", "agent": "caller"});
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| match hub.request("POST", "backups", Some(&wish)).0 {
                200 => _ = won.fetch_add(1, Ordering::SeqCst),
                status => assert_eq!(status, 409),
            });
        }
    });
    assert_eq!(won.into_inner(), 1);
    assert_eq!(hub.get("jobs")["total"], 1);
    let id = id_of(&hub.get("jobs")["backups"][0]);
    hub.post(&format!("backups/{id}/cancel"), &json!({}));
    hub.assert_tidy();
}

#[test]
fn two_hubs_do_not_share_a_data_directory() {
    let hub = Hub::start();
    let second = support::run(
        workflow_support::program(),
        &["serve", "--data-dir", hub.data().to_str().unwrap()],
    );
    assert!(!second.status.success());
    assert!(support::both(&second).contains("another hub"), "{}", support::both(&second));
}

#[test]
fn a_hundred_vms_are_listed_once_each_and_quickly_enough_to_watch() {
    let hub = Hub::start();
    for number in 0..100 {
        let name = format!("vm {number}-disk{}", number % 3);
        hub.enter_vm(&name, &[65536, 65536, 65536]);
        let backup = hub.start_backup(&name, "full");
        let (id, stop) = (id_of(&backup), AtomicBool::new(number % 2 == 0));
        if stop.into_inner() {
            hub.post(&format!("backups/{id}/cancel"), &json!({}));
        } else {
            for disk in 0..3 {
                assert_eq!(hub.complete(&id, disk, "c/1").0, 200);
            }
        }
    }
    let list = hub.get("backups");
    assert_eq!((&list["total"], hub.get("vms")["total"].as_u64()), (&json!(100), Some(100)));
    let completed = hub.get("backups?status=completed");
    assert_eq!(completed["total"], 50);
    let names: std::collections::BTreeSet<_> = list["backups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|backup| backup["vm_name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names.len(), 100);
    let metrics = hub.get("/metrics");
    assert!(metrics.as_str().unwrap().contains("sendense_backups{state=\"completed\"} 50"));
    hub.assert_tidy();
}

#[test]
fn a_hub_that_is_stopped_leaves_images_that_it_goes_on_with() {
    let mut hub = Hub::start();
    let vm = Vm::new(&hub, "web", &[4 * MIB]);
    let backup = hub.start_backup("web", "full");
    hub.send(&vm, &backup, 0);
    hub.stop();
    hub.restart();
    let id = id_of(&backup);
    assert_eq!(hub.backup(&id)["status"], "running");
    hub.send(&vm, &backup, 0);
    assert_eq!(hub.complete(&id, 0, "c/1").0, 200);
    hub.ok("POST", &format!("backups/{id}/verify"), None);
    hub.assert_tidy();
}
