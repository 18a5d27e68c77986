//! Archives as other programs read them.

use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use guest::tree::{Layout, Listed, Listing, Resolved};
use guest::{Cursor, Result as GuestResult};

use super::super::tree::{Fake, Made, dir, file, link, other, zeroes};
use super::*;

/// What a program prints; it must end well.
fn run(program: &str, args: &[&str], at: &Path) -> String {
    let output = Command::new(program).args(args).current_dir(at).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}{errors}");
    text
}

fn order<'o>(parts: &'o [Part<'o>], limits: &Limits) -> Order<'o> {
    Order { parts, missing: &[], limits: *limits, alive: &|| true }
}

fn pack(format: Format, tree: &dyn Tree, limits: &Limits, to: &Path) -> Report {
    let part = Part { name: b"top".to_vec(), tree, node: Node(0) };
    let mut out = io::BufWriter::new(std::fs::File::create(to).unwrap());
    let parts = [part];
    let order = order(&parts, limits);
    let report = write(format, &order, to.parent().unwrap(), &mut out).unwrap();
    out.flush().unwrap();
    report
}

/// Packs a tree and unpacks it with a foreign program; gives the directory with `top` in it.
fn unpacked(format: Format, tree: &dyn Tree, limits: &Limits) -> (tempfile::TempDir, Report) {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("archive");
    let report = pack(format, tree, limits, &archive);
    match format {
        Format::TarGz => run("tar", &["-xpzf", "archive", "--no-same-owner"], dir.path()),
        Format::Zip => run("unzip", &["-q", "archive"], dir.path()),
    };
    std::fs::remove_file(archive).unwrap();
    (dir, report)
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn ordinary() -> Vec<Made> {
    let mut private = file("private", "secret");
    private.mode = 0o4750;
    vec![
        dir("etc", vec![file("hostname", "guest\n"), link("name", "../etc/hostname"), private]),
        dir("empty", vec![]),
        file("noise", noise(3_000_000)),
        zeroes("holey", 70 << 20, true),
        file("grün ☃", "x"),
        dir("d".repeat(90), vec![file("f".repeat(200), "long")]),
        file("nothing", ""),
    ]
}

#[test]
fn foreign_programs_unpack_what_went_in() {
    for format in [Format::TarGz, Format::Zip] {
        let (dir, report) = unpacked(format, &Fake::new(ordinary()), &Limits::default());
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.entries, 12);
        let top = dir.path().join("top");
        assert_eq!(std::fs::read(top.join("noise")).unwrap(), noise(3_000_000));
        let holey = std::fs::read(top.join("holey")).unwrap();
        assert!(holey.len() == 70 << 20 && holey.iter().all(|b| *b == 0));
        assert_eq!(std::fs::read(top.join("etc/name")).unwrap(), b"guest\n");
        assert_eq!(std::fs::read(top.join("grün ☃")).unwrap(), b"x");
        assert_eq!(std::fs::read(top.join("nothing")).unwrap(), b"");
        assert!(top.join("empty").is_dir());
        let long = top.join("d".repeat(90)).join("f".repeat(200));
        assert_eq!(std::fs::read(long).unwrap(), b"long");
        let stat = run("stat", &["-c", "%a %Y", "top/etc/private"], dir.path());
        assert_eq!(stat, "750 1700000000\n");
        if format == Format::TarGz {
            let stat = run("stat", &["-c", "%y", "top/etc/private"], dir.path());
            assert!(stat.contains(".123456789"), "{stat}");
        }
    }
}

#[test]
fn python_reads_them_too() {
    let dir = tempfile::tempdir().unwrap();
    pack(Format::Zip, &Fake::new(ordinary()), &Limits::default(), &dir.path().join("a.zip"));
    pack(Format::TarGz, &Fake::new(ordinary()), &Limits::default(), &dir.path().join("a.tgz"));
    let script = "
import tarfile, zipfile
z = zipfile.ZipFile('a.zip')
assert z.testzip() is None
t = tarfile.open('a.tgz')
names = {m.name + ('/' if m.isdir() else '') for m in t}
assert names == set(z.namelist()), names ^ set(z.namelist())
m = t.getmember('top/etc/private')
assert (m.uid, m.gid, m.mode) == (1000, 100, 0o750), m
assert t.extractfile('top/noise').read() == z.read('top/noise')
";
    run("python3", &["-c", script], dir.path());
}

#[test]
fn hostile_trees_stay_where_they_are_unpacked() {
    let tree = || {
        Fake::new(vec![
            link("passwd", "/etc/passwd"),
            dir("a", vec![link("up", "../.."), link("trick", "b/../../.."), link("fine", "../x")]),
            file("../escape", "x"),
            file("C:\\x", "x"),
            file("nul", "x"),
            file("a:b", "1"),
            file("a%3Ab", "2"),
            dir("dot.", vec![file("in", "3")]),
            file(b"\xff\n", "4"),
            other("null", FileType::CharDevice),
            other("pipe", FileType::Fifo),
            other("secret", FileType::Opaque),
            file("x", "x"),
        ])
    };
    let (dir, report) = unpacked(Format::Zip, &tree(), &Limits::default());
    let listing = run("find", &["top", "-not", "-type", "d"], dir.path());
    let mut names: Vec<_> = listing.lines().collect();
    names.sort_unstable();
    let wanted = [
        "top/%6Eul",
        "top/%FF%0A",
        "top/C%3A%5Cx",
        "top/a%3Ab",
        "top/a%3Ab%~2",
        "top/a/fine",
        "top/dot%2E/in",
        "top/x",
    ];
    assert_eq!(names, wanted);
    assert_eq!(std::fs::read(dir.path().join("top/a%3Ab%~2")).unwrap(), b"1");
    let text = std::fs::read_to_string(dir.path().join(ERRORS)).unwrap();
    for line in [
        "SKIPPED: top/passwd: a link out of what is archived, to /etc/passwd",
        "SKIPPED: top/a/trick: ",
        "SKIPPED: top/null: a character device",
        "SKIPPED: top/secret: encrypted",
        "RENAMED: top/a:b: a%3Ab%~2",
        "RENAMED: top/\\xff\\n: %FF%0A",
        "INCOMPLETE: top: a name that is none: \"../escape\"",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} is not in {text}");
    }
    assert!(!report.is_clean());

    let (dir, report) = unpacked(Format::TarGz, &tree(), &Limits::default());
    assert!(report.lines.iter().all(|l| !l.starts_with("RENAMED")), "{report:?}");
    use std::os::unix::ffi::OsStrExt as _;
    let odd = dir.path().join("top").join(std::ffi::OsStr::from_bytes(b"\xff\n"));
    assert_eq!(std::fs::read(odd).unwrap(), b"4");
    assert!(!dir.path().join("top/passwd").is_symlink() && !dir.path().join("top/null").exists());
    assert!(dir.path().join("top/a/fine").is_symlink());
}

