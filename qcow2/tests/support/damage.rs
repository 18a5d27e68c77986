//! Images made by qemu, and damage done to them.

use std::path::{Path, PathBuf};

use super::{qemu_img, run, text};

/// Numbers that qemu-img check tells; what it leaves out is 0.
pub fn qemu_numbers<const N: usize>(path: &Path, keys: [&str; N]) -> [u64; N] {
    let output = run("qemu-img", &["check", "--output=json", text(path)]);
    let json = String::from_utf8_lossy(&output.stdout).into_owned();
    keys.map(|key| {
        let Some(at) = json.find(&format!("\"{key}\":")) else {
            return 0;
        };
        let digits: String = json[at..]
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().unwrap()
    })
}

/// What qemu-img check says: (corruptions, leaks).
pub fn qemu_counts(path: &Path) -> (u64, u64) {
    let [corruptions, leaks] = qemu_numbers(path, ["corruptions", "leaks"]);
    (corruptions, leaks)
}

pub fn make(dir: &Path, name: &str, options: &str) -> PathBuf {
    let path = dir.join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "8M"]);
    for (offset, pattern) in [("0", "1"), ("3M", "2"), ("5000k", "3")] {
        let write = format!("write -P {pattern} {offset} 200k");
        assert!(run("qemu-io", &["-c", &write, text(&path)]).status.success());
    }
    path
}

pub fn be64(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// Offsets of the first refcount block, of the L1 table, and of the first L2 table.
pub fn tables(bytes: &[u8]) -> (usize, usize, usize) {
    let l1 = be64(bytes, 40);
    (be64(bytes, be64(bytes, 48)), l1, be64(bytes, l1) & 0x00ff_ffff_ffff_fe00)
}

pub fn damaged(dir: &Path, name: &str, damage: impl Fn(&mut Vec<u8>)) -> PathBuf {
    let path = make(dir, name, "cluster_size=4k");
    let mut bytes = std::fs::read(&path).unwrap();
    damage(&mut bytes);
    std::fs::write(&path, bytes).unwrap();
    path
}
