//! One request over two nodes is one tree of spans at a collector, and what was asked is nowhere in it.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT_SPAN: &str = "00f067aa0ba902b7";
/// More than all nodes and workers need to send what they have.
const BOUND: Duration = Duration::from_secs(30);

struct Collector(mpsc::SyncSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.try_send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// A span as the test looks at it.
#[derive(Debug)]
struct Seen {
    name: String,
    parent: String,
    node: String,
    part: String,
    /// In nanoseconds since 1970.
    ended: u64,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Spans of [`TRACE`], by their ids.
fn read(request: &ExportTraceServiceRequest, spans: &mut BTreeMap<String, Seen>) {
    for resource in &request.resource_spans {
        let text = |key: &str| {
            let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
            let found = attributes.filter(|attribute| attribute.key == key);
            let value = found.filter_map(|attribute| attribute.value.as_ref()?.value.clone()).next();
            if let Some(Value::StringValue(text)) = value { text } else { String::new() }
        };
        for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
            if hex(&span.trace_id) == TRACE {
                let seen = Seen {
                    name: span.name.clone(),
                    parent: hex(&span.parent_span_id),
                    node: text("service.instance.id"),
                    part: text("mlxnode.part"),
                    ended: span.end_time_unix_nano,
                };
                spans.insert(hex(&span.span_id), seen);
            }
        }
    }
}

#[test]
fn story_a_request_is_one_trace_over_all_nodes() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (sender, requests) = mpsc::sync_channel(1024);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let service = TraceServiceServer::new(Collector(sender));
    let server = tonic::transport::Server::builder().add_service(service);
    runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let cluster = LocalCluster::start_with(2, &["--otlp-endpoint", &endpoint])?;
    let node = cluster.first();
    node.json(&["load", "demo", "--stages", "2"])?;
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let address = http.trim_start_matches("http://").to_owned();
    let body = r#"{"prompt": "xylophone quarantine", "max_tokens": 8, "ignore_eos": true, "stream": true}"#;
    let mut stream = TcpStream::connect(&address)?;
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         traceparent: 00-{TRACE}-{CLIENT_SPAN}-01\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    let mut spans = BTreeMap::new();
    let end = Instant::now() + BOUND;
    while spans.len() < 7 {
        let request = requests.recv_timeout(end.saturating_duration_since(Instant::now()));
        let request = request.with_context(|| format!("only {spans:?}"))?;
        ensure!(!format!("{request:?}").contains("xylophone"), "what was asked is not told: {request:?}");
        read(&request, &mut spans);
    }
    let find = |name: &str| {
        spans.iter().find(|(_, seen)| seen.name == name).with_context(|| format!("no {name} in {spans:?}"))
    };
    let (request, seen) = find("POST /v1/completions")?;
    ensure!(seen.parent == CLIENT_SPAN, "the client's span is its parent: {seen:?}");
    ensure!(seen.ended >= find("decode")?.1.ended, "it lasts as long as the answer streams: {spans:?}");
    let (generate, seen) = find("generate")?;
    ensure!(&seen.parent == request && seen.node == "node0", "{seen:?}");
    for name in ["queue", "prefill", "decode"] {
        ensure!(&find(name)?.1.parent == generate, "{name}: {spans:?}");
    }
    let stages: Vec<&Seen> = spans.values().filter(|seen| seen.name.starts_with("stage ")).collect();
    ensure!(stages.len() == 2 && stages.iter().all(|seen| &seen.parent == generate), "{stages:?}");
    let nodes: Vec<&str> = stages.iter().map(|seen| seen.node.as_str()).collect();
    ensure!(nodes.contains(&"node0") && nodes.contains(&"node1"), "{stages:?}");
    ensure!(stages.iter().all(|seen| seen.part.starts_with("demo ")), "{stages:?}");
    runtime.shutdown_background();
    Ok(())
}
