//! `/v1/files`: data sets for fine-tuning, as OpenAI's clients upload them, and what their jobs made.
//!
//! Data sets go to the store of jobs' files as they come, by what they hold; the name that a client gives is kept beside it until it is
//! deleted. They belong to the key that they came with: others do not see them, but for those who administer the cluster.
//!
//! | module | one line |
//! |---|---|
//! | `upload` | files on their way in |
//! | `results`, `wire` | files that jobs made, and what of a job they are made of |

mod results;
mod upload;
mod wire;

pub(in crate::http) use upload::upload;
pub(super) use wire::finished;

use crate::fields::shortened;
use crate::http::caller::Id;
use crate::http::query::{Page, Query, listing};
use crate::http::{ApiError, Caller, ErrorKind, HttpServices};
use crate::jobs::{InputFile, JobFiles, JobsService, NamedFile};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt as _;
use mlxnode_coordinator::Error;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

/// The only purpose that files come with.
const PURPOSE: &str = "fine-tune";
/// Files of a page.
const PAGE: usize = 10_000;

/// A file as OpenAI writes it.
fn shown(file: &NamedFile) -> Value {
    json!({
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created_unix,
        "expires_at": null, "filename": file.name, "purpose": PURPOSE, "status": "processed", "status_details": null,
    })
}

/// Why the store refused.
pub(super) fn told(error: Error) -> ApiError {
    let text = error.to_string();
    match error {
        Error::Invalid(_) => ApiError::new(ErrorKind::Invalid, text),
        Error::NotFound(_) => ApiError::new(ErrorKind::NotFound, text),
        // No room on the disk: what is over makes some.
        Error::TooMany(_) | Error::Unavailable(_) | Error::TimedOut(_) => {
            ApiError::new(ErrorKind::Unavailable, text).retry_after(Duration::from_secs(5))
        }
        _ => {
            tracing::error!(reason = text, "a file of a job failed");
            ApiError::new(
                ErrorKind::Internal,
                "the file could not be read or written; the node's log says why",
            )
        }
    }
}

impl HttpServices {
    pub(in crate::http) fn jobs_service(&self) -> Result<&JobsService, ApiError> {
        let missing = || ApiError::new(ErrorKind::Unavailable, "this listener takes no jobs");
        self.jobs_service.as_ref().ok_or_else(missing)
    }

    fn job_files(&self) -> Result<Arc<dyn JobFiles>, ApiError> {
        Ok(self.jobs_service()?.files().clone())
    }

    /// A file that this caller may see.
    pub(super) async fn file(&self, caller: &Caller, id: &str) -> Result<Option<NamedFile>, ApiError> {
        let kept = self.job_files()?.kept().await.map_err(told)?;
        Ok(kept.into_iter().find(|file| file.id == id && caller.may_see(&file.owner)))
    }

    async fn needed_file(&self, caller: &Caller, id: &str) -> Result<NamedFile, ApiError> {
        self.file(caller, id).await?.ok_or_else(|| {
            let message = format!("there is no file {:?}", shortened(id));
            ApiError { param: Some("id".to_owned()), ..ApiError::new(ErrorKind::NotFound, message) }
        })
    }
}

fn check_purpose(purpose: &str) -> Result<(), ApiError> {
    match purpose {
        PURPOSE => Ok(()),
        other => {
            let text = format!("purpose is {:?}, but only {PURPOSE:?} is served", shortened(other));
            Err(ApiError::field("purpose", text))
        }
    }
}

/// The files that nodes keep.
pub(in crate::http) async fn list(
    State(services): State<HttpServices>,
    caller: Caller,
    mut query: Query,
) -> Result<Json<Value>, ApiError> {
    if let Some(purpose) = query.take("purpose") {
        check_purpose(&purpose)?;
    }
    let order = query.take("order").unwrap_or_else(|| "desc".to_owned());
    let page = Page::of(&mut query, PAGE, PAGE)?;
    query.finish()?;
    let mut kept = services.job_files()?.kept().await.map_err(told)?;
    kept.retain(|file| caller.may_see(&file.owner));
    kept.sort_by(|one, other| (one.created_unix, &one.id).cmp(&(other.created_unix, &other.id)));
    match order.as_str() {
        "asc" => {}
        "desc" => kept.reverse(),
        _ => return Err(ApiError::field("order", "order must be asc or desc")),
    }
    let (files, more) = page.cut(kept, |file| &file.id)?;
    Ok(Json(listing(files.iter().map(shown).collect(), more)))
}

/// One of them.
pub(in crate::http) async fn one(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    if let Some(made) = services.result_file(&caller, &id).await? {
        return Ok(Json(made.shown(&services.job_files()?).await?));
    }
    Ok(Json(shown(&services.needed_file(&caller, &id).await?)))
}

/// What it holds.
pub(in crate::http) async fn content(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Response, ApiError> {
    let files = services.job_files()?;
    let (bytes, mut pieces) = match services.result_file(&caller, &id).await? {
        Some(made) => made.open(&files).await?,
        None => {
            let file = services.needed_file(&caller, &id).await?;
            let input = InputFile { name: file.name, hash: file.hash, bytes: file.bytes };
            (file.bytes, files.content(input))
        }
    };
    // Whether it can be read shows with the first piece; an empty file has none.
    let first = pieces.next().await.transpose().map_err(told)?;
    let first = futures::stream::iter(first.map(Ok::<Bytes, Error>));
    let mut response = Response::new(Body::from_stream(first.chain(pieces)));
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    Ok(response)
}

/// Forgets it; jobs that read it keep it.
pub(in crate::http) async fn delete(
    State(services): State<HttpServices>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    if let Some(made) = services.result_file(&caller, &id).await? {
        return Err(made.stays());
    }
    let file = services.needed_file(&caller, &id).await?;
    services.job_files()?.forget(file.id).await.map_err(told)?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}
