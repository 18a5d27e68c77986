//! Comparing an image with its checksums.

use std::path::Path;

use qcow2::{Image, MappingKind, OpenOptions};

use super::{Checksums, Result, failed, invalid};
use crate::checksum::Checksum;

/// Bytes that are read at a time.
const STEP: u64 = 1 << 20;

/// Runs of clusters that `image` itself stores, as (first, end).
fn stored(image: &Image) -> Result<Vec<(u64, u64)>> {
    let cluster = u64::from(image.cluster_size());
    let mut runs: Vec<(u64, u64)> = Vec::new();
    image.map(0, image.size(), &mut |mapping| {
        let data = matches!(mapping.kind, MappingKind::Data { .. } | MappingKind::Compressed);
        if data && mapping.depth == 0 {
            let first = mapping.offset / cluster;
            let end = (mapping.offset + mapping.length).div_ceil(cluster);
            match runs.last_mut() {
                Some((_, last)) if *last >= first => *last = end,
                _ => runs.push((first, end)),
            }
        }
        true
    })?;
    Ok(runs)
}

/// Calls `visit` with the number and checksum of each cluster of `first .. end`, as it is now.
fn read_clusters(
    image: &Image,
    (first, end): (u64, u64),
    size: u64,
    visit: &mut dyn FnMut(u64, Checksum) -> Result<()>,
) -> Result<()> {
    let cluster = u64::from(image.cluster_size());
    let step = (STEP / cluster).max(1);
    let mut buffer = Vec::new();
    let mut at = first;
    while at < end {
        let to = (at + step).min(end);
        let (from_byte, to_byte) = (at * cluster, (to * cluster).min(size));
        buffer.resize(usize::try_from(to_byte - from_byte).unwrap_or(usize::MAX), 0);
        image.read_at(&mut buffer, from_byte)?;
        let length = usize::try_from(cluster).unwrap_or(usize::MAX);
        for (index, bytes) in (at..).zip(buffer.chunks(length)) {
            visit(index, Checksum::of(bytes))?;
        }
        at = to;
    }
    Ok(())
}

/// Brings `sums` to what `image` stores: clusters without a checksum are read, and checksums of
/// clusters that are not stored are forgotten.
///
/// # Errors
/// `Io`, `Image`.
pub fn complete_checksums(image: &Image, sums: &Checksums, path: &Path) -> Result<()> {
    let mut after = 0;
    for (first, end) in stored(image)? {
        let end = end.min(sums.clusters());
        sums.clear(after, first).map_err(failed("cannot write", path))?;
        let mut at = first;
        while at < end {
            let to = (at + STEP / sums.cluster_size()).min(end);
            let known = sums.read(at, to).map_err(failed("cannot read", path))?;
            for (index, _) in (at..).zip(&known).filter(|(_, sum)| sum.is_none()) {
                read_clusters(image, (index, index + 1), sums.size(), &mut |index, sum| {
                    sums.set(index, &[sum]).map_err(failed("cannot write", path))
                })?;
            }
            at = to;
        }
        after = end;
    }
    sums.clear(after, sums.clusters()).map_err(failed("cannot write", path))
}

/// Reads every stored cluster of the image at `path` and compares it with `sums`; its backing
/// files are opened and not read. Returns the bytes read.
///
/// # Errors
/// `Invalid` with the first cluster that differs; `Io`, `Image`.
pub fn verify_image(path: &Path, sums: &Checksums) -> Result<u64> {
    let image = Image::open(path, &OpenOptions::new().read_only())?;
    let mut bytes = 0;
    let mut after = 0;
    let nothing_between = |from: u64, to: u64| -> Result<()> {
        let mut at = from;
        while at < to {
            let end = (at + (STEP >> 3)).min(to);
            let known = sums.read(at, end).map_err(failed("cannot read the checksums of", path))?;
            if let Some(lost) = known.iter().position(Option::is_some) {
                let at = (at + lost as u64) * sums.cluster_size();
                return Err(invalid(path, format!("has lost the data at byte {at} of the disk")));
            }
            at = end;
        }
        Ok(())
    };
    for (first, end) in stored(&image)? {
        let end = end.min(sums.clusters());
        nothing_between(after, first)?;
        let mut at = first;
        while at < end {
            let to = (at + STEP / sums.cluster_size()).min(end);
            let known = sums.read(at, to).map_err(failed("cannot read the checksums of", path))?;
            let mut expected = known.into_iter();
            read_clusters(&image, (at, to), sums.size(), &mut |index, sum| {
                bytes += sums.cluster_size();
                if expected.next().flatten() == Some(sum) {
                    return Ok(());
                }
                let at = index * sums.cluster_size();
                Err(invalid(
                    path,
                    format!("is damaged: the data at byte {at} of the disk has changed"),
                ))
            })?;
            at = to;
        }
        after = end;
    }
    nothing_between(after, sums.clusters())?;
    Ok(bytes)
}
