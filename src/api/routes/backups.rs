//! Backups, their disks and chains.

use axum::Json;
use axum::body::{Body as HttpBody, Bytes};
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Api;
use super::super::auth::{Admin, Operator, Viewer};
use super::super::error::{ApiError, ApiResult, Body, Query, invalid};
use super::super::progress;
use super::super::views::{
    BackupList, BackupResponse, BackupStats, ChainResponse, DiskList, Done, ListBackups,
    PlanResponse, StartBackup, StartQuery,
};
use crate::backup::{Backups, Failure, Request};
use crate::catalog::{BackupFilter, Copy};
use crate::model::{BackupState, CopyState, Timestamp};

/// Clusters whose checksums are sent at a time.
const CHECKSUMS: u64 = 128 << 10;
/// Such parts that wait to be sent.
const PARTS: usize = 4;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(start, list))
        .routes(routes!(stats))
        .routes(routes!(show, delete))
        .routes(routes!(disks))
        .routes(routes!(cancel))
        .routes(routes!(verify))
        .routes(routes!(follow))
        .routes(routes!(checksums))
        .routes(routes!(copies))
        .routes(routes!(copy))
        .routes(routes!(chain))
        .routes(routes!(chain_by_query))
        .routes(routes!(jobs))
        .routes(routes!(job))
}

fn respond(backups: &Backups, id: &str) -> Result<BackupResponse, Failure> {
    Ok(BackupResponse::new(backups, &backups.backup(id)?))
}

/// Starts a backup of all disks of a VM; with `dry_run=true` tells what it would do.
#[utoipa::path(post, path = "/backups", tag = "backups", params(StartQuery),
    request_body = StartBackup, responses(
        (status = 200, body = BackupResponse),
        (status = 409, description = "the VM has a running backup"),
        (status = 507, description = "the repository is too full")))]
async fn start(
    Operator(caller): Operator,
    State(api): State<Api>,
    Query(query): Query<StartQuery>,
    Body(body): Body<StartBackup>,
) -> ApiResult<Response> {
    if !matches!(body.agent.as_str(), "sna" | "caller") {
        return Err(invalid(format!("agent '{}' is none of: sna, caller", body.agent)));
    }
    let request = Request {
        vm_name: body.vm_name,
        kind: body.backup_type,
        repository: body.repository_id,
        policy_id: body.policy_id.filter(|id| !id.is_empty()),
        tags: body.tags,
        agent: body.agent,
    };
    if query.dry_run {
        let plan = api.blocking(move |backups| backups.plan(&request)).await?;
        return Ok(Json(PlanResponse::from(plan)).into_response());
    }
    let started = api.blocking(move |backups| {
        let backup = backups.start(&request, &caller.name)?;
        Ok(BackupResponse::new(backups, &backup))
    });
    Ok(Json(started.await?).into_response())
}

/// Lists backups, newest first.
#[utoipa::path(get, path = "/backups", tag = "backups", params(ListBackups),
    responses((status = 200, body = BackupList)))]
async fn list(
    _viewer: Viewer,
    State(api): State<Api>,
    Query(query): Query<ListBackups>,
) -> ApiResult<Json<BackupList>> {
    let filter = filter(query)?;
    list_by(api, filter).await
}

fn filter(query: ListBackups) -> ApiResult<BackupFilter> {
    let states = match query.status.as_deref().filter(|s| !s.is_empty()) {
        None => None,
        Some(word) => match BackupState::of_status(word) {
            states if states.is_empty() => return Err(invalid(format!("no status '{word}'"))),
            states => Some(states),
        },
    };
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    Ok(BackupFilter {
        vm_name: given(query.vm_name),
        vm_id: given(query.vm_context_id),
        repository_id: given(query.repository_id),
        states,
        kind: query.backup_type,
        id: None,
    })
}

async fn list_by(api: Api, filter: BackupFilter) -> ApiResult<Json<BackupList>> {
    let list = api.blocking(move |backups| {
        let found = backups.catalog().backups(&filter)?;
        let views: Vec<_> = found.iter().map(|b| BackupResponse::new(backups, b)).collect();
        Ok(BackupList { total: views.len(), backups: views })
    });
    Ok(Json(list.await?))
}

/// Sums over completed backups.
#[utoipa::path(get, path = "/backups/stats", tag = "backups", params(ListBackups),
    responses((status = 200, body = BackupStats)))]
async fn stats(
    _viewer: Viewer,
    State(api): State<Api>,
    Query(query): Query<ListBackups>,
) -> ApiResult<Json<BackupStats>> {
    let mut filter = filter(query)?;
    filter.states.get_or_insert(vec![BackupState::Completed]);
    let stats = api.blocking(move |backups| {
        let found = backups.catalog().backups(&filter)?;
        let sizes = found.iter().flat_map(|b| &b.disks).filter_map(|disk| disk.file_bytes);
        Ok(BackupStats {
            backup_count: found.len(),
            total_size_bytes: sizes.sum(),
            last_backup_at: found.iter().filter_map(|backup| backup.completed_at).max(),
        })
    });
    Ok(Json(stats.await?))
}

