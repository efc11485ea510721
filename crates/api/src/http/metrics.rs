//! `/metrics`: figures for Prometheus.

use crate::http::{ApiError, ErrorKind, HttpServices};
use crate::metrics::{CONTENT_TYPE, Observations};
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

pub(super) async fn metrics(State(services): State<HttpServices>) -> Result<impl IntoResponse, ApiError> {
    let observations = match &services.observer {
        Some(observer) => observer.observe().await,
        None => Observations::default(),
    };
    let text = services
        .metrics
        .text(observations)
        .map_err(|_| ApiError::new(ErrorKind::Internal, "the figures cannot be written"))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text))
}
