//! OTLP over gRPC: `opentelemetry.proto.collector.trace.v1.TraceService`.

use crate::Collector;
use mlxnode_compute::{Span, SpanValue};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1 as wire;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tonic::transport::{Channel, Endpoint};

/// The way to a collector.
pub(crate) struct Client {
    endpoint: Endpoint,
    /// Made at the first use, on the runtime that uses it.
    client: Option<TraceServiceClient<Channel>>,
    resource: Resource,
}

impl Client {
    /// No connection is made yet. Nothing is said of why an endpoint is none: the caller has a better sentence.
    pub(crate) fn new(collector: &Collector, patience: Duration) -> Result<Self, ()> {
        let is_plain = collector.endpoint.starts_with("http://");
        let endpoint = Endpoint::from_shared(collector.endpoint.clone()).map_err(|_| ())?;
        if !is_plain || endpoint.uri().port().is_none() {
            return Err(());
        }
        let attributes = vec![
            attribute("service.name", "mlxnode".into()),
            attribute("service.version", env!("CARGO_PKG_VERSION").into()),
            attribute("service.instance.id", collector.node.as_str().into()),
            attribute("mlxnode.part", collector.part.as_str().into()),
            attribute("process.pid", SpanValue::Count(std::process::id().into())),
        ];
        let resource = Resource { attributes, ..Resource::default() };
        let endpoint = endpoint.connect_timeout(patience).timeout(patience);
        Ok(Self { endpoint, client: None, resource })
    }

    /// Sends spans; says why it could not.
    pub(crate) async fn send(&mut self, spans: Vec<Span>) -> Result<(), String> {
        let client = self.client.get_or_insert_with(|| TraceServiceClient::new(self.endpoint.connect_lazy()));
        let scope = InstrumentationScope { name: "mlxnode".into(), ..InstrumentationScope::default() };
        let spans = spans.into_iter().map(span_to_wire).collect();
        let spans = wire::ScopeSpans { scope: Some(scope), spans, ..wire::ScopeSpans::default() };
        let spans = wire::ResourceSpans {
            resource: Some(self.resource.clone()),
            scope_spans: vec![spans],
            ..wire::ResourceSpans::default()
        };
        let request = ExportTraceServiceRequest { resource_spans: vec![spans] };
        client.export(request).await.map(drop).map_err(|status| status.message().to_owned())
    }
}

fn span_to_wire(span: Span) -> wire::Span {
    let status =
        span.failure.map(|message| wire::Status { message, code: wire::status::StatusCode::Error.into() });
    wire::Span {
        trace_id: span.context.trace_id().to_vec(),
        span_id: span.context.span_id().to_vec(),
        parent_span_id: span.parent.map(Vec::from).unwrap_or_default(),
        name: span.name,
        kind: wire::span::SpanKind::Internal.into(),
        start_time_unix_nano: nanos(span.began),
        end_time_unix_nano: nanos(span.ended),
        attributes: span.attributes.into_iter().map(|(name, value)| attribute(name, value)).collect(),
        status,
        ..wire::Span::default()
    }
}

fn attribute(name: &str, value: SpanValue) -> KeyValue {
    let value = match value {
        SpanValue::Text(text) => Value::StringValue(text),
        SpanValue::Count(count) => Value::IntValue(i64::try_from(count).unwrap_or(i64::MAX)),
        SpanValue::Seconds(seconds) => Value::DoubleValue(seconds),
    };
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

/// Since 1970.
fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
