//! Repositories and policies.

use std::path::PathBuf;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Api;
use super::super::auth::{Admin, Operator, Viewer};
use super::super::error::{ApiResult, Body, Query};
use super::super::views::{Done, NewRepository, PolicyView, RepositoryView, StorageView};
use crate::backup::{Backups, Failure, FailureKind};
use crate::catalog::{BackupFilter, CopyMode, Policy, Repository};
use crate::model::{Timestamp, new_id};
use crate::repository::{Root, Space};

/// Types that are a directory here.
const TYPES: [&str; 4] = ["local", "nfs", "cifs", "smb"];

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(add, list))
        .routes(routes!(test))
        .routes(routes!(refresh))
        .routes(routes!(import))
        .routes(routes!(check))
        .routes(routes!(storage))
        .routes(routes!(remove))
        .routes(routes!(add_policy, list_policies))
        .routes(routes!(remove_policy))
        .routes(routes!(apply_policies))
}

#[derive(Debug, Serialize, ToSchema)]
struct RepositoryList {
    repositories: Vec<RepositoryView>,
    total: usize,
}

fn directory(new: &NewRepository) -> Result<PathBuf, Failure> {
    if !TYPES.contains(&new.kind.as_str()) {
        let message = format!("repositories of type '{}' are not possible", new.kind);
        let next = format!("mount it, and give its directory; types: {}", TYPES.join(", "));
        return Err(Failure::new(FailureKind::Unprocessable, message, next));
    }
    let path = new.config.get("path").and_then(|path| path.as_str()).map(PathBuf::from);
    path.filter(|path| path.is_absolute()).ok_or_else(|| {
        let next = "{\"config\": {\"path\": \"/directory\"}}";
        Failure::new(FailureKind::Invalid, "config.path must be an absolute path", next)
    })
}

fn storage_of(backups: &Backups, repository: &Repository) -> Result<StorageView, Failure> {
    let filter =
        BackupFilter { repository_id: Some(repository.id.clone()), ..BackupFilter::default() };
    let found = backups.catalog().backups(&filter)?;
    let used = found.iter().flat_map(|b| &b.disks).filter_map(|disk| disk.file_bytes).sum();
    let (space, error) = match Root::open(repository.path.as_ref()).and_then(|(r, _)| r.space()) {
        Ok(space) => (space, None),
        Err(error) => (Space { total: 0, free: 0 }, Some(error.to_string())),
    };
    Ok(StorageView {
        total_bytes: space.total,
        used_bytes: used,
        available_bytes: space.free,
        backup_count: found.len(),
        error,
    })
}

fn find(backups: &Backups, key: &str) -> Result<Repository, Failure> {
    backups.catalog().repository(key)?.ok_or_else(|| Failure::not_found("repository", key))
}

/// Makes a directory a repository, or takes one that is.
#[utoipa::path(post, path = "/repositories", tag = "repositories", request_body = NewRepository,
    responses((status = 201, body = RepositoryView)))]
async fn add(
    Admin(caller): Admin,
    State(api): State<Api>,
    Body(new): Body<NewRepository>,
) -> ApiResult<(StatusCode, Json<RepositoryView>)> {
    let added = api.blocking(move |backups| {
        let path = directory(&new)?;
        let (_, identity) = Root::create(&path, &new_id("repo"))?;
        let repository = Repository {
            id: identity.id,
            name: new.name,
            kind: new.kind,
            enabled: new.enabled,
            path: path.to_string_lossy().into_owned(),
            config: new.config,
            is_immutable: new.is_immutable,
            min_retention_days: new.min_retention_days,
            created_at: Timestamp::now(),
        };
        backups.catalog().add_repository(&repository)?;
        let text = format!("repository '{}' at {}", repository.name, repository.path);
        backups.catalog().event(&caller.name, "repository.added", &repository.id, &text)?;
        let storage = storage_of(backups, &repository)?;
        Ok(RepositoryView::new(repository, storage))
    });
    Ok((StatusCode::CREATED, Json(added.await?)))
}

