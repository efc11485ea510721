//! Wishes from JSON to the messages of `Models`, and its refusals to HTTP's.

use crate::http::fields::Fields;
use crate::http::{ApiError, ErrorKind};
use mlxnode_proto::v1;
use std::time::Duration;
use tonic::{Code, Status};

/// As `mlxnode plan` bounds it.
const MOST_STAGES: i64 = 64;
/// More nodes than a desk holds.
const MOST_NODES: usize = 256;
/// What waits for a node or the coordinator to come back.
const SOON: Duration = Duration::from_secs(2);

pub(super) fn plan_request(fields: &mut Fields) -> Result<v1::PlanRequest, ApiError> {
    let model = fields.needed_string("model")?;
    if model.trim().is_empty() {
        return Err(ApiError::field("model", "model is empty; name a folder, OWNER/NAME or demo"));
    }
    let stages = fields.integer("stages", 1..=MOST_STAGES)?;
    Ok(v1::PlanRequest {
        model,
        stages: stages.and_then(|stages| u32::try_from(stages).ok()).unwrap_or_default(),
        nodes: fields.texts("nodes", MOST_NODES)?,
        context_tokens: fields.count("context_tokens")?.unwrap_or_default(),
        concurrent_sequences: fields.count("concurrent_sequences")?.unwrap_or_default(),
        guessing: guessing(fields)?,
    })
}

/// Present when any of its fields is.
fn guessing(fields: &mut Fields) -> Result<Option<v1::Guessing>, ApiError> {
    let guessing = v1::Guessing {
        draft_model: fields.string("draft_model")?.unwrap_or_default(),
        prompt_lookup: fields.count("prompt_lookup")?.unwrap_or_default(),
        num_draft_tokens: fields.count("num_draft_tokens")?.unwrap_or_default(),
    };
    Ok(Some(guessing).filter(|guessing| *guessing != v1::Guessing::default()))
}

pub(super) fn load_request(fields: &mut Fields) -> Result<v1::LoadRequest, ApiError> {
    let replicas = fields.integer("replicas", 1..=MOST_NODES as i64)?;
    let ttl = fields.integer("ttl_seconds", 0..=i64::from(u32::MAX))?;
    Ok(v1::LoadRequest {
        name: fields.string("name")?.unwrap_or_default(),
        plan: Some(plan_request(fields)?),
        replicas: replicas.and_then(|replicas| u32::try_from(replicas).ok()).unwrap_or_default(),
        pin: fields.boolean("pin")?.unwrap_or_default(),
        ttl_seconds: ttl.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or_default(),
        make_room: fields.boolean("make_room")?.unwrap_or_default(),
    })
}

pub(super) fn unload_request(fields: &mut Fields) -> Result<v1::UnloadRequest, ApiError> {
    Ok(v1::UnloadRequest { name: fields.needed_string("model")? })
}

pub(super) fn publish_request(id: String, fields: &mut Fields) -> Result<v1::PublishJobRequest, ApiError> {
    let step = fields.integer("step", 0..=i64::MAX)?.unwrap_or_default();
    Ok(v1::PublishJobRequest {
        id,
        step: u64::try_from(step).unwrap_or_default(),
        model: fields.string("model")?.unwrap_or_default(),
        adapter: fields.string("adapter")?.unwrap_or_default(),
    })
}

/// Why an order was not carried out.
pub(in crate::http) fn refusal(status: &Status) -> ApiError {
    let kind = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Invalid,
        Code::NotFound => ErrorKind::NoModel,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted | Code::Cancelled => {
            ErrorKind::Conflict
        }
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Forbidden,
        Code::ResourceExhausted => ErrorKind::RateLimited,
        Code::Unavailable | Code::DeadlineExceeded => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    let error = ApiError::new(kind, status.message());
    match kind {
        ErrorKind::RateLimited | ErrorKind::Unavailable => error.retry_after(SOON),
        _ => error,
    }
}
