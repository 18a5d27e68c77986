//! The program as a process: signals, reload, exit codes, status, socket activation.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nbd_proto::CommandFlags;
use sendense_hub::nbd::client::{Client, ClientOptions};
use serde_json::Value;
use support::{Hub, both, directory, hub, ok, program, text};

const NONE: CommandFlags = CommandFlags::empty();

fn client(server: &Hub, export: &str) -> Result<Client, sendense_hub::nbd::client::ClientError> {
    Client::connect_tcp(server.address(), &ClientOptions::new(export))
}

fn write_conf(dir: &Path, name: &str, content: &str) {
    std::fs::write(dir.join(name), content).unwrap();
}

/// Waits for a condition that a signal brings about.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(20), "{what} does not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_reload_adds_removes_and_changes_exports_and_leaves_the_others_alone() {
    let dir = directory();
    let conf = dir.path().join("conf.d");
    std::fs::create_dir(&conf).unwrap();
    for name in ["a", "b", "c"] {
        let file = dir.path().join(format!("{name}.img"));
        std::fs::write(file, vec![0; 1 << 20]).unwrap();
    }
    let section = |name: &str, more: &str| {
        format!("[{name}]\nexportname = {}\n{more}", text(&dir.path().join(format!("{name}.img"))))
    };
    write_conf(&conf, "a.conf", &section("a", ""));
    write_conf(&conf, "b.conf", &section("b", ""));
    let arguments = ["--listen", "127.0.0.1:0", "--config-dir", text(&conf)];
    let server = Hub::spawn(&arguments, 2);
    let mut a = client(&server, "a").unwrap();
    let mut b = client(&server, "b").unwrap();
    a.write(&[1; 512], 0, NONE).unwrap();
    b.write(&[1; 512], 0, NONE).unwrap();

    write_conf(&conf, "b.conf", &section("b", "readonly = true\n"));
    write_conf(&conf, "c.conf", &section("c", ""));
    server.signal("HUP");
    server.wait_for_log("reload done");
    a.write(&[2; 512], 0, NONE).unwrap();
    assert!(b.read(&mut [0; 512], 0).is_err(), "its export is another one now");
    let mut b = client(&server, "b").unwrap();
    assert!(b.write(&[1; 512], 0, NONE).is_err());
    client(&server, "c").unwrap().write(&[3; 512], 0, NONE).unwrap();

    std::fs::remove_file(conf.join("c.conf")).unwrap();
    server.signal("HUP");
    eventually("c is gone", || client(&server, "c").is_err());
    a.write(&[4; 512], 0, NONE).unwrap();

    // A bad file changes nothing and is named with its line.
    write_conf(&conf, "b.conf", &section("b", "\ncopyonwrite = true\n"));
    std::fs::remove_file(conf.join("a.conf")).unwrap();
    server.signal("HUP");
    server.wait_for_log("b.conf:4");
    a.write(&[5; 512], 0, NONE).unwrap();
    client(&server, "b").unwrap();
    server.stop();
}

#[test]
fn a_mistake_in_the_drop_ins_keeps_the_server_from_starting() {
    let dir = directory();
    write_conf(dir.path(), "x.conf", "[x]\nreadonly = maybe\n");
    let output = hub(&["export", "--config-dir", text(dir.path())]);
    assert_eq!(output.status.code(), Some(1));
    assert!(both(&output).contains("x.conf:2"), "{}", both(&output));
}

