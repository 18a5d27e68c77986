//! Copies of restore points in other repositories, with all that they build on. A worker makes
//! them; none stays pending.

use std::fs;

use super::error::{Failure, FailureKind};
use super::service::Backups;
use crate::catalog::{Backup, Copy, CopyMode, CopyRule};
use crate::model::{BackupState, CopyState};
use crate::repository::{
    Checksums, DiskFiles, Manifest, RepositoryError, Root, publish, remove_unfinished,
    sync_directory, verify_image,
};

/// Checksums that are copied at a time.
const BATCH: u64 = 8192;

impl Backups {
    /// Asks for a copy of a restore point in another repository.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` where it is no restore point, is there already, or the repository is
    /// disabled.
    pub fn ask_for_copy(&self, id: &str, repository: &str, actor: &str) -> Result<Copy, Failure> {
        let backup = self.backup(id)?;
        if backup.state != BackupState::Completed {
            return Err(Self::wrong_state(&backup, "only restore points can be copied"));
        }
        let target = self.choose_repository(Some(repository))?;
        if target.id == backup.repository_id {
            let text = format!("backup {id} is in repository '{}' itself", target.name);
            return Err(Failure::new(FailureKind::Conflict, text, "name another repository"));
        }
        let copy = self.catalog.add_copy(id, &target.id)?;
        self.record(actor, "copy.requested", id, &format!("to repository '{}'", target.name));
        Ok(copy)
    }

    /// Asks for the copies that the policy of a completed backup wants at once, and that are not
    /// there; those that failed again.
    pub(super) fn copy_by_policy(&self, backup: &Backup) {
        let Some(id) = &backup.policy_id else { return };
        let Ok(policies) = self.catalog.policies() else { return };
        let mut rules: Vec<CopyRule> = policies
            .into_iter()
            .filter(|policy| policy.id == *id && policy.enabled)
            .flat_map(|policy| policy.copy_rules)
            .filter(|rule| rule.enabled && rule.copy_mode == CopyMode::Immediate)
            .collect();
        rules.sort_by_key(|rule| rule.priority);
        let there = self.catalog.copies(Some(&backup.id)).unwrap_or_default();
        for rule in rules {
            let to = &rule.destination_repository_id;
            let known = self.catalog.repository(to).ok().flatten();
            let made = |copy: &Copy| {
                copy.state != CopyState::Failed
                    && known.as_ref().is_some_and(|repository| repository.id == copy.repository_id)
            };
            if there.iter().any(made) {
                continue;
            }
            if let Err(failure) = self.ask_for_copy(&backup.id, to, "policy") {
                self.record("hub", "copy.failed", &backup.id, &failure.to_string());
            }
        }
    }

    /// Makes the copies that are asked for, the oldest first. One that a crash cut off is made again.
    pub fn make_copies(&self) {
        let Ok(all) = self.catalog.copies(None) else { return };
        let open = |copy: &&Copy| matches!(copy.state, CopyState::Pending | CopyState::Copying);
        for copy in all.iter().filter(open) {
            let mut bytes = 0;
            let made = self.make_copy(copy, &mut bytes);
            let (state, error) = match &made {
                Ok(()) => (CopyState::Completed, None),
                Err(failure) => (CopyState::Failed, Some(failure.to_string())),
            };
            if let Err(error) = self.catalog.set_copy(&copy.id, state, bytes, error.as_deref()) {
                tracing::error!(copy = %copy.id, %error, "the end of a copy cannot be recorded");
            }
            let text = error.unwrap_or_else(|| format!("{bytes} bytes copied and verified"));
            self.record("hub", &format!("copy.{state}"), &copy.backup_id, &text);
        }
    }

    fn make_copy(&self, copy: &Copy, bytes: &mut u64) -> Result<(), Failure> {
        self.catalog.lease(&copy.id, &copy.backup_id, 0)?;
        let made = self.copy_lineage(copy, bytes);
        self.catalog.release_lease(&copy.id)?;
        made
    }

