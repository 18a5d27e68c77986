//! `sendense-ctl`: files out of restore points.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod files_support;
#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::fs;
use std::process::Output;

use files_support::{BIG, LATIN, MANY, PROGRAMS, Site, VOLUME, at};
use serde_json::Value;
use support::both;

fn in_volume(path: &str) -> String {
    format!("{VOLUME}/{path}")
}

fn ok(site: &Site, arguments: &[&str]) -> String {
    let output = site.ctl(arguments);
    assert!(output.status.success(), "{arguments:?}: {}\n{}", both(&output), site.hub.log());
    String::from_utf8(output.stdout).unwrap()
}

fn json(site: &Site, arguments: &[&str]) -> Value {
    serde_json::from_str(&ok(site, &[arguments, &["--json"]].concat())).unwrap()
}

fn fails(site: &Site, code: i32, arguments: &[&str]) -> String {
    let output = site.ctl(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", both(&output));
    both(&output)
}

#[test]
fn a_mount_is_made_looked_at_and_taken_away() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let said = ok(&site, &["restore", "mount", "--backup-id", &site.backup]);
    assert!(said.contains("disk0-p1  CLEAN"), "{said}");
    assert!(said.contains("disk0-p2 is REFUSED: "), "{said}");
    let mounts = json(&site, &["restore", "mounts"]);
    let mount = mounts["mounts"][0]["mount_id"].as_str().unwrap();
    assert!(ok(&site, &["restore", "mounts"]).contains(mount));
    assert!(ok(&site, &["restore", "volumes", mount]).contains("REFUSED"));
    assert_eq!(ok(&site, &["restore", "ls", mount]), "disk0-p1/\ndisk0-p2/\n");

    let etc = in_volume("etc");
    let listed = ok(&site, &["restore", "ls", mount, &etc]);
    assert_eq!(listed, "absolute\nempty/\nescape\nhostname\nloop\nname\nnothing\n");
    let long = ok(&site, &["restore", "ls", "-l", mount, &etc]);
    let line = long.lines().find(|line| line.contains("hostname") && !line.contains("->"));
    assert!(line.is_some_and(|line| line.starts_with("-rw-r--r--")), "{long}");
    assert!(long.contains("name -> hostname"), "{long}");
    let all = ok(&site, &["restore", "ls", "-R", mount, VOLUME]);
    assert!(all.contains("/disk0-p1/etc/empty:") && all.contains("\nfile-2499\n"), "{all}");
    let all = json(&site, &["restore", "ls", "-R", mount, &in_volume("many")]);
    assert_eq!(all["total_count"], MANY);

    let told = ok(&site, &["restore", "stat", mount, &in_volume("etc/name")]);
    assert!(told.contains("symlink") && told.contains("hostname"), "{told}");
    let told = json(&site, &["restore", "stat", "-L", mount, &in_volume("etc/name")]);
    assert_eq!((&told["type"], &told["size"]), (&"file".into(), &6.into()));
    assert_eq!(ok(&site, &["restore", "cat", mount, &in_volume("etc/absolute")]), "guest\n");
    let found = ok(&site, &["restore", "find", mount, "HOST*"]);
    assert_eq!(found, in_volume("etc/hostname") + "\n");

    fails(&site, 3, &["restore", "cat", mount, &in_volume("none")]);
    fails(&site, 2, &["restore", "cat", mount, &in_volume("etc")]);
    assert!(fails(&site, 1, &["restore", "ls", mount, "/disk0-p2"]).contains("luks2"));
    fails(&site, 1, &["restore", "ls", mount, &in_volume("../..")]);
    ok(&site, &["restore", "umount", mount]);
    fails(&site, 3, &["restore", "umount", mount]);
    fails(&site, 3, &["restore", "ls", mount]);
    site.hub.assert_tidy();
}

#[test]
fn names_of_guests_are_harmless_on_a_terminal_and_can_be_given_back() {
    use std::os::unix::ffi::OsStrExt;
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let listed = ok(&site, &["restore", "ls", &mount, VOLUME]);
    assert!(!listed.contains('\u{1b}'), "{listed:?}");
    assert!(listed.contains("a\\u{1b}[2J\\u{a}b\n") && listed.contains("caf\\xe9\n"), "{listed}");
    let json = ok(&site, &["restore", "ls", &mount, VOLUME, "--json"]);
    assert!(!json.contains('\u{1b}'));
    assert_eq!(ok(&site, &["restore", "cat", &mount, &in_volume("caf\\xe9")]), "latin");
    let raw = [in_volume("").as_bytes(), LATIN].concat();
    let output = site
        .program(&["restore", "cat", &mount])
        .arg(std::ffi::OsStr::from_bytes(&raw))
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"latin", "{}", both(&output));
    let missing = fails(&site, 3, &["restore", "cat", &mount, &in_volume("\u{1b}[31m")]);
    assert!(!missing.contains('\u{1b}'), "{missing:?}");
}

