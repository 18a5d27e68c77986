//! Failures as clients see them: `{"error", "details", "timestamp"}` and a status.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::backup::{Failure, FailureKind};
use crate::model::Timestamp;

/// The body of every answer that is an error.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct ErrorBody {
    /// What went wrong.
    error: String,
    /// What to do about it; may be empty.
    details: String,
    /// When.
    #[schema(value_type = String)]
    timestamp: Timestamp,
}

/// A failure on its way to a client.
#[derive(Debug)]
pub(super) struct ApiError(pub(super) Failure);

pub(super) type ApiResult<T> = Result<T, ApiError>;

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

pub(super) fn body(failure: &Failure) -> Json<ErrorBody> {
    let Failure { message, details, .. } = failure.clone();
    Json(ErrorBody { error: message, details, timestamp: Timestamp::now() })
}

pub(super) fn invalid(text: impl Into<String>) -> ApiError {
    ApiError(Failure::new(FailureKind::Invalid, text, "see /api/v1/openapi.json"))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            FailureKind::Invalid => StatusCode::BAD_REQUEST,
            FailureKind::NotFound => StatusCode::NOT_FOUND,
            FailureKind::Conflict => StatusCode::CONFLICT,
            FailureKind::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
            FailureKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            FailureKind::Agent => StatusCode::BAD_GATEWAY,
            FailureKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_server_error() {
            tracing::error!(failure = %self.0, %status, "a request failed");
        }
        (status, body(&self.0)).into_response()
    }
}

/// A JSON body, refused with our words.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => {
                let status = match &rejection {
                    JsonRejection::JsonDataError(_) => StatusCode::UNPROCESSABLE_ENTITY,
                    other => other.status(),
                };
                let text = rejection.body_text();
                let failure = Failure::new(FailureKind::Invalid, text, "see /api/v1/openapi.json");
                Err((status, body(&failure)).into_response())
            }
        }
    }
}

/// The query of an address, refused with our words.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        query
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|rejection: QueryRejection| invalid(rejection.body_text()))
    }
}
