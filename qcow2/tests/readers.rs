//! Independent implementations of the format read what this one writes: imago and qcow2-rs.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, dead_code, missing_docs)]
#![allow(unreachable_pub, clippy::print_stdout)]

mod support;

use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions, ZeroMode, create};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_alloc_dev_sync;
use support::Random;

const SIZE: u64 = 3 << 20;

/// A chain of three images with writes, zeroes and discards in each; the last and its content.
fn chain(dir: &Path, cluster_size: u32, seed: u64) -> (PathBuf, Vec<u8>) {
    let mut random = Random::new(seed);
    let mut below: Option<String> = None;
    for layer in 0..3 {
        let name = format!("{layer}.qcow2");
        let path = dir.join(&name);
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
        below = Some(name);
    }
    let path = dir.join("2.qcow2");
    let image = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
    let mut content = vec![0; SIZE as usize];
    image.read_at(&mut content, 0).unwrap();
    (path, content)
}

/// qcow2-rs looks for backing files in the current directory: they are opened here.
fn open_with_qcow2_rs(path: &Path) -> Qcow2Dev<Qcow2IoSync> {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let io = Qcow2IoSync::new(path, true, false);
    let (mut dev, backing) = qcow2_alloc_dev_sync(path, io, &params).unwrap();
    if let Some(name) = backing {
        dev.set_backing_dev(Box::new(open_with_qcow2_rs(&path.parent().unwrap().join(name))));
    }
    dev
}

#[tokio::test]
async fn imago_reads_the_same_from_a_chain() {
    for (seed, cluster_size) in [(1, 4096), (2, 16384), (3, 65536), (4, 1 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        let (path, content) = chain(dir.path(), cluster_size, seed);
        let image = Qcow2::<imago::file::File>::builder_path(&path)
            .open(PermissiveImplicitOpenGate::default())
            .await
            .unwrap();
        let image = FormatAccess::new(image);
        assert_eq!(image.size(), SIZE);
        let mut back = vec![0xee; SIZE as usize];
        image.read(&mut back[..], 0).await.unwrap();
        assert!(back == content, "clusters of {cluster_size}");
    }
}

#[tokio::test]
async fn qcow2_rs_reads_the_same_from_a_chain() {
    for (seed, cluster_size) in [(5, 4096), (6, 16384), (7, 65536), (8, 1 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        let (path, content) = chain(dir.path(), cluster_size, seed);
        let image = open_with_qcow2_rs(&path);
        image.qcow2_prep_io().await.unwrap();
        assert_eq!(image.info.virtual_size(), SIZE);
        let mut back = Qcow2IoBuf::<u8>::new(SIZE as usize);
        let read = image.read_at(&mut back, 0).await.unwrap();
        assert_eq!(read as u64, SIZE);
        assert!(back[..] == content[..], "clusters of {cluster_size}");
    }
}
