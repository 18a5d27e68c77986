//! qemu's tools against the server, and against its images.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::{
    Hub, Random, both, check_clean, compare, directory, hub, make_disk, missing, ok, run, text,
};

#[test]
fn qemu_img_converts_into_and_out_of_an_export() {
    if missing(&["qemu-img"]) {
        return;
    }
    let dir = directory();
    let (disk, image, back) =
        (dir.path().join("disk.raw"), dir.path().join("a.qcow2"), dir.path().join("back.raw"));
    make_disk(&disk, 64 << 20, 11);
    let hub = Hub::start(&["--create", "64M", &format!("disk={}", text(&image))]);
    ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&disk), hub.uri()]);
    ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&disk), hub.uri()]);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", hub.uri(), text(&back)]);
    let map = ok("qemu-img", &["map", "-f", "raw", "--output=json", hub.uri()]);
    assert!(map.contains("\"data\": true") && map.contains("\"data\": false"), "{map}");
    ok("qemu-img", &["bench", "-f", "raw", "-w", "-c", "200", "-d", "16", "-s", "64k", hub.uri()]);
    hub.stop();
    assert!(std::fs::read(&disk).unwrap() == std::fs::read(&back).unwrap());
    check_clean(&image);
}

#[test]
fn qemu_io_reads_what_it_wrote_with_every_kind_of_request() {
    if missing(&["qemu-io", "qemu-img"]) {
        return;
    }
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let hub = Hub::start(&["--create", "16M", &format!("disk={}", text(&image))]);
    let script = [
        "write -P 1 0 1M",
        "write -f -P 2 100k 3k",
        "aio_write -P 3 2M 2M",
        "aio_write -P 4 5M 64k",
        "aio_flush",
        "write -z 512k 64k",
        "write -z -u 640k 128k",
        "discard 2M 1M",
        "flush",
        "read -P 1 0 100k",
        "read -P 2 100k 3k",
        "read -P 0 512k 64k",
        "read -P 0 640k 128k",
        "read -P 3 3M 1M",
        "read -P 4 5M 64k",
        "read -P 0 2M 1M",
    ];
    let commands: Vec<&str> = script.iter().flat_map(|c| ["-c", c]).collect();
    let output = ok("qemu-io", &[&["-f", "raw"], &commands[..], &[hub.uri()]].concat());
    assert!(!output.contains("failed"), "{output}");
    hub.stop();
    check_clean(&image);
}

#[test]
fn a_full_and_five_incrementals_are_right_at_each_point() {
    if missing(&["qemu-img", "qemu-io"]) {
        return;
    }
    const SIZE: u64 = 48 << 20;
    let dir = directory();
    let disk = dir.path().join("disk.raw");
    make_disk(&disk, SIZE, 12);
    let file = OpenOptions::new().write(true).open(&disk).unwrap();
    let mut random = Random::new(13);
    let mut points = Vec::new();
    for number in 0..6 {
        let image = dir.path().join(format!("{number}.qcow2"));
        let export = format!("disk={}", text(&image));
        let size = SIZE.to_string();
        if number == 0 {
            let hub = Hub::start(&["--create", &size, &export]);
            ok("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&disk), hub.uri()]);
            hub.stop();
        } else {
            let backing = format!("{}.qcow2", number - 1);
            let hub = Hub::start(&["--create", &size, "--backing", &backing, &export]);
            for _ in 0..20 {
                let length = (1 + random.below(300)) * 512;
                let offset = random.below((SIZE - length) / 512) * 512;
                let pattern = 1 + random.below(250);
                let fill = vec![u8::try_from(pattern).unwrap(); usize::try_from(length).unwrap()];
                file.write_all_at(&fill, offset).unwrap();
                let command = format!("write -P {pattern} {offset} {length}");
                ok("qemu-io", &["-f", "raw", "-c", &command, hub.uri()]);
            }
            hub.stop();
        }
        let copy = dir.path().join(format!("{number}.raw"));
        std::fs::copy(&disk, &copy).unwrap();
        points.push((image, copy));
    }
    for (image, copy) in &points {
        check_clean(image);
        compare(copy, image);
        let output = hub(&["image", "compare", &format!("raw:{}", text(copy)), text(image)]);
        assert!(output.status.success(), "{}", both(&output));
    }
}

/// Serves `image` read-only, reads it all through NBD, and compares with what qemu reads from it.
fn reads_like_qemu(image: &Path, dir: &Path) {
    let (ours, theirs) = (dir.join("ours.raw"), dir.join("theirs.raw"));
    ok("qemu-img", &["convert", "-O", "raw", text(image), text(&theirs)]);
    let hub = Hub::start(&["--read-only", &format!("disk=qcow2:{}", text(image))]);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "raw", hub.uri(), text(&ours)]);
    hub.stop();
    assert!(
        std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap(),
        "{}",
        image.display()
    );
}

