//! The REST API: what clients of the old hub know, and what it lacked.
//!
//! Handlers parse, ask [`Backups`] on a thread that may block, and tell. Two doors lead here: the
//! agent's, where the callbacks need no token, and the admin's.

mod auth;
mod error;
mod metrics;
mod openapi;
mod progress;
mod routes;
mod tls;
mod views;

pub use auth::{hash_token, new_token};
pub use openapi::document;
pub use tls::{TlsFiles, TlsListener};

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::response::IntoResponse;

use crate::backup::{Backups, Failure, FailureKind};
use crate::nbd::ports::PortRange;
use crate::restore::{Mounts, Restores};
use error::ApiError;

/// Longest body of a request, in bytes.
const BODY: usize = 1 << 20;

/// Which way a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// The tunnel of capture agents: the callbacks need no token.
    Agent,
    /// Everything needs a token.
    Admin,
}

/// What handlers share.
#[derive(Clone)]
pub struct Api {
    backups: Arc<Backups>,
    restores: Arc<Restores>,
    mounts: Arc<Mounts>,
    streams: routes::Streams,
    door: Door,
    /// Ports that may be set aside.
    pool: PortRange,
}

impl Api {
    /// The API over `backups`, as seen through `door`.
    pub fn new(
        backups: Arc<Backups>,
        restores: Arc<Restores>,
        mounts: Arc<Mounts>,
        door: Door,
        pool: PortRange,
    ) -> Self {
        Self { backups, restores, mounts, streams: routes::Streams::default(), door, pool }
    }

    /// The service for a listener.
    pub fn router(self) -> Router {
        routes::router()
            .split_for_parts()
            .0
            .fallback(|| async { ApiError(Failure::not_found("such", "address")) })
            .method_not_allowed_fallback(|| async {
                let failure = Failure::new(
                    FailureKind::Invalid,
                    "this address does not know that method",
                    "see /api/v1/openapi.json",
                );
                (StatusCode::METHOD_NOT_ALLOWED, error::body(&failure)).into_response()
            })
            .layer(DefaultBodyLimit::max(BODY))
            .with_state(self)
    }

    /// Runs `work` on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Backups) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, ApiError> {
        let backups = Arc::clone(&self.backups);
        match tokio::task::spawn_blocking(move || work(&backups)).await {
            Ok(result) => result.map_err(ApiError),
            Err(error) => {
                tracing::error!(%error, "a request panicked; this is a defect, please report it");
                let text = "the request failed inside the hub; its log says more";
                Err(ApiError(Failure::new(FailureKind::Internal, text, "")))
            }
        }
    }
}
