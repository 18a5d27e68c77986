//! Restore points as a whole: deleting them, and finding them again in a bare repository.

use super::error::{Failure, FailureKind};
use super::service::Backups;
use crate::catalog::{Backup, BackupFilter, DiskBackup, Repository, Vm, VmDisk};
use crate::model::{BackupState, BackupType, DiskState, Timestamp, export_alias, export_name};
use crate::repository::{DiskFiles, Finding, FoundBackup, Manifest, Root, remove, scan};

/// What an import did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportReport {
    /// Id of the repository in the catalog.
    pub repository_id: String,
    /// Restore points that were new to the catalog.
    pub imported: Vec<String>,
    /// Restore points that it had.
    pub known: usize,
    /// What is odd in the directory.
    pub findings: Vec<Finding>,
}

impl Backups {
    /// Deletes a backup that has ended, and its files.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` while it runs, while others build on it, or while it must be kept.
    pub fn delete(&self, id: &str, actor: &str) -> Result<(), Failure> {
        let backup = self.backup(id)?;
        if backup.state.is_running() {
            return Err(Self::wrong_state(&backup, "cancel it first"));
        }
        self.check_not_exported(&backup)?;
        if backup.state == BackupState::Completed {
            self.check_kept(&backup, &backup.repository_id)?;
            for copy in self.catalog.copies(Some(id))? {
                self.check_kept(&backup, &copy.repository_id)?;
            }
        }
        self.catalog.begin_delete(id)?;
        self.record(actor, "backup.deleted", id, "deleted");
        self.delete_files(&backup)
    }

    /// Whether an operator's export shows it.
    fn check_not_exported(&self, backup: &Backup) -> Result<(), Failure> {
        let Ok(root) = self.root_of(backup) else { return Ok(()) };
        for export in self.catalog.exports()? {
            let shown = backup.disks.iter().any(|disk| {
                let image = root.directory().join(&disk.path).canonicalize();
                image.is_ok_and(|image| image == std::path::Path::new(&export.path))
            });
            if shown {
                let message = format!("backup {} is exported as '{}'", backup.id, export.name);
                let next = "take the export away first: DELETE /api/v1/nbd/exports/{name}";
                return Err(Failure::new(FailureKind::Conflict, message, next));
            }
        }
        Ok(())
    }

    /// Whether the repository says that it must stay.
    fn check_kept(&self, backup: &Backup, repository: &str) -> Result<(), Failure> {
        let Some(repository) = self.catalog.repository(repository)? else {
            return Ok(());
        };
        let age = Timestamp::now().since(backup.completed_at.unwrap_or(backup.created_at));
        let days = age.as_secs() / 86_400;
        let kept = u64::from(repository.min_retention_days);
        if !repository.is_immutable && kept == 0 {
            return Ok(());
        }
        if days < kept || (repository.is_immutable && kept == 0) {
            let name = &repository.name;
            let message = match kept {
                0 => format!("repository '{name}' is immutable: it keeps its backups for ever"),
                _ => format!("repository '{name}' keeps backups for {kept} days; this has {days}"),
            };
            return Err(Failure::new(FailureKind::Conflict, message, ""));
        }
        Ok(())
    }

    /// Takes the files and the row of a backup away that is being deleted.
    pub(super) fn delete_files(&self, backup: &Backup) -> Result<(), Failure> {
        // Its copies go first: as long as the row is there, everybody knows of them.
        for copy in self.catalog.copies(Some(&backup.id))? {
            if let Some(repository) = self.catalog.repository(&copy.repository_id)? {
                let (root, _) = Root::open(repository.path.as_ref())?;
                for disk in &backup.disks {
                    remove(&root.files_at(&disk.path)?)?;
                }
            }
        }
        let root = self.root_of(backup)?;
        for disk in &backup.disks {
            remove(&root.files_at(&disk.path)?)?;
        }
        self.catalog.remove_backup(&backup.id)?;
        Ok(())
    }

