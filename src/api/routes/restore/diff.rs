//! What differs between two restore points: ranges of a disk, and files.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::waiting::Waiting;
use crate::api::Api;
use crate::api::auth::{Operator, Viewer};
use crate::api::error::{ApiResult, Query};
use crate::restore::files::names;
use crate::restore::{Change, difference, file_changes};

/// Ranges of a difference that are told unless fewer are asked for, and at most.
const RANGES: usize = 10_000;
/// Files that are told unless fewer are asked for, and at most.
const FILES: usize = 100_000;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(diff)).routes(routes!(files))
}

#[derive(Debug, Deserialize, IntoParams)]
struct DiffQuery {
    /// The first restore point.
    from: String,
    /// The second.
    to: String,
    /// Number of the disk.
    #[serde(default)]
    disk_index: u32,
    /// At most so many ranges.
    limit: Option<usize>,
}

/// A range of a disk.
#[derive(Debug, Serialize, ToSchema)]
struct Range {
    offset: u64,
    length: u64,
}

/// What differs between two restore points of a disk, in clusters of 64 KiB.
#[derive(Debug, Serialize, ToSchema)]
struct DiffView {
    from: String,
    to: String,
    disk_index: u32,
    /// Bytes in all ranges, told or not.
    changed_bytes: u64,
    ranges: Vec<Range>,
    /// There are more ranges than were told.
    more: bool,
}

/// Compares a disk at two restore points by their checksums; no data is read.
#[utoipa::path(get, path = "/restore/diff", tag = "restore", params(DiffQuery),
    responses((status = 200, body = DiffView)))]
async fn diff(
    _viewer: Viewer,
    State(api): State<Api>,
    Query(query): Query<DiffQuery>,
) -> ApiResult<Json<DiffView>> {
    let (disk, most) = (query.disk_index, query.limit.unwrap_or(RANGES).min(RANGES));
    let found = api
        .blocking(move |backups| difference(backups, (&query.from, &query.to), disk, most))
        .await?;
    let ranges = found.ranges.into_iter().map(|(offset, length)| Range { offset, length });
    Ok(Json(DiffView {
        from: found.from,
        to: found.to,
        disk_index: disk,
        changed_bytes: found.bytes,
        ranges: ranges.collect(),
        more: found.more,
    }))
}

#[derive(Debug, Deserialize, IntoParams)]
struct FilesQuery {
    /// The first restore point.
    from: String,
    /// The second.
    to: String,
    /// At most so many files.
    limit: Option<usize>,
}

/// A path that differs.
#[derive(Debug, Serialize, ToSchema)]
struct ChangeView {
    path: String,
    /// `added`, `removed`, `changed` (content, or what it is), or `metadata` (mode, owner, time only).
    change: &'static str,
    /// `file`, `directory`, `symlink` and so on.
    #[serde(rename = "type")]
    file_type: &'static str,
    /// Bytes of a file in the first restore point.
    #[serde(skip_serializing_if = "Option::is_none")]
    size_before: Option<u64>,
    /// Bytes of a file in the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    size_after: Option<u64>,
}

impl From<Change> for ChangeView {
    fn from(change: Change) -> Self {
        Self {
            path: names::shown(&change.path),
            change: change.kind.word(),
            file_type: super::view::type_word(change.file_type),
            size_before: change.before,
            size_after: change.after,
        }
    }
}

/// Which files differ between two restore points.
#[derive(Debug, Serialize, ToSchema)]
struct FilesDiffView {
    from: String,
    to: String,
    /// Of a directory that is new or gone only itself is told.
    changes: Vec<ChangeView>,
    added: u64,
    removed: u64,
    changed: u64,
    metadata: u64,
    /// Files that both have.
    files_compared: u64,
    /// Bytes of content that had to be read: where layouts or clusters differ.
    bytes_read: u64,
    /// There are more than were told, or the notes say what could not be compared.
    more: bool,
    notes: Vec<String>,
}

/// Tells which files differ between two restore points of a VM. What lies in clusters that have the same
/// checksums is not read. Takes two mounts while it lasts, and ends with its client.
#[utoipa::path(get, path = "/restore/diff/files", tag = "restore", params(FilesQuery),
    responses((status = 200, body = FilesDiffView)))]
async fn files(
    Operator(caller): Operator,
    State(api): State<Api>,
    Query(query): Query<FilesQuery>,
) -> ApiResult<Json<FilesDiffView>> {
    let most = query.limit.unwrap_or(FILES).min(FILES);
    let mounts = Arc::clone(&api.mounts);
    let (_waiting, go_on) = Waiting::new();
    let (from, to) = (query.from.clone(), query.to.clone());
    let found = api
        .blocking(move |backups| {
            file_changes((backups, &mounts), (&from, &to), most, &caller.name, &go_on)
        })
        .await?;
    let [added, removed, changed, metadata] = found.counts;
    Ok(Json(FilesDiffView {
        from: query.from,
        to: query.to,
        changes: found.changes.into_iter().map(ChangeView::from).collect(),
        added,
        removed,
        changed,
        metadata,
        files_compared: found.files,
        bytes_read: found.bytes_read,
        more: found.more,
        notes: found.notes,
    }))
}