#[test]
fn every_image_that_qemu_makes_reads_the_same_through_the_server() {
    if missing(&["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = directory();
    let disk = dir.path().join("disk.raw");
    make_disk(&disk, (6 << 20) + 512 * 3, 14);
    for (number, options) in [
        vec!["-o", "compat=0.10"],
        vec!["-o", "cluster_size=512"],
        vec!["-o", "cluster_size=2M"],
        vec!["-o", "refcount_bits=1"],
        vec!["-o", "refcount_bits=64"],
        vec!["-o", "extended_l2=on"],
        vec!["-o", "preallocation=metadata"],
        vec!["-o", "preallocation=full"],
        vec!["-c", "-o", "compression_type=zlib"],
        vec!["-c", "-o", "compression_type=zstd"],
        vec!["-c", "-o", "compression_type=zlib,cluster_size=4k,compat=0.10"],
    ]
    .into_iter()
    .enumerate()
    {
        let image = dir.path().join(format!("{number}.qcow2"));
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        ok("qemu-img", &[&convert, &options[..], &[text(&disk), text(&image)]].concat());
        reads_like_qemu(&image, dir.path());
    }
    // Subclusters that qemu wrote one by one, over a raw backing file shorter than the overlay.
    let image = dir.path().join("sub.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", text(&disk), "-F"];
    ok("qemu-img", &[&create[..], &["raw", text(&image), "8M"]].concat());
    for command in
        ["write -P 9 70k 3k", "write -z 200k 10k", "write -P 7 7M 100k", "discard 1M 64k"]
    {
        ok("qemu-io", &["-c", command, text(&image)]);
    }
    reads_like_qemu(&image, dir.path());
}

#[test]
fn what_is_not_supported_is_refused_in_a_sentence() {
    if missing(&["qemu-img"]) {
        return;
    }
    let dir = directory();
    let path = |name: &str| dir.path().join(name);
    let create = |name: &str, options: &[&str]| {
        let file = path(name);
        ok("qemu-img", &[&["create", "-q", "-f", "qcow2"], options, &[text(&file), "1M"]].concat());
    };
    create(
        "luks.qcow2",
        &[
            "--object",
            "secret,id=s,data=abc",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ],
    );
    let data = format!("data_file={}", text(&path("data.bin")));
    create("external.qcow2", &["-o", &data]);
    create("snapshot.qcow2", &[]);
    ok("qemu-img", &["snapshot", "-c", "one", text(&path("snapshot.qcow2"))]);
    create("base.qcow2", &[]);
    create("loop.qcow2", &["-b", text(&path("base.qcow2")), "-F", "qcow2"]);
    let rebase = |options: &[&str], name: &str| {
        ok("qemu-img", &[&["rebase", "-u"], options, &[text(&path(name))]].concat());
    };
    rebase(&["-b", "loop.qcow2", "-F", "qcow2"], "base.qcow2");
    create("missing.qcow2", &["-u", "-b", "nothing.qcow2", "-F", "qcow2"]);
    create("protocol.qcow2", &["-u", "-b", "nbd://localhost/x", "-F", "raw"]);
    std::fs::write(path("text.qcow2"), "this is no image").unwrap();

    for (name, wanted) in [
        ("luks.qcow2", "encrypted"),
        ("external.qcow2", "external file"),
        ("snapshot.qcow2", "internal snapshot"),
        ("loop.qcow2", "loop"),
        ("missing.qcow2", "nothing.qcow2"),
        ("protocol.qcow2", "protocol"),
        ("text.qcow2", "not a QCOW2 image"),
    ] {
        let export = format!("d={}", text(&path(name)));
        let output = hub(&["export", "--listen", "127.0.0.1:0", &export]);
        let said = both(&output);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains(wanted), "{name}: {said}");
        assert!(said.contains(name) || name == "loop.qcow2", "{name}: {said}");
    }
    // A snapshot's image can still be read.
    Hub::start(&["--read-only", &format!("d={}", text(&path("snapshot.qcow2")))]).stop();
}

#[test]
fn a_chain_deeper_than_the_bound_is_refused() {
    let dir = directory();
    let path = |number: usize| dir.path().join(format!("{number}.qcow2"));
    for number in 0..258 {
        let mut options = qcow2::CreateOptions::new(1 << 20);
        if number > 0 {
            let name = format!("{}.qcow2", number - 1);
            options = options.backing(name, qcow2::BackingFormat::Qcow2);
        }
        qcow2::create(&path(number), &options).unwrap();
    }
    Hub::start(&[&format!("d={}", text(&path(255)))]).stop();
    let export = format!("d={}", text(&path(256)));
    let output = hub(&["export", "--listen", "127.0.0.1:0", &export]);
    assert!(both(&output).contains("longer than 256"), "{}", both(&output));
}

#[test]
fn an_image_in_use_here_is_refused_by_qemu_and_the_other_way_round() {
    if missing(&["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let export = format!("disk={}", text(&image));
    let server = Hub::start(&["--create", "8M", &export]);
    for arguments in [
        &["qemu-img", "info", text(&image)][..],
        &["qemu-img", "check", text(&image)],
        &["qemu-io", "-c", "write 0 64k", text(&image)],
    ] {
        let output = run(arguments[0], &arguments[1..]);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(both(&output).contains("lock"), "{}", both(&output));
    }
    let second = hub(&["export", "--listen", "127.0.0.1:0", &export]);
    assert!(!second.status.success());
    let said = both(&second);
    assert!(said.contains(&format!("process {} (sendense-hub)", server.pid())), "{said}");
    server.stop();

    let reader = Hub::start(&["--read-only", &export]);
    ok("qemu-img", &["info", text(&image)]);
    assert!(!run("qemu-io", &["-c", "write 0 64k", text(&image)]).status.success());
    reader.stop();

    // qemu-io holds the image from its first answer until its standard input ends.
    let mut holder = Command::new("qemu-io")
        .arg(text(&image))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    input.write_all(b"length\n").unwrap();
    let mut answers = BufReader::new(holder.stdout.take().unwrap()).lines();
    assert!(answers.any(|line| line.unwrap().contains("MiB")));
    let said = both(&hub(&["image", "check", "--repair", "all", text(&image)]));
    let name = format!("process {} (qemu-io)", holder.id());
    assert!(said.contains(&name), "{said}");
    drop(input);
    holder.wait().unwrap();
    drop(answers);
}
