//! Mounts: restore points whose files can be looked at.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use guest::{Status, VolumeAbout};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::stream::STREAMS;
use crate::api::Api;
use crate::api::auth::{Operator, Viewer};
use crate::api::error::{ApiResult, Body};
use crate::api::views::Done;
use crate::model::Timestamp;
use crate::restore::{MountInfo, MountStatus, MountWish};

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(mount))
        .routes(routes!(list))
        .routes(routes!(unmount))
        .routes(routes!(volumes))
        .routes(routes!(resources))
        .routes(routes!(cleanup))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewMount {
    /// The restore point.
    backup_id: String,
    /// Number of the disk; all disks where it is left out, so that what spans disks can be read.
    disk_index: Option<u32>,
    /// Show the tree under a directory of this name too, by FUSE.
    mount_path: Option<String>,
}

/// A volume of a mount.
#[derive(Debug, Serialize, ToSchema)]
struct VolumeView {
    /// Its name: the first part of the paths of its files.
    name: String,
    /// Where it lies.
    place: String,
    /// Bytes in all.
    size: u64,
    /// Bytes used, where it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    used: Option<u64>,
    /// What it holds; empty where nothing was recognised.
    filesystem_type: String,
    label: String,
    uuid: String,
    /// `clean`; `replayed`: what the machine would see after a reset; `stale`: as it lies on the
    /// disk, the newest changes may be missing; `refused`: it is not shown.
    status: &'static str,
    /// Why it is stale or refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// A status, and the reason for it.
pub(super) fn told(status: &Status) -> (&'static str, Option<&str>) {
    match status {
        Status::Clean => ("clean", None),
        Status::Replayed => ("replayed", None),
        Status::Stale(reason) => ("stale", Some(reason)),
        Status::Refused(reason) => ("refused", Some(reason)),
    }
}

impl From<VolumeAbout> for VolumeView {
    fn from(volume: VolumeAbout) -> Self {
        let (status, reason) = told(&volume.status);
        Self {
            reason: reason.map(str::to_owned),
            status,
            name: volume.name,
            place: volume.place,
            size: volume.size,
            used: volume.used,
            filesystem_type: volume.kind,
            label: volume.label,
            uuid: volume.uuid,
        }
    }
}

/// A restore point whose files can be looked at.
#[derive(Debug, Serialize, ToSchema)]
struct MountView {
    mount_id: String,
    backup_id: String,
    vm_name: String,
    /// Number of the disk; none where all are mounted.
    disk_index: Option<u32>,
    /// Directory with the same tree, where one was asked for.
    mount_path: Option<String>,
    /// Kind of the first file system that can be read; empty where there is none.
    filesystem_type: String,
    /// `mounted`, or `failed`.
    status: &'static str,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
    created_by: String,
    #[schema(value_type = String)]
    created_at: Timestamp,
    /// When it goes away unless it is used.
    #[schema(value_type = String)]
    expires_at: Timestamp,
    /// Requests that use it now.
    requests_in_flight: usize,
    /// Bytes of memory of its worker.
    memory_bytes: u64,
    volumes: Vec<VolumeView>,
    /// What people should know of it.
    notes: Vec<String>,
}

impl From<MountInfo> for MountView {
    fn from(mount: MountInfo) -> Self {
        let readable =
            mount.volumes.iter().find(|volume| !matches!(volume.status, Status::Refused(_)));
        let (status, error_message) = match mount.status {
            MountStatus::Mounted => ("mounted", None),
            MountStatus::Failed(reason) => ("failed", Some(reason)),
        };
        Self {
            filesystem_type: readable.map_or(String::new(), |volume| volume.kind.clone()),
            mount_id: mount.id,
            backup_id: mount.backup_id,
            vm_name: mount.vm_name,
            disk_index: mount.disk,
            mount_path: mount.mount_path.map(|path| path.to_string_lossy().into_owned()),
            status,
            error_message,
            created_by: mount.created_by,
            created_at: mount.created_at,
            expires_at: mount.expires_at,
            requests_in_flight: mount.requests_in_flight,
            memory_bytes: mount.memory,
            volumes: mount.volumes.into_iter().map(VolumeView::from).collect(),
            notes: mount.notes,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct MountList {
    mounts: Vec<MountView>,
    total: usize,
}

#[derive(Debug, Serialize, ToSchema)]
struct VolumeList {
    mount_id: String,
    volumes: Vec<VolumeView>,
}

/// Mounts a restore point: finds the volumes on its disks, and reads their journals, in a process of
/// its own. It goes away when nobody has used it for the idle time, and with the hub.
#[utoipa::path(post, path = "/restore/mount", tag = "restore", request_body = NewMount,
    responses((status = 201, body = MountView),
        (status = 409, description = "it is no restore point, or there are too many mounts")))]
async fn mount(
    Operator(caller): Operator,
    State(api): State<Api>,
    Body(body): Body<NewMount>,
) -> ApiResult<(StatusCode, Json<MountView>)> {
    let wish = MountWish {
        backup_id: body.backup_id,
        disk: body.disk_index,
        mount_path: body.mount_path.filter(|path| !path.is_empty()),
    };
    let mounts = std::sync::Arc::clone(&api.mounts);
    let mounted = api.blocking(move |_| mounts.mount(&wish, &caller.name)).await?;
    Ok((StatusCode::CREATED, Json(mounted.into())))
}

/// Lists the mounts.
#[utoipa::path(get, path = "/restore/mounts", tag = "restore",
    responses((status = 200, body = MountList)))]
