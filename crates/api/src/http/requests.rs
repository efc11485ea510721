//! Every request has a name: `x-request-id` in its answer, and a trace that goes on through the nodes.
//!
//! A client's own `x-request-id` and `traceparent` are taken over. The log says about a request what route it had, how it ended and
//! how long it took; never what was asked.

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Body as _, Frame, SizeHint};
use mlxnode_compute::{Span, SpanSink, SpanValue, TraceContext};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};
use tracing::{Instrument as _, debug, info_span};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: &str = "traceparent";
/// Longest id that a client may give.
const MAX_ID_BYTES: usize = 128;

/// Names a request and its answer. Its span lasts until the answer's last byte is handed over, or nobody wants the rest.
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
    let response = next.run(request).instrument(span.clone()).await;
    let _entered = span.enter();
    debug!(status = response.status().as_u16(), millis = arrived.elapsed().as_millis() as u64, "answered");
    let mut response = match (spans, name) {
        (Some(sink), Some(name)) => {
            let status = response.status();
            let span = Span {
                context: trace,
                parent: parent.map(|parent| parent.span_id()),
                name,
                began,
                ended: began,
                attributes: vec![("http.response.status_code", SpanValue::Count(status.as_u16().into()))],
                failure: status.is_server_error().then(|| status.to_string()),
            };
            let ending = Ending { sink, span: Some(span), is_whole: response.body().is_end_stream() };
            response.map(|body| Body::new(Watched { body, ending }))
        }
        _ => response,
    };
    if let Some(id) = id {
        response.headers_mut().insert(X_REQUEST_ID, id);
    }
    response
}

/// An answer's body, whose end is the end of the request's span.
struct Watched {
    body: Body,
    ending: Ending,
}

/// Tells of the span when it goes.
struct Ending {
    sink: Arc<dyn SpanSink>,
    span: Option<Span>,
    /// All of the body was handed over.
    is_whole: bool,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Err(_))) = &polled {
            self.ending.tell();
        }
        if matches!(polled, Poll::Ready(None)) || self.body.is_end_stream() {
            self.ending.is_whole = true;
            self.ending.tell();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Ending {
    fn tell(&mut self) {
        let Some(mut span) = self.span.take() else { return };
        span.ended = SystemTime::now();
        if !self.is_whole {
            // A client that leaves is no failure of ours.
            span.attributes.push(("mlxnode.answer", SpanValue::Text("not taken to its end".to_owned())));
        }
        self.sink.take(span);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.tell();
    }
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
