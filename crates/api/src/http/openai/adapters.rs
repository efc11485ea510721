//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: vLLM's way to change what adapters a model has while it runs.
//!
//! vLLM serves one model; here `model` says which one, when there are several.

use crate::http::body::JsonBody;
use crate::http::fields::Fields;
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use crate::models::{ModelsService, client};
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use tonic::{Code, Status};

/// What was done.
#[derive(Serialize)]
pub(in crate::http) struct Done {
    /// What requests write into `model` (or could, until now).
    id: String,
    object: &'static str,
    parent: String,
    is_loaded: bool,
}

/// Loads an adapter, or does nothing when it is there already.
pub(in crate::http) async fn load(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Done>, ApiError> {
    let mut fields = body.fields;
    let name = fields.needed_string("lora_name")?;
    let source = fields.needed_string("lora_path")?;
    fields.only("load_inplace", &[false.into()], "unload the adapter first")?;
    let model = services.base(&caller, &mut fields)?;
    fields.finish()?;
    let loaded = client::load_adapter(services.models()?, &model, source, &name).await;
    loaded.map_err(|status| told(&status))?;
    Ok(done(model, &name, true))
}

/// Unloads an adapter.
pub(in crate::http) async fn unload(
    State(services): State<HttpServices>,
    caller: Caller,
    body: JsonBody,
) -> Result<Json<Done>, ApiError> {
    let mut fields = body.fields;
    let name = fields.needed_string("lora_name")?;
    fields.without_effect("lora_int_id");
    let model = services.base(&caller, &mut fields)?;
    fields.finish()?;
    let unloaded = client::unload_adapter(services.models()?, &model, &name).await;
    unloaded.map_err(|status| told(&status))?;
    Ok(done(model, &name, false))
}

fn done(model: String, adapter: &str, is_loaded: bool) -> Json<Done> {
    Json(Done { id: format!("{model}:{adapter}"), object: "model", parent: model, is_loaded })
}

impl HttpServices {
    /// The deployment that `model` means.
    fn base(&self, caller: &Caller, fields: &mut Fields) -> Result<String, ApiError> {
        let model = fields.string("model")?.unwrap_or_default();
        let deployment = self.front.deployment(&model)?;
        match caller.may_use(&deployment.name) {
            true => Ok(deployment.name),
            false => Err(ApiError::new(ErrorKind::NoModel, format!("no model named {model:?} is loaded"))),
        }
    }

    fn models(&self) -> Result<&ModelsService, ApiError> {
        let control = self.control.as_ref();
        control.map(|control| &control.models).ok_or_else(|| {
            ApiError::new(ErrorKind::Unavailable, "this listener cannot change what is loaded")
        })
    }
}

/// What a client hears when an order was not carried out.
fn told(status: &Status) -> ApiError {
    let kind = match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition => ErrorKind::Invalid,
        Code::NotFound => ErrorKind::NoModel,
        Code::AlreadyExists => ErrorKind::Conflict,
        Code::ResourceExhausted => ErrorKind::RateLimited,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    ApiError::new(kind, status.message())
}
