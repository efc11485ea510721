//! The exporter against a collector of a few lines.
#![allow(clippy::unwrap_used)] // a failing test is supposed to stop

use mlxnode_compute::{Span, SpanValue, TraceContext};
use mlxnode_traces::{Collector, Exporter};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use std::time::{Duration, Instant, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

struct Taken(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Taken {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).await.unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn collector(endpoint: String) -> Collector {
    Collector { endpoint, node: "studio".into(), part: "node".into() }
}

fn span(is_sampled: bool) -> Span {
    let flags = if is_sampled { "01" } else { "00" };
    let text = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}");
    let ended = SystemTime::now();
    Span {
        context: TraceContext::parse(&text).unwrap(),
        parent: Some([9; 8]),
        name: "decode".into(),
        began: ended - Duration::from_millis(5),
        ended,
        attributes: vec![("tokens", SpanValue::Count(7)), ("model", "demo".into())],
        failure: Some("the worker ended".into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_arrive_with_their_ids_and_times_and_nothing_that_is_not_recorded() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut taken) = mpsc::channel(16);
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Taken(sender)));
    let server = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let exporter = Exporter::start(collector(endpoint)).unwrap();
    let sink = exporter.sink();
    sink.take(span(true));
    sink.take(span(false));
    // The end does not wait for the period.
    tokio::task::spawn_blocking(move || drop(exporter)).await.unwrap();
    let request = taken.recv().await.unwrap();
    assert!(taken.try_recv().is_err(), "one message");
    let resource = &request.resource_spans[0];
    let names = resource.resource.as_ref().unwrap().attributes.iter().map(|it| it.key.as_str());
    assert!(names.collect::<Vec<_>>().contains(&"service.instance.id"));
    let spans = &resource.scope_spans[0].spans;
    assert_eq!(spans.len(), 1);
    assert_eq!(spans[0].trace_id.len(), 16);
    assert_eq!(
        (spans[0].span_id.as_slice(), spans[0].parent_span_id.as_slice()),
        (&[0, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7][..], &[9; 8][..])
    );
    assert_eq!(spans[0].end_time_unix_nano - spans[0].start_time_unix_nano, 5_000_000);
    assert_eq!(spans[0].status.as_ref().unwrap().message, "the worker ended");
    sink.take(span(true)); // of no effect, and no panic
    server.abort();
}

#[test]
fn a_collector_that_is_not_there_holds_nobody_up() {
    let exporter = Exporter::start(collector("http://127.0.0.1:1".into())).unwrap();
    let sink = exporter.sink();
    let begun = Instant::now();
    for _ in 0..100_000 {
        sink.take(span(true));
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop(exporter);
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[test]
fn what_is_no_endpoint_is_told() {
    for text in ["", "collector:4317", "https://collector:4317", "http://collector", "http://", "ftp://x:1"] {
        let error = Exporter::start(collector(text.into())).err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("4317")), "{text}");
    }
}
