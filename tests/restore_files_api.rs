//! Files of restore points over the API.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod files_support;
#[path = "support/mod.rs"]
mod support;
mod workflow_support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use files_support::{BIG, HOLES, MANY, NASTY, PROGRAMS, REFUSED, Site, VOLUME, address};
use serde_json::{Value, json};
use workflow_support::{Hub, LIMIT, image_of};

fn in_volume(path: &str) -> String {
    format!("{VOLUME}/{path}")
}

fn names(list: &Value) -> Vec<String> {
    let files = list["files"].as_array().unwrap();
    files.iter().map(|file| file["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_mount_tells_its_volumes_and_their_files_as_clients_of_the_old_hub_read_them() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let made = site.hub.post("restore/mount", &json!({"backup_id": site.backup}));
    for key in [
        "mount_id",
        "backup_id",
        "filesystem_type",
        "status",
        "created_at",
        "expires_at",
        "vm_name",
        "volumes",
        "notes",
    ] {
        assert!(!made[key].is_null(), "{key}: {made}");
    }
    assert!(made.get("disk_index").is_some() && made.get("mount_path").is_some());
    assert_eq!((&made["filesystem_type"], &made["status"]), (&json!("ext4"), &json!("mounted")));
    let mount = made["mount_id"].as_str().unwrap();
    let listed = site.hub.get("restore/mounts");
    assert_eq!((&listed["total"], &listed["mounts"][0]["mount_id"]), (&json!(1), &json!(mount)));

    let volumes = site.hub.get(&format!("restore/{mount}/volumes"));
    let volumes = volumes["volumes"].as_array().unwrap();
    assert_eq!(volumes.len(), 2, "{volumes:?}");
    assert_eq!(format!("/{}", volumes[0]["name"].as_str().unwrap()), VOLUME);
    assert_eq!((&volumes[0]["status"], &volumes[0]["label"]), (&json!("clean"), &json!("files")));
    assert_eq!((&volumes[1]["name"], &volumes[1]["status"]), (&json!(REFUSED), &json!("refused")));
    assert!(volumes[1]["reason"].as_str().unwrap().contains("luks2"), "{volumes:?}");

    let root = site.hub.get(&format!("restore/{mount}/files"));
    assert_eq!(
        (names(&root), &root["path"]),
        (vec!["disk0-p1".into(), REFUSED.into()], &json!("/"))
    );
    assert!(root["files"].as_array().unwrap().iter().all(|file| file["type"] == "directory"));
    let etc = site.answer(mount, "files", &in_volume("etc"));
    assert_eq!((&etc["total_count"], &etc["more"]), (&json!(7), &json!(false)), "{etc}");
    let find = |name: &str| {
        let files = etc["files"].as_array().unwrap();
        files.iter().find(|file| file["name"] == name).unwrap_or_else(|| panic!("{name}: {etc}"))
    };
    let hostname = find("hostname");
    assert_eq!(hostname["path"], in_volume("etc/hostname"));
    assert_eq!((&hostname["size"], &hostname["mode"]), (&json!(6), &json!("0644")));
    assert!(hostname["modified_time"].as_str().unwrap().starts_with("20"));
    assert_eq!((&hostname["type"], &hostname["is_symlink"]), (&json!("file"), &json!(false)));
    let link = find("name");
    assert_eq!((&link["type"], &link["is_symlink"]), (&json!("symlink"), &json!(true)));
    assert_eq!(link["symlink_target"], "hostname");

    let info = site.answer(mount, "file-info", &in_volume("etc/name"));
    assert_eq!((&info["type"], &info["symlink_target"]), (&json!("symlink"), &json!("hostname")));
    let followed = format!("{}&follow=true", address(mount, "file-info", &in_volume("etc/name")));
    let info = site.hub.get(&followed);
    assert_eq!((&info["type"], &info["path"]), (&json!("file"), &json!(in_volume("etc/hostname"))));
    assert_eq!(info["volume_status"], "clean");

    let resources = site.hub.get("restore/resources");
    assert_eq!(resources["active_mounts"], 1, "{resources}");
    assert!(resources["worker_memory_bytes"].as_u64().unwrap() > 0, "{resources}");
    let cleanup = site.hub.get("restore/cleanup-status");
    assert!(cleanup["next_expiry"].is_string() && cleanup["cleaned"] == 0, "{cleanup}");
    site.hub.ok("DELETE", &format!("restore/{mount}"), None);
    assert_eq!(site.ask(mount, "files", "/").0, 404);
    assert_eq!(site.hub.get("restore/mounts")["total"], 0);
    site.hub.assert_tidy();
}

#[test]
fn listings_come_in_parts_that_are_whole_together() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let expected: BTreeSet<String> = (0..MANY).map(|number| format!("file-{number:04}")).collect();
    for limit in [700, 1000, 9999] {
        let mut found = Vec::new();
        let mut cursor = String::new();
        loop {
            let path = address(&mount, "files", &in_volume("many"));
            let page = site.hub.get(&format!("{path}&limit={limit}{cursor}"));
            assert!(names(&page).len() <= limit);
            assert_eq!(page["total_count"], names(&page).len());
            found.extend(names(&page));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
            assert_eq!(page["more"], true);
        }
        assert_eq!(found.len(), MANY);
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected);
    }
    let all = site.hub.get(&format!("{}&recursive=true", address(&mount, "files", VOLUME)));
    assert_eq!((&all["more"], all.get("errors")), (&json!(false), None));
    let paths: Vec<_> = all["files"].as_array().unwrap().iter().map(|f| &f["path"]).collect();
    assert!(paths.contains(&&json!(in_volume("many/file-2499"))));
    assert!(paths.contains(&&json!(in_volume("etc/empty"))));
    let few = format!("{}&recursive=true&limit=10", address(&mount, "files", "/"));
    assert_eq!(site.hub.get(&few)["more"], true);

    let search = |query: &str| site.hub.get(&format!("restore/{mount}/search?{query}"));
    assert_eq!(names(&search("name=HOSTNAME")), ["hostname"]);
    assert_eq!(names(&search("name=file-000%3F")).len(), 10);
    let some = search(&format!("name=file&limit=5&path={VOLUME}/many"));
    assert_eq!((names(&some).len(), &some["more"]), (5, &json!(true)));
    assert_eq!(search(&format!("name=file&path={VOLUME}/etc"))["total_count"], 0);
}

