//! `sendense-ctl restore get` and `cat`: files and directories out of a mount.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, ValueEnum};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use serde_json::{Value, json};

use super::download::Download;
use super::files::{address_of, info};
use super::report::{self, NAME, Watch};
use crate::ctl::Context;
use crate::ctl::error::{CtlError, CtlResult, FAILED, OK};
use crate::ctl::output::{complain, harmless, size};
use crate::ctl::progress::Display;
use crate::model::Timestamp;

/// Bytes of an archive that are read at once.
const BUFFER: usize = 256 << 10;
/// Longest part of a name in front of what marks an unfinished file.
const STEM: usize = 200;

#[derive(Debug, Args)]
pub(in crate::ctl) struct CatArguments {
    /// The mount
    mount: String,
    /// The file: /VOLUME/PATH
    path: OsString,
}

#[derive(Debug, Args)]
pub(in crate::ctl) struct GetArguments {
    /// The mount
    pub(super) mount: String,
    /// The file or directory: /VOLUME/PATH
    pub(super) path: OsString,
    /// Where it goes: a file, or a directory that is there [default: its name]
    pub(super) to: Option<PathBuf>,
    /// Form of a directory
    #[arg(long, value_enum, default_value = "tar.gz")]
    pub(super) archive: Form,
    /// Overwrite what is there
    #[arg(long)]
    pub(super) force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::ctl) enum Form {
    Zip,
    #[value(name = "tar.gz")]
    TarGz,
}

impl Form {
    fn word(self) -> &'static str {
        match self {
            Self::Zip => "zip",
            Self::TarGz => "tar.gz",
        }
    }
}

pub(super) fn cat(context: &Context, arguments: &CatArguments) -> CtlResult<u8> {
    let CatArguments { mount, path } = arguments;
    let known = info(context, mount, path, true)?;
    let download = Download::new(mount, path, &known)?;
    let mut out = io::stdout().lock();
    download.run(context, 0, &mut out)?;
    out.flush().map_err(|e| CtlError::failed(format!("cannot write the output: {e}"), ""))?;
    Ok(OK)
}

pub(super) fn get(context: &Context, arguments: &GetArguments) -> CtlResult<u8> {
    let GetArguments { mount, path, to, archive, force } = arguments;
    let known = info(context, mount, path, true)?;
    let directory = known["type"] == "directory";
    let to = target(path, to.as_deref(), directory.then_some(*archive));
    if !force && std::fs::symlink_metadata(&to).is_ok() {
        let cause = format!("'{}' is there already", to.display());
        return Err(CtlError::failed(cause, "give another place, or --force to overwrite it"));
    }
    let result = if directory {
        pack(context, mount, path, *archive, &to, *force)?
    } else {
        fetch(context, &Download::new(mount, path, &known)?, &known, &to, *force)?
    };
    let bytes = result["bytes"].as_u64().unwrap_or(0);
    let told = || format!("{} in {}", size(bytes), harmless(&to.to_string_lossy()));
    context.out.done(&result, told)?;
    if result["complete"] == false {
        complain(&format!("the archive is not all there is: {NAME} in it says what is missing"));
        return Ok(FAILED);
    }
    Ok(OK)
}

/// The local name of what is taken out.
fn target(path: &OsStr, to: Option<&Path>, archive: Option<Form>) -> PathBuf {
    let last = path.as_bytes().split(|byte| *byte == b'/').rfind(|part| !part.is_empty());
    // A guest's name does not steer a terminal that lists the directory here.
    let clean = |byte: &u8| if byte.is_ascii_control() { b'_' } else { *byte };
    let name: Vec<u8> = last.unwrap_or(b"files").iter().map(clean).collect();
    let mut name = OsStr::from_bytes(&name).to_owned();
    if let Some(form) = archive {
        name.push(".");
        name.push(form.word());
    }
    match to {
        None => PathBuf::from(name),
        Some(to) if to.is_dir() => to.join(name),
        Some(to) => to.to_owned(),
    }
}

/// Where an unfinished file is kept. The mark tells its version.
fn unfinished(to: &Path, mark: &str) -> PathBuf {
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name
        .chars()
        .scan(0, |length, c| {
            *length += c.len_utf8();
            (*length <= STEM).then_some(c)
        })
        .collect();
    to.with_file_name(format!("{name}.{mark}.partial"))
}

fn cannot(path: &Path) -> impl Fn(io::Error) -> CtlError {
    move |e| CtlError::failed(format!("cannot write '{}': {e}", path.display()), "")
}

/// Opens an unfinished file, for nobody else at the same time.
fn open(path: &Path) -> CtlResult<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.map_err(cannot(path))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let cause = format!("another download writes '{}'", path.display());
        CtlError::failed(cause, "wait for it, or give another place")
    })?;
    Ok(file)
}

/// Gives a finished file its name.
fn publish(from: &Path, to: &Path, force: bool) -> CtlResult<()> {
    if force {
        return std::fs::rename(from, to).map_err(cannot(to));
    }
    let renamed = rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
    match renamed {
        // Not every file system can do that.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS)
            if std::fs::symlink_metadata(to).is_err() =>
        {
            std::fs::rename(from, to).map_err(cannot(to))
        }
        renamed => renamed.map_err(|e| cannot(to)(e.into())),
    }
}