async fn list(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<MountList>> {
    let mounts = std::sync::Arc::clone(&api.mounts);
    let found = api.blocking(move |_| Ok(mounts.list())).await?;
    let mounts: Vec<_> = found.into_iter().map(MountView::from).collect();
    Ok(Json(MountList { total: mounts.len(), mounts }))
}

/// Takes a mount away; downloads from it are broken off.
#[utoipa::path(delete, path = "/restore/{id}", tag = "restore", params(("id" = String, Path)),
    responses((status = 200, body = Done)))]
async fn unmount(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    let mounts = std::sync::Arc::clone(&api.mounts);
    api.blocking(move |_| mounts.unmount(&id, &caller.name)).await?;
    Ok(Json(Done::new("the mount is gone")))
}

/// Lists the volumes of a mount, and how much each can be trusted.
#[utoipa::path(get, path = "/restore/{id}/volumes", tag = "restore",
    params(("id" = String, Path)), responses((status = 200, body = VolumeList)))]
async fn volumes(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<VolumeList>> {
    let mounts = std::sync::Arc::clone(&api.mounts);
    let found = api.blocking(move |_| mounts.info(&id)).await?;
    let volumes = found.volumes.into_iter().map(VolumeView::from).collect();
    Ok(Json(VolumeList { mount_id: found.id, volumes }))
}

/// What mounts take.
#[derive(Debug, Serialize, ToSchema)]
struct Resources {
    active_mounts: usize,
    max_mounts: usize,
    /// Bytes of memory of all workers.
    worker_memory_bytes: u64,
    requests_in_flight: usize,
    /// Downloads that run.
    downloads: usize,
    max_downloads: usize,
    /// Time without use after which a mount goes away.
    idle_seconds: u64,
}

/// Tells what mounts take, and what they may take.
#[utoipa::path(get, path = "/restore/resources", tag = "restore",
    responses((status = 200, body = Resources)))]
async fn resources(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<Resources>> {
    let mounts = std::sync::Arc::clone(&api.mounts);
    let found = api.blocking(move |_| Ok(mounts.list())).await?;
    let settings = api.mounts.settings();
    Ok(Json(Resources {
        active_mounts: found.len(),
        max_mounts: settings.mounts,
        worker_memory_bytes: found.iter().map(|mount| mount.memory).sum(),
        requests_in_flight: found.iter().map(|mount| mount.requests_in_flight).sum(),
        downloads: api.streams.count(),
        max_downloads: STREAMS,
        idle_seconds: settings.idle.as_secs(),
    }))
}

/// How mounts are taken away that nobody uses.
#[derive(Debug, Serialize, ToSchema)]
struct CleanupView {
    /// Time without use after which a mount goes away.
    idle_seconds: u64,
    /// Mounts whose worker is gone.
    failed_mounts: usize,
    /// When the next one goes away unless it is used.
    #[schema(value_type = Option<String>)]
    next_expiry: Option<Timestamp>,
    /// How many went away since the hub started.
    cleaned: u64,
    /// When it was looked for them last.
    #[schema(value_type = Option<String>)]
    last_run: Option<Timestamp>,
}

/// Tells how mounts are taken away that nobody uses.
#[utoipa::path(get, path = "/restore/cleanup-status", tag = "restore",
    responses((status = 200, body = CleanupView)))]
async fn cleanup(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<CleanupView>> {
    let mounts = std::sync::Arc::clone(&api.mounts);
    let found = api.blocking(move |_| Ok(mounts.cleanup())).await?;
    Ok(Json(CleanupView {
        idle_seconds: found.idle.as_secs(),
        failed_mounts: found.failed,
        next_expiry: found.next_expiry,
        cleaned: found.ended_idle,
        last_run: found.last_look,
    }))
}
