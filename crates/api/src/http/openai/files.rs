//! `/v1/files`: data sets for fine-tuning, as OpenAI's clients upload them. A file is named by its content, and listed by the node that
//! took it; jobs find it from every node.

use crate::http::{ApiError, ErrorKind, HttpServices};
use crate::jobs::{ContentHash, JobFiles, JobsService, NamedFile};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use http_body_util::BodyExt as _;
use mlxnode_coordinator::Error;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Largest file over HTTP: it is in memory once. `mlxnode jobs submit` takes larger ones.
const MAX_FILE: usize = 48 << 20;
/// It arrives within this time.
const UPLOAD_TIME: Duration = Duration::from_secs(300);
/// Longest name.
const MAX_NAME: usize = 255;
/// The only purpose that is served.
const PURPOSE: &str = "fine-tune";

/// A file as OpenAI writes it.
#[derive(Serialize)]
pub(in crate::http) struct FileObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: u64,
    filename: String,
    purpose: String,
    status: &'static str,
}

impl From<NamedFile> for FileObject {
    fn from(file: NamedFile) -> Self {
        Self {
            id: file_id(file.hash),
            object: "file",
            bytes: file.bytes,
            created_at: file.created_unix,
            filename: file.name,
            purpose: PURPOSE.to_owned(),
            status: "processed",
        }
    }
}

/// What clients call a file.
pub(super) fn file_id(hash: ContentHash) -> String {
    format!("file-{hash}")
}

/// The content that an id names.
pub(super) fn hash_of(id: &str, param: &str) -> Result<ContentHash, ApiError> {
    let hash = id.strip_prefix("file-").and_then(|hash| hash.parse().ok());
    hash.ok_or_else(|| {
        let shown: String = id.chars().take(80).collect();
        ApiError::field(param, format!("{shown:?} is no id of a file; upload it to /v1/files first"))
    })
}

