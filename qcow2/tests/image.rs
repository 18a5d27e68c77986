//! The engine through its public interface, against a plain byte vector.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use std::path::Path;
use std::sync::Arc;

use qcow2::storage::{MemStorage, Storage};
use qcow2::{
    BackingFormat, CreateOptions, ErrorKind, FileGate, Image, MappingKind, OpenOptions, ZeroMode,
    create, create_in,
};

fn memory(options: &CreateOptions) -> (Arc<MemStorage>, Image) {
    let storage = Arc::new(MemStorage::default());
    create_in(&*storage, options).unwrap();
    let image = reopen(&storage);
    (storage, image)
}

fn reopen(storage: &Arc<MemStorage>) -> Image {
    let gate = FileGate { lock: false };
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    Image::open_storage(storage, Path::new("memory"), &gate, &OpenOptions::new()).unwrap()
}

fn whole(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_new_image_reads_as_zeroes() {
    let (_, image) = memory(&CreateOptions::new(1_000_448));
    assert_eq!(whole(&image), vec![0; 1_000_448]);
}

#[test]
fn a_new_disk_ends_with_a_whole_sector_so_that_qemu_sees_all_of_it() {
    let (_, image) = memory(&CreateOptions::new(1_000_001));
    assert_eq!(image.size(), 1_000_448);
}

#[test]
fn unaligned_writes_read_back_before_and_after_reopening() {
    let (storage, image) = memory(&CreateOptions::new(300_032).cluster_size(4096));
    let mut model = vec![0; 300_032];
    for (i, (offset, length)) in
        [(0, 1), (4095, 2), (100, 9000), (300_031, 1), (8192, 4096), (12_000, 100_000)]
            .into_iter()
            .enumerate()
    {
        let bytes = vec![i as u8 + 1; length];
        image.write_at(&bytes, offset as u64).unwrap();
        model[offset..offset + length].copy_from_slice(&bytes);
        assert_eq!(whole(&image), model);
    }
    image.close().unwrap();
    assert_eq!(whole(&reopen(&storage)), model);
}

#[test]
fn zeroing_and_discarding_whole_clusters_gives_their_space_back_for_reuse() {
    let (storage, image) = memory(&CreateOptions::new(1 << 20).cluster_size(4096));
    image.write_at(&vec![7; 1 << 20], 0).unwrap();
    image.flush().unwrap();
    image.write_zeroes(0, 512 << 10, ZeroMode::Unmap).unwrap();
    image.discard(512 << 10, 256 << 10).unwrap();
    image.flush().unwrap();
    let before = storage.len().unwrap();
    image.write_at(&vec![9; 768 << 10], 0).unwrap();
    image.flush().unwrap();
    assert_eq!(storage.len().unwrap(), before);
    let mut model = vec![9; 768 << 10];
    model.resize(1 << 20, 7);
    assert_eq!(whole(&image), model);
}

#[test]
fn a_zero_write_on_an_empty_image_allocates_nothing() {
    let (_, image) = memory(&CreateOptions::new(1 << 40));
    image.write_zeroes(0, 1 << 40, ZeroMode::Unmap).unwrap();
    let mut mappings = Vec::new();
    image
        .map(0, 1 << 40, &mut |m| {
            mappings.push(m.kind);
            true
        })
        .unwrap();
    assert!(mappings.iter().all(|kind| *kind == MappingKind::Unallocated), "{mappings:?}");
}

/// A small image with data, damaged; opening it for writing and writing the first megabyte.
fn write_on_damaged(damage: impl Fn(&mut Vec<u8>)) -> (Arc<MemStorage>, qcow2::Result<()>) {
    let (storage, image) = memory(&CreateOptions::new(1 << 20).cluster_size(4096));
    image.write_at(&[7; 64 << 10], 0).unwrap();
    image.close().unwrap();
    let mut bytes = storage.snapshot();
    damage(&mut bytes);
    let storage = Arc::new(MemStorage::new(bytes));
    let gate = FileGate { lock: false };
    let opened = Image::open_storage(
        Arc::clone(&storage) as _,
        Path::new("memory"),
        &gate,
        &OpenOptions::new(),
    );
    let written = opened.and_then(|image| {
        let written = image.write_at(&[1; 1 << 20], 0);
        image.close()?;
        written
    });
    (storage, written)
}

fn word(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize & 0x00ff_ffff_ffff_fe00
}

#[test]
fn a_refcount_block_past_the_end_of_the_file_keeps_the_image_from_being_written() {
    let (storage, written) = write_on_damaged(|bytes| {
        let table = word(bytes, 48);
        bytes[table + 8..table + 16].copy_from_slice(&(1u64 << 40).to_be_bytes());
    });
    assert_eq!(written.unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(storage.snapshot().len() < 1 << 20);
}

#[test]
fn guest_data_is_never_written_where_only_a_damaged_entry_can_point() {
    for host in [1u64 << 40, 0] {
        let (storage, written) = write_on_damaged(|bytes| {
            let host = if host == 0 { word(bytes, 48) as u64 } else { host };
            let table = word(bytes, word(bytes, 40));
            bytes[table..table + 8].copy_from_slice(&(host | 1 << 63).to_be_bytes());
        });
        assert_eq!(written.unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(storage.snapshot().len() < 4 << 20);
    }
}

#[test]
fn a_file_that_lost_its_end_gives_errors_and_no_zeroes_however_much_is_read_at_once() {
    const CLUSTER: u64 = 64 << 10;
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    create(&base, &CreateOptions::new(1 << 20)).unwrap();
    let image = Image::open(&base, &OpenOptions::new()).unwrap();
    // The first write makes the tables; what comes then lies behind them.
    image.write_at(&[7; 512], 0).unwrap();
    image.write_at(&vec![7; 1 << 20], 0).unwrap();
    image.close().unwrap();
    let file = std::fs::File::options().write(true).open(&base).unwrap();
    let whole = file.metadata().unwrap().len();
    // Half of the disk and half of a cluster are left.
    file.set_len(whole - 8 * CLUSTER - CLUSTER / 2).unwrap();
    create(&top, &CreateOptions::new(1 << 20).backing("base.qcow2", BackingFormat::Qcow2)).unwrap();
    for path in [base, top] {
        let image = Image::open(&path, &OpenOptions::new().read_only()).unwrap();
        let read = |offset: u64, length: u64| {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            image.read_at(&mut bytes, offset).map(|()| bytes)
        };
        assert!(read(0, 7 * CLUSTER).unwrap().iter().all(|byte| *byte == 7));
        for (offset, length) in [(0, 1 << 20), (0, 9 * CLUSTER), (7 * CLUSTER, 2 * CLUSTER)] {
            let error = read(offset, length).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{length} bytes at {offset}: {error}");
        }
        // What is missing of the cluster in which the file ends is zeroes: qemu leaves that out.
        assert!(read(7 * CLUSTER, CLUSTER).unwrap().ends_with(&[0; 1000]));
    }
}
