//! Jobs in OpenAI's notation: calls of the service of jobs, and its messages as JSON.

use super::files::file_id;
use crate::http::page::refusal;
use crate::http::{ApiError, Caller};
use crate::jobs::{ContentHash, JobsService};
use futures::StreamExt as _;
use mlxnode_proto::v1::jobs_server::Jobs as _;
use mlxnode_proto::v1::{
    GetJobRequest, Job, JobInput, JobLogsRequest, JobState, ListJobsRequest, SubmitJobRequest,
};
use serde_json::{Value, json};
use tonic::Request;

/// Begins the line of a configuration that says what was asked over HTTP.
pub(super) const ASKED: &str = "# asked over HTTP: ";
/// What the trainer finds the files as.
const TRAINING: &str = "train.jsonl";
const VALIDATION: &str = "valid.jsonl";

/// A job to submit.
pub(super) struct Wish {
    pub(super) id: String,
    pub(super) source: String,
    /// The deployment that serves the result, and its name there.
    pub(super) publish: Option<(String, String)>,
    pub(super) configuration: String,
    /// Content and its bytes.
    pub(super) training: (ContentHash, u64),
    pub(super) validation: Option<(ContentHash, u64)>,
}

/// What can be done to a job.
pub(super) enum Change {
    Cancel,
    Pause,
    Resume,
}

fn asked<T>(caller: &Caller, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(caller.clone());
    request
}

pub(super) async fn submit(service: &JobsService, caller: &Caller, wish: Wish) -> Result<Value, ApiError> {
    let input = |name: &str, (hash, bytes): (ContentHash, u64)| JobInput {
        name: name.to_owned(),
        hash: hash.as_bytes().to_vec().into(),
        bytes,
    };
    let (publish_model, publish_adapter) = wish.publish.unwrap_or_default();
    let mut inputs = vec![input(TRAINING, wish.training)];
    inputs.extend(wish.validation.map(|file| input(VALIDATION, file)));
    let request = SubmitJobRequest {
        id: wish.id,
        model: wish.source,
        configuration: wish.configuration,
        inputs,
        publish_model,
        publish_adapter,
        ..SubmitJobRequest::default()
    };
    let job = service.submit(asked(caller, request)).await.map_err(|status| refusal(&status))?;
    Ok(shown(&job.into_inner()))
}

pub(super) async fn list(service: &JobsService) -> Result<Vec<Value>, ApiError> {
    let listed = service.list(Request::new(ListJobsRequest {})).await.map_err(|status| refusal(&status))?;
    Ok(listed.into_inner().jobs.iter().map(shown).collect())
}

async fn job(service: &JobsService, id: String) -> Result<Job, ApiError> {
    let job = service.get(Request::new(GetJobRequest { id })).await;
    Ok(job.map_err(|status| refusal(&status))?.into_inner())
}

pub(super) async fn get(service: &JobsService, id: String) -> Result<Value, ApiError> {
    Ok(shown(&job(service, id).await?))
}

pub(super) async fn change(
    service: &JobsService,
    caller: &Caller,
    id: String,
    change: Change,
) -> Result<Value, ApiError> {
    let request = asked(caller, GetJobRequest { id });
    let changed = match change {
        Change::Cancel => service.cancel(request).await,
        Change::Pause => service.pause(request).await,
        Change::Resume => service.resume(request).await,
    };
    Ok(shown(&changed.map_err(|status| refusal(&status))?.into_inner()))
}