    /// Enters the repository in `directory`, and every restore point in it that the catalog does
    /// not have.
    ///
    /// # Errors
    /// When the directory is no repository, or cannot be read.
    pub fn import(
        &self,
        directory: &std::path::Path,
        actor: &str,
    ) -> Result<ImportReport, Failure> {
        let (root, identity) = Root::open(directory)?;
        let path = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
        let path = path.to_string_lossy().into_owned();
        match self.catalog.repository(&identity.id)? {
            None => self.catalog.add_repository(&Repository {
                id: identity.id.clone(),
                name: identity.id.clone(),
                kind: "local".into(),
                enabled: true,
                path,
                config: serde_json::json!({}),
                is_immutable: false,
                min_retention_days: 0,
                created_at: identity.created_at,
            })?,
            Some(known) if known.path == path => {}
            Some(known) if Root::open(known.path.as_ref()).is_err() => {
                self.catalog.move_repository(&known.id, &path)?;
                let text = format!("moved from {} to {path}", known.path);
                self.record(actor, "repository.moved", &known.id, &text);
            }
            Some(known) => {
                let message = format!(
                    "'{path}' is a copy of repository '{}', which is at '{}'",
                    known.name, known.path
                );
                let next = "one of the two can be in a catalog: import the copy into another hub, \
                            or take the original away first";
                return Err(Failure::new(FailureKind::Conflict, message, next));
            }
        }
        let (found, findings) = scan(&root)?;
        let mut report =
            ImportReport { repository_id: identity.id, imported: Vec::new(), known: 0, findings };
        let before: Vec<String> = self.catalog.vms()?.into_iter().map(|vm| vm.name).collect();
        for backup in order_by_parent(found) {
            let row = self.import_row(&backup, &report.repository_id, &before)?;
            let Some(row) = row else { continue };
            if self.catalog.import_backup(&row)? {
                report.imported.push(row.id);
            } else if self.catalog.backup(&row.id)?.is_some() {
                report.known += 1;
            } else {
                let text = format!("{} cannot be imported: what it builds on is missing", row.id);
                report.findings.push(Finding { path: directory.to_owned(), text });
            }
        }
        let text = format!("{} restore points imported", report.imported.len());
        self.record(actor, "repository.imported", &report.repository_id, &text);
        Ok(report)
    }

    /// The row of a backup that was found. A VM that was not known `before` is entered, as its
    /// newest backup tells of it.
    fn import_row(
        &self,
        found: &FoundBackup,
        repository: &str,
        before: &[String],
    ) -> Result<Option<Backup>, Failure> {
        let Some(first) = found.disks.values().next() else { return Ok(None) };
        let mut vm = self.catalog.vm_by_name(&first.vm.name)?.unwrap_or_else(|| Vm {
            id: first.vm.id.clone(),
            name: first.vm.name.clone(),
            vm_path: first.vm.path.clone(),
            credential_id: None,
            disks: Vec::new(),
        });
        if !before.contains(&vm.name) {
            vm.disks = found.disks.values().map(vm_disk).collect();
            vm.id = self.catalog.put_vm(&vm)?;
        }
        let sealed = found.disks.values().map(|disk| disk.sealed_at).max();
        let mut disks: Vec<DiskBackup> =
            found.disks.values().map(|disk| disk_row(disk, first.backup_type)).collect();
        for disk in &mut disks {
            if self.catalog.alias_is_known(&disk.export_alias)? {
                // Two backups of one second; the name is for the record only.
                disk.export_alias.clone_from(&disk.export_name);
            }
        }
        Ok(Some(Backup {
            id: first.backup_id.clone(),
            vm_id: vm.id.clone(),
            vm_name: vm.name.clone(),
            repository_id: repository.to_owned(),
            policy_id: None,
            kind: first.backup_type,
            requested: first.backup_type,
            full_reason: None,
            agent: "caller".into(),
            state: BackupState::Completed,
            error: None,
            tags: first.tags.clone(),
            bytes_transferred: found.disks.values().map(|disk| disk.bytes_received).sum(),
            agent_phase: None,
            last_telemetry_at: None,
            created_at: first.created_at,
            started_at: Some(first.created_at),
            completed_at: sealed,
            disks,
        }))
    }

