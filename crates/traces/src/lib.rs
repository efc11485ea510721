//! Takes spans of requests to an OpenTelemetry collector, when one was named. Nothing is sent anywhere otherwise.
//!
//! ```text
//! front, workers ── SpanSink::take (never waits) ──▶ bounded channel ──▶ a thread of its own: batches, OTLP over gRPC ──▶ collector
//! ```
//!
//! The thread is the exporter's own, so that it works the same in a node and in a worker, whose threads are busy with other things. What the
//! collector does not take in time is lost and counted: tracing never holds up an answer.
//!
//! - `service`: the collector's protocol
//! - [`Exporter`]: the thread and its life

mod exporter;
mod service;

pub use exporter::{Collector, Exporter, ExporterError};
