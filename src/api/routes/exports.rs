//! NBD exports and ports.

use std::collections::BTreeSet;
use std::path::{Path as FsPath, PathBuf};
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Api;
use super::super::auth::{Operator, Viewer};
use super::super::error::{ApiResult, Body};
use super::super::views::{AllocationView, Done};
use crate::backup::{Backups, Failure, FailureKind};
use crate::catalog::{ExportRow, PortAllocation};
use crate::model::Timestamp;
use crate::nbd::ports::PortRange;
use crate::nbd::stats::Snapshot;

/// Time for which a port is set aside.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// Time that clients of an export which is taken away have to finish.
const NOTICE: Duration = Duration::from_millis(200);

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(add, list))
        .routes(routes!(remove))
        .routes(routes!(allocate))
        .routes(routes!(release))
        .routes(routes!(status))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewExport {
    /// Its name.
    export_name: String,
    /// A finished image in a repository.
    #[schema(value_type = String)]
    path: PathBuf,
    /// Must be true: a finished image is never changed.
    #[serde(default = "yes")]
    read_only: bool,
    /// Most connections; the server's bound where not given.
    max_connections: Option<u32>,
}

fn yes() -> bool {
    true
}

/// An export and what it did.
#[derive(Debug, Serialize, ToSchema)]
struct ExportView {
    name: String,
    /// Bytes of the disk.
    size: u64,
    read_only: bool,
    connections: usize,
    connections_served: u64,
    #[schema(value_type = Object)]
    stats: Snapshot,
}

#[derive(Debug, Serialize, ToSchema)]
struct ExportList {
    exports: Vec<ExportView>,
    total: usize,
}

fn views(backups: &Backups) -> Vec<ExportView> {
    let all = backups.publisher().server().exports.all().into_iter();
    let view = |export: std::sync::Arc<crate::nbd::exports::Export>| {
        let info = export.device.info();
        let (connections, connections_served) = export.connections();
        ExportView {
            name: export.name.clone(),
            size: info.size,
            read_only: info.read_only,
            connections,
            connections_served,
            stats: export.stats.snapshot(),
        }
    };
    all.map(view).collect()
}

/// The image that may be exported: inside a repository, finished, whatever links lead there.
fn permitted(backups: &Backups, path: &FsPath) -> Result<PathBuf, Failure> {
    let refused = |text: String| {
        let next = "give the path of a .qcow2 file inside a repository";
        Failure::new(FailureKind::Unprocessable, text, next)
    };
    let real = path
        .canonicalize()
        .map_err(|e| refused(format!("'{}' cannot be exported: {e}", path.display())))?;
    let inside = backups.catalog().repositories()?.iter().any(|repository| {
        FsPath::new(&repository.path).canonicalize().is_ok_and(|root| real.starts_with(root))
    });
    if !inside || real.extension().is_none_or(|ending| ending != "qcow2") {
        return Err(refused(format!("'{}' is no image in a repository", path.display())));
    }
    Ok(real)
}

/// Exports an image of a repository, read-only.
#[utoipa::path(post, path = "/nbd/exports", tag = "nbd", request_body = NewExport,
    responses((status = 201, body = ExportView)))]
async fn add(
    Operator(caller): Operator,
    State(api): State<Api>,
    Body(new): Body<NewExport>,
) -> ApiResult<(StatusCode, Json<ExportView>)> {
    let added = api.blocking(move |backups| {
        if !new.read_only {
            let text = "a finished image is never changed: it can be exported read-only";
            return Err(Failure::new(FailureKind::Unprocessable, text, "set read_only"));
        }
        crate::model::validate_export_name(&new.export_name)
            .map_err(|text| Failure::new(FailureKind::Invalid, text, ""))?;
        let path = permitted(backups, &new.path)?.to_string_lossy().into_owned();
        let name = new.export_name;
        let most = new.max_connections.and_then(|most| usize::try_from(most).ok());
        backups.catalog().add_export(&ExportRow {
            name: name.clone(),
            path: path.clone(),
            read_only: true,
            max_connections: new.max_connections,
        })?;
        if let Err(text) = backups.open_export(&name, &path, true, most) {
            backups.catalog().remove_export(&name)?;
            return Err(Failure::new(FailureKind::Conflict, text, ""));
        }
        backups.catalog().event(&caller.name, "export.added", &name, &path)?;
        views(backups)
            .into_iter()
            .find(|view| view.name == name)
            .ok_or_else(|| Failure::not_found("export", &name))
    });
    Ok((StatusCode::CREATED, Json(added.await?)))
}

