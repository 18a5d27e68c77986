//! Finding the restore points of a bare directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{DiskFiles, Manifest, Result, Root, failed};

/// A backup that was found, with the manifests of its disks by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundBackup {
    /// Its disks.
    pub disks: BTreeMap<u32, Manifest>,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where.
    pub path: PathBuf,
    /// What, in words.
    pub text: String,
}

/// Finds all backups whose disks are all there, oldest first, and what is odd.
///
/// # Errors
/// `Io` where a directory cannot be read.
pub fn scan(root: &Root) -> Result<(Vec<FoundBackup>, Vec<Finding>)> {
    let mut findings = Vec::new();
    let mut backups: BTreeMap<String, FoundBackup> = BTreeMap::new();
    for vm in directories(root.directory())? {
        for disk in directories(&vm)? {
            for path in files(&disk)? {
                examine(&path, &mut backups, &mut findings);
            }
        }
    }
    let mut whole = Vec::new();
    for (id, backup) in backups {
        let expected = backup.disks.values().map(|disk| disk.disks).max().unwrap_or(0);
        if backup.disks.len() as u64 == u64::from(expected) {
            whole.push(backup);
        } else {
            let text = format!("backup {id} has {} of {expected} disks", backup.disks.len());
            findings.push(Finding { path: root.directory().to_owned(), text });
        }
    }
    whole.sort_by_key(|backup| backup.disks.values().map(|disk| disk.sealed_at).max());
    Ok((whole, findings))
}

fn examine(path: &Path, backups: &mut BTreeMap<String, FoundBackup>, findings: &mut Vec<Finding>) {
    let mut odd = |text: String| findings.push(Finding { path: path.to_owned(), text });
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let files = |backup: &str| {
        let root = Root::new(path.ancestors().nth(3).unwrap_or(path));
        let vm = path.ancestors().nth(2).and_then(Path::file_name).unwrap_or_default();
        let disk = path.parent().and_then(Path::file_name).unwrap_or_default();
        let relative =
            format!("{}/{}/{backup}.qcow2", vm.to_string_lossy(), disk.to_string_lossy());
        root.files_at(&relative)
    };
    if let Some(backup) = name.strip_suffix(".json") {
        let Ok(files) = files(backup) else { return };
        match Manifest::read(path) {
            Err(error) => odd(error.to_string()),
            Ok(manifest) if manifest.backup_id != backup => {
                odd(format!("is the manifest of {}", manifest.backup_id));
            }
            Ok(manifest) => match whole(&files, &manifest) {
                Some(text) => odd(text),
                None => {
                    let entry = backups
                        .entry(backup.to_owned())
                        .or_insert_with(|| FoundBackup { disks: BTreeMap::new() });
                    entry.disks.insert(manifest.disk.id, manifest);
                }
            },
        }
    } else if let Some(backup) = name.strip_suffix(".qcow2").or(name.strip_suffix(".crc")) {
        if files(backup).is_ok_and(|files| !files.manifest().exists()) {
            odd("has no manifest".into());
        }
    } else {
        odd("is no part of a restore point".into());
    }
}

/// What is missing of an image with a manifest, told by names and lengths.
fn whole(files: &DiskFiles, manifest: &Manifest) -> Option<String> {
    match fs::metadata(files.image()) {
        Err(error) => return Some(format!("its image: {error}")),
        Ok(meta) if meta.len() != manifest.image.file_bytes => {
            let (found, told) = (meta.len(), manifest.image.file_bytes);
            return Some(format!("its image has {found} bytes, not {told}"));
        }
        Ok(_) => {}
    }
    (!files.checksums().exists()).then(|| "its checksums are missing".into())
}

fn entries(directory: &Path, want_directories: bool) -> Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            // A link may lead anywhere: it is neither.
            let kind = entry.file_type()?;
            if !hidden && if want_directories { kind.is_dir() } else { kind.is_file() } {
                found.push(entry.path());
            }
        }
        found.sort();
        Ok(found)
    };
    read().map_err(failed("cannot read the directory", directory))
}

fn directories(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = entries(path, true)?;
    found.retain(|path| path.file_name().is_some_and(|name| name != "lost+found"));
    Ok(found)
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    entries(path, false)
}

#[cfg(test)]
mod tests {
    use super::super::manifest::tests::sample;
    use super::*;

    #[test]
    fn a_backup_counts_once_all_its_disks_are_there_and_leftovers_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let add = |disk| {
            let files = root.files("ctx-web-1", disk, "backup-web-1");
            fs::create_dir_all(&files.directory).unwrap();
            let image = fs::File::create(files.image()).unwrap();
            image.set_len(1 << 20).unwrap();
            fs::write(files.checksums(), "").unwrap();
            sample("backup-web-1", disk, 2).write(&files.manifest()).unwrap();
            files
        };
        add(0);
        let (found, findings) = scan(&root).unwrap();
        assert!(found.is_empty());
        assert!(findings[0].text.contains("1 of 2 disks"), "{findings:?}");
        let files = add(1);
        assert_eq!(scan(&root).unwrap().0.len(), 1);
        fs::write(files.directory.join("backup-web-2.qcow2.partial"), "").unwrap();
        fs::write(files.directory.join("backup-web-3.qcow2"), "").unwrap();
        let (found, findings) = scan(&root).unwrap();
        assert_eq!((found.len(), findings.len()), (1, 2), "{findings:?}");
        fs::File::options().write(true).open(files.image()).unwrap().set_len(5).unwrap();
        assert!(scan(&root).unwrap().0.is_empty());
    }
}
