//! The description of the API, made from its code.

use utoipa::openapi::{Info, OpenApi};

use super::routes;

/// The OpenAPI document.
pub fn document() -> OpenApi {
    let mut document = routes::router().split_for_parts().1;
    let mut info = Info::new("Sendense hub", env!("CARGO_PKG_VERSION"));
    info.description = Some(
        "Backups of virtual machines over NBD. Every error has the body {error, details, \
         timestamp}. Sizes are bytes, rates bytes per second, times RFC 3339 in UTC. Everything but \
         the agent's callbacks and /health needs 'Authorization: Bearer TOKEN'."
            .into(),
    );
    document.info = info;
    document
}

/// A page that shows the document, without anything from elsewhere.
pub(super) const PAGE: &str = include_str!("reference.html");
