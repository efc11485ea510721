//! A request's body: bounded in size and time, read as one JSON object.

use crate::http::fields::Fields;
use crate::http::{ApiError, ErrorKind, HttpServices};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::Value;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// The largest body: a prompt of several million characters.
const MAX_BODY: usize = 16 << 20;
/// It arrives within this time.
const BODY_TIME: Duration = Duration::from_secs(60);
/// Numbers, texts, lists and objects in a body: each takes some 32 bytes in memory, however short it is.
const MAX_VALUES: usize = 1 << 20;
/// Larger bodies are read off the asynchronous threads.
const LARGE: usize = 128 << 10;

/// The fields of a body. Holds its place among the bodies that are read now.
pub(super) struct JsonBody {
    pub(super) fields: Fields,
    _room: OwnedSemaphorePermit,
}

impl FromRequest<HttpServices> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, services: &HttpServices) -> Result<Self, ApiError> {
        let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let declared = declared.and_then(|value| value.parse::<usize>().ok());
        if declared.is_some_and(|length| length > MAX_BODY) {
            return Err(too_large());
        }
        // A body of unknown length takes the room of the largest one.
        let kib = declared.unwrap_or(MAX_BODY).div_ceil(1024).max(1);
        let room = services.bodies.clone().try_acquire_many_owned(u32::try_from(kib).unwrap_or(u32::MAX));
        let room = room.map_err(|_| {
            let error = ApiError::new(
                ErrorKind::Unavailable,
                "too many large requests at once; try again in a moment",
            );
            error.retry_after(Duration::from_secs(1))
        })?;
        let collecting = Limited::new(request.into_body(), MAX_BODY).collect();
        let bytes = match tokio::time::timeout(BODY_TIME, collecting).await {
            Ok(Ok(collected)) => collected.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
            Ok(Err(error)) => {
                let message = format!("the body ended before its time: {error}");
                return Err(ApiError::new(ErrorKind::Invalid, message));
            }
            Err(_) => {
                let seconds = BODY_TIME.as_secs();
                let message = format!("the body did not arrive within {seconds} seconds");
                return Err(ApiError::new(ErrorKind::TooSlow, message));
            }
        };
        let parsed = match bytes.len() > LARGE {
            false => parse(&bytes),
            true => tokio::task::spawn_blocking(move || parse(&bytes))
                .await
                .map_err(|_| ApiError::new(ErrorKind::Internal, "the body could not be read"))?,
        };
        Ok(Self { fields: parsed?, _room: room })
    }
}

fn too_large() -> ApiError {
    ApiError::new(ErrorKind::TooLarge, format!("the body is larger than {} MiB", MAX_BODY >> 20))
}

fn parse(bytes: &[u8]) -> Result<Fields, ApiError> {
    let values = bytes.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if values > MAX_VALUES {
        // Commas in texts count too, so the number is looked at again only where it matters.
        let values = values_outside_texts(bytes);
        if values > MAX_VALUES {
            let message = format!("the body has {values} values, more than {MAX_VALUES}");
            return Err(ApiError::new(ErrorKind::TooLarge, message));
        }
    }
    if bytes.is_empty() {
        return Err(ApiError::new(ErrorKind::Invalid, "the body is empty, but must be a JSON object"));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(Fields::new("", map)),
        Ok(other) => {
            let message = format!("the body is {}, but must be a JSON object", super::fields::kind(&other));
            Err(ApiError::new(ErrorKind::Invalid, message))
        }
        Err(error) => Err(ApiError::new(ErrorKind::Invalid, format!("the body is not JSON: {error}"))),
    }
}

fn values_outside_texts(bytes: &[u8]) -> usize {
    let (mut count, mut in_text, mut escaped) = (0, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b',' | b'[' | b'{' if !in_text => count += 1,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_objects_of_bounded_size_are_read() {
        assert!(parse(br#"{"a": [1, 2]}"#).is_ok());
        for (body, words) in [
            ("", "empty"),
            ("[]", "a list"),
            ("7", "a number"),
            ("{", "not JSON"),
            ("{\"a\": 1} x", "not JSON"),
            ("\u{feff}{}", "not JSON"),
        ] {
            let error = parse(body.as_bytes()).err().unwrap();
            assert!(error.message.contains(words), "{body}: {}", error.message);
        }
        assert!(parse(b"{\"a\": \"\xff\"}").is_err());
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(deep.as_bytes()).is_err());
    }

    #[test]
    fn a_body_of_a_million_values_is_too_large_and_a_long_text_is_not() {
        let many = format!("{{\"a\": [{}1]}}", "1,".repeat(MAX_VALUES));
        assert_eq!(parse(many.as_bytes()).err().unwrap().kind, ErrorKind::TooLarge);
        let text = format!("{{\"a\": \"{}\\\"\"}}", ",".repeat(MAX_VALUES + 10));
        assert!(parse(text.as_bytes()).is_ok());
    }
}
