//! `/v1/models`: what can be asked.

use crate::deployments::{DeploymentView, State as DeploymentState, state_name};
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;

/// A list as OpenAI writes it.
#[derive(Serialize)]
pub(in crate::http) struct Listing {
    object: &'static str,
    data: Vec<Model>,
}

/// A model. The last three fields are ours; vLLM has `max_model_len` too.
#[derive(Serialize)]
pub(in crate::http) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: usize,
    architecture: String,
    state: &'static str,
}

/// Models that answer now or soon.
pub(in crate::http) async fn list(State(services): State<HttpServices>, caller: Caller) -> Json<Listing> {
    let deployments = services.front.deployments();
    let shown = deployments.into_iter().filter(|deployment| is_shown(deployment, &caller));
    Json(Listing { object: "list", data: shown.map(|deployment| model(deployment, &services)).collect() })
}

/// One of them by its name.
pub(in crate::http) async fn one(
    State(services): State<HttpServices>,
    caller: Caller,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::new(ErrorKind::Invalid, error.body_text()))?;
    let deployment = services.front.deployment(&name)?;
    if !is_shown(&deployment, &caller) {
        return Err(ApiError::new(ErrorKind::NoModel, format!("no model named {name:?} is loaded")));
    }
    Ok(Json(model(deployment, &services)))
}

fn is_shown(deployment: &DeploymentView, caller: &Caller) -> bool {
    !matches!(deployment.state, DeploymentState::Failed | DeploymentState::Unloading)
        && caller.may_use(&deployment.name)
}

fn model(deployment: DeploymentView, services: &HttpServices) -> Model {
    Model {
        id: deployment.name,
        object: "model",
        created: services.started,
        owned_by: "mlxnode",
        max_model_len: deployment.context_tokens,
        architecture: deployment.architecture,
        state: state_name(deployment.state),
    }
}
