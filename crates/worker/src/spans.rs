//! What a stage did for each sequence, as spans: from opened to closed, with the steps and the time they took.
//!
//! The compute thread shows every message on its way to the shard, and tells afterwards what a batch took.

use crate::message::{Message, StageTimes};
use mlxnode_compute::{LayerRange, SequenceId, SequenceSpec, Span, SpanSink, SpanValue};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The sequences that are under way, for whoever collects traces.
#[derive(Debug)]
pub(crate) struct StageSpans {
    sink: Option<Arc<dyn SpanSink>>,
    layers: LayerRange,
    open: HashMap<SequenceId, Open>,
}

#[derive(Debug)]
struct Open {
    span: Span,
    steps: u64,
    compute: Duration,
    wait: Duration,
}

impl StageSpans {
    /// Without a sink nothing is remembered.
    pub(crate) fn new(sink: Option<Arc<dyn SpanSink>>, layers: LayerRange) -> Self {
        Self { sink, layers, open: HashMap::new() }
    }

    /// Sequences of a message, before it is worked on.
    pub(crate) fn see(&mut self, message: &Message) -> Vec<SequenceId> {
        if self.sink.is_none() {
            return Vec::new();
        }
        match message {
            Message::Open { sequence, spec, .. } => {
                self.open(*sequence, spec);
                Vec::new()
            }
            Message::Batch(batch) => batch.micro.rows.iter().map(|row| row.sequence).collect(),
            Message::Close { sequence } => {
                self.close(*sequence);
                Vec::new()
            }
            Message::Failed { sequence, .. } => {
                self.fail(*sequence);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// A step of these sequences took so long.
    pub(crate) fn stepped(&mut self, sequences: &[SequenceId], times: StageTimes) {
        for sequence in sequences {
            if let Some(open) = self.open.get_mut(sequence) {
                open.steps += 1;
                open.compute += times.compute;
                open.wait += times.wait;
            }
        }
    }

    fn open(&mut self, sequence: SequenceId, spec: &SequenceSpec) {
        let Some(trace) = spec.trace.filter(|trace| trace.is_sampled()) else { return };
        let now = SystemTime::now();
        let span = Span {
            context: trace.with_span(rand::random()),
            parent: Some(trace.span_id()),
            name: format!("stage {}", self.layers),
            began: now,
            ended: now,
            attributes: vec![("gen_ai.usage.input_tokens", spec.prompt_tokens.into())],
            failure: None,
        };
        self.open.insert(sequence, Open { span, steps: 0, compute: Duration::ZERO, wait: Duration::ZERO });
    }

    /// The reason is left out: it may quote what was asked.
    fn fail(&mut self, sequence: SequenceId) {
        if let Some(open) = self.open.get_mut(&sequence) {
            open.span.failure = Some("the sequence failed in a stage before this one".to_owned());
        }
    }

    fn close(&mut self, sequence: SequenceId) {
        let (Some(sink), Some(open)) = (&self.sink, self.open.remove(&sequence)) else { return };
        let mut span = open.span;
        span.ended = SystemTime::now();
        span.attributes.extend([
            ("mlxnode.steps", SpanValue::Count(open.steps)),
            ("mlxnode.compute_seconds", SpanValue::Seconds(open.compute.as_secs_f64())),
            ("mlxnode.wait_seconds", SpanValue::Seconds(open.wait.as_secs_f64())),
        ]);
        sink.take(span);
    }
}
