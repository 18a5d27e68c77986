//! `sendense-ctl restore mount`, and looking at the files of a mount.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::get::{self, CatArguments, GetArguments};
use crate::ctl::Context;
use crate::ctl::error::{CtlError, CtlResult, FAILED, OK};
use crate::ctl::http::{LONG, encode, encode_bytes};
use crate::ctl::output::{
    bytes, complain, each, fields, harmless, line, message, number, size, table, time, word,
};

/// Most levels that are listed below a directory.
const DEPTH: usize = 256;
/// Names that are asked for at a time.
const NAMES: usize = 10_000;

#[derive(Debug, Subcommand)]
pub(in crate::ctl) enum FilesCommand {
    /// Make the files of a restore point visible, with the volumes that are on its disks
    Mount(MountArguments),
    /// List the mounts
    Mounts,
    /// List the volumes of a mount, and how much each can be trusted
    Volumes(OfMount),
    /// List a directory; / has the volumes in it
    Ls(LsArguments),
    /// Tell all that is known of a file or directory
    Stat(StatArguments),
    /// Print a file
    Cat(CatArguments),
    /// Take out a file, or a directory as an archive
    Get(GetArguments),
    /// Find names
    Find(FindArguments),
    /// Take a mount away
    Umount(OfMount),
}

#[derive(Debug, Args)]
pub(in crate::ctl) struct MountArguments {
    /// The restore point
    #[arg(long, value_name = "ID")]
    backup_id: String,
    /// Number of the disk [default: all disks, so that what spans disks can be read]
    #[arg(long, value_name = "N")]
    disk: Option<u32>,
    /// Show the files under a directory of this name on the hub too, by FUSE
    #[arg(long, value_name = "NAME")]
    path: Option<String>,
}

#[derive(Debug, Args)]
pub(in crate::ctl) struct OfMount {
    /// The mount
    mount: String,
}

#[derive(Debug, Args)]
pub(in crate::ctl) struct LsArguments {
    /// The mount
    mount: String,
    /// The directory: /VOLUME/PATH
    #[arg(default_value = "/")]
    path: OsString,
    /// Permissions, owner, size and time too
    #[arg(short, long)]
    long: bool,
    /// What is below, too
    #[arg(short = 'R', long)]
    recursive: bool,
}

#[derive(Debug, Args)]
pub(in crate::ctl) struct StatArguments {
    /// The mount
    mount: String,
    /// The file: /VOLUME/PATH
    path: OsString,
    /// Of a link, tell of what it points to
    #[arg(short = 'L', long)]
    follow: bool,
}

