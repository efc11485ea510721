//! `/health`: does this node take requests?

use crate::http::{ApiError, ErrorKind, HttpServices};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// 200 while it does, 503 once it stops.
pub(super) async fn health(State(services): State<HttpServices>) -> Response {
    if services.stopping.is_cancelled() {
        return ApiError::new(ErrorKind::Unavailable, "the node is stopping").into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}
