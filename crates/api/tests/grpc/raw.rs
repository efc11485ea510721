//! The public services on a port, with a caller that is admitted as the test says, and the smallest client: it sends the bytes it is told.

use crate::desk::Desk;
use anyhow::{Context as _, Result};
use async_trait::async_trait;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::{self, Next};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use mlxnode_api::cluster::{ClusterService, ClusterView, Household, HouseholdError, NodeView};
use mlxnode_api::gate::{Gate, GateOptions};
use mlxnode_api::http::HttpOptions;
use mlxnode_api::jobs::{JobsService, NoJobFiles};
use mlxnode_api::keys::{KeysService, KeysView};
use mlxnode_api::metrics::Metrics;
use mlxnode_api::models::{Busy, ModelsService};
use mlxnode_api::panorama::{NodeSeen, Panorama, Sight};
use mlxnode_api::{CoordinatorRoute, InferenceService, PublicServices, Route, public_routes};
use mlxnode_cluster::{Invite, KeyPin, PeerKey, Role};
use mlxnode_coordinator::scheduler::Statistics;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tower::{Service as _, ServiceExt as _};

/// The services, and a connection to them.
pub(crate) struct Rpcs {
    pub(crate) desk: Desk,
    pub(crate) channel: Channel,
    pub(crate) keys: watch::Sender<KeysView>,
    _server: AbortOnDropHandle<()>,
}

/// A cluster of nobody.
struct Nobody(watch::Sender<u64>);

#[async_trait]
impl Household for Nobody {
    fn view(&self) -> ClusterView {
        let nobody = mlxnode_cluster::NodeId::from_bytes([0; 32]);
        ClusterView {
            cluster: mlxnode_cluster::ClusterId::from_bytes([0; 32]),
            cluster_name: "nobody".into(),
            own: nobody,
            coordinator: nobody,
            nodes: Vec::new(),
            roster_version: 1,
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }

    async fn invite(&self, _lifetime: Duration) -> Result<Invite, HouseholdError> {
        Err(HouseholdError::Unavailable("nobody".into()))
    }

    async fn forget(&self, _reference: &str) -> Result<NodeView, HouseholdError> {
        Err(HouseholdError::UnknownNode("nobody".into()))
    }

    async fn leave(&self) -> Result<Option<String>, HouseholdError> {
        Err(HouseholdError::Refused("nobody".into()))
    }
}

impl CoordinatorRoute for Nobody {
    fn route(&self) -> Result<Route, Status> {
        Err(Status::unavailable("there is no coordinator"))
    }
}

impl Busy for Nobody {
    fn statistics(&self) -> BTreeMap<String, Statistics> {
        BTreeMap::new()
    }
}

#[async_trait]
impl Sight for Nobody {
    async fn look(&self) -> Vec<NodeSeen> {
        Vec::new()
    }
}

/// What the connection's key is admitted as; none is a connection without one, which TLS would not let in.
pub(crate) async fn start(role: Option<Role>, keys: KeysView) -> Result<Rpcs> {
    let desk = Desk::with(HttpOptions { any_port_will_do: false, ..HttpOptions::local() }).await?;
    let (keys, receiver) = watch::channel(keys);
    let gate = Gate::new(receiver.clone(), GateOptions::default());
    let metrics = Arc::new(Metrics::default());
    let nobody = || Arc::new(Nobody(watch::channel(0).0));
    let front = desk.front.clone().counting(metrics.clone(), Some(gate.clone()));
    let services = PublicServices {
        inference: InferenceService::new(front),
        models: ModelsService::new(nobody(), desk.deployments.subscribe(), nobody()),
        cluster: ClusterService::new(
            nobody(),
            nobody(),
            desk.deployments.subscribe(),
            nobody(),
            Panorama::new(nobody()),
        ),
        keys: KeysService::new(nobody(), receiver),
        jobs: JobsService::new(nobody(), Arc::new(NoJobFiles)),
    };
    let routes = public_routes(services, gate, metrics).await?;
    let peer = role.map(|role| PeerKey { pin: KeyPin::from_bytes([7; 32]), role });
    let router = routes.into_axum_router().layer(middleware::from_fn_with_state(peer, admit));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = mlxnode_cluster::server_builder()
        .add_routes(Routes::from(router))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
    let server = tokio::spawn(async move {
        let _ = server.await;
    });
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    Ok(Rpcs { desk, channel, keys, _server: AbortOnDropHandle::new(server) })
}

async fn admit(
    State(peer): State<Option<PeerKey>>,
    mut request: Request,
    next: Next,
) -> axum::response::Response {
    if let Some(peer) = peer {
        request.extensions_mut().insert(peer);
    }
    next.run(request).await
}

/// How a call ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) http: u16,
    /// gRPC's code; none when the answer is not gRPC at all.
    pub(crate) code: Option<i32>,
    pub(crate) message: String,
    /// Bytes of the answer's messages.
    pub(crate) bytes: usize,
}

impl Ended {
    /// A code that is not OK, or a status of HTTP that says as much.
    pub(crate) fn is_refusal(&self) -> bool {
        match self.code {
            Some(code) => (1..=16).contains(&code),
            None => (400..500).contains(&self.http),
        }
    }
}

/// A call with these headers and this body, as they are. Watches are read up to their first message.
pub(crate) async fn call(
    channel: &Channel,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Ended> {
    send(channel, Method::POST, path, headers, body).await
}

pub(crate) async fn send(
    channel: &Channel,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Ended> {
    let mut request = axum::http::Request::builder().method(method).uri(path).body(Body::from(body))?;
    let all = request.headers_mut();
    all.insert("content-type", HeaderValue::from_static("application/grpc"));
    all.insert("te", HeaderValue::from_static("trailers"));
    for (name, value) in headers {
        let (name, value) =
            (HeaderName::from_bytes(name.as_bytes())?, HeaderValue::from_bytes(value.as_bytes())?);
        if value.is_empty() {
            all.remove(name);
        } else {
            all.insert(name, value);
        }
    }
    let request = request.map(tonic::body::Body::new);
    let mut channel = channel.clone();
    let response = channel.ready().await?.call(request).await?;
    let (parts, mut body) = response.into_parts();
    let mut ended = told(&parts.headers, parts.status.as_u16());
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    while ended.code.is_none() {
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(status))) => anyhow::bail!("{path}: the connection broke: {status}"),
            Ok(None) => break,
            Err(_) => anyhow::bail!("{path}: no end in 5 s"),
        };
        if let Some(trailers) = frame.trailers_ref() {
            ended = Ended { bytes: ended.bytes, ..told(trailers, ended.http) };
        } else if let Some(data) = frame.data_ref() {
            ended.bytes += data.len();
            let goes_on = ["/Watch", "/Figures"].iter().any(|method| path.ends_with(method));
            if goes_on && ended.bytes > 0 {
                ended.code = Some(0);
            }
        }
    }
    Ok(ended)
}

fn told(headers: &HeaderMap, http: u16) -> Ended {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    Ended { http, code: text("grpc-status").parse().ok(), message: text("grpc-message").to_owned(), bytes: 0 }
}

/// A message in its frame.
pub(crate) fn framed(message: &[u8]) -> Bytes {
    frame(0, message.len() as u32, message)
}

/// A frame that says what it is told to say.
pub(crate) fn frame(flag: u8, length: u32, message: &[u8]) -> Bytes {
    [&[flag][..], &length.to_be_bytes(), message].concat().into()
}

impl Rpcs {
    pub(crate) async fn stop(self) -> Result<()> {
        drop(self.channel);
        self.desk.stop().await.context("the desk")
    }
}