/// Lists all exports, those of running backups too.
#[utoipa::path(get, path = "/nbd/exports", tag = "nbd",
    responses((status = 200, body = ExportList)))]
async fn list(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<ExportList>> {
    let exports = api.blocking(|backups| Ok(views(backups))).await?;
    Ok(Json(ExportList { total: exports.len(), exports }))
}

/// Takes an export away, once its image is closed. Those of running backups stay.
#[utoipa::path(delete, path = "/nbd/exports/{name}", tag = "nbd", params(("name" = String, Path)),
    responses((status = 200, body = Done), (status = 409, description = "a backup needs it")))]
async fn remove(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(name): Path<String>,
) -> ApiResult<Json<Done>> {
    api.blocking(move |backups| {
        if !backups.catalog().remove_export(&name)? {
            return Err(match backups.publisher().server().exports.get(&name) {
                None => Failure::not_found("export", &name),
                Some(_) => {
                    let text = format!("export '{name}' belongs to a running backup");
                    Failure::new(FailureKind::Conflict, text, "cancel the backup instead")
                }
            });
        }
        if let Err(error) = backups.publisher().withdraw(&name, NOTICE) {
            tracing::warn!(export = %name, %error, "closed with an error");
        }
        Ok(backups.catalog().event(&caller.name, "export.removed", &name, "removed")?)
    })
    .await?;
    Ok(Json(Done::new("the export is closed")))
}

#[derive(Debug, Deserialize, ToSchema)]
struct Allocate {
    /// The job that needs them.
    job_id: String,
    /// Name of the export; with several disks, numbers follow.
    export_name: String,
    /// How many.
    #[serde(default = "one")]
    disk_count: u16,
}

fn one() -> u16 {
    1
}

#[derive(Debug, Serialize, ToSchema)]
struct Allocated {
    job_id: String,
    allocated_ports: Vec<AllocatedPort>,
    #[schema(value_type = String)]
    expires_at: Timestamp,
}

#[derive(Debug, Serialize, ToSchema)]
struct AllocatedPort {
    port: u16,
    export_name: String,
}

/// Sets ports of the pool aside for a job, for a day.
#[utoipa::path(post, path = "/nbd/ports/allocate", tag = "nbd", request_body = Allocate,
    responses((status = 200, body = Allocated), (status = 409, description = "none are free")))]
async fn allocate(
    Operator(caller): Operator,
    State(api): State<Api>,
    Body(body): Body<Allocate>,
) -> ApiResult<Json<Allocated>> {
    let pool = api.pool;
    let allocated = api.blocking(move |backups| {
        let taken = taken(backups)?;
        let free = pool.iter().filter(|port| !taken.contains(port));
        let ports: Vec<u16> = free.take(usize::from(body.disk_count)).collect();
        if body.disk_count == 0 || ports.len() < usize::from(body.disk_count) {
            let text = format!("{} ports are not free in {pool}", body.disk_count);
            return Err(Failure::new(FailureKind::Conflict, text, "release some"));
        }
        let now = Timestamp::now();
        let expires_at = now.after(KEPT);
        let name = |number: usize| match body.disk_count {
            1 => body.export_name.clone(),
            _ => format!("{}-disk{number}", body.export_name),
        };
        let rows: Vec<PortAllocation> = ports
            .iter()
            .enumerate()
            .map(|(number, port)| PortAllocation {
                port: *port,
                job_id: body.job_id.clone(),
                export_name: name(number),
                allocated_at: now,
                expires_at,
            })
            .collect();
        backups.catalog().allocate_ports(&rows)?;
        avoid(backups)?;
        let text = format!("ports {ports:?} set aside");
        backups.catalog().event(&caller.name, "ports.allocated", &body.job_id, &text)?;
        let ports = rows.into_iter();
        let ports = ports.map(|row| AllocatedPort { port: row.port, export_name: row.export_name });
        Ok(Allocated { job_id: body.job_id, allocated_ports: ports.collect(), expires_at })
    });
    Ok(Json(allocated.await?))
}

