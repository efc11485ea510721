//! Files on their way in: multipart forms of any order, piece by piece to the disk.

use super::{check_purpose, shown, told};
use crate::fields::shortened;
use crate::http::{ApiError, Caller, ErrorKind, HttpServices, id, unix_time};
use crate::jobs::{JobFiles, NamedFile, TakingIn};
use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use mlxnode_coordinator::jobs::MAX_INPUT_BYTES;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// Nothing comes of an upload for so long: it broke.
const STANDSTILL: Duration = Duration::from_secs(60);
/// Longest name.
const MAX_NAME: usize = 255;
/// Longest text beside the file.
const MAX_TEXT: usize = 1024;
/// Bytes that may come without any of them belonging to a part: its head is not as long.
const MAX_HEAD: usize = 4 << 20;
/// As much of an upload that is wrong is read to its end, and for so long: the connection can be used further then.
const MAX_DRAINED: usize = 4 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(2);
/// Pieces that go to the disk.
const PIECE: usize = 256 << 10;

/// What an upload brings.
#[derive(Default)]
struct Parts {
    purpose: Option<String>,
    /// Name and where its bytes are.
    file: Option<(String, Box<dyn TakingIn>)>,
}

/// An upload on its way.
struct Incoming {
    parts: multer::Multipart<'static>,
    /// Bytes that came since the last piece that was understood.
    unread: Arc<AtomicUsize>,
}

/// Takes a file in. When the upload breaks, or is wrong, nothing is left of it.
pub(in crate::http) async fn upload(
    State(services): State<HttpServices>,
    caller: Caller,
    request: Request,
) -> Response {
    let begun = begin(&services, &request);
    let (files, boundary, _turn) = match begun {
        Ok(begun) => begun,
        Err(error) => return closing(error),
    };
    let mut incoming = Incoming::new(request, boundary);
    match take(&files, &caller, &mut incoming).await {
        Ok(file) => Json(shown(&file)).into_response(),
        // Whoever sends something short and wrong keeps the connection; for others it ends here, and they are told.
        Err(error) => match tokio::time::timeout(DRAIN_TIME, incoming.drain()).await {
            Ok(true) => error.into_response(),
            _ => closing(error),
        },
    }
}

