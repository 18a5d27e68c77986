//! Whether a restore point is still what was written, and its checksums as one list.

use super::error::{Failure, FailureKind};
use super::service::Backups;
use crate::checksum::{Checksum, LENGTH};
use crate::model::BackupState;
use crate::repository::{Checksums, Manifest, RepositoryError, verify_image};

/// The checksums of a disk as it was at a restore point, each from the image that has the cluster.
pub struct MergedChecksums {
    /// From the restore point's own image down to the full.
    layers: Vec<(Checksums, qcow2::Image)>,
    clusters: u64,
}

impl MergedChecksums {
    /// Clusters of the disk.
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    /// The checksums of the clusters `from .. to`, encoded; zeroes where a cluster reads as zeroes.
    ///
    /// # Errors
    /// Those of the files.
    pub fn encode(&self, from: u64, to: u64) -> std::io::Result<Vec<u8>> {
        let count = usize::try_from(to - from).unwrap_or(usize::MAX);
        let mut sums: Vec<Option<Checksum>> = vec![None; count];
        let Some((first, image)) = self.layers.first() else { return Ok(vec![0; count * LENGTH]) };
        // Which image has a cluster is the mapping's to say: zeroes may hide what lies below.
        let cluster = first.cluster_size();
        let (start, end) = (from * cluster, (to * cluster).min(image.size()));
        let mut runs = Vec::new();
        if start < end {
            image
                .map(start, end - start, &mut |mapping| {
                    if matches!(
                        mapping.kind,
                        qcow2::MappingKind::Data { .. } | qcow2::MappingKind::Compressed
                    ) {
                        let last = (mapping.offset + mapping.length).div_ceil(cluster);
                        runs.push((mapping.depth, mapping.offset / cluster, last));
                    }
                    true
                })
                .map_err(std::io::Error::other)?;
        }
        for (depth, first, last) in runs {
            let layer = usize::try_from(depth).ok().and_then(|depth| self.layers.get(depth));
            let Some((sums_of, _)) = layer else { continue };
            let last = last.min(sums_of.clusters());
            let found = sums_of.read(first, last.max(first))?;
            let at = usize::try_from(first - from).unwrap_or(usize::MAX);
            for (slot, sum) in sums.iter_mut().skip(at).zip(found) {
                *slot = sum;
            }
            // The last cluster of a disk that has grown since was shorter then.
            let short = sums_of.size() / cluster;
            let grown = sums_of.size() % cluster != 0 && image.size() > sums_of.size();
            if grown && (first.max(from)..last).contains(&short) {
                let start = short * cluster;
                let length = cluster.min(image.size() - start);
                let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
                image.read_at(&mut bytes, start).map_err(std::io::Error::other)?;
                let at = usize::try_from(short - from).unwrap_or(usize::MAX);
                if let Some(slot) = sums.get_mut(at) {
                    *slot = Some(Checksum::of(&bytes));
                }
            }
        }
        Ok(sums.iter().flat_map(|sum| sum.map_or([0; LENGTH], Checksum::encode)).collect())
    }
}

impl Backups {
    /// Reads what a restore point's own images store, and compares it with their checksums; bytes
    /// read.
    ///
    /// # Errors
    /// `Conflict` where it is damaged, or no restore point; `Internal` where it cannot be read.
    pub fn verify(&self, id: &str, actor: &str) -> Result<u64, Failure> {
        let backup = self.backup(id)?;
        if backup.state != BackupState::Completed {
            return Err(Self::wrong_state(&backup, "only restore points can be verified"));
        }
        let root = self.root_of(&backup)?;
        let mut bytes = 0;
        for disk in &backup.disks {
            let files = root.files_at(&disk.path)?;
            let verified = Manifest::read(&files.manifest()).and_then(|manifest| {
                let sums = Checksums::open(&files.checksums())?;
                let (hash, _) = sums.root_hash()?;
                if hash != manifest.image.root_hash || Some(&hash) != disk.root_hash.as_ref() {
                    let path = files.checksums();
                    let reason = "does not fit its manifest: it has changed".into();
                    return Err(RepositoryError::Invalid { path, reason });
                }
                verify_image(&files.image(), &sums)
            });
            match verified {
                Ok(read) => bytes += read,
                Err(error) if !error.is_damage() => return Err(error.into()),
                Err(error) => {
                    let text = format!("disk {} is damaged: {error}", disk.disk_id);
                    self.record(actor, "backup.damaged", id, &text);
                    let next =
                        "restore from another restore point; the next backup should be a full";
                    return Err(Failure::new(FailureKind::Conflict, text, next));
                }
            }
        }
        self.record(actor, "backup.verified", id, &format!("{bytes} bytes read, all well"));
        Ok(bytes)
    }

    /// The checksums of a disk at a restore point.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where it is no restore point; `Internal` where files cannot be read.
    pub fn checksums(&self, id: &str, disk: u32) -> Result<MergedChecksums, Failure> {
        let backup = self.backup(id)?;
        if backup.state != BackupState::Completed {
            return Err(Self::wrong_state(&backup, "only restore points have checksums"));
        }
        let root = self.root_of(&backup)?;
        let mut layers = Vec::new();
        for id in self.catalog.lineage(id, disk)?.iter().rev() {
            let files = root.files(&backup.vm_id, disk, id);
            let sums = Checksums::open(&files.checksums())?;
            let options = qcow2::OpenOptions::new().read_only();
            let image =
                qcow2::Image::open(&files.image(), &options).map_err(RepositoryError::from)?;
            layers.push((sums, image));
        }
        let (first, _) =
            layers.first().ok_or_else(|| Failure::not_found("disk", &disk.to_string()))?;
        let clusters = first.clusters();
        Ok(MergedChecksums { layers, clusters })
    }
}