/// Shows a backup.
#[utoipa::path(get, path = "/backups/{id}", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = BackupResponse)))]
async fn show(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<BackupResponse>> {
    Ok(Json(api.blocking(move |backups| respond(backups, &id)).await?))
}

/// Deletes a backup that nothing builds on.
#[utoipa::path(delete, path = "/backups/{id}", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = Done), (status = 409, description = "others need it")))]
async fn delete(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| backups.delete(&id, &caller.name)).await?;
    Ok(Json(Done::new("the backup is deleted")))
}

/// The disks of a backup.
#[utoipa::path(get, path = "/backups/{id}/disks", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = DiskList)))]
async fn disks(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<DiskList>> {
    Ok(Json(api.blocking(move |backups| respond(backups, &id)).await?.into()))
}

/// Cancels a running backup; nothing is left of it but its row.
#[utoipa::path(post, path = "/backups/{id}/cancel", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = BackupResponse), (status = 409, description = "it has ended")))]
async fn cancel(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<BackupResponse>> {
    let cancelled = api.blocking(move |backups| {
        backups.cancel(&id, &caller.name)?;
        respond(backups, &id)
    });
    Ok(Json(cancelled.await?))
}

/// Reads all that a restore point itself stores, and compares it with its checksums.
#[utoipa::path(post, path = "/backups/{id}/verify", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = Done), (status = 409, description = "it is damaged")))]
async fn verify(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    let bytes = api.blocking(move |backups| backups.verify(&id, &caller.name)).await?;
    Ok(Json(Done::new(format!("{bytes} bytes read, all as they were written"))))
}

/// Server-sent events with the backup whenever it has changed, until it has ended.
#[utoipa::path(get, path = "/backups/{id}/events", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, description = "events named `progress` with a BackupResponse",
        content_type = "text/event-stream")))]
async fn follow(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Response> {
    let wanted = id.clone();
    api.blocking(move |backups| backups.backup(&wanted)).await?;
    Ok(progress::follow(api, id).into_response())
}

/// The checksums of a disk as it was, 8 bytes per cluster of 64 KiB: CRC-32 and half an XXH3, both
/// little-endian; zeroes where the cluster reads as zeroes.
#[utoipa::path(get, path = "/backups/{id}/disks/{disk}/checksums", tag = "backups",
    params(("id" = String, Path), ("disk" = u32, Path)),
    responses((status = 200, content_type = "application/octet-stream")))]
async fn checksums(
    _operator: Operator,
    State(api): State<Api>,
    Path((id, disk)): Path<(String, u32)>,
) -> ApiResult<Response> {
    let merged = api.blocking(move |backups| backups.checksums(&id, disk)).await?;
    let (send, receive) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(PARTS);
    let length = merged.clusters() * 8;
    tokio::task::spawn_blocking(move || {
        let mut from = 0;
        while from < merged.clusters() {
            let to = (from + CHECKSUMS).min(merged.clusters());
            let part = merged.encode(from, to).map(Bytes::from);
            let failed = part.is_err();
            if send.blocking_send(part).is_err() || failed {
                return;
            }
            from = to;
        }
    });
    let parts = futures_util::stream::unfold(receive, |mut receive| async move {
        receive.recv().await.map(|part| (part, receive))
    });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, length.to_string()),
    ];
    Ok((headers, HttpBody::from_stream(parts)).into_response())
}

/// A copy of a restore point in another repository.
#[derive(Debug, Serialize, ToSchema)]
struct CopyView {
    copy_id: String,
    backup_id: String,
    repository_id: String,
    status: CopyState,
    bytes_copied: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
    #[schema(value_type = String)]
    created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    completed_at: Option<Timestamp>,
}

#[derive(Debug, Serialize, ToSchema)]
struct CopyList {
    copies: Vec<CopyView>,
    total: usize,
}

/// Copies of a backup in other repositories.
#[utoipa::path(get, path = "/backups/{id}/copies", tag = "backups", params(("id" = String, Path)),
    responses((status = 200, body = CopyList)))]
