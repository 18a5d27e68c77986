//! Trees as the kernel and other programs see them through FUSE. Skipped loudly where FUSE is not.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use guest::{FileType, Node, Tree};

use super::super::files::tree::{Fake, Made, dir, file, link, other, zeroes};
use super::*;

fn no_fuse() -> bool {
    let missing = fs::File::options().read(true).write(true).open("/dev/fuse").is_err();
    if missing {
        eprintln!("SKIPPED: /dev/fuse is not there");
    }
    missing
}

fn shell(script: &str, at: &Path) -> String {
    let output = Command::new("sh").args(["-ec", script]).current_dir(at).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect()
}

fn ordinary() -> Vec<Made> {
    let mut setuid = file("su", "x");
    setuid.mode = 0o4755;
    vec![
        dir("etc", vec![file("hostname", "guest\n"), link("abs", "/etc/hostname"), setuid]),
        dir("many", (0..3000).map(|n| file(format!("file-{n:04}"), format!("{n}"))).collect()),
        file("noise", noise(3_000_000)),
        zeroes("holey", 5 << 30, true),
    ]
}

/// A mount with a directory of its own.
fn mounted(trees: Vec<(&str, Fake)>) -> (tempfile::TempDir, FuseTree) {
    let dir = tempfile::tempdir().unwrap();
    let volumes =
        trees.into_iter().map(|(name, tree)| (name.to_owned(), Arc::new(tree) as Arc<dyn Tree>));
    let fuse = FuseTree::mount(&dir.path().join("m"), volumes.collect()).unwrap();
    (dir, fuse)
}

#[test]
fn programs_read_a_tree_as_any_other() {
    if no_fuse() {
        return;
    }
    let (dir, fuse) =
        mounted(vec![("disk0-p1", Fake::new(ordinary())), ("disk0-p2", Fake::new(vec![]))]);
    let at = fuse.path().to_owned();
    assert_eq!(shell("ls", &at), "disk0-p1\ndisk0-p2\n");
    assert_eq!(shell("ls disk0-p1/many | wc -l; find . -type f | wc -l", &at), "3000\n3004\n");
    assert_eq!(
        shell("cat disk0-p1/etc/abs; readlink disk0-p1/etc/abs", &at),
        "guest\n../etc/hostname\n"
    );
    assert_eq!(shell("cd disk0-p1 && grep -rl guest etc | sort", &at), "etc/hostname\n");
    assert_eq!(shell("stat -c '%a %u %g %s' disk0-p1/etc/su", &at), "755 1000 100 1\n");
    assert!(fs::read(at.join("disk0-p1/noise")).unwrap() == noise(3_000_000));
    let (major, minor) = about(&at).unwrap().device;
    let ahead = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if fs::File::options().write(true).open(&ahead).is_ok() {
        assert_eq!(fs::read_to_string(ahead).unwrap().trim(), READ_AHEAD_KIB.to_string());
    }
    shell("cp -r m/disk0-p1/many m/disk0-p1/noise . && cmp noise m/disk0-p1/noise", dir.path());
    assert_eq!(shell("cat many/file-2999; ls many | wc -l", dir.path()), "29993000\n");
    // Holes are told, so that a copy of 5 GiB of them is soon done.
    assert_eq!(
        shell("cp --sparse=auto m/disk0-p1/holey . && stat -c '%s %b' holey", dir.path()),
        "5368709120 0\n"
    );
    assert!(fs::write(at.join("disk0-p1/new"), "").is_err());
    let options = fs::read_to_string("/proc/self/mounts").unwrap();
    let options = options.lines().find(|l| l.contains(at.to_str().unwrap())).unwrap().to_owned();
    for wanted in ["ro,", "nosuid", "nodev", "noexec", "sendense-restore "] {
        assert!(options.contains(wanted), "{options}");
    }
    fuse.unmount();
    assert!(!at.exists());
}