#[test]
fn names_of_any_bytes_are_told_and_found_again() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let root = site.answer(&mount, "files", VOLUME);
    for (name, content) in [(r"caf\xe9", "latin"), (NASTY, "nasty")] {
        let files = root["files"].as_array().unwrap();
        let file = files.iter().find(|file| file["name"] == name).unwrap();
        let path = address(&mount, "download", file["path"].as_str().unwrap());
        assert_eq!(site.raw("GET", &path, &[]).body, content.as_bytes());
    }
    let raw = format!("restore/{mount}/download?path={VOLUME}/caf%E9");
    let answer = site.raw("GET", &raw, &[]);
    assert_eq!(answer.body, b"latin");
    let disposition = answer.header("content-disposition");
    assert!(disposition.starts_with("attachment; filename=\"caf"), "{disposition}");
}

#[test]
fn a_download_is_the_file_or_the_part_that_was_asked_for() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let (mount, expected) = (site.mount(), site.read("big.bin"));
    let path = address(&mount, "download", &in_volume("big.bin"));
    let whole = site.raw("GET", &path, &[]);
    assert_eq!((whole.status, whole.header("content-length")), (200, &*BIG.to_string()));
    assert!(whole.body == expected);
    assert_eq!(whole.header("accept-ranges"), "bytes");
    assert_eq!(whole.header("content-type"), "application/octet-stream");
    assert_eq!(whole.header("x-content-type-options"), "nosniff");
    let disposition = "attachment; filename=\"big.bin\"; filename*=UTF-8''big.bin";
    assert_eq!(whole.header("content-disposition"), disposition);
    let tag = whole.header("etag").to_owned();
    assert!(tag.starts_with('"') && tag.ends_with('"') && tag.len() > 20, "{tag}");
    assert_eq!(site.answer(&mount, "file-info", &in_volume("big.bin"))["etag"], tag.as_str());

    let head = site.raw("HEAD", &path, &[("range", "bytes=5-9")]);
    assert_eq!((head.status, head.header("content-length")), (200, &*BIG.to_string()));
    assert_eq!((head.header("etag"), head.body.len()), (&*tag, 0));

    let last = BIG - 1;
    for (range, from, to) in [
        ("bytes=0-0", 0, 0),
        ("bytes=1048570-1048590", 1_048_570, 1_048_590),
        ("bytes=3000000-", 3_000_000, last),
        ("bytes=-100", BIG - 100, last),
    ] {
        for headers in [vec![("range", range)], vec![("range", range), ("if-range", &tag)]] {
            let part = site.raw("GET", &path, &headers);
            assert_eq!(part.status, 206, "{range}");
            assert_eq!(part.header("content-range"), format!("bytes {from}-{to}/{BIG}"));
            assert!(part.body == expected[from..=to], "{range}");
        }
    }
    let other = site.raw("GET", &path, &[("range", "bytes=1-2"), ("if-range", "\"other\"")]);
    assert_eq!((other.status, other.body.len()), (200, BIG));
    let outside = site.raw("GET", &path, &[("range", &*format!("bytes={BIG}-"))]);
    assert_eq!((outside.status, outside.body.len()), (416, 0));
    assert_eq!(outside.header("content-range"), format!("bytes */{BIG}"));

    // Another mount of the same restore point goes on where this one ended.
    site.hub.ok("DELETE", &format!("restore/{mount}"), None);
    let again = address(&site.mount(), "download", &in_volume("big.bin"));
    let rest = site.raw("GET", &again, &[("range", "bytes=4000000-"), ("if-range", &tag)]);
    assert_eq!((rest.status, rest.header("etag")), (206, &*tag));
    assert!(rest.body == expected[4_000_000..]);

    let mount = site.mount();
    let empty = site.raw("GET", &address(&mount, "download", &in_volume("etc/nothing")), &[]);
    assert_eq!((empty.status, empty.header("content-length"), empty.body.len()), (200, "0", 0));
    let linked = site.raw("GET", &address(&mount, "download", &in_volume("etc/absolute")), &[]);
    assert_eq!(linked.body, b"guest\n", "links begin at the volume's root");
    let end = format!("bytes={}-", HOLES - 5);
    let holes = address(&mount, "download", &in_volume("holes.img"));
    assert_eq!(site.raw("GET", &holes, &[("range", &end)]).body, b"\0\0end");
}