/// Ports that somebody has.
fn taken(backups: &Backups) -> Result<BTreeSet<u16>, Failure> {
    let aside = backups.catalog().port_allocations()?.into_iter().map(|row| row.port);
    let used = backups.publisher().ports().map(|(_, used)| used).unwrap_or_default();
    Ok(aside.chain(used.into_iter().map(|(port, _)| port)).collect())
}

fn avoid(backups: &Backups) -> Result<(), Failure> {
    let aside = backups.catalog().port_allocations()?;
    backups.publisher().avoid(aside.into_iter().map(|row| row.port));
    Ok(())
}

#[derive(Debug, Deserialize, ToSchema)]
struct Release {
    /// The job that has them.
    job_id: String,
    /// Which; all of the job's where empty.
    #[serde(default)]
    ports: Vec<u16>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Released {
    success: bool,
    released_count: usize,
}

/// Gives ports of a job back.
#[utoipa::path(post, path = "/nbd/ports/release", tag = "nbd", request_body = Release,
    responses((status = 200, body = Released)))]
async fn release(
    Operator(caller): Operator,
    State(api): State<Api>,
    Body(body): Body<Release>,
) -> ApiResult<Json<Released>> {
    let released = api.blocking(move |backups| {
        let released = backups.catalog().release_ports(&body.job_id, &body.ports)?;
        avoid(backups)?;
        let text = format!("{released} ports released");
        backups.catalog().event(&caller.name, "ports.released", &body.job_id, &text)?;
        Ok(Released { success: true, released_count: released })
    });
    Ok(Json(released.await?))
}

#[derive(Debug, Serialize, ToSchema)]
struct PortStatus {
    /// First and last port of the pool, `A-B`.
    range: String,
    total_ports: usize,
    allocated: usize,
    available: usize,
    allocations: Vec<AllocationView>,
}

/// The pool: who has which port.
#[utoipa::path(get, path = "/nbd/ports/status", tag = "nbd",
    responses((status = 200, body = PortStatus)))]
async fn status(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<PortStatus>> {
    let pool = api.pool;
    Ok(Json(api.blocking(move |backups| port_status(backups, pool)).await?))
}

fn port_status(backups: &Backups, pool: PortRange) -> Result<PortStatus, Failure> {
    let mut allocations: Vec<AllocationView> =
        backups.catalog().port_allocations()?.into_iter().map(AllocationView::from).collect();
    if let Some((_, used)) = backups.publisher().ports() {
        allocations.extend(used.into_iter().map(|(port, export_name)| AllocationView {
            port,
            job_id: format!("backup-{}", export_name.rsplit_once("-disk").map_or("", |n| n.0)),
            export_name,
            allocated_at: None,
            expires_at: None,
        }));
    }
    allocations.sort_by_key(|allocation| allocation.port);
    let total_ports = pool.iter().count();
    let allocated = allocations.len();
    Ok(PortStatus {
        range: pool.to_string(),
        total_ports,
        allocated,
        available: total_ports.saturating_sub(allocated),
        allocations,
    })
}
