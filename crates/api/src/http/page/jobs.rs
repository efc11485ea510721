//! `/api/v1/jobs`: what the cluster works on besides answering. Jobs are submitted, cancelled, paused and resumed at
//! `/v1/fine_tuning/jobs`.

use crate::http::body::JsonBody;
use crate::http::caller::Id;
use crate::http::jobs_client;
use crate::http::{ApiError, Caller, HttpServices};
use crate::jobs::JobView;
use axum::Json;
use axum::extract::State;
use serde::Serialize;

/// The jobs that the caller may see.
#[derive(Serialize)]
pub(in crate::http) struct Listing {
    jobs: Vec<JobView>,
}

/// What requests write into `model`.
#[derive(Serialize)]
pub(in crate::http) struct Published {
    id: String,
}

/// Empty where nobody runs jobs.
pub(in crate::http) async fn jobs(State(services): State<HttpServices>, caller: Caller) -> Json<Listing> {
    let mut jobs = services.jobs.as_ref().map(|table| table.jobs()).unwrap_or_default();
    jobs.retain(|job| caller.may_see(&job.owner));
    Json(Listing { jobs })
}

/// Serves what a job made, as `mlxnode jobs publish` does.
pub(in crate::http) async fn publish(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
    body: JsonBody,
) -> Result<Json<Published>, ApiError> {
    let mut fields = body.fields;
    let request = super::wire::publish_request(id, &mut fields)?;
    fields.finish()?;
    let id = jobs_client::publish(services.jobs_service()?, &caller, request).await?;
    Ok(Json(Published { id }))
}
