//! A piece of a request's way, for tracing tools: what was done, from when to when, and numbers about it. Never what was asked.

use crate::TraceContext;
use std::fmt;
use std::time::SystemTime;

/// Something that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The trace, and this span's own id in it.
    pub context: TraceContext,
    /// The span that this one is part of; none for the first.
    pub parent: Option<[u8; 8]>,
    /// What was done.
    pub name: String,
    /// Since when.
    pub began: SystemTime,
    /// Until when.
    pub ended: SystemTime,
    /// Names as in OpenTelemetry's conventions where there is one.
    pub attributes: Vec<(&'static str, SpanValue)>,
    /// Why it failed, in words about the failure and not about the request.
    pub failure: Option<String>,
}

/// What an attribute says.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanValue {
    /// A name.
    Text(String),
    /// A count.
    Count(u64),
    /// A time.
    Seconds(f64),
}

impl From<&str> for SpanValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<usize> for SpanValue {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}

/// Where spans go when somebody collects them. Never waits: a span for which there is no room is lost.
pub trait SpanSink: fmt::Debug + Send + Sync {
    /// Takes a span.
    fn take(&self, span: Span);
}
