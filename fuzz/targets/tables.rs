//! Disks that begin with anything: partition tables, volume groups, signatures.
#![no_main]

mod disks;

use std::sync::Arc;

use disks::{BLOCK, Sparse, crc, number};
use guest::{Guest, Source, Status};
use libfuzzer_sys::fuzz_target;

/// Volumes that are looked at.
const VOLUMES: usize = 100;
/// The polynomial of GPT and LVM2, and what checksums of the latter start from.
const CRC32: u32 = 0xedb8_8320;
const LVM_START: u32 = 0xf597_a6cf;

/// The first byte gives the size of the disks, and whether the rest is one disk or two.
fn disks(input: &[u8]) -> Vec<Sparse> {
    let Some((first, rest)) = input.split_first() else { return Vec::new() };
    let parts = match first & 16 {
        0 => vec![rest],
        _ => rest.chunks(rest.len().div_ceil(2).max(1)).collect(),
    };
    let disk = |(number, bytes): (u32, &[u8])| {
        let size = bytes.len() as u64 + (1 << (first % 16 + 12));
        let mut disk = Sparse { disk: number, size, ..Sparse::default() };
        disk.put(0, bytes);
        if first & 32 == 0 {
            restamp(&mut disk, bytes.len());
        }
        disk
    };
    (0..).zip(parts).map(disk).collect()
}

/// Makes the checksums of a GPT and of a physical volume right.
fn restamp(disk: &mut Sparse, length: usize) {
    for sector in [512, BLOCK as u64] {
        let mut header = disk.get(sector, 512);
        let entries = number::<4>(&header, 80).saturating_mul(number::<4>(&header, 84));
        let size = number::<4>(&header, 12) as usize;
        if !header.starts_with(b"EFI PART") || size > 512 || entries > 256 << 10 {
            continue;
        }
        let place = number::<8>(&header, 72).saturating_mul(sector);
        let sum = !crc(CRC32, !0, &disk.get(place, entries as usize));
        header[88..92].copy_from_slice(&sum.to_le_bytes());
        header[16..20].fill(0);
        let sum = !crc(CRC32, !0, &header[..size]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        disk.put(sector, &header);
    }
    for at in (0..length.min(128 << 10) as u64).step_by(512) {
        let mut sector = disk.get(at, 512);
        if sector.starts_with(b"LABELONE") {
            let sum = crc(CRC32, LVM_START, &sector[20..]);
            disk.put(at + 16, &sum.to_le_bytes());
        } else if sector[4..].starts_with(b" LVM2 x[5A%r0N*>") {
            let (start, size) = (number::<8>(&sector, 40), number::<8>(&sector, 48));
            if size <= 128 << 10 {
                let text = disk.get(at.saturating_add(start), size as usize);
                sector[56..60].copy_from_slice(&crc(CRC32, LVM_START, &text).to_le_bytes());
            }
            let sum = crc(CRC32, LVM_START, &sector[4..]);
            sector[..4].copy_from_slice(&sum.to_le_bytes());
            disk.put(at, &sector);
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let disks = disks(input);
    let sources: Vec<Arc<dyn Source>> =
        disks.iter().map(|disk| Arc::new(disk.clone()) as Arc<dyn Source>).collect();
    let guest = Guest::open(&sources);
    assert!(guest.volumes.len() >= usize::from(!sources.is_empty() && guest.notes.is_empty()));
    let mut names: Vec<_> = guest.volumes.iter().map(|volume| &volume.about.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), guest.volumes.len());
    for volume in guest.volumes.iter().take(VOLUMES) {
        let refused = matches!(volume.about.status, Status::Refused(_));
        assert_eq!(volume.file_system().is_err(), refused);
        let source = volume.source();
        for at in [0, source.size() / 2, source.size().saturating_sub(5000)] {
            let length = (source.size() - at).min(5000);
            let mut buf = vec![0; length as usize];
            if source.read_at(&mut buf, at).is_err() {
                continue;
            }
            // What is traced is what was read.
            let mut traced = Vec::new();
            source.trace(at, length, &mut |range| {
                let disk = &sources[range.disk as usize];
                let mut part = vec![0; range.length as usize];
                disk.read_at(&mut part, range.offset).expect("it lies on the disk");
                traced.extend(part);
            });
            assert!(traced.len() != buf.len() || traced == buf);
        }
    }
});