/// Lists the repositories with their room.
#[utoipa::path(get, path = "/repositories", tag = "repositories",
    responses((status = 200, body = RepositoryList)))]
async fn list(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<RepositoryList>> {
    let list = api.blocking(|backups| {
        let mut repositories = Vec::new();
        for repository in backups.catalog().repositories()? {
            let storage = storage_of(backups, &repository)?;
            repositories.push(RepositoryView::new(repository, storage));
        }
        Ok(RepositoryList { total: repositories.len(), repositories })
    });
    Ok(Json(list.await?))
}

/// Tries whether a directory could be a repository: files are made, flushed and removed.
#[utoipa::path(post, path = "/repositories/test", tag = "repositories", request_body = NewRepository,
    responses((status = 200, body = StorageView)))]
async fn test(
    _admin: Admin,
    State(api): State<Api>,
    Body(new): Body<NewRepository>,
) -> ApiResult<Json<StorageView>> {
    let tried = api.blocking(move |_| {
        let space = Root::probe(&directory(&new)?).map_err(|e| {
            Failure::new(FailureKind::Unprocessable, e.to_string(), "check path and permissions")
        })?;
        let Space { total, free } = space;
        Ok(StorageView { total_bytes: total, available_bytes: free, ..StorageView::default() })
    });
    Ok(Json(tried.await?))
}

/// Asks all repositories for their room; the same as listing them, which always does.
#[utoipa::path(post, path = "/repositories/refresh-storage", tag = "repositories",
    responses((status = 200, body = RepositoryList)))]
async fn refresh(viewer: Viewer, state: State<Api>) -> ApiResult<Json<RepositoryList>> {
    list(viewer, state).await
}

#[derive(Debug, Deserialize, ToSchema)]
struct Import {
    /// Directory of the repository, on the hub.
    #[schema(value_type = String)]
    path: PathBuf,
}

#[derive(Debug, Serialize, ToSchema)]
struct Imported {
    repository_id: String,
    imported: Vec<String>,
    known: usize,
    /// What is odd in the directory.
    findings: Vec<String>,
}

/// Enters a repository and all its restore points, out of their manifests.
#[utoipa::path(post, path = "/repositories/import", tag = "repositories", request_body = Import,
    responses((status = 200, body = Imported)))]
async fn import(
    Admin(caller): Admin,
    State(api): State<Api>,
    Body(body): Body<Import>,
) -> ApiResult<Json<Imported>> {
    let report = api.blocking(move |backups| backups.import(&body.path, &caller.name)).await?;
    let findings = report.findings.iter().map(|f| format!("'{}' {}", f.path.display(), f.text));
    Ok(Json(Imported {
        repository_id: report.repository_id,
        imported: report.imported,
        known: report.known,
        findings: findings.collect(),
    }))
}

#[derive(Debug, Serialize, ToSchema)]
struct Checked {
    /// Every disagreement; empty is as it should be.
    findings: Vec<String>,
}

/// Compares the catalog with what the repositories hold.
#[utoipa::path(post, path = "/catalog/check", tag = "repositories",
    responses((status = 200, body = Checked)))]
async fn check(_operator: Operator, State(api): State<Api>) -> ApiResult<Json<Checked>> {
    Ok(Json(Checked { findings: api.blocking(Backups::check).await? }))
}

/// Room in a repository.
#[utoipa::path(get, path = "/repositories/{id}/storage", tag = "repositories",
    params(("id" = String, Path)), responses((status = 200, body = StorageView)))]
async fn storage(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<StorageView>> {
    let found = api.blocking(move |backups| storage_of(backups, &find(backups, &id)?));
    Ok(Json(found.await?))
}

/// Forgets a repository that holds no backups; its directory stays.
#[utoipa::path(delete, path = "/repositories/{id}", tag = "repositories",
    params(("id" = String, Path)),
    responses((status = 200, body = Done), (status = 409, description = "it holds backups")))]