#[test]
fn a_directory_comes_as_an_archive_that_others_can_read() {
    if support::missing(&PROGRAMS) || support::missing(&["unzip", "tar"]) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let directory = tempfile::tempdir().unwrap();
    let save = |name: &str, path: &str, format: &str| {
        let (file, argument) = files_support::at(&directory, name);
        let path = format!("{}&format={format}", address(&mount, "download-directory", path));
        let answer = site.raw("GET", &path, &[]);
        assert!(answer.status == 200 && answer.whole, "{}", site.hub.log());
        std::fs::write(file, &answer.body).unwrap();
        (argument, answer.header("content-disposition").to_owned())
    };
    let (zip, name) = save("many.zip", &in_volume("many"), "zip");
    assert!(name.contains("filename=\"many.zip\""), "{name}");
    assert!(support::ok("unzip", &["-t", &zip]).contains("No errors detected"));
    assert_eq!(support::ok("unzip", &["-p", &zip, "many/file-0042"]), "42");
    let (tar, name) = save("etc.tar.gz", &in_volume("etc"), "tar.gz");
    assert!(name.contains("filename=\"etc.tar.gz\""), "{name}");
    let listed = support::ok("tar", &["-tzf", &tar]);
    let listed: BTreeSet<&str> = listed.lines().collect();
    for name in ["etc/", "etc/empty/", "etc/hostname", "etc/name", "RESTORE-ERRORS.txt"] {
        assert!(listed.contains(name), "{name}: {listed:?}");
    }
    assert!(!listed.contains("etc/escape"), "a link that leads out is not in it");
    assert_eq!(support::ok("tar", &["-xzOf", &tar, "etc/hostname"]), "guest\n");
    let file = address(&mount, "download-directory", &in_volume("big.bin"));
    assert_eq!(site.raw("GET", &file, &[]).status, 400);
    let file = format!("{}&format=rar", address(&mount, "download-directory", VOLUME));
    assert_eq!(site.raw("GET", &file, &[]).status, 400);
}

