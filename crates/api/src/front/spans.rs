//! A request as spans: the whole of it, and in it waiting, reading the prompt, writing the answer.

use mlxnode_compute::{Span, SpanSink, SpanValue, TraceContext};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// The spans of one request. Dropped before its end, it was aborted.
#[derive(Debug)]
pub(super) struct RequestSpans {
    sink: Arc<dyn SpanSink>,
    whole: Span,
    /// The part that it is in: its name and when that began.
    part: (&'static str, SystemTime),
    /// Both clocks at one moment: spans want the wall's, everything else goes by the other.
    clock: (Instant, SystemTime),
    has_ended: bool,
}

impl RequestSpans {
    /// A request that came at `arrived`; `trace` has its own span.
    pub(super) fn new(
        sink: Arc<dyn SpanSink>,
        trace: TraceContext,
        parent: Option<[u8; 8]>,
        model: &str,
        prompt_tokens: usize,
        arrived: Instant,
    ) -> Self {
        let clock = (Instant::now(), SystemTime::now());
        let began = clock.1 - clock.0.saturating_duration_since(arrived);
        let whole = Span {
            context: trace,
            parent,
            name: "generate".to_owned(),
            began,
            ended: began,
            attributes: vec![
                ("gen_ai.request.model", model.into()),
                ("gen_ai.usage.input_tokens", prompt_tokens.into()),
            ],
            failure: None,
        };
        Self { sink, whole, part: ("queue", began), clock, has_ended: false }
    }

    /// The first step begins.
    pub(super) fn started(&mut self, cached_tokens: usize, now: Instant) {
        self.whole.attributes.push(("mlxnode.cached_tokens", cached_tokens.into()));
        self.next_part("prefill", now);
    }

    /// The first token is there.
    pub(super) fn first_token(&mut self, now: Instant) {
        self.next_part("decode", now);
    }

    /// It has ended; without a word it failed. What went wrong stands in the log and not here: it may quote what was asked.
    pub(super) fn ended(&mut self, finished: Option<&'static str>, generated: Option<usize>, now: Instant) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        self.next_part("", now);
        self.whole.ended = self.wall(now);
        let generated = generated.map(|generated| ("gen_ai.usage.output_tokens", generated.into()));
        self.whole.attributes.extend(generated);
        match finished {
            Some(finished) => {
                self.whole.attributes.push(("gen_ai.response.finish_reasons", finished.into()));
            }
            None => self.whole.failure = Some("the request failed; the node's log says why".to_owned()),
        }
        self.sink.take(self.whole.clone());
    }

    fn next_part(&mut self, name: &'static str, now: Instant) {
        let now = self.wall(now);
        let (ended, began) = std::mem::replace(&mut self.part, (name, now));
        self.sink.take(Span {
            context: self.whole.context.with_span(rand::random()),
            parent: Some(self.whole.context.span_id()),
            name: ended.to_owned(),
            began,
            ended: now,
            attributes: Vec::<(&'static str, SpanValue)>::new(),
            failure: None,
        });
    }

    fn wall(&self, now: Instant) -> SystemTime {
        self.clock.1 + now.saturating_duration_since(self.clock.0)
    }
}

impl Drop for RequestSpans {
    fn drop(&mut self) {
        self.ended(Some("abort"), None, Instant::now());
    }
}
