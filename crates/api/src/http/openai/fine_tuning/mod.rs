//! `/v1/fine_tuning/jobs`: jobs of the cluster as OpenAI's clients submit and watch them.
//!
//! | module | one line |
//! |---|---|
//! | `request` | what a client asks for, and the configuration of the trainer that follows from it |
//! | `wire` | jobs, events and checkpoints as OpenAI writes them |

mod request;
mod wire;

use super::files::told;
use crate::http::body::JsonBody;
use crate::http::caller::Id;
use crate::http::jobs_client::{self, Change};
use crate::http::query::{Page, Query, listing};
use crate::http::{ApiError, Caller, ErrorKind, HttpServices, id};
use crate::jobs::{ContentHash, InputFile, NamedFile, Unfit};
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use futures::{StreamExt as _, TryStreamExt as _};
use mlxnode_coordinator::deployments::check_adapter_name;
use mlxnode_coordinator::jobs::JobSpec;
use request::Asked;
use serde_json::Value;

/// Entries of a page when nobody says how many, and at most.
const PAGE: usize = 20;
const MAX_PAGE: usize = 100;
/// What the trainer finds the files as.
const TRAINING: &str = "train.jsonl";
const VALIDATION: &str = "valid.jsonl";
/// Longest `Idempotency-Key`.
const MAX_KEY: usize = 255;
/// Jobs that are asked for together.
const TOGETHER: usize = 8;

/// The `Idempotency-Key` of a request: with the same one it is the same job, however often it is asked for.
pub(in crate::http) struct IdempotencyKey(Option<String>);

impl<S: Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let Some(value) = parts.headers.get("idempotency-key") else { return Ok(Self(None)) };
        match value.to_str() {
            Ok(key) if (1..=MAX_KEY).contains(&key.len()) => Ok(Self(Some(key.to_owned()))),
            _ => Err(ApiError::field(
                "Idempotency-Key",
                format!("Idempotency-Key must have 1 to {MAX_KEY} characters of ASCII"),
            )),
        }
    }
}

impl IdempotencyKey {
    /// The id of the job: of each key's own, so that nobody meets another's by the same word.
    fn job_id(&self, caller: &Caller) -> String {
        match &self.0 {
            None => id("ftjob-"),
            Some(key) => {
                let hash = ContentHash::of(format!("{}\0{key}", caller.tenant).as_bytes()).to_string();
                format!("ftjob-{}", hash.get(..24).unwrap_or(&hash))
            }
        }
    }
}

/// Submits a job.
pub(in crate::http) async fn create(
    State(services): State<HttpServices>,
    caller: Caller,
    key: IdempotencyKey,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let asked = Asked::read(body.fields)?;
    check_share(&caller, &asked)?;
    let service = services.jobs_service()?;
    let job = key.job_id(&caller);
    let base = base(&services, &caller, &asked, &job)?;
    let training = file(&services, &caller, &asked.training_file, "training_file").await?;
    let mut inputs = vec![input(TRAINING, &training)];
    if let Some(id) = &asked.validation_file {
        inputs.push(input(VALIDATION, &file(&services, &caller, id, "validation_file").await?));
    }
    let examined = service.files().check(asked.first_configuration(), base.source.clone(), inputs.clone());
    let examined = examined.await.map_err(unfit)?;
    let (configuration, labels) = asked.configuration(&examined)?;
    let wish = wire::Wish { id: job, base, inputs, configuration, labels, examined };
    let submitted = jobs_client::submit(service, &caller, wire::request(wish, &asked)).await?;
    Ok(Json(wire::shown(&submitted)))
}

/// Whoever does not administer the cluster leaves the rest of a node's time to its requests.
fn check_share(caller: &Caller, asked: &Asked) -> Result<(), ApiError> {
    let most = JobSpec::DEFAULT_SHARE;
    if caller.administers() || asked.share_percent <= most {
        return Ok(());
    }
    let message = format!(
        "share_percent is {}, but jobs of this API key may have at most {most}; more takes the role admin",
        asked.share_percent
    );
    Err(ApiError { param: Some("share_percent".into()), ..ApiError::new(ErrorKind::Forbidden, message) })
}

/// The model that is trained, and where the result is served.
struct Base {
    source: String,
    /// A loaded model, and what the result is called there.
    publish: Option<(String, String)>,
}

