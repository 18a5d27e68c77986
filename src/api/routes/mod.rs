//! The addresses of the API, by what they are about.

mod access;
mod agent;
mod backups;
mod exports;
mod repositories;
mod restore;
mod system;
mod vms;

use utoipa_axum::router::OpenApiRouter;

pub(super) use restore::Streams;

use super::Api;

/// All addresses.
pub(super) fn router() -> OpenApiRouter<Api> {
    let api = OpenApiRouter::new()
        .merge(agent::router())
        .merge(backups::router())
        .merge(vms::router())
        .merge(repositories::router())
        .merge(exports::router())
        .merge(access::router())
        .merge(restore::router())
        .merge(system::router());
    OpenApiRouter::new().nest("/api/v1", api).merge(system::root())
}
