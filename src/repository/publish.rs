//! Giving finished files their names, and taking files away.

use std::fs;
use std::io;
use std::path::Path;

use super::layout::temporary;
use super::{DiskFiles, Result, failed};

/// Makes the names in a directory durable.
///
/// # Errors
/// `Io`.
pub fn sync_directory(path: &Path) -> Result<()> {
    let sync = || fs::File::open(path)?.sync_all();
    sync().map_err(failed("cannot flush the directory", path))
}

/// Gives the files of a sealed disk their names, the manifest last; durable on return. What has its
/// name already keeps it, so that this can be repeated after a crash.
///
/// # Errors
/// `Io`, also where a file is neither there finished nor unfinished.
pub fn publish(files: &DiskFiles) -> Result<()> {
    let [image, checksums, manifest] = files.finished();
    for path in [&image, &checksums] {
        rename(path)?;
    }
    // A manifest whose image lost its name in a power cut would tell of what is not there.
    sync_directory(&files.directory)?;
    rename(&manifest)?;
    sync_directory(&files.directory)?;
    remove_if_there(&files.durable())
}

fn rename(path: &Path) -> Result<()> {
    match fs::rename(DiskFiles::partial(path), path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.exists() => Ok(()),
        result => result.map_err(failed("cannot give its name to", path)),
    }
}

/// Removes the files of a disk, finished or not, the manifest first; durable on return. What is not
/// there is no error, so that this can be repeated. Directories that are left empty go too.
///
/// # Errors
/// `Io`.
pub fn remove(files: &DiskFiles) -> Result<()> {
    if !files.directory.exists() {
        return Ok(());
    }
    let [image, checksums, manifest] = files.finished();
    for path in [&manifest, &checksums, &image] {
        remove_if_there(path)?;
        remove_if_there(&DiskFiles::partial(path))?;
    }
    remove_if_there(&temporary(&DiskFiles::partial(&manifest)))?;
    remove_if_there(&files.durable())?;
    sync_directory(&files.directory)?;
    // They stay where something else is in them.
    if fs::remove_dir(&files.directory).is_ok()
        && let Some(vm) = files.directory.parent()
    {
        let _ = fs::remove_dir(vm);
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(failed("cannot remove", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::Root;

    #[test]
    fn publishing_can_be_repeated_from_any_point() {
        let dir = tempfile::tempdir().unwrap();
        let files = Root::new(dir.path()).files("ctx", 0, "b");
        for done in 0..=3 {
            fs::create_dir_all(&files.directory).unwrap();
            for (number, path) in files.finished().iter().enumerate() {
                let name = if number < done { path.clone() } else { DiskFiles::partial(path) };
                fs::write(name, number.to_string()).unwrap();
            }
            publish(&files).unwrap();
            publish(&files).unwrap();
            for (number, path) in files.finished().iter().enumerate() {
                assert_eq!(fs::read_to_string(path).unwrap(), number.to_string());
            }
            remove(&files).unwrap();
            remove(&files).unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_missing_file_is_no_success() {
        let dir = tempfile::tempdir().unwrap();
        let files = Root::new(dir.path()).files("ctx", 0, "b");
        fs::create_dir_all(&files.directory).unwrap();
        fs::write(DiskFiles::partial(&files.image()), "x").unwrap();
        assert!(publish(&files).is_err());
    }
}