#[test]
fn the_signals_that_end_programs_end_it_cleanly() {
    for name in ["TERM", "INT"] {
        let mut server = Hub::start(&["d=null:1M"]);
        let _idle = client(&server, "d").unwrap();
        server.signal(name);
        assert_eq!(server.wait(), Some(0), "{}", server.log());
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Hub::start(&["d=null:1M"]);
    let _idle = client(&server, "d").unwrap();
    // Both are there when it goes on: the second is not late, however busy the machine is.
    for name in ["STOP", "TERM", "INT", "CONT"] {
        server.signal(name);
    }
    assert_eq!(server.wait(), Some(130), "{}", server.log());
}

#[test]
fn an_image_that_cannot_be_closed_makes_the_exit_code_one() {
    let dir = directory();
    let image = dir.path().join("a.qcow2");
    let mut server = Hub::start(&["--create", "8M", &format!("d={}", text(&image))]);
    client(&server, "d").unwrap().write(&[1; 512], 0, NONE).unwrap();
    // The process may not make files longer than this any more: metadata cannot be written.
    ok("prlimit", &["--pid", &server.pid().to_string(), "--fsize=4096"]);
    server.signal("TERM");
    let code = server.wait();
    assert_eq!(code, Some(1), "{}", server.log());
    assert!(server.log().contains("not closed cleanly"), "{}", server.log());
}

#[test]
fn the_status_tells_what_was_done() {
    let dir = directory();
    let control = dir.path().join("control");
    let server = Hub::start(&["--control", text(&control), "d=null:1M"]);
    let mut nbd = client(&server, "d").unwrap();
    nbd.write(&[1; 4096], 0, NONE).unwrap();
    nbd.read(&mut [0; 512], 0).unwrap();
    nbd.flush().unwrap();
    assert!(nbd.read(&mut [0; 512], 1 << 20).is_err());
    let output = hub(&["status", "--json", text(&control)]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    let export = &status["exports"][0];
    for (key, value) in [
        ("connections", 1),
        ("connections_served", 1),
        ("reads", 1),
        ("writes", 1),
        ("flushes", 1),
        ("errors", 1),
        ("bytes_read", 512),
        ("bytes_written", 4096),
    ] {
        assert_eq!(export[key], value, "{key}");
    }
    let table = both(&hub(&["status", text(&control)]));
    assert!(table.contains("EXPORT") && table.contains("4.0 KiB"), "{table}");
    nbd.disconnect().unwrap();
    let log = server.stop();
    assert!(log.contains("written=4096"), "{log}");
    assert!(!control.exists());
    assert!(!hub(&["status", text(&control)]).status.success());
}

#[test]
fn a_port_probe_logs_nothing_above_debug() {
    let server = Hub::start(&["d=null:1M"]);
    for _ in 0..3 {
        drop(TcpStream::connect(server.address()).unwrap());
    }
    let mut polite = TcpStream::connect(server.address()).unwrap();
    polite.read_exact(&mut [0; 18]).unwrap();
    polite.write_all(b"nonsense, not NBD").unwrap();
    server.wait_for_log("negotiation ended");
    let log = server.stop();
    let loud = log
        .lines()
        .filter(|l| !l.contains("DEBUG") && !l.contains("export opened"))
        .filter(|l| !l.contains("shutting down"))
        .collect::<Vec<_>>();
    assert!(loud.is_empty(), "{loud:?}");
}

#[test]
fn sockets_that_systemd_opened_are_served() {
    let script = "import os, socket, sys\n\
        s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n\
        os.dup2(s.fileno(), 9); os.dup2(9, 3)\n\
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n\
        os.execv(sys.argv[1], sys.argv[1:])\n";
    let program = program().get_program().to_owned();
    let mut child = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(program)
        .args(["export", "d=null:1M"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut uri = String::new();
    std::io::BufRead::read_line(&mut out, &mut uri).unwrap();
    let address = uri.trim().trim_start_matches("nbd://").trim_end_matches("/d");
    let nbd = Client::connect_tcp(address, &ClientOptions::new("d")).unwrap();
    assert_eq!(nbd.size(), 1 << 20);
    drop(nbd);
    ok("kill", &[&child.id().to_string()]);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_unix_socket_in_use_is_respected_and_a_dead_one_replaced() {
    let dir = directory();
    let socket = dir.path().join("socket");
    let server = Hub::spawn(&["--unix", text(&socket), "d=null:1M"], 1);
    let second = hub(&["export", "--unix", text(&socket), "d=null:1M"]);
    assert_eq!(second.status.code(), Some(1));
    server.kill();
    assert!(socket.exists());
    Hub::spawn(&["--unix", text(&socket), "d=null:1M"], 1).stop();
}

#[test]
fn what_makes_no_sense_on_the_command_line_is_told() {
    for (arguments, wanted) in [
        (&["export"][..], "nothing to serve"),
        (&["export", "d"], "NAME=IMAGE"),
        (&["export", "d=/nowhere/disk"], "never guessed"),
        (&["export", "d=/nowhere/disk.raw"], "No such file"),
        (&["export", "a b=null:1M"], "export name"),
        (&["export", "--buffers", "1M", "d=null:1M"], "too few"),
        (&["image", "create", "/tmp/never.qcow2"], "needs a size"),
        (&["image", "info", "/nowhere.qcow2"], "No such file"),
    ] {
        let output = hub(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(both(&output).contains(wanted), "{arguments:?}: {}", both(&output));
    }
}

#[test]
fn images_are_made_described_mapped_and_compared() {
    let dir = directory();
    let path = |name: &str| dir.path().join(name);
    let (base, top) = (path("base.qcow2"), path("top.qcow2"));
    let done = |arguments: &[&str]| {
        let output = hub(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", both(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    done(&["image", "create", text(&base), "64M", "--cluster-size", "4K"]);
    done(&["image", "create", text(&top), "--backing", "base.qcow2"]);
    let info: Value =
        serde_json::from_str(&done(&["image", "info", "--json", text(&top)])).unwrap();
    assert_eq!(info["virtual_size"], 64 << 20);
    assert_eq!(info["backing_file"], "base.qcow2");
    assert_eq!(info["backing_format"], "qcow2");
    assert_eq!(info["chain"][0], text(&base));
    assert!(done(&["image", "info", text(&top)]).contains("64.0 MiB"));

    let server = Hub::start(&[&format!("d={}", text(&top))]);
    client(&server, "d").unwrap().write(&[1; 4096], 1 << 20, NONE).unwrap();
    server.stop();
    let map: Value = serde_json::from_str(&done(&["image", "map", "--json", text(&top)])).unwrap();
    assert_eq!(map.as_array().unwrap().len(), 3);
    assert_eq!(map[1]["offset"], 1 << 20);
    assert_eq!(map[1]["depth"], 1);

    let compared = hub(&["image", "compare", "--json", text(&base), text(&top)]);
    assert_eq!(compared.status.code(), Some(1));
    let result: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert_eq!(result["first_difference"], 1 << 20);
    assert!(done(&["image", "compare", text(&top), text(&top)]).contains("equal"));
    let failed = hub(&["image", "compare", text(&top), "/nowhere.qcow2"]);
    assert_eq!(failed.status.code(), Some(2));
    let check: Value =
        serde_json::from_str(&done(&["image", "check", "--json", text(&top)])).unwrap();
    assert_eq!(check["corruptions"], 0);
}

#[test]
fn the_demonstration_runs_and_finds_everything_equal() {
    let dir = directory();
    let output = hub(&["demo", "--directory", text(dir.path())]);
    let said = both(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("reads back equal"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}
