//! Volumes of machines as foreign tools make them: partitions, volume groups, and what is not read.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest::local::LocalTree;
use guest::tree::{Origin, Tree};
use guest::{FileType, Guest, Source, Status, Volume, source::RawDisk};
use sha2::{Digest, Sha256};
use support::{
    Item, Mounted, Truth, assert_same, blank, missing, no_root, noise, poke, run,
    truth_of_directory, truth_of_reader,
};

const MIB: u64 = 1 << 20;

fn open(images: &[&Path]) -> Guest {
    let disk = |(number, path): (u32, &&Path)| -> Arc<dyn Source> {
        Arc::new(RawDisk::new(File::open(path).unwrap(), number).unwrap())
    };
    Guest::open(&(0..).zip(images).map(disk).collect::<Vec<_>>())
}

/// Name, first sector and number of sectors of every volume.
fn places(guest: &Guest) -> Vec<(String, u64, u64)> {
    let place = |volume: &Volume| {
        let mut start = None;
        volume.source().trace(0, 1, &mut |range| start = Some(range.offset / 512));
        (volume.about.name.clone(), start.unwrap_or(0), volume.about.size / 512)
    };
    guest.volumes.iter().map(place).collect()
}

/// The same of the partitions by `sfdisk -d`, which are named by their numbers.
fn truth_by_sfdisk(image: &Path) -> Vec<(String, u64, u64)> {
    let dump = run("sfdisk", &[&"-d", &image]);
    let prefix = format!("{}", image.display());
    let mut found = Vec::new();
    for line in dump.lines().filter(|line| line.starts_with(&prefix)) {
        let (name, rest) = line.split_once(" : ").unwrap();
        let field = |name: &str| {
            let value = rest.split(',').find_map(|part| part.trim().strip_prefix(name)).unwrap();
            value.trim_start_matches('=').trim().split(' ').next().unwrap().to_owned()
        };
        if ["5", "f"].contains(&field("type").as_str()) {
            continue;
        }
        let parse = |text: String| text.parse::<u64>().unwrap();
        let name = format!("disk0-p{}", number(name));
        found.push((name, parse(field("start")), parse(field("size"))));
    }
    found
}

/// The digits at the end of a partition's name.
fn number(name: &str) -> &str {
    let name = name.trim();
    let digits = name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    &name[digits..]
}

fn sfdisk(image: &Path, script: &str) {
    let file = image.with_extension("script");
    fs::write(&file, script).unwrap();
    let shell = format!(
        "sfdisk -q --no-reread --no-tell-kernel '{}' < '{}'",
        image.display(),
        file.display()
    );
    run("sh", &[&"-c", &shell]);
}

fn refusal<'a>(guest: &'a Guest, name: &str) -> (&'a str, &'a str) {
    let volume = guest.volumes.iter().find(|volume| volume.about.name == name).unwrap();
    match &volume.about.status {
        Status::Refused(reason) => (&volume.about.kind, reason),
        status => panic!("{name}: {status:?}"),
    }
}