#[test]
fn names_of_any_bytes_and_any_length_are_kept_in_tar() {
    let name = [b"\xe9".repeat(120), b"end".to_vec()].concat();
    let (dir, report) =
        unpacked(Format::TarGz, &Fake::new(vec![file(&name, "x")]), &Limits::default());
    assert!(report.is_clean());
    use std::os::unix::ffi::OsStrExt as _;
    assert!(dir.path().join("top").join(std::ffi::OsStr::from_bytes(&name)).exists());
}

#[test]
fn damage_leaves_an_archive_that_is_well_formed_and_says_so() {
    for format in [Format::TarGz, Format::Zip] {
        let mut tree = Fake::new(vec![
            file("half", noise(3 << 20)),
            file("none", "nothing of it"),
            dir("bad", vec![file("lost", "")]),
            file("good", "good"),
        ]);
        let (half, none, bad) = (tree.find("half"), tree.find("none"), tree.find("bad"));
        tree.fail_read(half, 2 << 20);
        tree.fail_read(none, 0);
        tree.fail_list(bad);
        let (dir, report) = unpacked(format, &tree, &Limits::default());
        let half = std::fs::read(dir.path().join("top/half")).unwrap();
        assert!(half[..2 << 20] == noise(2 << 20));
        assert!(half[2 << 20..].iter().all(|b| *b == 0));
        assert_eq!(half.len(), if format == Format::Zip { 2 << 20 } else { 3 << 20 });
        assert!(!dir.path().join("top/none").exists());
        assert_eq!(std::fs::read(dir.path().join("top/good")).unwrap(), b"good");
        let text = std::fs::read_to_string(dir.path().join(ERRORS)).unwrap();
        for word in ["DAMAGED: top/half: ", "UNREADABLE: top/none: ", "INCOMPLETE: top/bad: "] {
            assert!(text.contains(word), "{text}");
        }
        assert_eq!(report.lines.len(), 3);
    }
}