#[test]
fn hostile_links_lead_nowhere_out_of_their_volume() {
    if no_fuse() {
        return;
    }
    let mut tree = Fake::new(vec![
        dir(
            "a",
            vec![dir("b", vec![link("root", "../.."), link("out", "root/../../../../etc/passwd")])],
        ),
        dir(
            "deep",
            vec![dir("er", vec![dir("est", vec![link("up", "../../../../../../../etc")])])],
        ),
        link("abs", "/etc/passwd"),
        link("self", "self"),
    ]);
    // The same link, and the same directory, at another depth.
    let (up, est) = (tree.find("deep/er/est/up"), tree.find("deep/er/est"));
    tree.link_into(Node(0), "up", up);
    tree.link_into(Node(0), "est", est);
    let (_dir, fuse) = mounted(vec![("v", tree), ("w", Fake::new(vec![file("secret", "w")]))]);
    let script = "find . -type l | while read l; do
        t=$(readlink -m \"$l\"); case \"$t\" in \"$PWD\"/v|\"$PWD\"/v/*) ;; *) echo \"$l: $t\";; esac; done";
    assert_eq!(shell(script, fuse.path()), "");
    assert_eq!(shell("find v -type l | wc -l", fuse.path()), "7\n");
    assert!(fs::read(fuse.path().join("v/abs")).is_err());
    assert!(fs::read(fuse.path().join("v/self")).is_err());
}

#[test]
fn what_cannot_be_read_fails_and_is_not_left_out() {
    if no_fuse() {
        return;
    }
    let mut tree = Fake::new(vec![
        other("null", FileType::CharDevice),
        other("pipe", FileType::Fifo),
        other("opaque", FileType::Opaque),
        file("bad", noise(1 << 20)),
        dir("lost", vec![file("x", "")]),
        dir("loop", vec![]),
        file("good", "good"),
    ]);
    let (bad, lost, own) = (tree.find("bad"), tree.find("lost"), tree.find("loop"));
    tree.fail_read(bad, 1000);
    tree.fail_list(lost);
    tree.link_into(own, "again", own);
    let (_dir, fuse) = mounted(vec![("v", tree)]);
    let v = fuse.path().join("v");
    assert_eq!(shell("ls", &v).lines().count(), 7);
    for name in ["null", "pipe", "opaque"] {
        assert!(fs::metadata(v.join(name)).unwrap().is_file());
        assert!(fs::File::open(v.join(name)).is_err());
    }
    assert!(fs::read(v.join("bad")).is_err());
    assert!(fs::read_dir(v.join("lost")).unwrap().next().is_none_or(|entry| entry.is_err()));
    let find = Command::new("find").arg(&v).output().unwrap();
    assert!(!find.status.success());
    assert_eq!(fs::read(v.join("good")).unwrap(), b"good");
}

#[test]
fn use_is_seen_and_an_unmount_waits_for_nobody() {
    if no_fuse() {
        return;
    }
    let (_dir, fuse) = mounted(vec![("v", Fake::new(ordinary()))]);
    assert_eq!(fuse.in_flight(), 0);
    let before = fuse.last_use();
    let mut open = fs::File::open(fuse.path().join("v/noise")).unwrap();
    open.read_exact(&mut [0; 10]).unwrap();
    assert!(fuse.in_flight() >= 1 && fuse.last_use() > before);
    let at = fuse.path().to_owned();
    let trees = Arc::downgrade(&fuse.shared);
    fuse.unmount();
    assert!(!at.exists());
    use std::os::unix::fs::FileExt as _;
    assert!(open.read_at(&mut [0; 10], 2_900_000).is_err());
    drop(open);
    // With the last file the threads end as well.
    while trees.strong_count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn only_empty_directories_are_mounted_on() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |name: &str| FuseTree::mount(&dir.path().join(name), Vec::new()).err().unwrap();
    fs::create_dir_all(dir.path().join("full/x")).unwrap();
    std::os::unix::fs::symlink("/tmp", dir.path().join("link")).unwrap();
    assert!(mount("full").contains("not empty"));
    assert!(mount("link").contains("no directory"));
    assert!(mount("not/there").contains("not/there"));
    let tree = || Arc::new(Fake::new(vec![])) as Arc<dyn Tree>;
    for names in [["a", "a"], ["..", "b"], ["a/b", "c"]] {
        let volumes = names.map(|name| (name.to_owned(), tree())).to_vec();
        assert!(FuseTree::mount(&dir.path().join("m"), volumes).is_err());
    }
}

#[test]
fn what_is_mounted_is_not_mounted_over_and_its_server_is_not_asked() {
    if no_fuse() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = || {
        let tree = Arc::new(Fake::new(ordinary())) as Arc<dyn Tree>;
        FuseTree::mount(&dir.path().join("m"), vec![("v".to_owned(), tree)])
    };
    let first = mount().unwrap();
    assert!(mount().err().unwrap().contains("mounted at"));
    let open = fs::File::open(dir.path().join("m/v/noise")).unwrap();
    first.unmount();
    // The file system lives on below the open file, but not in the way of the next one.
    let second = mount().unwrap();
    drop(open);
    assert!(dir.path().join("m/v/etc").is_dir());
    second.unmount();
    assert!(!dir.path().join("m").exists());
}

/// Mounts in a process of its own until it is killed; run by the test below.
#[test]
#[ignore = "is run by another test"]
fn mounts_until_it_is_killed() {
    let at = std::env::var_os("SENDENSE_TEST_MOUNT").unwrap();
    let tree = Arc::new(Fake::new(ordinary())) as Arc<dyn Tree>;
    let _fuse = FuseTree::mount(Path::new(&at), vec![("v".to_owned(), tree)]).unwrap();
    println!("mounted");
    std::thread::park();
}

#[test]
fn what_a_killed_hub_left_is_cleared() {
    if no_fuse() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("with space");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--ignored",
            "--nocapture",
            "restore::fuse::tests::mounts_until_it_is_killed",
        ])
        .env("SENDENSE_TEST_MOUNT", &at)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("mounted") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut output, &mut line).unwrap(), 0);
    }
    assert!(at.join("v/etc").is_dir());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(fs::read(at.join("v/noise")).is_err());
    assert_eq!(clear_stale(dir.path()), 1);
    assert!(!at.exists());
    assert_eq!(clear_stale(dir.path()), 0);
}

#[test]
fn the_kernels_escapes_are_undone() {
    assert_eq!(unescape(br"/a\040b\134c\"), br"/a b\c\");
}