/// The newest first.
pub(super) async fn events(service: &JobsService, id: String) -> Result<Vec<Value>, ApiError> {
    let request = Request::new(JobLogsRequest { id: id.clone(), follow: false });
    let lines = service.logs(request).await.map_err(|status| refusal(&status))?.into_inner();
    let lines: Vec<_> = lines.collect().await;
    let mut events = Vec::new();
    for (number, line) in lines.into_iter().enumerate() {
        let line = line.map_err(|status| refusal(&status))?;
        events.push(json!({
            "object": "fine_tuning.job.event", "id": format!("ftevent-{id}-{number}"), "created_at": line.at_unix,
            "level": if line.text.starts_with("failed") { "error" } else { "info" },
            "message": line.text, "type": "message", "data": null,
        }));
    }
    for loss in job(service, id.clone()).await?.losses {
        events.push(json!({
            "object": "fine_tuning.job.event", "id": format!("ftevent-{id}-step-{}", loss.step),
            "created_at": events.last().map_or(json!(0), |event| event["created_at"].clone()), "level": "info",
            "message": format!("step {}", loss.step), "type": "metrics",
            "data": {"step": loss.step, "train_loss": loss.training, "valid_loss": loss.validation},
        }));
    }
    events.reverse();
    Ok(events)
}

/// The newest first.
pub(super) async fn checkpoints(service: &JobsService, id: String) -> Result<Vec<Value>, ApiError> {
    let job = job(service, id.clone()).await?;
    let entry = |held: &mlxnode_proto::v1::JobCheckpoint| {
        let at = |step: u64| job.losses.iter().rev().find(move |loss| loss.step <= step);
        let hash: String = held.hash.iter().map(|byte| format!("{byte:02x}")).collect();
        json!({
            "object": "fine_tuning.job.checkpoint", "id": format!("ftckpt-{hash}"), "created_at": held.saved_unix,
            "fine_tuned_model_checkpoint": served(&job, &held.hash), "fine_tuning_job_id": id,
            "step_number": held.step,
            "metrics": {"step": held.step, "train_loss": at(held.step).and_then(|loss| loss.training)},
        })
    };
    Ok(job.checkpoints.iter().rev().map(entry).collect())
}

/// What requests write into `model` for a checkpoint.
fn served(job: &Job, hash: &[u8]) -> Option<String> {
    let publication = job.publications.iter().find(|it| it.hash == hash && it.problem.is_empty())?;
    Some(format!("{}:{}", publication.model, publication.adapter))
}

/// A job as OpenAI writes it.
fn shown(job: &Job) -> Value {
    let wish = job.wish.clone().unwrap_or_default();
    let status = match job.state() {
        JobState::Preparing => "validating_files",
        JobState::Queued | JobState::WaitingForNodes | JobState::Unspecified => "queued",
        JobState::Running => "running",
        JobState::Paused => "paused",
        JobState::Finished => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    };
    let file = |name: &str| {
        let input = wish.inputs.iter().find(|input| input.name == name)?;
        ContentHash::try_from(input.hash.as_ref()).ok().map(file_id)
    };
    let told = wish.configuration.lines().next().and_then(|line| line.strip_prefix(ASKED));
    let told: Value = told.and_then(|told| serde_json::from_str(told).ok()).unwrap_or_default();
    let newest = job.checkpoints.last();
    let error = (job.state() == JobState::Failed)
        .then(|| json!({"code": "failed", "message": job.detail, "param": null}));
    let now = i64::try_from(crate::http::unix_time()).unwrap_or(i64::MAX);
    json!({
        "object": "fine_tuning.job",
        "id": wish.id,
        "created_at": job.submitted_unix,
        "finished_at": (job.ended_unix > 0).then_some(job.ended_unix),
        "model": if wish.publish_model.is_empty() { &wish.model } else { &wish.publish_model },
        "fine_tuned_model": newest.and_then(|held| served(job, &held.hash)),
        "organization_id": "mlxnode",
        "status": status,
        "detail": job.detail,
        "hyperparameters": if told.is_null() { json!({}) } else { told["hyperparameters"].clone() },
        "method": {"type": "supervised"},
        "seed": told["seed"],
        "metadata": told["metadata"],
        "training_file": file(TRAINING).unwrap_or_default(),
        "validation_file": file(VALIDATION),
        "result_files": [],
        "trained_tokens": (job.trained_tokens > 0).then_some(job.trained_tokens),
        "error": error,
        "estimated_finish": (job.seconds_left > 0.0).then_some(now.saturating_add(job.seconds_left as i64)),
        "integrations": [],
        "step": job.step,
        "steps": job.steps,
    })
}
