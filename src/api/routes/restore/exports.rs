//! Restore points as disks: exports.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::api::Api;
use crate::api::auth::{Operator, Viewer};
use crate::api::error::{ApiResult, Body};
use crate::api::views::Done;
use crate::model::Timestamp;
use crate::restore::{RestoreExport, Wish};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(export)).routes(routes!(list)).routes(routes!(remove))
}

#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = NewRestoreExport)]
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
#[schema(as = RestoreExport)]
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
#[schema(as = RestoreExportList)]
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
