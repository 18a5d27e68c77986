//! Health, events, metrics, and the description of the API.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::auth::Viewer;
use super::super::error::{ApiResult, Query};
use super::super::views::EventView;
use super::super::{Api, metrics, openapi};
use crate::model::Timestamp;

/// Events that are told unless fewer are asked for, and at most.
const EVENTS: u32 = 1000;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(events))
        .routes(routes!(document))
        .routes(routes!(reference))
}

/// Addresses outside `/api/v1`.
pub(super) fn root() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(root_health)).routes(routes!(all_metrics))
}

#[derive(Debug, Serialize, ToSchema)]
struct Health {
    service: &'static str,
    status: &'static str,
    #[schema(value_type = String)]
    timestamp: Timestamp,
    version: &'static str,
    database: String,
}

/// Whether the hub works; 503 where it does not.
#[utoipa::path(get, path = "/health", tag = "system", responses((status = 200, body = Health)))]
async fn health(State(api): State<Api>) -> impl IntoResponse {
    let asked = api.blocking(|backups| Ok(backups.catalog().events(None, 1)?)).await;
    let (code, status, database) = match asked {
        Ok(_) => (StatusCode::OK, "healthy", "connected".to_owned()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy", error.0.to_string()),
    };
    let version = env!("CARGO_PKG_VERSION");
    let timestamp = Timestamp::now();
    (code, Json(Health { service: "sendense-hub", status, timestamp, version, database }))
}

/// The same, where load balancers look.
#[utoipa::path(get, path = "/health", tag = "system", responses((status = 200, body = Health)))]
async fn root_health(state: State<Api>) -> impl IntoResponse {
    health(state).await
}

#[derive(Debug, Deserialize, IntoParams)]
struct EventQuery {
    /// Of this backup, repository, ... only.
    subject: Option<String>,
    /// At most so many.
    limit: Option<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
struct EventList {
    events: Vec<EventView>,
    total: usize,
}

/// What was done, newest first.
#[utoipa::path(get, path = "/events", tag = "system", params(EventQuery),
    responses((status = 200, body = EventList)))]
async fn events(
    _viewer: Viewer,
    State(api): State<Api>,
    Query(query): Query<EventQuery>,
) -> ApiResult<Json<EventList>> {
    let most = query.limit.unwrap_or(EVENTS).min(EVENTS);
    let found = api
        .blocking(move |backups| Ok(backups.catalog().events(query.subject.as_deref(), most)?));
    let events: Vec<_> = found.await?.into_iter().map(EventView::from).collect();
    Ok(Json(EventList { total: events.len(), events }))
}

/// Metrics in the format of Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "system",
    responses((status = 200, content_type = "text/plain")))]
async fn all_metrics(_viewer: Viewer, State(api): State<Api>) -> ApiResult<impl IntoResponse> {
    let text = api.blocking(metrics::render).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text))
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "system",
    responses((status = 200, content_type = "application/json")))]
async fn document() -> impl IntoResponse {
    Json(openapi::document())
}

/// A page that shows it.
#[utoipa::path(get, path = "/reference", tag = "system",
    responses((status = 200, content_type = "text/html")))]
async fn reference() -> Html<&'static str> {
    Html(openapi::PAGE)
}
