//! Restore points as disks.

mod exports;

use utoipa_axum::router::OpenApiRouter;

use crate::api::Api;

pub(super) fn router() -> OpenApiRouter<Api> {
    exports::router()
}
