//! libnbd's programs against the server.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use serde_json::Value;
use support::{Hub, check_clean, compare, directory, make_disk, missing, ok, run, text};

const SIZE: u64 = 96 << 20;

fn copy_in_and_out(connections: &str, requests: &str) {
    if missing(&["nbdcopy", "qemu-img"]) {
        return;
    }
    let dir = directory();
    let (disk, image, back) =
        (dir.path().join("disk.raw"), dir.path().join("a.qcow2"), dir.path().join("back.raw"));
    make_disk(&disk, SIZE, 1);
    let export = format!("disk={}", text(&image));
    let hub = Hub::start(&["--create", &SIZE.to_string(), &export]);
    let options = ["--connections", connections, "--requests", requests, "--flush"];
    ok("nbdcopy", &[&options[..], &[text(&disk), hub.uri()]].concat());
    std::fs::File::create(&back).unwrap().set_len(SIZE).unwrap();
    ok("nbdcopy", &[&options[..], &[hub.uri(), text(&back)]].concat());
    assert!(std::fs::read(&disk).unwrap() == std::fs::read(&back).unwrap());
    hub.stop();
    check_clean(&image);
    compare(&disk, &image);
}

#[test]
fn nbdcopy_with_one_connection_and_one_request_copies_in_and_out() {
    copy_in_and_out("1", "1");
}

#[test]
fn nbdcopy_with_four_connections_copies_in_and_out() {
    copy_in_and_out("4", "16");
}

#[test]
fn nbdcopy_with_eight_connections_copies_in_and_out() {
    copy_in_and_out("8", "64");
}

#[test]
fn nbdcopy_writes_raw_files_over_a_unix_socket() {
    if missing(&["nbdcopy"]) {
        return;
    }
    let dir = directory();
    let (disk, raw) = (dir.path().join("disk.raw"), dir.path().join("copy.raw"));
    make_disk(&disk, SIZE, 2);
    let socket = dir.path().join("socket");
    let export = format!("disk={}", text(&raw));
    let hub = Hub::spawn(&["--unix", text(&socket), "--create", &SIZE.to_string(), &export], 1);
    assert!(hub.uri().starts_with("nbd+unix:///disk?socket="), "{}", hub.uri());
    ok("nbdcopy", &["--flush", text(&disk), hub.uri()]);
    hub.stop();
    assert!(!socket.exists(), "the socket is removed at the end");
    assert!(std::fs::read(&disk).unwrap() == std::fs::read(&raw).unwrap());
}

#[test]
fn nbdinfo_sees_what_the_export_can_do() {
    if missing(&["nbdinfo"]) {
        return;
    }
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let export = format!("disk1={}", text(&image));
    let hub = Hub::start(&["--create", "10G", &export]);
    let info: Value = serde_json::from_str(&ok("nbdinfo", &["--json", hub.uri()])).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "disk1");
    assert_eq!(export["export-size"], 10u64 << 30);
    for able in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(export[able], true, "{able}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 65536);
    assert_eq!(export["block_size_maximum"], 64 << 20);
    let contexts = export["contexts"].as_array().unwrap();
    assert_eq!(contexts, &["base:allocation", "qemu:allocation-depth"]);
    hub.stop();
}

