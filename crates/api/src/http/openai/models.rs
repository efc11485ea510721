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

/// A model, or a model with an adapter. The last three fields are ours; vLLM has `parent` and `max_model_len` too.
#[derive(Serialize)]
pub(in crate::http) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Of a model with an adapter: the model.
    parent: Option<String>,
    max_model_len: usize,
    architecture: String,
    state: &'static str,
}

/// Models that answer now or soon.
pub(in crate::http) async fn list(State(services): State<HttpServices>, caller: Caller) -> Json<Listing> {
    let deployments = services.front.deployments();
    let shown = deployments.into_iter().filter(|deployment| is_shown(deployment, &caller));
    let (mut data, mut with_adapters) = (Vec::new(), Vec::new());
    for deployment in shown {
        let is_listed = |model: &Model| model.id == deployment.name;
        if data.iter().any(is_listed) {
            continue; // a further replica
        }
        let usable = deployment.adapters.iter().filter(|adapter| adapter.problem.is_none());
        with_adapters.extend(usable.map(|adapter| model(&deployment, Some(&adapter.name), &services)));
        data.push(model(&deployment, None, &services));
    }
    data.append(&mut with_adapters);
    Json(Listing { object: "list", data })
}

/// One of them by its name.
pub(in crate::http) async fn one(
    State(services): State<HttpServices>,
    caller: Caller,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::new(ErrorKind::Invalid, error.body_text()))?;
    let (deployment, adapter) = services.front.find(&name)?;
    if !is_shown(&deployment, &caller) {
        return Err(ApiError::new(ErrorKind::NoModel, format!("no model named {name:?} is loaded")));
    }
    services.front.check_adapter(&deployment, adapter.as_deref())?;
    Ok(Json(model(&deployment, adapter.as_deref(), &services)))
}

fn is_shown(deployment: &DeploymentView, caller: &Caller) -> bool {
    !matches!(deployment.state, DeploymentState::Failed | DeploymentState::Unloading)
        && caller.may_use(&deployment.name)
}

fn model(deployment: &DeploymentView, adapter: Option<&str>, services: &HttpServices) -> Model {
    let name = &deployment.name;
    Model {
        id: adapter.map_or_else(|| name.clone(), |adapter| format!("{name}:{adapter}")),
        object: "model",
        created: services.started,
        owned_by: "mlxnode",
        parent: adapter.map(|_| name.clone()),
        max_model_len: deployment.context_tokens,
        architecture: deployment.architecture.clone(),
        state: state_name(deployment.state),
    }
}
