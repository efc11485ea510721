//! `/api/v1/plan`, `/api/v1/load`, `/api/v1/unload`: what `mlxnode plan`, `load` and `unload` do, wherever the coordinator is.

use super::{client, control, wire};
use crate::http::body::JsonBody;
use crate::http::events::{Events, Gone, stream};
use crate::http::{ApiError, Dialect, ErrorKind, HttpServices};
use crate::picture::{DeploymentPicture, Plan};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use serde::Serialize;
use serde_json::{Value, json};

pub(in crate::http) async fn plan(
    State(services): State<HttpServices>,
    body: JsonBody,
) -> Result<Json<Plan>, ApiError> {
    let mut fields = body.fields;
    let request = wire::plan_request(&mut fields)?;
    fields.finish()?;
    Ok(Json(client::plan(&control(&services)?.models, request).await?))
}

/// What a load reports on its way, as `mlxnode load --json` does.
#[derive(Serialize)]
pub(super) struct Progress {
    pub(super) phase: String,
    /// Empty for the whole cluster.
    pub(super) node: String,
    pub(super) done_bytes: u64,
    /// 0 while unknown.
    pub(super) total_bytes: u64,
    pub(super) detail: String,
    /// In the last one.
    pub(super) deployment: Option<DeploymentPicture>,
}

/// Answers when the model is loaded; with `stream`, reports until then. A client that leaves before takes its wish back.
pub(in crate::http) async fn load(
    State(services): State<HttpServices>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let mut fields = body.fields;
    let (request, streams) = (wire::load_request(&mut fields)?, fields.boolean("stream")?);
    fields.finish()?;
    let mut reports = client::load(&control(&services)?.models, request).await?;
    if streams == Some(true) {
        return Ok(stream(move |events: Events| async move {
            while let Some(report) = reports.next().await {
                match report {
                    Ok(progress) => events.named("progress", &progress).await?,
                    Err(error) => return events.named("error", &error.body(Dialect::OpenAi)).await,
                }
            }
            Ok::<(), Gone>(())
        }));
    }
    while let Some(report) = reports.next().await {
        if let Some(deployment) = report?.deployment {
            return Ok(Json(deployment).into_response());
        }
    }
    Err(ApiError::new(ErrorKind::Unavailable, "the load ended without a word; see `mlxnode status`"))
}

pub(in crate::http) async fn unload(
    State(services): State<HttpServices>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let mut fields = body.fields;
    let request = wire::unload_request(&mut fields)?;
    fields.finish()?;
    let model = request.name.clone();
    client::unload(&control(&services)?.models, request).await?;
    Ok(Json(json!({"unloaded": model})))
}
