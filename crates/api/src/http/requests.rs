//! Every request has a name: `x-request-id` in its answer, and a trace that goes on through the nodes.
//!
//! A client's own `x-request-id` and `traceparent` are taken over. The log says about a request what route it had, how it ended and
//! how long it took; never what was asked.

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use mlxnode_compute::TraceContext;
use std::time::Instant;
use tracing::{Instrument as _, debug, info_span};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: &str = "traceparent";
/// Longest id that a client may give.
const MAX_ID_BYTES: usize = 128;

/// Names a request and its answer.
pub(super) async fn name(mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    let parent = headers.get(TRACEPARENT).and_then(|value| TraceContext::parse(value.to_str().ok()?));
    let trace = match parent {
        Some(parent) => parent.with_span(rand::random()),
        None => TraceContext::new(random()),
    };
    let id = headers.get(X_REQUEST_ID).filter(|id| is_usable(id)).cloned();
    // An id of ours is the trace's, so that one leads to the other.
    let id = id.or_else(|| HeaderValue::from_str(&trace.id()).ok());
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let span = info_span!("request", trace = trace.id(), route);
    request.extensions_mut().insert(trace);
    let arrived = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let _entered = span.enter();
    debug!(status = response.status().as_u16(), millis = arrived.elapsed().as_millis() as u64, "answered");
    if let Some(id) = id {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    response
}

fn random() -> [u8; 24] {
    rand::random()
}

/// Letters, digits and what ids are punctuated with: it goes into logs.
fn is_usable(id: &HeaderValue) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-:/+=".contains(byte);
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.as_bytes().iter().all(allowed)
}