    fn copy_lineage(&self, copy: &Copy, bytes: &mut u64) -> Result<(), Failure> {
        let backup = self.backup(&copy.backup_id)?;
        let target = self.choose_repository(Some(&copy.repository_id))?;
        let (target, _) = Root::open(target.path.as_ref())?;
        self.catalog.set_copy(&copy.id, CopyState::Copying, 0, None)?;
        let mut lineage: Vec<String> = Vec::new();
        for disk in &backup.disks {
            for id in self.catalog.lineage(&backup.id, disk.disk_id)? {
                if !lineage.contains(&id) {
                    lineage.push(id);
                }
            }
        }
        for id in &lineage {
            let part = self.backup(id)?;
            *bytes += self.copy_files(&part, &target)?;
            if *id != backup.id {
                self.catalog.note_copied(id, &copy.repository_id)?;
            }
        }
        Ok(())
    }

    fn copy_files(&self, backup: &Backup, target: &Root) -> Result<u64, Failure> {
        let source = self.root_of(backup)?;
        let mut bytes = 0;
        for disk in &backup.disks {
            let from = source.files_at(&disk.path)?;
            let to = target.files_at(&disk.path)?;
            let manifest = Manifest::read(&from.manifest())?;
            if Manifest::read(&to.manifest()).is_ok_and(|there| there == manifest) {
                continue;
            }
            let copied = copy_disk(&from, &to, &manifest);
            if copied.is_err() {
                remove_unfinished(&to)?;
            }
            bytes += copied?;
        }
        Ok(bytes)
    }

    /// Ids of the backups that are copied into a repository.
    pub(super) fn copied_into(&self, repository: &str) -> Result<Vec<String>, Failure> {
        let all = self.catalog.copies(None)?.into_iter();
        let there =
            all.filter(|c| c.repository_id == repository && c.state == CopyState::Completed);
        Ok(there.map(|copy| copy.backup_id).collect())
    }
}

/// Copies the files of a disk, compares them with their checksums, and gives them their names.
fn copy_disk(
    from: &DiskFiles,
    to: &DiskFiles,
    manifest: &Manifest,
) -> Result<u64, RepositoryError> {
    let io = |what: &'static str, path: &std::path::Path| {
        let path = path.to_owned();
        move |source| RepositoryError::Io { what, path, source }
    };
    fs::create_dir_all(&to.directory).map_err(io("cannot make", &to.directory))?;
    for directory in to.directory.ancestors().skip(1).take(2) {
        sync_directory(directory)?;
    }
    let image = DiskFiles::partial(&to.image());
    let copy = || -> std::io::Result<u64> {
        let bytes = fs::copy(from.image(), &image)?;
        fs::File::open(&image)?.sync_all()?;
        Ok(bytes)
    };
    let bytes = copy().map_err(io("cannot copy to", &image))?;
    let sums = copy_checksums(from, to)?;
    let (hash, _) = sums.root_hash()?;
    if hash != manifest.image.root_hash {
        let reason = "does not fit its manifest: it has changed".into();
        return Err(RepositoryError::Invalid { path: from.checksums(), reason });
    }
    verify_image(&image, &sums)?;
    manifest.write(&DiskFiles::partial(&to.manifest()))?;
    publish(to)?;
    Ok(bytes)
}

/// Copies checksums, holes as holes.
fn copy_checksums(from: &DiskFiles, to: &DiskFiles) -> Result<Checksums, RepositoryError> {
    let source = Checksums::open(&from.checksums())?;
    let path = DiskFiles::partial(&to.checksums());
    let cluster_size = u32::try_from(source.cluster_size()).unwrap_or(u32::MAX);
    let target = Checksums::create(&path, source.size(), cluster_size)?;
    let copy = || -> std::io::Result<()> {
        let mut at = 0;
        while at < source.clusters() {
            let end = (at + BATCH).min(source.clusters());
            for (index, sum) in (at..).zip(source.read(at, end)?) {
                if let Some(sum) = sum {
                    target.set(index, &[sum])?;
                }
            }
            at = end;
        }
        Ok(())
    };
    copy().map_err(|source| RepositoryError::Io { what: "cannot copy to", path, source })?;
    target.sync()?;
    Ok(target)
}
