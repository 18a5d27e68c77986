//! Independent implementations of the format read what this one writes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, dead_code, missing_docs)]
#![allow(unreachable_pub, clippy::print_stdout)]

#[path = "support/readers.rs"]
mod readers;
mod support;

use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions, ZeroMode, create};
use support::Random;

const SIZE: u64 = 3 << 20;

#[test]
fn imago_and_qcow2_rs_read_the_same_from_each_image_of_a_chain() {
    for (seed, cluster_size) in [(1, 4096), (2, 16384), (3, 65536), (4, 1 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random::new(seed);
        let mut below: Option<String> = None;
        for layer in 0..3 {
            let name = format!("{layer}.qcow2");
            let path = dir.path().join(&name);
            let mut options = CreateOptions::new(SIZE).cluster_size(cluster_size);
            if let Some(below) = below.take() {
                options = options.backing(below, BackingFormat::Qcow2);
            }
            create(&path, &options).unwrap();
            let image = Image::open(&path, &OpenOptions::new()).unwrap();
            for _ in 0..60 {
                let offset = random.below(SIZE);
                let length = (1 + random.below(100_000)).min(SIZE - offset);
                match random.below(10) {
                    0 => image.write_zeroes(offset, length, ZeroMode::Unmap).unwrap(),
                    1 => image.write_zeroes(offset, length, ZeroMode::KeepAllocated).unwrap(),
                    2 => image.discard(offset, length).unwrap(),
                    _ => {
                        let byte = 1 + random.below(255) as u8;
                        image.write_at(&vec![byte; length as usize], offset).unwrap();
                    }
                }
            }
            image.close().unwrap();
            readers::agree(&path);
            below = Some(name);
        }
    }
}
