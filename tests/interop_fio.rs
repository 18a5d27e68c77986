//! fio's nbd engine, which verifies what it wrote.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use support::{Hub, check_clean, directory, missing, ok, run, text};

fn verify(options: &[&str]) {
    if missing(&["fio", "qemu-img"]) {
        return;
    }
    if !String::from_utf8_lossy(&run("fio", &["--enghelp"]).stdout).contains("nbd") {
        assert!(std::env::var_os("CI").is_none(), "fio must have its nbd engine");
        println!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let hub = Hub::start(&["--create", "64M", &format!("disk={}", text(&image))]);
    let uri = format!("--uri={}", hub.uri());
    let fixed = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--verify=crc32c",
        "--verify_state_save=0",
        "--randseed=7",
    ];
    let output = ok("fio", &[&fixed[..], options].concat());
    assert!(output.contains("err= 0"), "{output}");
    hub.stop();
    check_clean(&image);
}

#[test]
fn random_small_writes_with_many_in_flight_verify() {
    verify(&["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=32m", "--fsync=64"]);
}

#[test]
fn writes_of_odd_sizes_verify() {
    verify(&[
        "--rw=randwrite",
        "--bsrange=512-200k",
        "--bs_unaligned=0",
        "--iodepth=8",
        "--size=48m",
    ]);
}

#[test]
fn mixed_reads_and_writes_verify() {
    verify(&["--rw=randrw", "--bs=64k", "--iodepth=16", "--size=64m"]);
}

#[test]
fn large_sequential_writes_verify() {
    verify(&["--rw=write", "--bs=4m", "--iodepth=4", "--size=64m"]);
}