#[test]
fn bounds_end_an_archive_in_order() {
    let tree = Fake::new(vec![
        file("a", [0; 100]),
        zeroes("bomb", 1 << 60, true),
        dir("deep", vec![dir("er", vec![file("x", "")])]),
        file("b", "b"),
        file("c", "c"),
    ]);
    let limits = Limits { entries: 6, bytes: 1000, depth: 2 };
    let (dir, report) = unpacked(Format::Zip, &tree, &limits);
    let text = report.text();
    assert!(text.contains("CUT: top/bomb: "), "{text}");
    assert!(text.contains("INCOMPLETE: top/deep/er: directories deeper than 2"), "{text}");
    assert!(dir.path().join("top/b").exists() && dir.path().join("top/c").exists());
    let (dir, report) = unpacked(Format::TarGz, &tree, &Limits { entries: 3, ..limits });
    assert!(report.text().contains("CUT: top: there are more names than allowed"));
    assert!(!dir.path().join("top/c").exists());
}

#[test]
fn one_file_and_several_parts_have_names_of_their_own() {
    let tree = Fake::new(vec![file("f", "f")]);
    let part = |name: &str, node| Part { name: name.as_bytes().to_vec(), tree: &tree, node };
    let f = tree.find("f");
    let parts =
        [part("..", f), part("vol", Node(0)), part("vol", f), part("C:", f), part(ERRORS, f)];
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = Vec::new();
    let limits = Limits { bytes: 4, ..Limits::default() };
    write(Format::Zip, &order(&parts, &limits), dir.path(), &mut bytes).unwrap();
    std::fs::write(dir.path().join("a.zip"), bytes).unwrap();
    let names = run("unzip", &["-Z1", "a.zip"], dir.path());
    let names: Vec<_> = names.lines().collect();
    let last = format!("{ERRORS}-2");
    assert_eq!(names, [".%2E", "vol/", "vol/f", "vol-2", "C%3A", last.as_str()]);
}

/// Takes so many bytes and then fails, or panics.
struct Cut {
    taken: Vec<u8>,
    most: usize,
    panics: bool,
}

impl Write for Cut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.taken.len() >= self.most {
            assert!(!self.panics, "the writer panics");
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.taken.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_archive_that_was_broken_off_does_not_look_whole() {
    let tree = Fake::new(vec![file("noise", noise(8 << 20))]);
    for (format, panics) in
        [(Format::TarGz, false), (Format::Zip, false), (Format::TarGz, true), (Format::Zip, true)]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut cut = Cut { taken: Vec::new(), most: 1 << 20, panics };
        let part = Part { name: b"top".to_vec(), tree: &tree, node: Node(0) };
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let parts = [part];
            write(format, &order(&parts, &Limits::default()), dir.path(), &mut cut)
        }));
        assert!(!matches!(done, Ok(Ok(_))));
        let archive = dir.path().join("archive");
        std::fs::write(&archive, &cut.taken).unwrap();
        let (program, args) = match format {
            Format::TarGz => ("gzip", ["-t", "-c"]),
            Format::Zip => ("unzip", ["-t", "-q"]),
        };
        let mut command = Command::new(program);
        command.args(args).stdin(std::fs::File::open(&archive).unwrap());
        if format == Format::Zip {
            command.arg(&archive);
        }
        assert!(!command.output().unwrap().status.success());
    }
}

/// A thousand directories of a thousand files that are made as they are asked for.
struct Million {
    sizes: Fake,
}

impl Tree for Million {
    fn root(&self) -> GuestResult<Node> {
        Ok(Node(0))
    }
    fn stat(&self, node: Node) -> GuestResult<guest::Attributes> {
        self.sizes.stat(Node(u64::from(node.0 > 1000)))
    }
    fn list(&self, directory: Node, cursor: Cursor, limit: usize) -> GuestResult<Listing> {
        let first = if directory.0 == 0 { 1 } else { directory.0 * 1001 };
        let end = (cursor.0 + limit as u64).min(1000);
        let entry = |n: u64| {
            let node = Node(first + n);
            let name = format!("a name of usual length {n:04}").into_bytes();
            Listed { name, node, attributes: self.stat(node), target: None }
        };
        let entries = (cursor.0..end).map(entry).collect();
        Ok(Listing { entries, next: (end < 1000).then_some(Cursor(end)) })
    }
    fn lookup(&self, _: Node, _: &[u8]) -> GuestResult<Option<Listed>> {
        Ok(None)
    }
    fn resolve(&self, _: &[u8], _: bool) -> GuestResult<Resolved> {
        Err(Error::not_found("no paths here"))
    }
    fn read_at(&self, _: Node, buf: &mut [u8], offset: u64) -> GuestResult<usize> {
        self.sizes.read_at(Node(1), buf, offset)
    }
    fn read_link(&self, _: Node) -> GuestResult<Vec<u8>> {
        Err(Error::not_found("no links here"))
    }
    fn xattrs(&self, _: Node) -> GuestResult<Vec<(Vec<u8>, Vec<u8>)>> {
        Ok(Vec::new())
    }
    fn layout(&self, _: Node, _: u64) -> GuestResult<Layout> {
        Ok(Layout::default())
    }
}

fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Tells how much it took, and the largest memory seen meanwhile.
struct Watched {
    bytes: u64,
    most: u64,
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.bytes >> 20) != (self.bytes + bytes.len() as u64) >> 20 {
            self.most = self.most.max(resident());
        }
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_million_entries_take_no_memory() {
    // Alone in a process: others' memory must not count.
    const ALONE: &str = "SENDENSE_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = std::thread::current().name().unwrap().to_owned();
        let mut command = Command::new(std::env::current_exe().unwrap());
        assert!(command.args(["--exact", &name]).env(ALONE, "1").status().unwrap().success());
        return;
    }
    let tree = Million { sizes: Fake::new(vec![file("f", "f")]) };
    for (format, most) in [(Format::Zip, 1_001_000), (Format::TarGz, 100_000)] {
        let dir = tempfile::tempdir().unwrap();
        let before = resident();
        let mut out = Watched { bytes: 0, most: before };
        let part = Part { name: b"top".to_vec(), tree: &tree, node: Node(0) };
        let limits = Limits { entries: most, ..Limits::default() };
        let parts = [part];
        let report = write(format, &order(&parts, &limits), dir.path(), &mut out).unwrap();
        assert_eq!(report.entries, most + 1);
        assert!(out.most - before < 32 << 20, "{} bytes more", out.most - before);
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}

#[test]
fn more_entries_than_65535_are_zip64() {
    let dir = tempfile::tempdir().unwrap();
    let tree = Million { sizes: Fake::new(vec![file("f", "")]) };
    let limits = Limits { entries: 70_000, ..Limits::default() };
    let report = pack(Format::Zip, &tree, &limits, &dir.path().join("a.zip"));
    let script = "import zipfile; print(len(zipfile.ZipFile('a.zip').namelist()))";
    let count = run("python3", &["-c", script], dir.path());
    // One more is the report.
    assert_eq!(count.trim(), (report.entries + 1).to_string());
    assert!(run("unzip", &["-Z", "-h", "a.zip"], dir.path()).contains("70002"));
}

#[test]
fn files_of_more_than_4_gib_are_zip64() {
    let dir = tempfile::tempdir().unwrap();
    let size = (4 << 30) + 12345;
    let tree = Fake::new(vec![zeroes("large", size, true), file("after", "after")]);
    let report = pack(Format::Zip, &tree, &Limits::default(), &dir.path().join("a.zip"));
    assert!(report.is_clean());
    let listing = run("unzip", &["-Zl", "a.zip"], dir.path());
    assert!(listing.contains(&size.to_string()), "{listing}");
    let script = "import zipfile; z = zipfile.ZipFile('a.zip'); i = z.getinfo('top/large')
assert i.file_size == (4 << 30) + 12345 and z.read('top/after') == b'after'";
    run("python3", &["-c", script], dir.path());
    let after = run("unzip", &["-p", "a.zip", "top/after"], dir.path());
    assert_eq!(after, "after");
}

#[test]
fn zip64_entries_unpack_whole() {
    let dir = tempfile::tempdir().unwrap();
    let tree = Fake::new(vec![file("noise", noise(200_000)), zeroes("holey", 5 << 20, true)]);
    let mut out = std::fs::File::create(dir.path().join("a.zip")).unwrap();
    let mut zip = zip::Zip::new(&mut out, dir.path()).unwrap();
    zip.set_large(100);
    let part = Part { name: b"top".to_vec(), tree: &tree, node: Node(0) };
    let parts = [part];
    fill(&mut zip, Format::Zip, &order(&parts, &Limits::default())).unwrap();
    run("unzip", &["-q", "a.zip"], dir.path());
    assert!(std::fs::read(dir.path().join("top/noise")).unwrap() == noise(200_000));
    let script = "import zipfile; assert zipfile.ZipFile('a.zip').testzip() is None";
    run("python3", &["-c", script], dir.path());
}

