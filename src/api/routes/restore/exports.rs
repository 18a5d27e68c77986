//! Restore points as disks: exports, and what differs.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::api::Api;
use crate::api::auth::{Operator, Viewer};
use crate::api::error::{ApiResult, Body, Query};
use crate::api::views::Done;
use crate::model::Timestamp;
use crate::restore::{RestoreExport, Wish, difference};

/// Ranges of a difference that are told unless fewer are asked for, and at most.
const RANGES: usize = 10_000;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(export))
        .routes(routes!(list))
        .routes(routes!(remove))
        .routes(routes!(diff))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewExport {
    /// The restore point.
    backup_id: String,
    /// Number of the disk.
    #[serde(default)]
    disk_index: u32,
    /// Take writes, and throw them away with the export: to boot from it.
    #[serde(default)]
    writable: bool,
}

/// A restore point as an NBD export.
#[derive(Debug, Serialize, ToSchema)]
struct ExportView {
    export_name: String,
    /// `nbd://HOST:PORT/EXPORT`
    nbd_uri: String,
    backup_id: String,
    disk_index: u32,
    writable: bool,
    /// Bytes of the disk.
    size: u64,
    connections: usize,
    #[schema(value_type = String)]
    created_at: Timestamp,
}

impl ExportView {
    fn new(api: &Api, export: RestoreExport) -> Self {
        let settings = api.backups.settings();
        let port = export.port.unwrap_or(settings.nbd_port);
        Self {
            nbd_uri: format!("nbd://{}:{port}/{}", settings.nbd_host, export.name),
            export_name: export.name,
            backup_id: export.backup_id,
            disk_index: export.disk_id,
            writable: export.writable,
            size: export.size,
            connections: export.connections,
            created_at: export.created_at,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct ExportList {
    exports: Vec<ExportView>,
    total: usize,
}

/// Exports a restore point: read-only, or with an overlay that is thrown away. It is taken away when
/// nobody has been connected for the idle time, and with the hub.
#[utoipa::path(post, path = "/restore/export", tag = "restore", request_body = NewExport,
    responses((status = 201, body = ExportView)))]
async fn export(
    Operator(caller): Operator,
    State(api): State<Api>,
    Body(body): Body<NewExport>,
) -> ApiResult<(StatusCode, Json<ExportView>)> {
    let wish =
        Wish { backup_id: body.backup_id, disk_id: body.disk_index, writable: body.writable };
    let restores = std::sync::Arc::clone(&api.restores);
    let exported = api.blocking(move |_| restores.export(&wish, &caller.name)).await?;
    Ok((StatusCode::CREATED, Json(ExportView::new(&api, exported))))
}

/// Lists the exports of restore points.
#[utoipa::path(get, path = "/restore/exports", tag = "restore",
    responses((status = 200, body = ExportList)))]
async fn list(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<ExportList>> {
    let restores = std::sync::Arc::clone(&api.restores);
    let found = api.blocking(move |_| Ok(restores.list())).await?;
    let exports: Vec<_> = found.into_iter().map(|export| ExportView::new(&api, export)).collect();
    Ok(Json(ExportList { total: exports.len(), exports }))
}

/// Takes an export of a restore point away, with what was written to it.
#[utoipa::path(delete, path = "/restore/exports/{name}", tag = "restore",
    params(("name" = String, Path)), responses((status = 200, body = Done)))]
async fn remove(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(name): Path<String>,
) -> ApiResult<Json<Done>> {
    let restores = std::sync::Arc::clone(&api.restores);
    api.blocking(move |_| restores.remove(&name, &caller.name)).await?;
    Ok(Json(Done::new("the export is closed")))
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