async fn copies(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<CopyList>> {
    let found = api.blocking(move |backups| {
        backups.backup(&id)?;
        Ok(backups.catalog().copies(Some(&id))?)
    });
    let view = |copy: Copy| CopyView {
        copy_id: copy.id,
        backup_id: copy.backup_id,
        repository_id: copy.repository_id,
        status: copy.state,
        bytes_copied: copy.bytes_copied,
        error_message: copy.error,
        created_at: copy.created_at,
        completed_at: copy.completed_at,
    };
    let copies: Vec<_> = found.await?.into_iter().map(view).collect();
    Ok(Json(CopyList { total: copies.len(), copies }))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct AskForCopy {
    /// Id or name of the repository.
    repository_id: String,
}

/// That a copy is asked for.
#[derive(Debug, Serialize, ToSchema)]
struct CopyAsked {
    message: String,
    copy_id: String,
    status: CopyState,
}

/// Copies a restore point, with all that it builds on, into another repository, and verifies it
/// there. A copy that failed is tried again by asking again.
#[utoipa::path(post, path = "/backups/{id}/copy", tag = "backups", params(("id" = String, Path)),
    request_body = AskForCopy, responses((status = 201, body = CopyAsked)))]
async fn copy(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
    Body(body): Body<AskForCopy>,
) -> ApiResult<(StatusCode, Json<CopyAsked>)> {
    let asked = api
        .blocking(move |backups| backups.ask_for_copy(&id, &body.repository_id, &caller.name))
        .await?;
    let message = "the copy will be made".to_owned();
    let answer = CopyAsked { message, copy_id: asked.id, status: asked.state };
    Ok((StatusCode::CREATED, Json(answer)))
}

#[derive(Debug, Deserialize, IntoParams)]
struct DiskQuery {
    /// Number of the disk.
    #[serde(default)]
    disk_id: u32,
}

#[derive(Debug, Deserialize, IntoParams)]
struct ChainQuery {
    /// The VM.
    vm_name: String,
    /// Number of the disk.
    #[serde(default)]
    disk_id: u32,
}

/// The chain of a VM's disk that was changed last.
#[utoipa::path(get, path = "/backups/{id}/chain", tag = "backups",
    params(("id" = String, Path, description = "Name of the VM, or id of a backup"), DiskQuery),
    responses((status = 200, body = ChainResponse)))]
async fn chain(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(vm): Path<String>,
    Query(query): Query<DiskQuery>,
) -> ApiResult<Json<ChainResponse>> {
    chain_of(api, vm, query.disk_id).await
}

/// The same, by query.
#[utoipa::path(get, path = "/backup/chain", tag = "backups", params(ChainQuery),
    responses((status = 200, body = ChainResponse)))]
async fn chain_by_query(
    _viewer: Viewer,
    State(api): State<Api>,
    Query(query): Query<ChainQuery>,
) -> ApiResult<Json<ChainResponse>> {
    chain_of(api, query.vm_name, query.disk_id).await
}

async fn chain_of(api: Api, key: String, disk: u32) -> ApiResult<Json<ChainResponse>> {
    let chain = api.blocking(move |backups| {
        let catalog = backups.catalog();
        let (vm, of) = match catalog.vm_by_name(&key)? {
            Some(vm) => (vm, None),
            None => {
                let backup = backups.backup(&key).map_err(|_| Failure::not_found("VM", &key))?;
                let vm =
                    catalog.vm(&backup.vm_id)?.ok_or_else(|| Failure::not_found("VM", &key))?;
                (vm, Some(backup.id))
            }
        };
        let chains = catalog.chains(&vm.id, disk)?;
        let chain = chains
            .into_iter()
            .find(|chain| of.as_ref().is_none_or(|id| chain.backups.contains(id)))
            .ok_or_else(|| Failure::not_found("chain of disk", &disk.to_string()))?;
        let mut members = Vec::new();
        for id in &chain.backups {
            let backup = backups.backup(id)?;
            let row = backup.disks.iter().find(|d| d.disk_id == disk);
            let bytes = row.and_then(|d| d.file_bytes).unwrap_or(0);
            members.push((BackupResponse::new(backups, &backup), bytes));
        }
        Ok(ChainResponse::new(&vm, chain, members))
    });
    Ok(Json(chain.await?))
}

/// Lists jobs: running ones, or with `status` others. A backup is its own job.
#[utoipa::path(get, path = "/jobs", tag = "jobs", params(ListBackups),
    responses((status = 200, body = BackupList)))]
async fn jobs(
    _viewer: Viewer,
    State(api): State<Api>,
    Query(query): Query<ListBackups>,
) -> ApiResult<Json<BackupList>> {
    use BackupState::{Preparing, Queued, Receiving, Sealing};
    let mut filter = filter(query)?;
    filter.states.get_or_insert(vec![Queued, Preparing, Receiving, Sealing]);
    list_by(api, filter).await
}

/// Shows a job.
#[utoipa::path(get, path = "/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = BackupResponse)))]
async fn job(
    viewer: Viewer,
    state: State<Api>,
    id: Path<String>,
) -> Result<Json<BackupResponse>, ApiError> {
    show(viewer, state, id).await
}