fn base(services: &HttpServices, caller: &Caller, asked: &Asked, job: &str) -> Result<Base, ApiError> {
    let model = &asked.model;
    if !caller.may_use(model) {
        let message = format!("there is no model {model:?}, or this API key may not use it");
        return Err(ApiError { param: Some("model".into()), ..ApiError::new(ErrorKind::NoModel, message) });
    }
    let adapter = asked.suffix.clone().unwrap_or_else(|| job.to_owned());
    check_adapter_name(&adapter).map_err(|error| ApiError::field("suffix", error.to_string()))?;
    let deployments = services.front.deployments();
    if let Some(loaded) = deployments.iter().find(|deployment| deployment.name == *model) {
        // A job that asked for the name before is found by its id when it is submitted.
        let is_own = |source: &str| source.starts_with(&format!("job:{job}/"));
        let taken = loaded.adapters.iter().find(|known| known.name == adapter);
        if taken.is_some_and(|known| !is_own(&known.source)) {
            let message =
                format!("{model} has an adapter {adapter:?} already; take another suffix, or unload it");
            return Err(ApiError::field("suffix", message));
        }
        return Ok(Base { source: loaded.source.clone(), publish: Some((loaded.name.clone(), adapter)) });
    }
    let is_adapter = |name: &str| {
        deployments.iter().any(|it| name.strip_prefix(&it.name).is_some_and(|rest| rest.starts_with(':')))
    };
    if is_adapter(model) {
        let message = "a model with an adapter cannot be trained further; name the model itself";
        return Err(ApiError::field("model", message));
    }
    if !caller.administers() {
        // What is not loaded would be downloaded, or read from a folder of a node.
        let message = format!("this API key trains models that are loaded, but no model {model:?} is");
        return Err(ApiError { param: Some("model".into()), ..ApiError::new(ErrorKind::NoModel, message) });
    }
    if asked.suffix.is_some() {
        let message = format!(
            "suffix names the result among the adapters of a loaded model, but no model {model:?} is loaded; load it, or leave suffix out \
             and publish the result later"
        );
        return Err(ApiError::field("suffix", message));
    }
    Ok(Base { source: model.clone(), publish: None })
}

fn input(name: &str, file: &NamedFile) -> InputFile {
    InputFile { name: name.to_owned(), hash: file.hash, bytes: file.bytes }
}

async fn file(
    services: &HttpServices,
    caller: &Caller,
    id: &str,
    param: &'static str,
) -> Result<NamedFile, ApiError> {
    services.file(caller, id).await?.ok_or_else(|| {
        let shown = crate::fields::shortened(id);
        ApiError::field(param, format!("there is no file {shown:?}; upload it to /v1/files first"))
    })
}

fn unfit(unfit: Unfit) -> ApiError {
    match unfit {
        Unfit::Configuration(text) => ApiError::field("configuration", text),
        Unfit::Rows { text } => match text.starts_with(VALIDATION) {
            true => ApiError::field("validation_file", text).coded("invalid_validation_file"),
            false => ApiError::field("training_file", text).coded("invalid_training_file"),
        },
        Unfit::NotHere(text) => ApiError::new(ErrorKind::Unavailable, text),
        Unfit::Failed(error) => told(error),
    }
}

/// All jobs, by pages.
pub(in crate::http) async fn list(
    State(services): State<HttpServices>,
    caller: Caller,
    mut query: Query,
) -> Result<Json<Value>, ApiError> {
    let page = Page::of(&mut query, PAGE, MAX_PAGE)?;
    query.finish()?;
    let service = services.jobs_service()?;
    let (jobs, more) = page.cut(jobs_client::list(service, &caller).await?, wire::id)?;
    // The list leaves out what makes it long.
    let whole = futures::stream::iter(jobs.into_iter().map(|job| {
        let (service, caller) = (service.clone(), caller.clone());
        async move {
            match jobs_client::get(&service, &caller, wire::id(&job)).await {
                Ok(job) => Ok(Some(job)),
                // It made room for a new one at this moment.
                Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        }
    }));
    let whole: Vec<_> = whole.buffered(TOGETHER).try_collect().await?;
    Ok(Json(listing(whole.iter().flatten().map(wire::shown).collect(), more)))
}

/// One job.
pub(in crate::http) async fn one(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    let job = jobs_client::get(services.jobs_service()?, &caller, &id).await?;
    Ok(Json(wire::shown(&job)))
}

async fn change(
    services: &HttpServices,
    caller: &Caller,
    id: &str,
    change: Change,
) -> Result<Json<Value>, ApiError> {
    let job = jobs_client::change(services.jobs_service()?, caller, id, change).await?;
    Ok(Json(wire::shown(&job)))
}

/// Ends a job.
pub(in crate::http) async fn cancel(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    change(&services, &caller, &id, Change::Cancel).await
}

/// Has a job save a checkpoint and stand still.
pub(in crate::http) async fn pause(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    change(&services, &caller, &id, Change::Pause).await
}

/// Has a job go on; one that failed too.
pub(in crate::http) async fn resume(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    change(&services, &caller, &id, Change::Resume).await
}

/// What happened to a job, the newest first.
pub(in crate::http) async fn events(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
    mut query: Query,
) -> Result<Json<Value>, ApiError> {
    let page = Page::of(&mut query, PAGE, MAX_PAGE)?;
    query.finish()?;
    let service = services.jobs_service()?;
    let job = jobs_client::get(service, &caller, &id).await?;
    let log = jobs_client::log(service, &caller, &id).await?;
    part(&page, wire::events(&job, &log))
}

/// What a job saved, the newest first.
pub(in crate::http) async fn checkpoints(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
    mut query: Query,
) -> Result<Json<Value>, ApiError> {
    let page = Page::of(&mut query, 10, MAX_PAGE)?;
    query.finish()?;
    let job = jobs_client::get(services.jobs_service()?, &caller, &id).await?;
    part(&page, wire::checkpoints(&job))
}

fn part(page: &Page, all: Vec<Value>) -> Result<Json<Value>, ApiError> {
    let (entries, more) = page.cut(all, |entry| entry["id"].as_str().unwrap_or_default())?;
    Ok(Json(listing(entries, more)))
}
