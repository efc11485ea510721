//! What one request costs, written down wherever it counts: its place in the queue, the figures, the key that asked.

use super::FrontError;
use super::admission::Place;
use super::spans::RequestSpans;
use crate::gate::Gate;
use crate::metrics::{Finished, Metrics, Rejection, RequestRecord};
use mlxnode_compute::TraceContext;
use mlxnode_coordinator::scheduler::{RunError, RunRequest};
use std::sync::Arc;
use std::time::Instant;
use tracing::debug;

/// What is known of a sequence when it is submitted.
pub(super) struct Submitted {
    prompt_tokens: usize,
    trace: Option<TraceContext>,
    arrived: Instant,
}

impl Submitted {
    pub(super) fn new(run: &RunRequest, arrived: Instant) -> Self {
        Self { prompt_tokens: run.prompt.len(), trace: run.spec.trace, arrived }
    }
}

/// The account of one request. Dropped before its end, the request counts as aborted.
#[derive(Debug)]
pub(super) struct Account {
    place: Place,
    record: RequestRecord,
    metrics: Arc<Metrics>,
    /// Where its tokens are counted, and for whom.
    gate: Option<(Gate, String)>,
    prompt_tokens: usize,
    generated: usize,
    trace: Option<TraceContext>,
    spans: Option<RequestSpans>,
    arrived: Instant,
    /// When the first step began, and how many tokens of the prompt needed no work; until the first token.
    prefill: Option<(Instant, usize)>,
}

impl Account {
    pub(super) fn new(
        place: Place,
        record: RequestRecord,
        metrics: Arc<Metrics>,
        gate: Option<(Gate, String)>,
        spans: Option<RequestSpans>,
        submitted: Submitted,
    ) -> Self {
        let Submitted { prompt_tokens, trace, arrived } = submitted;
        let (generated, prefill) = (0, None);
        Self { place, record, metrics, gate, prompt_tokens, generated, trace, spans, arrived, prefill }
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The first step begins.
    pub(super) fn started(&mut self, cached_tokens: usize) {
        let now = Instant::now();
        self.place.started();
        self.record.started(cached_tokens, now);
        if let Some(spans) = &mut self.spans {
            spans.started(cached_tokens, now);
        }
        self.prefill = Some((now, cached_tokens));
        self.spend(self.prompt_tokens, now);
    }

    /// A token was generated.
    pub(super) fn token(&mut self) {
        let now = Instant::now();
        if let Some((began, cached_tokens)) = self.prefill.take() {
            self.place.measured(cached_tokens, now.saturating_duration_since(began));
            if let Some(spans) = &mut self.spans {
                spans.first_token(now);
            }
        }
        self.generated += 1;
        self.record.token(now);
        self.spend(1, now);
    }

    /// It ran to its end.
    pub(super) fn ended(&mut self, finished: Finished) {
        let now = Instant::now();
        self.place.started();
        self.record.ended(finished, now);
        self.tell("ended", now);
        if let Some(spans) = &mut self.spans {
            spans.ended(Some(finished.word()), Some(self.generated), now);
        }
    }

    /// It did not. What the client hears.
    pub(super) fn failed(&mut self, error: RunError) -> FrontError {
        let now = Instant::now();
        self.place.started();
        self.tell("failed", now);
        if let Some(spans) = &mut self.spans {
            spans.ended(None, Some(self.generated), now);
        }
        match &error {
            RunError::QueueFull { .. } => self.record.was_never_taken(),
            RunError::Cancelled | RunError::DeadlineExceeded => self.record.ended(Finished::Abort, now),
            _ => self.record.ended(Finished::Error, now),
        }
        match error {
            RunError::QueueFull { tokens, .. } => {
                self.metrics.rejected(Rejection::Overloaded);
                let retry_after = self.place.refused(tokens, now);
                FrontError::Busy { model: self.place.model().to_owned(), retry_after }
            }
            error => error.into(),
        }
    }

    /// Counts and times, by the trace that the request has on all nodes.
    fn tell(&self, what: &'static str, now: Instant) {
        let Some(trace) = self.trace else { return };
        let millis = now.saturating_duration_since(self.arrived).as_millis() as u64;
        let (prompt_tokens, generated) = (self.prompt_tokens, self.generated);
        debug!(trace = trace.id(), prompt_tokens, generated, millis, "request {what}");
    }

    fn spend(&self, tokens: usize, now: Instant) {
        if let Some((gate, tenant)) = &self.gate {
            gate.spend(tenant, tokens as u64, now);
        }
    }
}
