//! `sendense-ctl restore diff`

use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::Context;
use crate::ctl::error::{CtlResult, OK};
use crate::ctl::http::query;
use crate::ctl::output::{bytes, each, harmless, number, size, table, word};

/// Time for a comparison of files: a large machine has millions of them.
const COMPARISON: Duration = Duration::from_secs(4 * 3600);

#[derive(Debug, Args)]
pub(in crate::ctl) struct DiffArguments {
    /// The first restore point
    from: String,
    /// The second
    to: String,
    /// Number of the disk
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "files")]
    disk: u32,
    /// Tell which files differ, on all disks, instead of ranges of one disk
    #[arg(long)]
    files: bool,
}

pub(super) fn run(context: &Context, arguments: &DiffArguments) -> CtlResult<u8> {
    if arguments.files { files(context, arguments) } else { ranges(context, arguments) }
}

fn ranges(context: &Context, arguments: &DiffArguments) -> CtlResult<u8> {
    let DiffArguments { from, to, disk, .. } = arguments;
    let disk = disk.to_string();
    let pairs = [("from", Some(from.as_str())), ("to", Some(to)), ("disk_index", Some(&disk))];
    let found = context.api.get(&format!("/restore/diff{}", query(&pairs)))?;
    context.out.show(&found, || {
        let row = |range: &Value| {
            vec![number(range, "offset").to_string(), number(range, "length").to_string()]
        };
        let rows: Vec<_> = each(&found, "ranges").map(row).collect();
        let more = if found["more"] == true { "\n(and more ranges)" } else { "" };
        let changed = bytes(&found, "changed_bytes");
        format!("{}\n{changed} differ{more}", table(&["OFFSET", "LENGTH"], &rows))
    })?;
    Ok(OK)
}

fn files(context: &Context, arguments: &DiffArguments) -> CtlResult<u8> {
    let DiffArguments { from, to, .. } = arguments;
    let pairs = [("from", Some(from.as_str())), ("to", Some(to))];
    let found =
        context.api.get_within(&format!("/restore/diff/files{}", query(&pairs)), COMPARISON)?;
    context.out.show(&found, || {
        let sized = |change: &Value, key: &str| {
            change[key].as_u64().map_or_else(|| "-".to_owned(), size)
        };
        let row = |change: &Value| {
            vec![
                word(change, "change"),
                word(change, "type"),
                sized(change, "size_before"),
                sized(change, "size_after"),
                harmless(&word(change, "path")),
            ]
        };
        let rows: Vec<_> = each(&found, "changes").map(row).collect();
        let mut text = table(&["CHANGE", "TYPE", "BEFORE", "AFTER", "PATH"], &rows);
        for note in each(&found, "notes") {
            let note = harmless(note.as_str().unwrap_or_default());
            text.push_str(&format!("\nnote: {note}"));
        }
        let count = |key: &str| number(&found, key);
        text.push_str(&format!(
            "\n{} added, {} removed, {} changed, {} with other metadata; {} files compared, {} read",
            count("added"),
            count("removed"),
            count("changed"),
            count("metadata"),
            count("files_compared"),
            bytes(&found, "bytes_read"),
        ));
        text
    })?;
    Ok(OK)
}