#[test]
fn what_cannot_be_given_is_refused_with_status_and_reason() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    for (what, path, expected, word) in [
        ("files", format!("/{REFUSED}"), 422, "luks2"),
        ("download", format!("/{REFUSED}/a"), 422, "luks2"),
        ("download-directory", format!("/{REFUSED}"), 422, "luks2"),
        ("files", in_volume(".."), 400, ".."),
        ("download", in_volume("etc/../../../etc/passwd"), 400, ".."),
        ("download", in_volume("etc/hostname\0"), 400, "NUL"),
        ("files", "etc".into(), 400, "begins with /"),
        ("files", in_volume("none"), 404, "none"),
        ("files", "/disk9".into(), 404, "disk9"),
        ("files", in_volume("etc/hostname"), 400, "irectory"),
        ("file-info", in_volume("etc/hostname/x"), 404, ""),
        ("download", in_volume("etc"), 400, "directory"),
        ("download", "/".into(), 400, "directory"),
        ("download", in_volume("etc/escape"), 404, "passwd"),
        ("download", in_volume("etc/loop"), 422, "links"),
        ("file-info", String::new(), 400, "path"),
    ] {
        let (status, answer) = site.ask(&mount, what, &path);
        assert_eq!(status, expected, "{what} {path:?}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(word), "{what} {path:?}: {answer}");
    }
    let (status, _) = site.hub.request("GET", &format!("restore/{mount}/search?name="), None);
    assert_eq!(status, 400);
    let (status, _) = site.hub.request("GET", &format!("restore/{mount}/search"), None);
    assert_eq!(status, 400);
    for id in ["restore/none/files", "restore/none/volumes", "restore/none/download?path=/a/b"] {
        assert_eq!(site.hub.request("GET", id, None).0, 404, "{id}");
    }
    let none = json!({"backup_id": "backup-none"});
    assert_eq!(site.hub.request("POST", "restore/mount", Some(&none)).0, 404);
    let unknown = json!({"backup_id": site.backup, "write": true});
    assert_eq!(site.hub.request("POST", "restore/mount", Some(&unknown)).0, 422);
}

#[test]
fn viewers_see_mounts_and_only_operators_see_files() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let made = site.hub.post("tokens", &json!({"name": "viewer", "role": "viewer"}));
    let viewer = made["token"].as_str().unwrap();
    let path = format!("path={VOLUME}/etc");
    let wish = json!({"backup_id": site.backup});
    for (method, what, body, expected) in [
        ("GET", "mounts".to_owned(), None, 200),
        ("GET", "resources".to_owned(), None, 200),
        ("GET", "cleanup-status".to_owned(), None, 200),
        ("GET", format!("{mount}/volumes"), None, 200),
        ("GET", format!("{mount}/files?{path}"), None, 403),
        ("GET", format!("{mount}/file-info?{path}"), None, 403),
        ("GET", format!("{mount}/search?name=a&{path}"), None, 403),
        ("GET", format!("{mount}/download?{path}/hostname"), None, 403),
        ("GET", format!("{mount}/download-directory?{path}"), None, 403),
        ("POST", "mount".to_owned(), Some(&wish), 403),
        ("DELETE", mount.clone(), None, 403),
    ] {
        let address = format!("restore/{what}");
        let (status, answer) = site.hub.request_as(Some(viewer), method, &address, body);
        assert_eq!(status, expected, "{method} {what}: {answer}");
        assert_eq!(site.hub.request_as(None, method, &address, body).0, 401, "{method} {what}");
    }
    assert_eq!(site.hub.get("restore/mounts")["total"], 1);
}