#[test]
fn a_file_is_taken_out_and_goes_on_where_it_broke_off() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let (mount, expected) = (site.mount(), site.read("big.bin"));
    let here = tempfile::tempdir().unwrap();
    let (file, to) = at(&here, "copy.bin");
    let get = ["restore", "get", &mount, &in_volume("big.bin"), &to];
    let taken = json(&site, &get);
    assert_eq!((&taken["bytes"], &taken["resumed_at"]), (&BIG.into(), &0.into()));
    assert!(fs::read(&file).unwrap() == expected);
    let told = site.answer(&mount, "file-info", &in_volume("big.bin"));
    let modified: std::time::SystemTime = fs::metadata(&file).unwrap().modified().unwrap();
    let seconds = modified.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let time = sendense_hub::model::Timestamp::parse(told["modified_time"].as_str().unwrap());
    assert_eq!(u64::try_from(time.unwrap().unix()).unwrap(), seconds);

    let said = fails(&site, 1, &get);
    assert!(said.contains("--force"), "{said}");
    fs::write(&file, "mine").unwrap();
    fails(&site, 1, &get);
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    ok(&site, &[&get[..], &["--force"]].concat());
    assert!(fs::read(&file).unwrap() == expected);

    // What a broken download left, from another mount.
    let tag = taken["etag"].as_str().unwrap().trim_matches('"');
    let left = here.path().join(format!("copy.bin.{}.partial", &tag[..16]));
    fs::remove_file(&file).unwrap();
    fs::write(&left, &expected[..5_000_000]).unwrap();
    let again = site.mount();
    let taken = json(&site, &["restore", "get", &again, &in_volume("big.bin"), &to]);
    assert_eq!(taken["resumed_at"], 5_000_000);
    assert!(fs::read(&file).unwrap() == expected && !left.exists());

    // Into a directory, under its own name.
    let directory = here.path().to_str().unwrap();
    ok(&site, &["restore", "get", &mount, &in_volume("etc/nothing"), directory]);
    assert_eq!(fs::metadata(here.path().join("nothing")).unwrap().len(), 0);
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_directory_is_taken_out_as_an_archive() {
    if support::missing(&PROGRAMS) || support::missing(&["unzip", "tar"]) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let here = tempfile::tempdir().unwrap();
    let directory = here.path().to_str().unwrap();
    ok(&site, &["restore", "get", &mount, &in_volume("many"), directory]);
    let listed = support::ok("tar", &["-tzf", &at(&here, "many.tar.gz").1]);
    assert_eq!(listed.lines().count(), MANY + 1);
    let (_, to) = at(&here, "x.zip");
    ok(&site, &["restore", "get", &mount, &in_volume("many"), &to, "--archive", "zip"]);
    assert!(support::ok("unzip", &["-t", &to]).contains("No errors"));
    fails(&site, 1, &["restore", "get", &mount, &in_volume("many"), &to, "--archive", "zip"]);
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 2);
    // A link that leads out is not in an archive: that is said, and told by the exit code.
    for (name, form) in [("etc.zip", "zip"), ("etc.tar.gz", "tar.gz")] {
        let (path, to) = at(&here, name);
        let get = ["restore", "get", &mount, &in_volume("etc"), &to, "--archive", form];
        let said = fails(&site, 1, &get);
        assert!(said.contains("RESTORE-ERRORS.txt"), "{said}");
        assert!(path.exists());
    }
}

#[test]
fn one_file_is_extracted_from_a_backup_and_no_mount_stays() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let here = tempfile::tempdir().unwrap();
    let extract = |file: &str, output: &str| -> Output {
        let id = &site.backup;
        site.ctl(&["backup", "extract", "--backup-id", id, "--file", file, "--output", output])
    };
    for (name, file) in [("a", "/etc/hostname"), ("b", "etc/hostname"), ("c", "/disk0-p1/etc/name")]
    {
        let (path, output) = at(&here, name);
        let done = extract(file, &output);
        assert!(done.status.success(), "{file}: {}", both(&done));
        assert_eq!(fs::read(path).unwrap(), b"guest\n");
    }
    let missing = extract("/etc/none", &at(&here, "d").1);
    assert_eq!(missing.status.code(), Some(3), "{}", both(&missing));
    assert!(both(&missing).contains("luks2"), "{}", both(&missing));
    assert_eq!(extract("/etc/hostname", &at(&here, "a").1).status.code(), Some(1));
    assert_eq!(site.hub.get("restore/mounts")["total"], 0);
    let mounted = json(&site, &["backup", "mount", "--backup-id", &site.backup]);
    assert_eq!(mounted["status"], "mounted");
}