    /// Compares catalog and repositories; every disagreement in words.
    ///
    /// # Errors
    /// When the catalog or a directory cannot be read.
    pub fn check(&self) -> Result<Vec<String>, Failure> {
        let mut findings = self.catalog.check()?;
        for repository in self.catalog.repositories()? {
            let scanned = Root::open(repository.path.as_ref()).and_then(|(root, _)| scan(&root));
            let (found, odd) = match scanned {
                Ok(scanned) => scanned,
                Err(error) => {
                    findings.push(format!("repository '{}': {error}", repository.name));
                    continue;
                }
            };
            let rows = self.catalog.backups(&BackupFilter {
                repository_id: Some(repository.id.clone()),
                ..BackupFilter::default()
            })?;
            let copied = self.copied_into(&repository.id)?;
            compare(&repository, &found, &rows, &copied, &mut findings);
            let unfinished = |finding: &Finding| {
                let name = finding.path.file_name().unwrap_or_default().to_string_lossy();
                rows.iter().any(|row| row.state.is_running() && name.starts_with(&row.id))
            };
            for finding in odd.iter().filter(|finding| !unfinished(finding)) {
                findings.push(format!("'{}' {}", finding.path.display(), finding.text));
            }
        }
        Ok(findings)
    }
}

fn compare(
    repository: &Repository,
    found: &[FoundBackup],
    rows: &[Backup],
    copied: &[String],
    findings: &mut Vec<String>,
) {
    let name = &repository.name;
    let id = |backup: &FoundBackup| {
        backup.disks.values().next().map(|m| m.backup_id.clone()).unwrap_or_default()
    };
    for backup in found {
        let id = id(backup);
        match rows.iter().find(|row| row.id == id) {
            None if copied.contains(&id) => {}
            None => findings.push(format!("{id} in repository '{name}' is not in the catalog")),
            Some(row) => {
                for disk in &row.disks {
                    let manifest = backup.disks.get(&disk.disk_id);
                    let same = manifest.is_some_and(|m| {
                        disk.root_hash.as_ref() == Some(&m.image.root_hash)
                            && disk.change_id.as_ref() == Some(&m.change_id)
                            && disk.parent == m.parent.as_ref().map(|p| p.backup_id.clone())
                    });
                    if !same {
                        let number = disk.disk_id;
                        findings
                            .push(format!("{id}: catalog and manifest of disk {number} differ"));
                    }
                }
            }
        }
    }
    let completed = rows.iter().filter(|row| row.state == BackupState::Completed);
    for expected in completed.map(|row| &row.id).chain(copied) {
        if !found.iter().any(|backup| id(backup) == *expected) {
            findings.push(format!("{expected} is in the catalog, not in repository '{name}'"));
        }
    }
}

/// Parents before what builds on them.
fn order_by_parent(found: Vec<FoundBackup>) -> Vec<FoundBackup> {
    let parent = |backup: &FoundBackup| {
        backup
            .disks
            .values()
            .filter_map(|m| m.parent.as_ref())
            .map(|p| p.backup_id.clone())
            .collect::<Vec<_>>()
    };
    let mut rest = found;
    let mut ordered: Vec<FoundBackup> = Vec::new();
    loop {
        let ids: Vec<String> = rest
            .iter()
            .filter_map(|b| b.disks.values().next().map(|m| m.backup_id.clone()))
            .collect();
        let (ready, later): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|b| parent(b).iter().all(|p| !ids.contains(p)));
        if ready.is_empty() {
            // A circle of manifests is nobody's restore point.
            return ordered;
        }
        ordered.extend(ready);
        rest = later;
    }
}

fn vm_disk(manifest: &Manifest) -> VmDisk {
    VmDisk {
        disk_id: manifest.disk.id,
        disk_key: manifest.disk.key,
        unit_number: manifest.disk.unit_number,
        label: manifest.disk.label.clone(),
        capacity: manifest.disk.capacity_bytes,
    }
}

fn disk_row(manifest: &Manifest, kind: BackupType) -> DiskBackup {
    let (id, disk) = (&manifest.backup_id, manifest.disk.id);
    DiskBackup {
        disk_id: disk,
        disk_key: manifest.disk.key,
        capacity: manifest.disk.capacity_bytes,
        state: DiskState::Completed,
        parent: manifest.parent.as_ref().map(|parent| parent.backup_id.clone()),
        previous_change_id: manifest.previous_change_id.clone(),
        change_id: Some(manifest.change_id.clone()),
        path: DiskFiles::relative(&manifest.vm.id, disk, id),
        export_name: export_name(id, disk),
        export_alias: export_alias(&manifest.vm.id, disk, kind, manifest.created_at),
        port: None,
        bytes_received: manifest.bytes_received,
        bytes_unchanged: 0,
        stored_bytes: Some(manifest.image.stored_bytes),
        file_bytes: Some(manifest.image.file_bytes),
        root_hash: Some(manifest.image.root_hash.clone()),
        error: None,
        sealed_at: Some(manifest.sealed_at),
    }
}
