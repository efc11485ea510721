//! Every request has a name: `x-request-id` in its answer, and a trace that goes on through the nodes.
//!
//! A client's own `x-request-id` and `traceparent` are taken over. The log says about a request what route it had, how it ended and
//! how long it took; never what was asked.

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use mlxnode_compute::{Span, SpanSink, SpanValue, TraceContext};
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tracing::{Instrument as _, debug, info_span};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: &str = "traceparent";
/// Longest id that a client may give.
const MAX_ID_BYTES: usize = 128;

/// Names a request and its answer. Its span ends with the head of the answer: what streams has spans of its own.
pub(super) async fn name(
    State(spans): State<Option<Arc<dyn SpanSink>>>,
    mut request: Request,
    next: Next,
) -> Response {
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
    let began = SystemTime::now();
    let name = spans.is_some().then(|| format!("{} {}", request.method(), route_of(&request)));
    let mut response = next.run(request).instrument(span.clone()).await;
    let _entered = span.enter();
    debug!(status = response.status().as_u16(), millis = arrived.elapsed().as_millis() as u64, "answered");
    if let (Some(spans), Some(name)) = (spans, name) {
        let status = response.status();
        spans.take(Span {
            context: trace,
            parent: parent.map(|parent| parent.span_id()),
            name,
            began,
            ended: SystemTime::now(),
            attributes: vec![("http.response.status_code", SpanValue::Count(status.as_u16().into()))],
            failure: status.is_server_error().then(|| status.to_string()),
        });
    }
    if let Some(id) = id {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    response
}

/// As the table of routes writes it, never what was asked for.
fn route_of(request: &Request) -> &str {
    request.extensions().get::<MatchedPath>().map_or("(no route)", MatchedPath::as_str)
}

fn random() -> [u8; 24] {
    rand::random()
}

/// Letters, digits and what ids are punctuated with: it goes into logs.
fn is_usable(id: &HeaderValue) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-:/+=".contains(byte);
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.as_bytes().iter().all(allowed)
}