#[test]
fn links_do_not_stand_where_something_else_goes() {
    let tree = Fake::new(vec![
        link("A", "b"),
        dir("a", vec![link("up", "../b")]),
        dir("b", vec![file("x", "x"), file("x", "again"), link("c", "x"), link("c", "y")]),
        dir("B", vec![link("up", "../b"), file("y", "y")]),
        link("readme", "b/x"),
        dir("c", vec![]),
        dir("c", vec![file("lost", "")]),
    ]);
    for format in [Format::TarGz, Format::Zip] {
        let (dir, report) = unpacked(format, &tree, &Limits::default());
        let listing = run("find", &["top", "-not", "-type", "d"], dir.path());
        let mut names: Vec<_> = listing.lines().collect();
        names.sort_unstable();
        assert_eq!(names, ["top/B/y", "top/a/up", "top/b/c", "top/b/x", "top/readme"]);
        assert_eq!(std::fs::read(dir.path().join("top/b/x")).unwrap(), b"x");
        for line in [
            "SKIPPED: top/A: a link that shares its name",
            "SKIPPED: top/b/x: a name that the directory has twice",
            "SKIPPED: top/b/c: a name that the directory has twice",
            "SKIPPED: top/B/up: a link in a directory that some systems",
            "SKIPPED: top/c: a name that the directory has twice",
        ] {
            assert!(report.lines.iter().any(|l| l.starts_with(line)), "{line}: {report:?}");
        }
        assert_eq!(report.lines.len(), 5);
    }
}

#[test]
fn a_client_that_is_gone_ends_it_though_nothing_is_written() {
    let pipes = (0..1000).map(|n| other(format!("{n}"), FileType::Fifo)).collect();
    let tree = Fake::new(pipes);
    let parts = [Part { name: b"top".to_vec(), tree: &tree, node: Node(0) }];
    let asked = std::cell::Cell::new(0);
    let alive = || {
        asked.set(asked.get() + 1);
        asked.get() < 10
    };
    let order = Order { alive: &alive, ..order(&parts, &Limits::default()) };
    let dir = tempfile::tempdir().unwrap();
    let error = write(Format::Zip, &order, dir.path(), &mut Vec::new()).unwrap_err();
    assert_eq!((error.kind(), asked.get()), (io::ErrorKind::BrokenPipe, 10));
}

#[test]
fn a_layout_in_crumbs_is_given_up() {
    let mut tree = Fake::new(vec![zeroes("f", 3 << 20, false)]);
    tree.crumbs = true;
    let (dir, report) = unpacked(Format::TarGz, &tree, &Limits::default());
    assert!(report.is_clean());
    assert_eq!(std::fs::metadata(dir.path().join("top/f")).unwrap().len(), 3 << 20);
    assert_eq!(tree.layouts.into_inner(), 4096);
}

#[test]
fn a_list_of_entries_that_is_too_long_ends_an_archive_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = vec![link("link", "0")];
    tree.extend((0..100).map(|n| file(format!("{n}"), "x")));
    let tree = Fake::new(tree);
    let mut out = std::fs::File::create(dir.path().join("a.zip")).unwrap();
    let mut zip = zip::Zip::new(&mut out, dir.path()).unwrap();
    zip.set_most((256 << 10) + 1000);
    let part = |name: &str| Part { name: name.into(), tree: &tree, node: Node(0) };
    let parts = [part("top"), part("second")];
    let missing = [("disk0".to_owned(), "damaged".to_owned())];
    let order = Order { missing: &missing, ..order(&parts, &Limits::default()) };
    let report = fill(&mut zip, Format::Zip, &order).unwrap();
    assert!((5..50).contains(&report.entries), "{report:?}");
    assert_eq!(report.lines[0], "UNREADABLE: disk0: damaged");
    assert!(report.lines[1].starts_with("CUT: top/"), "{report:?}");
    assert_eq!(report.lines.len(), 2);
    run("unzip", &["-q", "a.zip"], dir.path());
    assert!(dir.path().join(ERRORS).exists() && !dir.path().join("second").exists());
}