#[derive(Debug, Args)]
pub(in crate::ctl) struct FindArguments {
    /// The mount
    mount: String,
    /// A part of the name, in any case; or all of it with * for anything and ? for a character
    name: String,
    /// Look below this directory [default: all volumes]
    #[arg(long, value_name = "PATH")]
    path: Option<OsString>,
    /// At most so many
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

pub(super) fn run(context: &Context, command: FilesCommand) -> CtlResult<u8> {
    match command {
        FilesCommand::Mount(arguments) => mount(context, &arguments),
        FilesCommand::Mounts => mounts(context),
        FilesCommand::Volumes(of) => {
            let found = context.api.get(&address(&of.mount, "volumes"))?;
            context.out.show(&found, || volumes(&found))?;
            Ok(OK)
        }
        FilesCommand::Ls(arguments) => ls(context, &arguments),
        FilesCommand::Stat(arguments) => {
            let found = info(context, &arguments.mount, &arguments.path, arguments.follow)?;
            context.out.show(&found, || describe(&found))?;
            Ok(OK)
        }
        FilesCommand::Cat(arguments) => get::cat(context, &arguments),
        FilesCommand::Get(arguments) => get::get(context, &arguments),
        FilesCommand::Find(arguments) => find(context, &arguments),
        FilesCommand::Umount(of) => {
            let gone = unmount(context, &of.mount)?;
            context.out.done(&gone, || message(&gone))?;
            Ok(OK)
        }
    }
}

/// An address of a mount.
pub(super) fn address(mount: &str, what: &str) -> String {
    format!("{}/{what}", mount_address(mount))
}

/// An address of something in a mount.
pub(super) fn address_of(mount: &str, what: &str, path: &OsStr) -> String {
    format!("{}?path={}", address(mount, what), encode_bytes(path.as_bytes()))
}

/// What is known of a file.
pub(super) fn info(context: &Context, mount: &str, path: &OsStr, follow: bool) -> CtlResult<Value> {
    let address = address_of(mount, "file-info", path);
    context.api.get(&format!("{address}&follow={follow}"))
}

/// Makes a mount.
pub(super) fn make(
    context: &Context,
    backup: &str,
    disk: Option<u32>,
    path: Option<&str>,
) -> CtlResult<Value> {
    let mut wish = json!({"backup_id": backup});
    if let Some(disk) = disk {
        wish["disk_index"] = disk.into();
    }
    if let Some(path) = path {
        wish["mount_path"] = path.into();
    }
    let made = context.api.post("/restore/mount", &wish, LONG)?;
    if made["status"] == "failed" {
        let cause = format!("the mount failed: {}", word(&made, "error_message"));
        return Err(CtlError::failed(cause, "the hub's log says more"));
    }
    Ok(made)
}

/// Takes a mount away.
pub(super) fn unmount(context: &Context, mount: &str) -> CtlResult<Value> {
    context.api.delete(&mount_address(mount))
}

/// The address of a mount itself.
pub(super) fn mount_address(mount: &str) -> String {
    format!("/restore/{}", encode(mount))
}

pub(in crate::ctl) fn mount(context: &Context, arguments: &MountArguments) -> CtlResult<u8> {
    let MountArguments { backup_id, disk, path } = arguments;
    let made = make(context, backup_id, *disk, path.as_deref())?;
    context.out.show(&made, || {
        let mut rows = vec![
            ("mount", word(&made, "mount_id")),
            ("vm", word(&made, "vm_name")),
            ("backup", word(&made, "backup_id")),
            ("until", format!("{} unless it is used", time(&made, "expires_at"))),
        ];
        if made["mount_path"].is_string() {
            rows.push(("path", word(&made, "mount_path")));
        }
        format!("{}\n\n{}", fields(&rows), volumes(&made))
    })?;
    Ok(OK)
}

fn mounts(context: &Context) -> CtlResult<u8> {
    let found = context.api.get("/restore/mounts")?;
    context.out.show(&found, || {
        let row = |mount: &Value| {
            vec![
                word(mount, "mount_id"),
                word(mount, "vm_name"),
                word(mount, "backup_id"),
                word(mount, "status"),
                number(mount, "requests_in_flight").to_string(),
                bytes(mount, "memory_bytes"),
                time(mount, "expires_at"),
            ]
        };
        let rows: Vec<_> = each(&found, "mounts").map(row).collect();
        table(&["MOUNT", "VM", "BACKUP", "STATE", "REQUESTS", "MEMORY", "UNTIL"], &rows)
    })?;
    Ok(OK)
}

/// Volumes, each with its status; below them why some cannot be trusted, or are not shown.
fn volumes(found: &Value) -> String {
    let row = |volume: &Value| {
        vec![
            word(volume, "name"),
            word(volume, "status").to_uppercase(),
            word(volume, "filesystem_type"),
            bytes(volume, "size"),
            bytes(volume, "used"),
            word(volume, "label"),
            word(volume, "place"),
        ]
    };
    let rows: Vec<_> = each(found, "volumes").map(row).collect();
    let titles = ["VOLUME", "STATUS", "TYPE", "SIZE", "USED", "LABEL", "PLACE"];
    let mut lines = vec![table(&titles, &rows)];
    let reasons = each(found, "volumes").filter(|volume| volume["reason"].is_string());
    let reason = |volume: &Value| {
        let (name, status) = (word(volume, "name"), word(volume, "status").to_uppercase());
        format!("{name} is {status}: {}", word(volume, "reason"))
    };
    let notes = each(found, "notes").filter_map(Value::as_str).map(harmless);
    let told: Vec<_> = reasons.map(reason).chain(notes).collect();
    if !told.is_empty() {
        lines.push(String::new());
        lines.extend(told);
    }
    lines.join("\n")
}

/// A file in a line.
fn row(file: &Value, name: &str) -> Vec<String> {
    let kind = match file["type"].as_str().unwrap_or_default() {
        "file" => '-',
        "directory" => 'd',
        "symlink" => 'l',
        "char_device" => 'c',
        "block_device" => 'b',
        "fifo" => 'p',
        "socket" => 's',
        _ => '?',
    };
    let mode = u32::from_str_radix(file["mode"].as_str().unwrap_or_default(), 8).unwrap_or(0);
    let mut name = harmless(name);
    if let Some(target) = file["symlink_target"].as_str() {
        name = format!("{name} -> {}", harmless(target));
    }
    if let Some(note) = file["note"].as_str() {
        name = format!("{name}  ({})", harmless(note));
    }
    vec![
        format!("{kind}{}", permissions(mode)),
        format!("{}:{}", number(file, "uid"), number(file, "gid")),
        number(file, "size").to_string(),
        time(file, "modified_time"),
        name,
    ]
}

/// `rwxr-xr-x`, with the set-id and sticky bits where `ls` has them.
fn permissions(mode: u32) -> String {
    let mut text = String::new();
    for (shift, special, set) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => set.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// All pages of a directory, one after the other.
fn pages(
    context: &Context,
    mount: &str,
    path: &OsStr,
    mut each_page: impl FnMut(Value) -> CtlResult<()>,
) -> CtlResult<()> {
    let address = address_of(mount, "files", path);
    let mut cursor = None::<String>;
    loop {
        let mut from = format!("{address}&limit={NAMES}");
        if let Some(cursor) = &cursor {
            from.push_str(&format!("&cursor={}", encode(cursor)));
        }
        let page = context.api.get(&from)?;
        let next = page["next_cursor"].as_str().map(str::to_owned);
        each_page(page)?;
        if next.is_none() {
            return Ok(());
        }
        if next == cursor {
            let cause = "the hub gives the same part of a directory again and again";
            return Err(CtlError::failed(cause, "please report this"));
        }
        cursor = next;
    }
}

fn sort(files: &mut [Value]) {
    files.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
}

fn ls(context: &Context, arguments: &LsArguments) -> CtlResult<u8> {
    let LsArguments { mount, path, long, recursive } = arguments;
    let mut all = Vec::new();
    let mut code = OK;
    // Paths that are still to be listed, and their depths.
    let mut ahead = vec![(path.clone(), 0)];
    let mut first = true;
    while let Some((directory, depth)) = ahead.pop() {
        if *recursive && !context.out.json {
            let gap = if std::mem::take(&mut first) { "" } else { "\n" };
            line(&format!("{gap}{}:", harmless(&directory.to_string_lossy())))?;
        }
        let mut below = Vec::new();
        let listed = pages(context, mount, &directory, |mut page| {
            let Some(files) = page["files"].as_array_mut() else { return Ok(()) };
            // Of a directory with more names than a page, each page for itself.
            sort(files);
            let inside = files.iter().filter(|file| *recursive && file["type"] == "directory");
            below.extend(inside.filter_map(|file| file["path"].as_str().map(OsString::from)));
            if context.out.json {
                all.append(files);
                return Ok(());
            }
            print(files, *long)
        });
        match listed {
            // What was asked for cannot be listed.
            Err(error) if depth == 0 => return Err(error),
            Err(error) => {
                code = FAILED;
                let name = harmless(&directory.to_string_lossy());
                complain(&format!("{name}: {}", error.cause));
            }
            Ok(()) => {}
        }
        if depth >= DEPTH && !below.is_empty() {
            code = FAILED;
            let name = harmless(&directory.to_string_lossy());
            complain(&format!("{name}: too deep, what is below is not listed"));
            below.clear();
        }
        ahead.extend(below.into_iter().rev().map(|path| (path, depth + 1)));
    }
    if context.out.json {
        let path = path.to_string_lossy();
        let told = json!({"mount_id": mount, "path": path, "total_count": all.len(), "files": all});
        context.out.show(&told, String::new)?;
    }
    Ok(code)
}

fn print(files: &[Value], long: bool) -> CtlResult<()> {
    if files.is_empty() {
        return Ok(());
    }
    let name = |file: &Value| file["name"].as_str().unwrap_or_default().to_owned();
    if !long {
        let plain = |file: &Value| {
            let end = if file["type"] == "directory" { "/" } else { "" };
            harmless(&name(file)) + end
        };
        let lines: Vec<_> = files.iter().map(plain).collect();
        return line(&lines.join("\n"));
    }
    let rows: Vec<_> = files.iter().map(|file| row(file, &name(file))).collect();
    let text = table(&["MODE", "OWNER", "SIZE", "MODIFIED", "NAME"], &rows);
    line(&text)
}

fn describe(file: &Value) -> String {
    let mut rows = vec![
        ("path", word(file, "path")),
        ("type", word(file, "type")),
        ("size", format!("{} ({})", size(number(file, "size")), number(file, "size"))),
        ("mode", word(file, "mode")),
        ("owner", format!("{}:{}", number(file, "uid"), number(file, "gid"))),
        ("links", number(file, "links").to_string()),
    ];
    for (name, key) in [
        ("allocated", "allocated"),
        ("target", "symlink_target"),
        ("modified", "modified_time"),
        ("changed", "changed_time"),
        ("accessed", "accessed_time"),
        ("created", "created_time"),
        ("note", "note"),
        ("entity tag", "etag"),
    ] {
        if !file[key].is_null() {
            rows.push((name, word(file, key)));
        }
    }
    let attributes: Vec<_> = each(file, "xattrs").map(|x| word(x, "name")).collect();
    if !attributes.is_empty() {
        rows.push(("attributes", attributes.join(" ")));
    }
    let mut status = word(file, "volume_status").to_uppercase();
    if file["volume_reason"].is_string() {
        status = format!("{status}: {}", word(file, "volume_reason"));
    }
    rows.push(("volume", status));
    fields(&rows)
}

fn find(context: &Context, arguments: &FindArguments) -> CtlResult<u8> {
    let FindArguments { mount, name, path, limit } = arguments;
    let mut address = address_of(mount, "search", path.as_deref().unwrap_or("/".as_ref()));
    address.push_str(&format!("&name={}", encode(name)));
    if let Some(limit) = limit {
        address.push_str(&format!("&limit={limit}"));
    }
    let found = context.api.get_within(&address, LONG)?;
    let lines: Vec<_> = each(&found, "files").map(|file| word(file, "path")).collect();
    if context.out.json || !lines.is_empty() {
        context.out.show(&found, || lines.join("\n"))?;
    }
    for trouble in each(&found, "errors") {
        let text = format!("{}: {}", word(trouble, "path"), word(trouble, "error"));
        complain(&text);
    }
    if found["more"] == true {
        context.out.note("there may be more: --limit N tells more, --path PATH looks in less");
    }
    Ok(if each(&found, "errors").next().is_some() { FAILED } else { OK })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_told_as_ls_does() {
        for (mode, text) in [
            (0o644, "rw-r--r--"),
            (0o4755, "rwsr-xr-x"),
            (0o2640, "rw-r-S---"),
            (0o1777, "rwxrwxrwt"),
            (0o7000, "--S--S--T"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }

    #[test]
    fn a_volume_that_is_not_shown_says_so_and_why() {
        let found = json!({"volumes": [
            {"name": "disk0-p1", "status": "replayed", "filesystem_type": "ext4", "size": 1024},
            {"name": "disk0-p2", "status": "refused", "reason": "LUKS\u{1b}[2J", "size": 2048},
        ], "notes": ["disk 1 is empty"]});
        let text = volumes(&found);
        assert!(text.contains("disk0-p1  REPLAYED  ext4"), "{text}");
        assert!(text.contains("disk0-p2 is REFUSED: LUKS\\u{1b}[2J\ndisk 1 is empty"), "{text}");
    }
}