/// Takes a file out. What an earlier, broken download of the same version left is not loaded again.
fn fetch(
    context: &Context,
    download: &Download,
    known: &Value,
    to: &Path,
    force: bool,
) -> CtlResult<Value> {
    let mark: String = download.tag.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
    let partial = unfinished(to, &mark);
    let mut file = open(&partial)?;
    let mut begun = file.metadata().map_err(cannot(&partial))?.len();
    if begun > download.size {
        file.set_len(0).map_err(cannot(&partial))?;
        begun = 0;
    }
    if begun > 0 {
        context.out.note(&format!("going on at byte {begun} of {}", download.size));
    }
    file.seek(SeekFrom::Start(begun)).map_err(cannot(&partial))?;
    download.run(context, begun, &mut file)?;
    if let Some(modified) = modified(known) {
        file.set_modified(modified).map_err(cannot(&partial))?;
    }
    file.sync_all().map_err(cannot(&partial))?;
    publish(&partial, to, force)?;
    Ok(json!({"path": known["path"], "to": to.to_string_lossy(), "bytes": download.size,
        "resumed_at": begun, "etag": download.tag}))
}

/// When a file's content changed last, where this system can tell.
fn modified(known: &Value) -> Option<SystemTime> {
    let time = Timestamp::parse(known["modified_time"].as_str()?).ok()?;
    let seconds = u64::try_from(time.unix()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Takes a directory out, as an archive. It is made while it is loaded, and cannot go on after a cut.
fn pack(
    context: &Context,
    mount: &str,
    path: &OsStr,
    form: Form,
    to: &Path,
    force: bool,
) -> CtlResult<Value> {
    let partial = unfinished(to, form.word());
    let mut file = open(&partial)?;
    let address = address_of(mount, "download-directory", path);
    let address = format!("{address}&format={}", form.word());
    let copied = copy(context, &address, form, &partial, &mut file);
    let finished = copied.and_then(|copied| {
        file.sync_all().map_err(cannot(&partial))?;
        publish(&partial, to, force)?;
        Ok(copied)
    });
    if finished.is_err() {
        // It is of no use to anybody.
        let _ = std::fs::remove_file(&partial);
    }
    let (bytes, complete) = finished?;
    Ok(json!({"path": path.to_string_lossy(), "to": to.to_string_lossy(), "bytes": bytes,
        "archive": form.word(), "complete": complete}))
}

/// Loads all of an archive; its length, and whether it has all that it should.
fn copy(
    context: &Context,
    address: &str,
    form: Form,
    path: &Path,
    file: &mut File,
) -> CtlResult<(u64, bool)> {
    file.set_len(0).map_err(cannot(path))?;
    let (_, mut body) = context.api.stream(address)?;
    let progress = Display::new(context.out);
    let mut watch = (form == Form::TarGz).then(Watch::new);
    let mut buffer = vec![0; BUFFER];
    let mut done = 0;
    let broken = |done: u64, error: io::Error| {
        let cause = format!("the archive was broken off after {done} bytes: {error}");
        CtlError::failed(cause, "the hub's log says why; start again")
    };
    let mut go = || -> CtlResult<()> {
        loop {
            let count = body.read(&mut buffer).map_err(|error| broken(done, error))?;
            if count == 0 {
                return Ok(());
            }
            let part = buffer.get(..count).unwrap_or_default();
            file.write_all(part).map_err(cannot(path))?;
            if let Some(watch) = &mut watch {
                watch.take(part).map_err(|error| broken(done, error))?;
            }
            done += count as u64;
            progress.count("downloading", done);
        }
    };
    let result = go();
    progress.end();
    result?;
    let told = match watch {
        Some(watch) => watch.found(),
        None => report::in_zip(file),
    };
    Ok((done, !told.map_err(|error| broken(done, error))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_gets_its_own_name_where_none_is_given() {
        let here = tempfile::tempdir().unwrap();
        let at = |path: &[u8], to: Option<&Path>, form| target(OsStr::from_bytes(path), to, form);
        assert_eq!(at(b"/disk0/etc/hosts", None, None), Path::new("hosts"));
        assert_eq!(at(b"/disk0/etc/", None, Some(Form::TarGz)), Path::new("etc.tar.gz"));
        assert_eq!(at(b"/", None, Some(Form::Zip)), Path::new("files.zip"));
        assert_eq!(at(b"/disk0/a\x1b[2J\n", None, None), Path::new("a_[2J_"));
        assert_eq!(at(b"/disk0/b", Some(here.path()), None), here.path().join("b"));
        assert_eq!(at(b"/disk0/b", Some("c".as_ref()), None), Path::new("c"));
    }

    #[test]
    fn an_unfinished_file_is_named_after_its_version_and_fits_into_a_directory() {
        assert_eq!(unfinished("/x/a.iso".as_ref(), "12ab"), Path::new("/x/a.iso.12ab.partial"));
        let long = unfinished("\u{e9}".repeat(127).as_ref(), "0123456789abcdef");
        assert!(long.as_os_str().len() <= 255, "{}", long.display());
    }

    #[test]
    fn a_finished_file_does_not_take_the_place_of_another_unless_it_is_told_to() {
        let here = tempfile::tempdir().unwrap();
        let (from, to) = (here.path().join("a"), here.path().join("b"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert!(publish(&from, &to, false).is_err());
        assert_eq!(std::fs::read(&to).unwrap(), b"old");
        publish(&from, &to, true).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"new");
    }
}