async fn remove(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| {
        let repository = find(backups, &id)?;
        backups.catalog().remove_repository(&repository.id)?;
        let text = "repository forgotten; its directory stays";
        Ok(backups.catalog().event(&caller.name, "repository.removed", &repository.id, text)?)
    })
    .await?;
    Ok(Json(Done::new("the repository is forgotten; its directory stays")))
}

#[derive(Debug, Serialize, ToSchema)]
struct PolicyList {
    policies: Vec<PolicyView>,
    total: usize,
}

/// Adds a policy.
#[utoipa::path(post, path = "/policies", tag = "policies", request_body = PolicyView,
    responses((status = 201, body = PolicyView)))]
async fn add_policy(
    Admin(caller): Admin,
    State(api): State<Api>,
    Body(new): Body<PolicyView>,
) -> ApiResult<(StatusCode, Json<PolicyView>)> {
    let added = api.blocking(move |backups| {
        let repository = find(backups, &new.primary_repository_id)?;
        for rule in &new.copy_rules {
            if find(backups, &rule.destination_repository_id)?.id == repository.id {
                let text = "a copy rule names the policy's own repository";
                return Err(Failure::new(FailureKind::Invalid, text, "name another one"));
            }
            if rule.copy_mode == CopyMode::Scheduled {
                let text = "copies at times of their own are not possible";
                let next = "use copy_mode immediate, or manual and POST /backups/{id}/copy";
                return Err(Failure::new(FailureKind::Unprocessable, text, next));
            }
        }
        let mut policy = Policy {
            id: String::new(),
            name: new.name,
            enabled: new.enabled,
            primary_repository_id: repository.id,
            retention_days: new.retention_days,
            copy_rules: new.copy_rules,
            created_at: Timestamp::now(),
        };
        policy.id = backups.catalog().add_policy(&policy)?;
        backups.catalog().event(&caller.name, "policy.added", &policy.id, &policy.name)?;
        Ok(PolicyView::from(policy))
    });
    Ok((StatusCode::CREATED, Json(added.await?)))
}

/// Lists the policies.
#[utoipa::path(get, path = "/policies", tag = "policies",
    responses((status = 200, body = PolicyList)))]
async fn list_policies(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<PolicyList>> {
    let policies = api.blocking(|backups| Ok(backups.catalog().policies()?)).await?;
    let policies: Vec<_> = policies.into_iter().map(PolicyView::from).collect();
    Ok(Json(PolicyList { total: policies.len(), policies }))
}

/// Removes a policy; its backups stay.
#[utoipa::path(delete, path = "/policies/{id}", tag = "policies", params(("id" = String, Path)),
    responses((status = 200, body = Done)))]
async fn remove_policy(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(id): Path<String>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| {
        if !backups.catalog().remove_policy(&id)? {
            return Err(Failure::not_found("policy", &id));
        }
        Ok(backups.catalog().event(&caller.name, "policy.removed", &id, "policy removed")?)
    })
    .await?;
    Ok(Json(Done::new("the policy is removed; its backups stay")))
}

#[derive(Debug, Deserialize, IntoParams)]
struct ApplyQuery {
    /// Tell what would be deleted, and delete nothing.
    #[serde(default)]
    dry_run: bool,
}

#[derive(Debug, Serialize, ToSchema)]
struct Applied {
    /// Ids of the backups that were, or would be, deleted.
    deleted: Vec<String>,
}

/// Deletes what no policy keeps any more, as the hub does every hour.
#[utoipa::path(post, path = "/policies/apply", tag = "policies", params(ApplyQuery),
    responses((status = 200, body = Applied)))]
async fn apply_policies(
    Admin(caller): Admin,
    State(api): State<Api>,
    Query(query): Query<ApplyQuery>,
) -> ApiResult<Json<Applied>> {
    let deleted =
        api.blocking(move |backups| backups.apply_policies(query.dry_run, &caller.name)).await?;
    Ok(Json(Applied { deleted }))
}
