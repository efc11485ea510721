//! `/api/v1/jobs`: what the cluster works on besides answering. Jobs are submitted, cancelled, paused and resumed at
//! `/v1/fine_tuning/jobs`.

use crate::fields::shortened;
use crate::http::body::JsonBody;
use crate::http::caller::Id;
use crate::http::jobs_client;
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
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
    if !caller.administers() {
        check_model(&caller, &request.model)?;
    }
    let id = jobs_client::publish(services.jobs_service()?, &caller, request).await?;
    Ok(Json(Published { id }))
}

/// Whoever does not administer the cluster says which model, and it is one that they may ask.
fn check_model(caller: &Caller, model: &str) -> Result<(), ApiError> {
    if model.is_empty() {
        return Err(ApiError::field("model", "model is missing: name the model that the adapter is for"));
    }
    if !caller.may_use(model) {
        let shown = shortened(model);
        let message = format!("there is no model {shown:?}, or this API key may not use it");
        return Err(ApiError { param: Some("model".into()), ..ApiError::new(ErrorKind::NoModel, message) });
    }
    Ok(())
}