#[test]
fn partitions_of_a_gpt_are_where_sfdisk_says_and_its_copy_helps_out() {
    if missing(&["sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("gpt.img");
    blank(&image, 64 * MIB);
    sfdisk(
        &image,
        "label: gpt\nsize=4MiB, type=U\nsize=2MiB, type=21686148-6449-6E6F-744E-656564454649\n\
         start=16MiB, size=8MiB, type=L\nstart=30MiB, type=E6D6D379-F507-44C2-A23C-238F2A3DF928\n",
    );
    let truth = truth_by_sfdisk(&image);
    assert_eq!(truth.len(), 4);
    let guest = open(&[&image]);
    assert_eq!(places(&guest), truth);
    assert!(guest.notes.is_empty());
    let types: Vec<_> = guest.volumes.iter().map(|volume| volume.about.place.as_str()).collect();
    let names = ["EFI system", "BIOS boot", "Linux filesystem", "Linux LVM"];
    for (number, (found, name)) in types.iter().zip(names).enumerate() {
        assert_eq!(*found, format!("disk 0, partition {} ({name})", number + 1));
    }
    assert!(refusal(&guest, "disk0-p2").1.contains("holds no file system"));
    poke(&image, 512 + 60, b"damage");
    let guest = open(&[&image]);
    assert_eq!(places(&guest), truth);
    assert!(guest.notes[0].contains("copy at the end"));
    poke(&image, 64 * MIB - 512 + 60, b"damage");
    assert!(refusal(&open(&[&image]), "disk0").1.contains("checksum"));
}

#[test]
fn logical_partitions_are_where_sfdisk_says() {
    if missing(&["sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("dos.img");
    blank(&image, 64 * MIB);
    sfdisk(
        &image,
        "label: dos\nstart=1MiB, size=4MiB, type=83, bootable\nstart=8MiB, size=40MiB, type=5\n\
         start=50MiB, size=5MiB, type=7\n\nstart=9MiB, size=6MiB, type=83\n\
         start=16MiB, size=6MiB, type=82\nstart=30MiB, size=10MiB, type=8e\n",
    );
    let truth = truth_by_sfdisk(&image);
    assert!(truth.len() >= 4, "{truth:?}");
    assert_eq!(places(&open(&[&image])), truth);
}

#[test]
fn file_systems_on_whole_disks_are_not_taken_for_tables() {
    if missing(&["mkfs.vfat", "mkfs.ntfs", "mkfs.ext4", "mkfs.exfat"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, program, arguments) in [
        ("fat", "mkfs.vfat", &[][..]),
        ("ntfs", "mkfs.ntfs", &["-F", "-Q", "-q"]),
        ("ext", "mkfs.ext4", &["-q", "-F"]),
        ("exfat", "mkfs.exfat", &["-L", "x"]),
    ] {
        let image = dir.path().join(name);
        blank(&image, 16 * MIB);
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
        arguments.iter().for_each(|argument| all.push(argument));
        all.push(&image);
        run(program, &all);
        assert_eq!(places(&open(&[&image])), [("disk0".to_owned(), 0, 16 * MIB / 512)], "{name}");
    }
}

/// Loop devices over images, which end with it.
struct Loops(Vec<String>);

impl Loops {
    fn over(images: &[PathBuf]) -> Self {
        let mut loops = Self(Vec::new());
        for image in images {
            loops.0.push(run("losetup", &[&"--show", &"-f", image]).trim().to_owned());
        }
        loops
    }

    /// Runs a tool of LVM on them, without device-mapper.
    fn lvm(&self, arguments: &[&str]) -> String {
        let accepted: String = self.0.iter().map(|dev| format!("\"a|^{dev}$|\",")).collect();
        let config = format!(
            "devices{{ use_devicesfile=0 dir=\"/dev\" scan=[\"/dev\"] filter=[{accepted}\"r|.*|\"] \
             obtain_device_list_from_udev=0 external_device_info_source=\"none\" sysfs_scan=0 \
             md_component_detection=0 multipath_component_detection=0 }} \
             activation{{ udev_sync=0 udev_rules=0 monitoring=0 }} backup{{ backup=0 archive=0 }}"
        );
        let (program, rest) = arguments.split_first().unwrap();
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"--driverloaded", &"n", &"--config"];
        all.push(&config);
        rest.iter().for_each(|argument| all.push(argument));
        run(program, &all)
    }

    /// A group of physical volumes on all of them, with logical volumes by options of `lvcreate`.
    fn group(&self, name: &str, volumes: &[&[&str]]) {
        let devices: Vec<&str> = self.0.iter().map(String::as_str).collect();
        self.lvm(&[&["pvcreate", "-q", "-ff", "-y"], &devices[..]].concat());
        self.lvm(&[&["vgcreate", "-q", "-s", "1m", name], &devices[..]].concat());
        for options in volumes {
            let create = ["lvcreate", "-q", "-an", "-Zn", "-Wn", "-y", name];
            self.lvm(&[&create[..], options].concat());
        }
    }

    /// The segments of a group's volumes, as LVM tells them; the devices lie over `images`.
    fn segments(&self, group: &str, images: &[PathBuf]) -> Vec<Segment> {
        let plain = ["--units", "b", "--nosuffix", "--noheadings", "-o"];
        // Physical extents begin at 1 MiB, which is what is reckoned with below.
        let starts = self.lvm(&[&["pvs"], &plain[..], &["pe_start"]].concat());
        assert!(starts.split_whitespace().all(|start| start == "1048576"), "{starts}");
        let fields = "lv_name,seg_start,seg_size,seg_pe_ranges,stripe_size";
        let more = [fields, "--segments", "--separator", "|", group];
        let report = self.lvm(&[&["lvs"], &plain[..], &more].concat());
        let segment = |line: &str| {
            let part: Vec<&str> = line.split('|').collect();
            let size = part[2].parse().unwrap();
            let stripe = |range: &str| {
                let (device, extents) = range.rsplit_once(':').unwrap();
                let first: u64 = extents.split('-').next().unwrap().parse().unwrap();
                let disk = self.0.iter().position(|known| *known == device).unwrap();
                let file = File::options().write(true).open(&images[disk]).unwrap();
                (file, MIB + first * MIB)
            };
            Segment {
                volume: part[0].to_owned(),
                start: part[1].parse().unwrap(),
                size,
                chunk: part[4].parse().ok().filter(|chunk| *chunk > 0).unwrap_or(size),
                stripes: part[3].split_whitespace().map(stripe).collect(),
            }
        };
        report.lines().map(str::trim).filter(|line| !line.is_empty()).map(segment).collect()
    }
}

/// A segment of a logical volume.
struct Segment {
    volume: String,
    start: usize,
    size: usize,
    /// Bytes that one stripe takes before the next one's turn.
    chunk: usize,
    /// Images, and where the segment begins in each.
    stripes: Vec<(File, u64)>,
}

impl Segment {
    /// Fills it from its start on.
    fn write(&self, bytes: &[u8]) {
        for (index, bytes) in bytes.chunks(self.chunk).enumerate() {
            let (file, start) = &self.stripes[index % self.stripes.len()];
            let row = index / self.stripes.len() * self.chunk;
            file.write_all_at(bytes, start + row as u64).unwrap();
        }
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        for device in &self.0 {
            let _ = std::process::Command::new("losetup").args(["-d", device]).status();
        }
    }
}

#[test]
fn logical_volumes_over_several_disks_read_what_lies_where_lvs_says() {
    if missing(&["pvcreate", "vgcreate", "lvcreate", "lvs", "losetup"]) || no_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images: Vec<PathBuf> = (0..3).map(|n| dir.path().join(format!("pv{n}"))).collect();
    images.iter().for_each(|image| blank(image, 24 * MIB));
    let loops = Loops::over(&images);
    loops.group(
        "testvg",
        &[
            &["-n", "two", "-i2", "-I", "64k", "-l", "6"],
            &["-n", "three", "-i3", "-I", "8k", "-l", "9"],
            &["-n", "linear", "-l", "30"],
        ],
    );
    let mut expected = BTreeMap::new();
    for segment in loops.segments("testvg", &images) {
        let volume: &mut Vec<u8> = expected.entry(segment.volume.clone()).or_default();
        volume.resize(volume.len().max(segment.start + segment.size), 0);
        let bytes = noise((segment.start + segment.volume.len()) as u64, segment.size);
        volume[segment.start..segment.start + segment.size].copy_from_slice(&bytes);
        segment.write(&bytes);
    }
    drop(loops);
    let paths: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
    let guest = open(&paths);
    let names: Vec<_> = guest.volumes.iter().map(|volume| volume.about.name.as_str()).collect();
    assert_eq!(names, ["testvg-linear", "testvg-three", "testvg-two"]);
    assert!(guest.notes.is_empty(), "{:?}", guest.notes);
    for volume in &guest.volumes {
        let expected = &expected[volume.about.name.strip_prefix("testvg-").unwrap()];
        assert_eq!(volume.about.size, expected.len() as u64);
        for (offset, length) in [(0, expected.len()), (65_000, 3_000_000), (777, 70_000)] {
            let mut found = vec![0; length];
            volume.source().read_at(&mut found, offset as u64).unwrap();
            assert!(found == expected[offset..offset + length], "{}", volume.about.name);
        }
    }
    let guest = open(&paths[..2]);
    assert!(refusal(&guest, "testvg-three").1.contains("is missing"));
}

#[test]
fn what_foreign_tools_made_is_told_by_name() {
    if missing(&["cryptsetup", "mkswap", "mke2fs", "sfdisk"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str| {
        let path = dir.path().join(name);
        blank(&path, 32 * MIB);
        path
    };
    let key = dir.path().join("key");
    fs::write(&key, "secret").unwrap();
    for kind in ["luks1", "luks2"] {
        let path = image(kind);
        // What is left of a table from before counts for nothing.
        sfdisk(&path, "label: gpt\nsize=4MiB, type=U\n");
        poke(&path, 0, &[0; 512]);
        assert_eq!(open(&[&path]).volumes[0].about.name, "disk0-p1");
        run(
            "cryptsetup",
            &[
                &"-q",
                &"luksFormat",
                &"--type",
                &kind,
                &"--pbkdf",
                &"pbkdf2",
                &"--pbkdf-force-iterations",
                &"1000",
                &path,
                &key,
            ],
        );
        let guest = open(&[&path]);
        let (found, reason) = refusal(&guest, "disk0");
        assert_eq!((found, reason), (kind, &*format!("{kind}: it is encrypted")));
    }
    let swap = image("swap");
    run("mkswap", &[&swap]);
    assert_eq!(refusal(&open(&[&swap]), "disk0").0, "swap");
    let journal = image("journal");
    run("mke2fs", &[&"-q", &"-F", &"-O", &"journal_dev", &journal]);
    assert_eq!(refusal(&open(&[&journal]), "disk0").0, "ext-journal");
    assert!(refusal(&open(&[&image("empty")]), "disk0").1.contains("empty"));
}

/// A few files, of sizes that tell partitions, stripes and disks apart; what is in them.
fn tree(at: &Path) -> Truth {
    fs::create_dir_all(at.join("directory/below")).unwrap();
    fs::write(at.join("hello.txt"), "hello, world\n").unwrap();
    fs::write(at.join("directory/large"), noise(1, 3_333_333)).unwrap();
    fs::write(at.join("directory/below/a name that takes more entries"), noise(2, 70_000)).unwrap();
    fs::write(at.join("directory/empty"), "").unwrap();
    truth_of_directory(at, false)
}

/// A file system of `size` bytes with what is in `tree`.
fn filled(dir: &Path, kind: &str, size: u64, tree: &Path) -> Vec<u8> {
    let image = dir.join(kind);
    blank(&image, size);
    match kind {
        "ext4" => drop(run("mke2fs", &[&"-q", &"-F", &"-t", &"ext4", &"-d", &tree, &image])),
        "btrfs" => drop(run("mkfs.btrfs", &[&"-q", &"--rootdir", &tree, &image])),
        "ntfs" => {
            run("mkntfs", &[&"-F", &"-Q", &"-q", &image]);
            let at = dir.join("mount");
            fs::create_dir_all(&at).unwrap();
            run("ntfs-3g", &[&image, &at]);
            let mounted = Mounted { at };
            run("cp", &[&"-r", &tree.join("."), &mounted.at]);
        }
        fat => {
            run("mkfs.fat", &[&"-F", &fat.trim_start_matches("fat"), &"-s", &"1", &image]);
            let names = [tree.join("hello.txt"), tree.join("directory")];
            run("mcopy", &[&"-s", &"-i", &image, &names[0], &names[1], &"::"]);
        }
    }
    fs::read(&image).unwrap()
}

/// The volume `name` holds `kind`, and in it what is in `truth`; and every file lies on the disks where
/// its layout says.
#[track_caller]
fn assert_holds(guest: &Guest, images: &[&Path], (name, kind): (&str, &str), truth: &Truth) {
    let volume = guest.volumes.iter().find(|volume| volume.about.name == name).unwrap();
    assert_eq!((&*volume.about.kind, &volume.about.status), (kind, &Status::Clean), "{name}");
    let mut found = truth_of_reader(volume.file_system().unwrap(), false, 10);
    found.remove(&b"lost+found"[..]);
    assert_same(&found, truth);
    let tree = LocalTree::new(volume).unwrap();
    for (path, item) in truth.iter().filter(|(_, item)| item.file_type == FileType::File) {
        let node = tree.resolve(path, false).unwrap().node;
        let shown = String::from_utf8_lossy(path);
        let mut content = Vec::new();
        let (mut from, mut on_disks) = (Some(0), 0);
        while let Some(start) = from {
            let layout = tree.layout(node, start).unwrap();
            for piece in layout.pieces {
                assert_eq!(piece.offset, content.len() as u64, "{name}: {shown}");
                let end = content.len() + piece.length as usize;
                match piece.origin {
                    Origin::Hole => content.resize(end, 0),
                    // Where content is checked it is told where it lies all the same.
                    Origin::Plain(ranges) => {
                        for range in ranges {
                            let mut part = vec![0; range.length as usize];
                            let disk = File::open(images[range.disk as usize]).unwrap();
                            disk.read_exact_at(&mut part, range.offset).unwrap();
                            content.extend(part);
                        }
                        on_disks += piece.length;
                    }
                    Origin::Encoded(_) | Origin::Unknown => {
                        let mut part = vec![0; piece.length as usize];
                        let read = tree.read_at(node, &mut part, piece.offset).unwrap();
                        content.extend(&part[..read]);
                    }
                }
                assert_eq!(content.len(), end, "{name}: {shown}");
            }
            from = layout.next;
        }
        let content = Sha256::digest(&content).to_vec();
        assert_eq!(Item { content, ..item.clone() }, *item, "{name}: {shown}");
        assert!(item.size < 1 << 20 || on_disks == item.size, "{name}: {shown}");
    }
}

#[test]
fn files_in_partitions_of_a_gpt_are_read_and_traced_to_the_disk() {
    if missing(&["sfdisk", "mke2fs", "mkfs.btrfs", "mkfs.fat", "mcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, source) = (dir.path().join("disk"), dir.path().join("tree"));
    let truth = tree(&source);
    blank(&image, 240 * MIB);
    sfdisk(
        &image,
        "label: gpt\nstart=1MiB, size=40MiB, type=U\nstart=50MiB, size=20MiB, type=L\n\
         start=80MiB, size=130MiB, type=L\n",
    );
    for (kind, start, size) in [("fat32", 1, 40), ("ext4", 50, 20), ("btrfs", 80, 130)] {
        poke(&image, start * MIB, &filled(dir.path(), kind, size * MIB, &source));
    }
    let guest = open(&[&image]);
    for volume in [("disk0-p1", "fat32"), ("disk0-p2", "ext4"), ("disk0-p3", "btrfs")] {
        assert_holds(&guest, &[&image], volume, &truth);
    }
}

#[test]
fn files_in_logical_partitions_are_read_and_traced_to_the_disk() {
    if missing(&["sfdisk", "mkntfs", "ntfs-3g", "mkfs.fat", "mcopy"]) || no_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, source) = (dir.path().join("disk"), dir.path().join("tree"));
    let truth = tree(&source);
    blank(&image, 64 * MIB);
    sfdisk(
        &image,
        "label: dos\nstart=1MiB, size=1MiB, type=83\nstart=3MiB, size=60MiB, type=f\n\n\n\
         start=5MiB, size=20MiB, type=7\nstart=30MiB, size=16MiB, type=6\n",
    );
    for (kind, start, size) in [("ntfs", 5, 20), ("fat16", 30, 16)] {
        poke(&image, start * MIB, &filled(dir.path(), kind, size * MIB, &source));
    }
    let guest = open(&[&image]);
    for volume in [("disk0-p5", "ntfs"), ("disk0-p6", "fat16")] {
        assert_holds(&guest, &[&image], volume, &truth);
    }
}

#[test]
fn files_on_whole_disks_are_read_whatever_table_seems_to_be_there() {
    if missing(&["sfdisk", "mke2fs", "mkfs.fat", "mcopy"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("tree");
    let truth = tree(&source);
    let stale = dir.path().join("stale");
    blank(&stale, 20 * MIB);
    sfdisk(&stale, "label: gpt\nstart=1MiB, size=4MiB, type=U\n");
    let table = fs::read(&stale).unwrap();
    for kind in ["ext4", "fat16"] {
        let image = dir.path().join(format!("disk-{kind}"));
        let mut bytes = filled(dir.path(), kind, 20 * MIB, &source);
        if kind == "ext4" {
            // The copy of the table at the end is left over, where no file lies.
            let end = bytes.len() - 33 * 512;
            bytes[end..].copy_from_slice(&table[end..]);
        }
        fs::write(&image, bytes).unwrap();
        assert_holds(&open(&[&image]), &[&image], ("disk0", kind), &truth);
    }
}

#[test]
fn files_on_logical_volumes_are_read_and_traced_to_the_disks() {
    let tools = ["pvcreate", "vgcreate", "lvcreate", "lvs", "losetup", "mke2fs"];
    if missing(&tools) || no_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("tree");
    let truth = tree(&source);
    let images: Vec<PathBuf> = (0..2).map(|n| dir.path().join(format!("pv{n}"))).collect();
    images.iter().for_each(|image| blank(image, 24 * MIB));
    let loops = Loops::over(&images);
    loops.group(
        "filesvg",
        &[&["-n", "striped", "-i2", "-I", "16k", "-l", "36"], &["-n", "linear", "-l", "10"]],
    );
    let segments = loops.segments("filesvg", &images);
    assert_eq!(segments.iter().filter(|segment| segment.volume == "linear").count(), 2);
    for (name, size) in [("striped", 36), ("linear", 10)] {
        let bytes = filled(dir.path(), "ext4", size * MIB, &source);
        for segment in segments.iter().filter(|segment| segment.volume == name) {
            segment.write(&bytes[segment.start..segment.start + segment.size]);
        }
    }
    drop(loops);
    let paths: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
    let guest = open(&paths);
    assert!(guest.notes.is_empty(), "{:?}", guest.notes);
    for name in ["filesvg-striped", "filesvg-linear"] {
        assert_holds(&guest, &paths, (name, "ext4"), &truth);
    }
}
