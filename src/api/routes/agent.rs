//! The callbacks of capture agents.

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Api;
use super::super::auth::Agent;
use super::super::error::{ApiResult, Body, Query};
use super::super::views::Done;
use crate::backup::Telemetry;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(change_id))
        .routes(routes!(complete))
        .routes(routes!(telemetry))
}

#[derive(Debug, Deserialize, IntoParams)]
struct ChangeIdQuery {
    /// The VM.
    vm_name: String,
    /// Number of the disk.
    #[serde(default)]
    disk_id: u32,
}

/// All values are strings: the agent decodes them so.
#[derive(Debug, Serialize, ToSchema)]
struct ChangeIdAnswer {
    vm_name: String,
    disk_id: String,
    /// Send what changed since; everything where empty.
    change_id: String,
    backup_job_id: String,
    message: String,
}

/// What the agent of a VM's running backup is to send of a disk.
#[utoipa::path(get, path = "/backups/changeid", tag = "agent", params(ChangeIdQuery),
    responses((status = 200, body = ChangeIdAnswer)))]
async fn change_id(
    _agent: Agent,
    State(api): State<Api>,
    Query(query): Query<ChangeIdQuery>,
) -> ApiResult<Json<ChangeIdAnswer>> {
    let ChangeIdQuery { vm_name, disk_id } = query;
    let name = vm_name.clone();
    let found = api.blocking(move |backups| backups.change_id(&name, disk_id)).await?;
    Ok(Json(ChangeIdAnswer {
        vm_name,
        disk_id: disk_id.to_string(),
        change_id: found.change_id,
        backup_job_id: found.backup_id,
        message: found.message,
    }))
}

/// Agents send a number of bytes too; the hub counts for itself.
#[derive(Debug, Deserialize, ToSchema)]
struct Complete {
    /// The change id of the source at the time of this backup.
    #[serde(default)]
    change_id: String,
    /// Number of the disk.
    #[serde(default)]
    disk_id: u32,
}

/// Completes a disk. 200 means that it is durable; with the last disk, that there is a restore
/// point.
#[utoipa::path(post, path = "/backups/{id}/complete", tag = "agent", params(("id" = String, Path)),
    request_body = Complete, responses((status = 200, body = Done)))]
async fn complete(
    _agent: Agent,
    State(api): State<Api>,
    Path(id): Path<String>,
    Body(body): Body<Complete>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| backups.complete(&id, body.disk_id, &body.change_id)).await?;
    Ok(Json(Done::new("the disk is complete")))
}

/// Takes telemetry: a sign of life, never the truth.
#[utoipa::path(post, path = "/telemetry/backup/{id}", tag = "agent", params(("id" = String, Path)),
    request_body = Telemetry, responses((status = 200, body = Done)))]
async fn telemetry(
    _agent: Agent,
    State(api): State<Api>,
    Path(id): Path<String>,
    Body(telemetry): Body<Telemetry>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| backups.telemetry(&id, telemetry)).await?;
    Ok(Json(Done::new("noted")))
}
