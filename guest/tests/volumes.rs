//! Volumes of machines as foreign tools make them: partitions, volume groups, and what is not read.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guest::{Guest, Source, Status, Volume, source::RawDisk};
use support::{blank, missing, no_root, noise, poke, run};

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
    std::fs::write(&file, script).unwrap();
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
    let devices: Vec<&str> = loops.0.iter().map(String::as_str).collect();
    loops.lvm(&[&["pvcreate", "-q", "-ff", "-y"], &devices[..]].concat());
    loops.lvm(&[&["vgcreate", "-q", "-s", "1m", "testvg"], &devices[..]].concat());
    let create = ["lvcreate", "-q", "-an", "-Zn", "-Wn", "-y"];
    for more in [
        &["-n", "two", "-i2", "-I", "64k", "-l", "6", "testvg"][..],
        &["-n", "three", "-i3", "-I", "8k", "-l", "9", "testvg"],
        &["-n", "linear", "-l", "30", "testvg"],
    ] {
        loops.lvm(&[&create[..], more].concat());
    }
    let fields = "lv_name,seg_start,seg_size,seg_pe_ranges,stripe_size";
    let report = loops.lvm(&[
        "lvs",
        "--segments",
        "--units",
        "b",
        "--nosuffix",
        "--noheadings",
        "--separator",
        "|",
        "-o",
        fields,
        "testvg",
    ]);
    let files: Vec<File> =
        images.iter().map(|path| File::options().write(true).open(path).unwrap()).collect();
    let mut expected: std::collections::BTreeMap<String, Vec<u8>> = Default::default();
    // Physical extents begin at 1 MiB, which is what `pvs -o pe_start` tells as well.
    let starts =
        loops.lvm(&["pvs", "--units", "b", "--nosuffix", "--noheadings", "-o", "pe_start"]);
    assert!(starts.split_whitespace().all(|start| start == "1048576"), "{starts}");
    for line in report.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let part: Vec<&str> = line.split('|').collect();
        let (start, size): (usize, usize) = (part[1].parse().unwrap(), part[2].parse().unwrap());
        let volume = expected.entry(part[0].to_owned()).or_default();
        volume.resize(volume.len().max(start + size), 0);
        let bytes = noise(start as u64 + part[0].len() as u64, size);
        volume[start..start + size].copy_from_slice(&bytes);
        let ranges: Vec<(usize, u64)> = part[3]
            .split_whitespace()
            .map(|range| {
                let (device, extents) = range.rsplit_once(':').unwrap();
                let first: u64 = extents.split('-').next().unwrap().parse().unwrap();
                (devices.iter().position(|known| *known == device).unwrap(), MIB + first * MIB)
            })
            .collect();
        let chunk = part[4].parse().ok().filter(|chunk| *chunk > 0).unwrap_or(size);
        for (index, bytes) in bytes.chunks(chunk).enumerate() {
            let (file, at) = ranges[index % ranges.len()];
            let row = (index / ranges.len() * chunk) as u64;
            files[file].write_all_at(bytes, at + row).unwrap();
        }
    }
    drop(loops);
    files.iter().for_each(|file| file.sync_all().unwrap());
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
    std::fs::write(&key, "secret").unwrap();
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
