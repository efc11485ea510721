//! `/api/v1/jobs`: what the cluster works on besides answering.

use crate::http::HttpServices;
use crate::jobs::JobView;
use axum::Json;
use axum::extract::State;
use serde::Serialize;

/// All jobs.
#[derive(Serialize)]
pub(in crate::http) struct Listing {
    jobs: Vec<JobView>,
}

/// Empty where nobody runs jobs.
pub(in crate::http) async fn jobs(State(services): State<HttpServices>) -> Json<Listing> {
    Json(Listing { jobs: services.jobs.as_ref().map(|table| table.jobs()).unwrap_or_default() })
}