/// Waits until so many requests use the mounts.
fn wait_for_requests(site: &Site, count: u64) {
    let since = Instant::now();
    loop {
        let told = site.hub.get("restore/resources");
        if told["requests_in_flight"] == count && told["downloads"] == count {
            return;
        }
        assert!(since.elapsed() < LIMIT, "{told}\n{}", site.hub.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_client_that_goes_away_frees_what_its_download_held() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let mount = site.mount();
    let authority = site.hub.api.trim_start_matches("http://").to_owned();
    for address in [
        address(&mount, "download", &in_volume("holes.img")),
        format!("{}&format=tar.gz", address(&mount, "download-directory", VOLUME)),
    ] {
        let mut stream = TcpStream::connect(&authority).unwrap();
        let request = format!(
            "GET /api/v1/{address} HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer {}\r\n\r\n",
            site.hub.token
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut start = [0; 1024];
        stream.read_exact(&mut start).unwrap();
        assert!(start.starts_with(b"HTTP/1.1 200 OK\r\n"));
        if address.contains("holes") {
            wait_for_requests(&site, 1);
        }
        drop(stream);
        wait_for_requests(&site, 0);
    }
}

/// Bytes of a download that no buffer on its way takes as a whole.
const LONG: usize = 256 << 20;

#[test]
fn a_download_that_takes_longer_than_the_idle_time_is_whole_and_the_mount_ends_after_it() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let sections = "[restore]\nmount_idle_seconds = 5\n";
    let site = Site::on(Hub::configured("reconnect_seconds = 60\n", sections));
    let mount = site.mount();
    let authority = site.hub.api.trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&authority).unwrap();
    let request = format!(
        "GET /api/v1/{} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\
         Range: bytes=0-{}\r\nAuthorization: Bearer {}\r\n\r\n",
        address(&mount, "download", &in_volume("holes.img")),
        LONG - 1,
        site.hub.token
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = vec![0; 1 << 20];
    stream.read_exact(&mut answer).unwrap();
    std::thread::sleep(Duration::from_secs(8));
    assert_eq!(site.hub.get("restore/mounts")["total"], 1, "{}", site.hub.log());
    let rest = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    let length = answer.len() + usize::try_from(rest).unwrap();
    let body = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4;
    assert!(answer.starts_with(b"HTTP/1.1 206 "));
    assert_eq!(length - body, LONG);
    let since = Instant::now();
    while site.hub.get("restore/mounts")["total"] != 0 {
        assert!(since.elapsed() < LIMIT, "{}", site.hub.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(site.hub.get("restore/cleanup-status")["cleaned"], 1);
    assert_eq!(site.ask(&mount, "files", "/").0, 404);
    site.hub.assert_tidy();
}

/// Where a file with the content `all` has these bytes, which begin a page.
fn place(all: &[u8], bytes: &[u8]) -> Option<u64> {
    let page = all.chunks(bytes.len()).position(|page| page == bytes)?;
    Some((page * bytes.len()) as u64)
}

#[test]
fn a_file_whose_end_cannot_be_read_does_not_look_whole() {
    if support::missing(&PROGRAMS) {
        return;
    }
    let site = Site::new();
    let path_of_image = image_of(&site.hub.backup(&site.backup), 0);
    let image = std::fs::File::options().write(true).open(&path_of_image).unwrap();
    let (stored, content) = (std::fs::read(&path_of_image).unwrap(), site.read("big.bin"));
    // Pieces of the disk are stored in the order in which they come to be written, not in that of the disk.
    // Not each of them begins a page of this file.
    let places = (1..BIG >> 20).filter_map(|mib| place(&stored, &content[mib << 20..][..4096]));
    image.set_len(places.max().unwrap()).unwrap();
    let mount = site.mount();
    let path = address(&mount, "download", &in_volume("big.bin"));
    let broken = site.raw("GET", &path, &[]);
    assert_eq!(broken.status, 200, "{}", String::from_utf8_lossy(&broken.body));
    assert!(!broken.whole && broken.body.len() < BIG, "{}", broken.body.len());
    assert!(broken.body == site.read("big.bin")[..broken.body.len()]);
    // Who goes on from there is told why that cannot be.
    let range = format!("bytes={}-", broken.body.len());
    let rest = site.raw("GET", &path, &[("range", &range)]);
    let reason: Value = serde_json::from_slice(&rest.body).unwrap();
    assert!(rest.status >= 400 && reason["error"].is_string(), "{} {reason}", rest.status);
}