#[test]
fn nbdinfo_maps_holes_data_and_depth_of_a_chain() {
    if missing(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let dir = directory();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    let hub = Hub::start(&["--create", "1M", &format!("d={}", text(&base))]);
    ok("qemu-io", &["-f", "raw", "-c", "write 128k 128k", hub.uri()]);
    hub.stop();
    let export = format!("d={}", text(&top));
    let hub = Hub::start(&["--create", "0", "--backing", "base.qcow2", &export]);
    ok("qemu-io", &["-f", "raw", "-c", "write 512k 64k", hub.uri()]);
    ok("qemu-io", &["-f", "raw", "-c", "write -z -u 192k 64k", hub.uri()]);
    let extents = |arguments: &[&str]| -> Vec<(u64, u64, u64)> {
        let json: Value = serde_json::from_str(&ok("nbdinfo", arguments)).unwrap();
        let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
        json.as_array()
            .unwrap()
            .iter()
            .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type")))
            .collect()
    };
    const K: u64 = 1024;
    let map = extents(&["--map", "--json", hub.uri()]);
    let expected = [
        (0, 128 * K, 3),
        (128 * K, 64 * K, 0),
        (192 * K, 320 * K, 3),
        (512 * K, 64 * K, 0),
        (576 * K, 448 * K, 3),
    ];
    assert_eq!(map, expected);
    let depth = extents(&["--map=qemu:allocation-depth", "--json", hub.uri()]);
    let expected = [
        (0, 128 * K, 0),
        (128 * K, 64 * K, 2),
        (192 * K, 64 * K, 1),
        (256 * K, 256 * K, 0),
        (512 * K, 64 * K, 1),
        (576 * K, 448 * K, 0),
    ];
    assert_eq!(depth, expected);
    hub.stop();
}

#[test]
fn exports_are_listed_and_each_is_reached_by_its_name() {
    if missing(&["nbdinfo"]) {
        return;
    }
    let hub = Hub::start(&["a=null:1M", "b=null:2M", "c=null:3M"]);
    let server = format!("nbd://{}", hub.address());
    let list: Value = serde_json::from_str(&ok("nbdinfo", &["--list", "--json", &server])).unwrap();
    let names: Vec<_> =
        list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].clone()).collect();
    assert_eq!(names, ["a", "b", "c"]);
    for (uri, size) in hub.uris().iter().zip(["1048576", "2097152", "3145728"]) {
        assert_eq!(ok("nbdinfo", &["--size", uri]).trim(), size);
    }
    // With several exports the default one is nobody's.
    assert!(!run("nbdinfo", &["--size", &server]).status.success());
    hub.stop();
}

#[test]
fn the_only_export_answers_to_the_empty_name_too() {
    if missing(&["nbdinfo"]) {
        return;
    }
    let hub = Hub::start(&["only=null:1M"]);
    let size = ok("nbdinfo", &["--size", &format!("nbd://{}", hub.address())]);
    assert_eq!(size.trim(), "1048576");
    hub.stop();
}

#[test]
fn each_export_of_a_pool_has_a_port_that_serves_it_alone() {
    if missing(&["nbdinfo"]) {
        return;
    }
    let hub = Hub::start(&["--pool", "23100-23180", "a=null:1M", "b=null:2M"]);
    let ports: Vec<&str> =
        hub.uris().iter().map(|uri| uri.split(['/', ':']).nth(4).unwrap()).collect();
    assert_ne!(ports[0], ports[1]);
    assert_eq!(ok("nbdinfo", &["--size", &hub.uris()[1]]).trim(), "2097152");
    let own = format!("nbd://127.0.0.1:{}", ports[1]);
    assert_eq!(ok("nbdinfo", &["--size", &own]).trim(), "2097152");
    assert!(!run("nbdinfo", &["--size", &format!("{own}/a")]).status.success());
    hub.stop();
}

#[test]
fn a_python_client_gets_the_errors_that_the_specification_names() {
    if missing(&["nbdsh"]) {
        return;
    }
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let export = format!("disk={}", text(&image));
    let hub = Hub::start(&["--create", "8M", "--max-payload", "4M", &export]);
    ok("/usr/bin/python3", &["tests/nbd_errors.py", hub.uri(), "writable"]);
    hub.stop();
    check_clean(&image);
    let hub = Hub::start(&["--read-only", "--max-payload", "4M", &export]);
    ok("/usr/bin/python3", &["tests/nbd_errors.py", hub.uri(), "read-only"]);
    hub.stop();
}

#[test]
fn a_capture_agent_that_never_flushes_nor_says_goodbye_loses_nothing() {
    if missing(&["nbdsh", "qemu-img"]) {
        return;
    }
    let dir = directory();
    let (disk, image) = (dir.path().join("disk.raw"), dir.path().join("a.qcow2"));
    make_disk(&disk, (128 << 20) + 512 * 5, 3);
    let size = std::fs::metadata(&disk).unwrap().len().to_string();
    let hub = Hub::start(&["--create", &size, &format!("vm-disk0={}", text(&image))]);
    ok("/usr/bin/python3", &["tests/sbc_agent.py", "full", hub.port(), "vm-disk0", text(&disk)]);
    hub.stop();
    check_clean(&image);
    compare(&disk, &image);

    // The next day: some extents change, and with them unchanged neighbours are sent.
    let overlay = dir.path().join("b.qcow2");
    let export = format!("vm-disk0={}", text(&overlay));
    let hub = Hub::start(&["--create", "0", "--backing", "a.qcow2", &export]);
    ok("/usr/bin/python3", &["tests/sbc_agent.py", "incr", hub.port(), "vm-disk0", text(&disk)]);
    hub.stop();
    check_clean(&overlay);
    compare(&disk, &overlay);
}
