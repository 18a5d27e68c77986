//! VMs and their disks.

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::Api;
use super::super::auth::{Operator, Viewer};
use super::super::error::{ApiResult, Body, invalid};
use super::super::views::{VmList, VmView};
use crate::backup::Failure;
use crate::catalog::{Vm, VmDisk};

/// Device key of disk 0 where the real one is not known.
const FIRST_KEY: u32 = 2000;
/// Longest name of a VM, in bytes.
const NAME: usize = 255;
/// Most disks of a VM.
const DISKS: usize = 256;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(show, put))
}

/// Lists the VMs.
#[utoipa::path(get, path = "/vms", tag = "vms", responses((status = 200, body = VmList)))]
async fn list(_viewer: Viewer, State(api): State<Api>) -> ApiResult<Json<VmList>> {
    let vms = api.blocking(|backups| Ok(backups.catalog().vms()?)).await?;
    let vms: Vec<VmView> = vms.into_iter().map(VmView::from).collect();
    Ok(Json(VmList { total: vms.len(), vms }))
}

/// Shows a VM.
#[utoipa::path(get, path = "/vms/{name}", tag = "vms", params(("name" = String, Path)),
    responses((status = 200, body = VmView)))]
async fn show(
    _viewer: Viewer,
    State(api): State<Api>,
    Path(name): Path<String>,
) -> ApiResult<Json<VmView>> {
    let vm = api.blocking(move |backups| {
        backups.catalog().vm_by_name(&name)?.ok_or_else(|| Failure::not_found("VM", &name))
    });
    Ok(Json(vm.await?.into()))
}

/// Enters a VM with its disks as they are now, or changes it.
#[utoipa::path(put, path = "/vms/{name}", tag = "vms", params(("name" = String, Path)),
    request_body = VmView, responses((status = 200, body = VmView)))]
async fn put(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(name): Path<String>,
    Body(view): Body<VmView>,
) -> ApiResult<Json<VmView>> {
    if name.is_empty() || name.len() > NAME || view.disks.len() > DISKS {
        return Err(invalid(format!("a VM has a name of up to {NAME} bytes and {DISKS} disks")));
    }
    let vm = api.blocking(move |backups| {
        let catalog = backups.catalog();
        let credential_id = match view.credential_id.filter(|key| !key.is_empty()) {
            None => None,
            Some(key) => {
                let all = catalog.credentials()?;
                let found = all.into_iter().find(|c| c.id == key || c.name == key);
                Some(found.ok_or_else(|| Failure::not_found("credential", &key))?.id)
            }
        };
        let disks = view.disks.into_iter().map(|disk| VmDisk {
            disk_id: disk.disk_id,
            disk_key: disk.disk_key.unwrap_or(FIRST_KEY + disk.disk_id),
            unit_number: disk.unit_number.unwrap_or(disk.disk_id),
            label: disk.label,
            capacity: disk.capacity_bytes,
        });
        let vm = Vm {
            id: String::new(),
            name: name.clone(),
            vm_path: view.vm_path,
            credential_id,
            disks: disks.collect(),
        };
        catalog.put_vm(&vm)?;
        catalog.event(&caller.name, "vm.entered", &name, "VM entered")?;
        catalog.vm_by_name(&name)?.ok_or_else(|| Failure::not_found("VM", &name))
    });
    Ok(Json(vm.await?.into()))
}
