//! Random work on chains of three, judged by qemu-img: `check` finds nothing, the raw copy that
//! `convert` makes equals the model.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    unreachable_pub,
    missing_docs,
    dead_code
)]

mod support;

use std::path::Path;

use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions, ZeroMode, create};
use support::{Random, missing, qemu_img};

fn work(image: &Image, model: &mut [u8], random: &mut Random, operations: usize) {
    let size = image.size();
    for _ in 0..operations {
        let offset = random.below(size);
        let longest = [700, 20_000, 200_000][random.below(3) as usize];
        let length = (1 + random.below(longest)).min(size - offset);
        let range = offset as usize..(offset + length) as usize;
        match random.below(10) {
            0..=5 => {
                let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8 | 1).collect();
                image.write_at(&bytes, offset).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            6 => {
                image.write_zeroes(offset, length, ZeroMode::Unmap).unwrap();
                model[range].fill(0);
            }
            7 => {
                image.write_zeroes(offset, length, ZeroMode::KeepAllocated).unwrap();
                model[range].fill(0);
            }
            8 => {
                image.discard(offset, length).unwrap();
                // What a discard leaves is not promised: take over what is there.
                image.read_at(&mut model[range], offset).unwrap();
            }
            _ => image.flush().unwrap(),
        }
        let probe = random.below(size);
        let mut byte = [0];
        image.read_at(&mut byte, probe).unwrap();
        assert_eq!(byte[0], model[probe as usize], "byte {probe}");
    }
}

fn agrees_with_qemu(path: &Path, model: &[u8]) {
    let image = path.to_str().unwrap();
    qemu_img(&["check", image]);
    let report = qcow2::check(path, qcow2::Repair::None).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    let raw = format!("{image}.raw");
    qemu_img(&["convert", "-O", "raw", image, &raw]);
    assert!(std::fs::read(&raw).unwrap() == model, "qemu reads something else in {image}");
}

fn chain_of_three(seed: u64, cluster_sizes: [u32; 3], sizes: [u64; 3], refcount_bits: u32) {
    if missing("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let mut model: Vec<u8> = Vec::new();
    let mut below: Option<String> = None;
    for layer in 0..3 {
        let name = format!("{layer}.qcow2");
        let path = dir.path().join(&name);
        let mut options = CreateOptions::new(sizes[layer]).cluster_size(cluster_sizes[layer]);
        options.refcount_bits = refcount_bits;
        options.backing = below.take().map(|name| (name, BackingFormat::Qcow2));
        create(&path, &options).unwrap();
        model.resize(sizes[layer] as usize, 0);
        for _ in 0..3 {
            let image = Image::open(&path, &OpenOptions::new()).unwrap();
            work(&image, &mut model, &mut random, 60);
            image.close().unwrap();
            agrees_with_qemu(&path, &model);
        }
        below = Some(name);
    }
}

#[test]
fn qemu_agrees_with_small_clusters_and_growing_disks() {
    chain_of_three(1, [512; 3], [1_000_448, 1_500_160, 1_500_672], 16);
    chain_of_three(2, [4096; 3], [3_000_320, 3_333_120, 3_333_632], 16);
}

#[test]
fn qemu_agrees_with_mixed_clusters_and_a_shrinking_disk() {
    chain_of_three(3, [65536, 512, 4096], [2_000_384, 900_096, 1_800_192], 64);
    chain_of_three(4, [512, 65536, 1 << 21], [2_000_384, 3_900_416, 4_800_512], 1);
}

#[test]
fn qemu_agrees_with_the_default_geometry() {
    chain_of_three(5, [65536; 3], [10_000_384, 10_000_384, 10_000_384], 16);
}
