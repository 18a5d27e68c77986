//! Image files with any content: opened, described, mapped, read, checked, repaired and written.
#![no_main]

use std::path::Path;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use qcow2::storage::{MemStorage, Storage};
use qcow2::{FileGate, Image, OpenOptions, Repair, ZeroMode, check_storage};

/// Bytes that one read or write takes at most.
const PIECE: u64 = 64 << 10;
/// Extents of the mapping that are looked at.
const EXTENTS: usize = 1000;
/// A file that grows past this is not followed further.
const LONGEST: u64 = 16 << 20;

fn open(storage: &Arc<MemStorage>, options: &OpenOptions) -> qcow2::Result<Image> {
    // A name that resolves to nothing: backing files are another matter.
    let path = Path::new("/nonexistent/image.qcow2");
    Image::open_storage(Arc::clone(storage) as _, path, &FileGate { lock: false }, options)
}

/// Reads at the beginning, in the middle and at the end.
fn look(image: &Image) {
    let size = image.size();
    for at in [0, size / 2, size.saturating_sub(PIECE)] {
        let mut buf = vec![0; PIECE.min(size - at) as usize];
        let _ = image.read_at(&mut buf, at);
    }
    let mut seen = 0;
    let mut end = 0;
    let _ = image.map(0, size, &mut |mapping| {
        assert_eq!(mapping.offset, end);
        end += mapping.length;
        seen += 1;
        seen < EXTENTS
    });
    assert!(end <= size);
}

fn change(image: &Image) {
    let size = image.size();
    for (at, byte) in [(0, 1), (size / 3, 2), (size.saturating_sub(PIECE), 3)] {
        let length = PIECE.min(size - at);
        let _ = image.write_at(&vec![byte; length as usize], at);
        let _ = image.write_zeroes(at, length / 2, ZeroMode::Unmap);
        let _ = image.discard(at, length / 3);
    }
    let _ = image.flush();
    look(image);
    let _ = image.close();
}

fuzz_target!(|input: &[u8]| {
    let storage = Arc::new(MemStorage::new(input.to_vec()));
    if let Ok(image) = open(&storage, &OpenOptions::new().read_only()) {
        look(&image);
    }
    assert_eq!(storage.snapshot(), input, "looking changes nothing");
    let sound = check_storage(&*storage, Repair::None).is_ok_and(|report| report.is_clean());
    if let Ok(image) = open(&storage, &OpenOptions::new()) {
        change(&image);
        drop(image);
        if sound {
            let report = check_storage(&*storage, Repair::None).expect("it was sound before");
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
        }
    }
    if storage.len().is_ok_and(|length| length > LONGEST) {
        return;
    }
    let _ = check_storage(&*storage, Repair::All);
    if let Ok(image) = open(&storage, &OpenOptions::new().read_only()) {
        look(&image);
    }
});
