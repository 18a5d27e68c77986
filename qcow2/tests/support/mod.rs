//! Shared by the tests that ask qemu's tools.

pub mod damage;

use std::path::Path;
use std::process::{Command, Output};

/// A small generator: the tests need variety, not quality.
pub struct Random(u64);

impl Random {
    /// Equal seeds give equal sequences.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Runs a program whatever its exit code.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// Runs qemu-img, which must succeed; its output.
pub fn qemu_img(arguments: &[&str]) -> String {
    let output = run("qemu-img", arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}{errors}");
    text
}

/// Whether a program is missing; says so loudly, and fails where nothing may be missing.
pub fn missing(program: &str) -> bool {
    let missing = Command::new(program).arg("--version").output().is_err();
    assert!(!missing || std::env::var_os("CI").is_none(), "{program} is missing");
    if missing {
        println!("SKIPPED: {program} is missing (package qemu-utils)");
    }
    missing
}

/// A path as a program's argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