fn closing(error: ApiError) -> Response {
    let mut response = error.into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn begin(
    services: &HttpServices,
    request: &Request,
) -> Result<(Arc<dyn JobFiles>, String, OwnedSemaphorePermit), ApiError> {
    let files = services.job_files()?;
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let boundary = kind.and_then(|kind| multer::parse_boundary(kind).ok());
    let boundary = boundary.ok_or_else(|| {
        let message = "the body must be multipart/form-data with the parts purpose and file";
        ApiError::new(ErrorKind::Invalid, message)
    })?;
    let turn = services.uploads.clone().try_acquire_owned();
    let turn = turn.map_err(|_| {
        ApiError::new(ErrorKind::RateLimited, "too many uploads at once; try again in a moment")
            .retry_after(Duration::from_secs(2))
    })?;
    Ok((files, boundary, turn))
}

async fn take(
    files: &Arc<dyn JobFiles>,
    caller: &Caller,
    incoming: &mut Incoming,
) -> Result<NamedFile, ApiError> {
    let Parts { purpose, file } = incoming.read(files).await?;
    check_purpose(&purpose.ok_or_else(|| ApiError::field("purpose", "purpose is missing"))?)?;
    let (name, content) = file.ok_or_else(|| ApiError::field("file", "file is missing"))?;
    let (hash, bytes) = content.finish().await.map_err(told)?;
    let named =
        NamedFile { id: id("file-"), hash, bytes, name, owner: caller.name(), created_unix: unix_time() };
    files.keep(named.clone()).await.map_err(told)?;
    Ok(named)
}

impl Incoming {
    fn new(request: Request, boundary: String) -> Self {
        // What comes in is counted anew with every piece that is understood: a head without an end fills no memory.
        let unread = Arc::new(AtomicUsize::new(0));
        let counted = unread.clone();
        let mut body = request.into_body().into_data_stream();
        // multer takes all that is ready before it says what it has understood: one piece each time that it looks, or a fast upload
        // would count as a head without an end.
        let mut has_given = false;
        let stream = futures::stream::poll_fn(move |context| {
            if std::mem::take(&mut has_given) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let piece = match ready!(body.poll_next_unpin(context)) {
                None => return Poll::Ready(None),
                Some(piece) => piece.map_err(std::io::Error::other),
            };
            has_given = true;
            Poll::Ready(Some(piece.and_then(|piece| {
                match counted.fetch_add(piece.len(), Ordering::Relaxed) > MAX_HEAD {
                    true => Err(std::io::Error::other("the head of a part has no end")),
                    false => Ok::<Bytes, std::io::Error>(piece),
                }
            })))
        });
        Self { parts: multer::Multipart::new(stream, boundary), unread }
    }

    /// Reads what is left, if that is little; true when nothing is.
    async fn drain(&mut self) -> bool {
        let mut drained = 0;
        while let Ok(part) = self.parts.next_field().await {
            let Some(mut part) = part else { return true };
            while let Ok(Some(piece)) = part.chunk().await {
                self.unread.store(0, Ordering::Relaxed);
                drained += piece.len();
                if drained > MAX_DRAINED {
                    return false;
                }
            }
        }
        false
    }

    /// All parts. A part that is not served, or wrong, ends it.
    async fn read(&mut self, files: &Arc<dyn JobFiles>) -> Result<Parts, ApiError> {
        let unread = self.unread.clone();
        let mut found = Parts::default();
        while let Some(mut part) = in_time(self.parts.next_field()).await? {
            unread.store(0, Ordering::Relaxed);
            let name = shortened(part.name().unwrap_or_default());
            let is_twice = match name.as_str() {
                "purpose" => found.purpose.is_some(),
                "file" => found.file.is_some(),
                _ => {
                    let message = match name.starts_with("expires_after") {
                        true => {
                            "expires_after is not supported: files stay until they are deleted".to_owned()
                        }
                        false => format!("{name:?} is not a part that is served here; purpose and file are"),
                    };
                    return Err(ApiError::field(name, message));
                }
            };
            if is_twice {
                return Err(ApiError::field(name.clone(), format!("{name} is there twice")));
            }
            if name == "purpose" {
                let mut text = BytesMut::new();
                while let Some(piece) = in_time(part.chunk()).await? {
                    unread.store(0, Ordering::Relaxed);
                    text.extend_from_slice(&piece);
                    if text.len() > MAX_TEXT {
                        return Err(ApiError::field(
                            "purpose",
                            format!("purpose is longer than {MAX_TEXT} bytes"),
                        ));
                    }
                }
                let text = String::from_utf8_lossy(&text).into_owned();
                check_purpose(&text)?;
                found.purpose = Some(text);
                continue;
            }
            let file_name = part
                .file_name()
                .ok_or_else(|| ApiError::field("file", "file must be a file: its part has no filename"))?;
            let file_name = file_name.chars().filter(|it| !it.is_control()).take(MAX_NAME).collect();
            let mut content = files.take_in().await.map_err(told)?;
            let (mut received, mut waiting) = (0_u64, BytesMut::new());
            while let Some(piece) = in_time(part.chunk()).await? {
                unread.store(0, Ordering::Relaxed);
                received += piece.len() as u64;
                if received > MAX_INPUT_BYTES {
                    let message = format!("the file is larger than {} GiB", MAX_INPUT_BYTES >> 30);
                    return Err(ApiError::new(ErrorKind::TooLarge, message));
                }
                waiting.extend_from_slice(&piece);
                if waiting.len() >= PIECE {
                    content.write(waiting.split().freeze()).await.map_err(told)?;
                }
            }
            if !waiting.is_empty() {
                content.write(waiting.freeze()).await.map_err(told)?;
            }
            found.file = Some((file_name, content));
        }
        Ok(found)
    }
}

/// The next of an upload, when it comes.
async fn in_time<T>(next: impl Future<Output = multer::Result<T>>) -> Result<T, ApiError> {
    match tokio::time::timeout(STANDSTILL, next).await {
        Ok(Ok(next)) => Ok(next),
        Ok(Err(error)) => {
            let message = format!("the body cannot be read: {}", shortened(&error.to_string()));
            Err(ApiError::new(ErrorKind::Invalid, message))
        }
        Err(_) => {
            let message = format!("nothing came of the file for {} seconds", STANDSTILL.as_secs());
            Err(ApiError::new(ErrorKind::TooSlow, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    /// A form with a file of so many pieces of a MiB, all of which are ready at once.
    fn form(head: &str, pieces: usize) -> Incoming {
        let piece = Bytes::from(vec![b'x'; 1 << 20]);
        let begin = Bytes::from(format!("--XX\r\n{head}"));
        let end = Bytes::from_static(b"\r\n--XX--\r\n");
        let body = [vec![begin], vec![piece; pieces], vec![end]].concat();
        let body = Body::from_stream(futures::stream::iter(body.into_iter().map(Ok::<_, std::io::Error>)));
        Incoming::new(Request::new(body), "XX".to_owned())
    }

    #[tokio::test]
    async fn what_comes_faster_than_it_is_read_is_no_head() {
        let mut incoming = form("content-disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n", 16);
        let mut part = incoming.parts.next_field().await.unwrap().unwrap();
        let mut received = 0;
        while let Some(piece) = part.chunk().await.unwrap() {
            incoming.unread.store(0, Ordering::Relaxed);
            received += piece.len();
        }
        assert_eq!(received, 16 << 20);
        drop(part);
        assert!(incoming.parts.next_field().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_head_without_an_end_fills_no_memory() {
        let mut incoming = form("x: ", 64);
        assert!(incoming.parts.next_field().await.is_err());
        assert!(incoming.unread.load(Ordering::Relaxed) <= MAX_HEAD + (2 << 20));
    }
}