/// Why the store refused.
pub(super) fn told(error: Error) -> ApiError {
    let text = error.to_string();
    let kind = match error {
        Error::Invalid(_) => ErrorKind::Invalid,
        Error::NotFound(_) => ErrorKind::NoModel,
        Error::TooMany(_) => ErrorKind::RateLimited,
        Error::Unavailable(_) | Error::TimedOut(_) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    ApiError::new(kind, text)
}

impl HttpServices {
    pub(super) fn jobs_service(&self) -> Result<&JobsService, ApiError> {
        let missing = || ApiError::new(ErrorKind::Unavailable, "this listener takes no jobs");
        self.jobs_service.as_ref().ok_or_else(missing)
    }

    fn job_files(&self) -> Result<&Arc<dyn JobFiles>, ApiError> {
        Ok(self.jobs_service()?.files())
    }
}

/// Takes a file in.
pub(in crate::http) async fn upload(
    State(services): State<HttpServices>,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    let files = services.job_files()?.clone();
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let boundary = kind.and_then(|kind| multer::parse_boundary(kind).ok());
    let boundary = boundary.ok_or_else(|| {
        ApiError::new(ErrorKind::Invalid, "the body must be multipart/form-data with the parts purpose and file")
    })?;
    let room = services.bodies.clone().try_acquire_many_owned((MAX_FILE >> 10) as u32);
    let _room = room.map_err(|_| {
        ApiError::new(ErrorKind::Unavailable, "too many large requests at once; try again in a moment")
            .retry_after(Duration::from_secs(1))
    })?;
    let limits = multer::SizeLimit::new().whole_stream(MAX_FILE as u64 + 4096);
    let constraints = multer::Constraints::new().size_limit(limits);
    let stream = request.into_body().into_data_stream();
    let mut parts = multer::Multipart::with_constraints(stream, boundary, constraints);
    let reading = async {
        let (mut purpose, mut file) = (None, None);
        while let Some(part) = parts.next_field().await? {
            match part.name() {
                Some("purpose") => purpose = Some(part.text().await?),
                Some("file") => {
                    let name = part.file_name().unwrap_or("file").to_owned();
                    file = Some((name, part.bytes().await?));
                }
                Some("expires_after[anchor]" | "expires_after[seconds]") => drop(part.bytes().await?),
                other => {
                    let shown: String = other.unwrap_or_default().chars().take(80).collect();
                    return Ok(Err(ApiError::field(shown.clone(), format!("{shown:?} is not known here"))));
                }
            }
        }
        Ok::<_, multer::Error>(Ok((purpose, file)))
    };
    let read = tokio::time::timeout(UPLOAD_TIME, reading).await;
    let read = read.map_err(|_| ApiError::new(ErrorKind::TooSlow, "the file did not arrive in time"))?;
    let (purpose, file) = read.map_err(|error| match error {
        multer::Error::StreamSizeExceeded { .. } => ApiError::new(
            ErrorKind::TooLarge,
            format!("the file is larger than {} MiB; submit it with `mlxnode jobs submit`", MAX_FILE >> 20),
        ),
        other => ApiError::new(ErrorKind::Invalid, format!("the body cannot be read: {other}")),
    })??;
    match purpose.as_deref() {
        Some(PURPOSE) => {}
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            let text = format!("purpose is {shown:?}, but only {PURPOSE:?} is served");
            return Err(ApiError::field("purpose", text));
        }
        None => return Err(ApiError::field("purpose", "purpose is missing")),
    }
    let (name, content) = file.ok_or_else(|| ApiError::field("file", "file is missing"))?;
    let hashed = content.clone();
    let hash = tokio::task::spawn_blocking(move || ContentHash::of(&hashed)).await;
    let hash = hash.map_err(|_| ApiError::new(ErrorKind::Internal, "the file could not be read"))?;
    let bytes = content.len() as u64;
    if !files.received(hash).await.map_err(told)?.is_complete {
        let mut receiving = files.receive(hash, bytes, 0).await.map_err(told)?;
        receiving.write(content).await.map_err(told)?;
        receiving.finish().await.map_err(told)?;
    }
    let name = name.chars().filter(|it| !it.is_control()).take(MAX_NAME).collect();
    let named = NamedFile { hash, bytes, name, created_unix: crate::http::unix_time() };
    files.keep(named.clone()).await.map_err(told)?;
    Ok(Json(named.into()))
}

/// The files that this node took.
pub(in crate::http) async fn list(
    State(services): State<HttpServices>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Json<Value>, ApiError> {
    let mut named = services.job_files()?.kept().await.map_err(told)?;
    named.sort_by_key(|file| std::cmp::Reverse(file.created_unix));
    if query.get("purpose").is_some_and(|purpose| purpose != PURPOSE) {
        named.clear();
    }
    let data: Vec<FileObject> = named.into_iter().map(FileObject::from).collect();
    Ok(Json(json!({"object": "list", "data": data, "has_more": false})))
}

async fn find(services: &HttpServices, id: &str) -> Result<NamedFile, ApiError> {
    let hash = hash_of(id, "file_id")?;
    let named = services.job_files()?.kept().await.map_err(told)?;
    let found = named.into_iter().find(|file| file.hash == hash);
    found.ok_or_else(|| ApiError::new(ErrorKind::NoModel, "there is no file of this id on this node"))
}

/// One of them.
pub(in crate::http) async fn one(
    State(services): State<HttpServices>,
    Path(id): Path<String>,
) -> Result<Json<FileObject>, ApiError> {
    Ok(Json(find(&services, &id).await?.into()))
}

/// What it holds.
pub(in crate::http) async fn content(
    State(services): State<HttpServices>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&services, &id).await?;
    let content = services.job_files()?.read(file.hash, file.bytes).await.map_err(told)?;
    let mut response = Response::new(Body::from(content));
    let kind = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// Forgets it; jobs that name it keep it.
pub(in crate::http) async fn delete(
    State(services): State<HttpServices>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let file = find(&services, &id).await?;
    services.job_files()?.forget(file.hash).await.map_err(told)?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}
