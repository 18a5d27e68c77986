//! `sendense-ctl backup extract`: one file out of a backup, without a mount that stays.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::files::{info, make, mount_address, unmount};
use super::get::{Form, GetArguments, get};
use crate::ctl::Context;
use crate::ctl::error::{CtlError, CtlResult, INTERRUPTED, Kind};
use crate::ctl::http::Api;
use crate::ctl::output::{complain, each, harmless, word};

#[derive(Debug, Args)]
pub(in crate::ctl) struct ExtractArguments {
    /// The restore point
    #[arg(long, value_name = "ID")]
    backup_id: String,
    /// The file or directory, as the machine names it; or /VOLUME/PATH
    #[arg(long, value_name = "PATH")]
    file: OsString,
    /// Where it goes: a file, or a directory that is there [default: its name]
    #[arg(long, value_name = "TO")]
    output: Option<PathBuf>,
    /// Form of a directory
    #[arg(long, value_enum, default_value = "tar.gz")]
    archive: Form,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
}

pub(in crate::ctl) fn extract(context: &Context, arguments: &ExtractArguments) -> CtlResult<u8> {
    let made = make(context, &arguments.backup_id, None, None)?;
    let mount = made["mount_id"].as_str().unwrap_or_default().to_owned();
    unmount_when_interrupted(context.api.clone(), mount.clone());
    let taken = locate(context, &made, &mount, &arguments.file).and_then(|path| {
        let wanted = GetArguments {
            mount: mount.clone(),
            path,
            to: arguments.output.clone(),
            archive: arguments.archive,
            force: arguments.force,
        };
        get(context, &wanted)
    });
    // The hub takes it away by itself, only later.
    if let Err(error) = unmount(context, &mount) {
        complain(&format!("the mount {mount} stays for now: {}", error.cause));
    }
    taken
}

/// Ctrl-C ends the process only after the mount is gone. What was loaded stays, to go on with.
fn unmount_when_interrupted(api: Api, mount: String) {
    let wait = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        // Without signals the mount goes away later, by itself.
        let Ok(runtime) = runtime else { return };
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            let _ = api.delete(&mount_address(&mount));
            std::process::exit(INTERRUPTED.into());
        }
    };
    let _ = std::thread::Builder::new().name("signals".into()).spawn(wait);
}

/// Where a path is: in the one volume that has it, or as it stands.
fn locate(context: &Context, made: &Value, mount: &str, file: &OsStr) -> CtlResult<OsString> {
    let shown = harmless(&file.to_string_lossy());
    let inside = match file.as_bytes() {
        [b'/', ..] => file.to_owned(),
        _ => join("", file),
    };
    let volumes = || each(made, "volumes").filter(|volume| volume["status"] != "refused");
    let (mut found, mut failed) = (Vec::new(), None);
    let exact = volumes().any(|volume| {
        let name = volume["name"].as_str().unwrap_or_default().as_bytes();
        inside
            .as_bytes()
            .get(1..)
            .and_then(|path| path.strip_prefix(name))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    });
    let names = volumes().map(|volume| format!("/{}", volume["name"].as_str().unwrap_or_default()));
    let mut candidates: Vec<_> = names.map(|volume| join(&volume, &inside)).collect();
    if exact {
        candidates.insert(0, inside.clone());
    }
    for path in candidates {
        match info(context, mount, &path, true) {
            Ok(_) => found.push(path),
            Err(error) if error.kind == Kind::NotFound => {}
            Err(error) => failed = Some(error),
        }
    }
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => {
            if let Some(error) = failed {
                return Err(error);
            }
            let refused = each(made, "volumes").filter(|volume| volume["status"] == "refused");
            let reason =
                |volume: &Value| format!("{}: {}", word(volume, "name"), word(volume, "reason"));
            let reasons: Vec<_> = refused.map(reason).collect();
            let next = match reasons.is_empty() {
                true => "`restore mount` and `restore find` look for names".to_owned(),
                false => format!("not shown are {}", reasons.join("; ")),
            };
            let cause = format!("no volume of this backup has '{shown}'");
            Err(CtlError::new(Kind::NotFound, cause, next))
        }
        several => {
            let paths: Vec<_> = several.iter().map(|path| path.to_string_lossy()).collect();
            let cause = format!("{} volumes have '{shown}'", several.len());
            let next = format!("say which one: --file {}", harmless(&paths.join(" or ")));
            Err(CtlError::new(Kind::Conflict, cause, next))
        }
    }
}

/// `inside` below `above`.
fn join(above: &str, inside: &OsStr) -> OsString {
    let mut path = OsString::from(above);
    if !inside.as_bytes().starts_with(b"/") {
        path.push("/");
    }
    path.push(inside);
    path
}
