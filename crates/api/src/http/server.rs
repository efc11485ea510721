//! The listener: accepts connections and bounds them in number, size and time, then hands requests to the router.

use crate::http::guard::Guard;
use crate::http::{HttpServices, routes};
use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::stalled::StalledWrites;

/// How the listener is set up.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Take any free port when this one is taken: nobody asked for it by name.
    pub any_port_will_do: bool,
    /// Names besides the loopback's and the node's own that requests may be sent to.
    pub hosts: Vec<String>,
    /// Origins of web pages that may ask.
    pub origins: Vec<String>,
    /// Ask for an API key on this machine too, and even while there is none.
    pub requires_key: bool,
}

impl HttpOptions {
    /// mlx_lm.server's address, so that its clients keep their settings.
    pub const DEFAULT_PORT: u16 = 8080;

    /// The loopback only, at [`Self::DEFAULT_PORT`] or wherever there is room.
    pub fn local() -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::from([127, 0, 0, 1]), Self::DEFAULT_PORT),
            any_port_will_do: true,
            hosts: Vec::new(),
            origins: Vec::new(),
            requires_key: false,
        }
    }
}

/// Nothing can be bound there.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for HTTP on {address}")]
pub struct BindError {
    /// Where.
    pub address: SocketAddr,
    /// The system's reason.
    #[source]
    pub source: std::io::Error,
}

/// A bound listener that serves nobody yet.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    bound: SocketAddr,
    options: HttpOptions,
}

/// Connections at once. Each costs a file and some ten kilobytes.
const MAX_CONNECTIONS: usize = 1024;
/// A request's headers arrive within this time, and an idle connection is closed after it.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// All headers of a request together.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Headers of a request.
const MAX_HEADERS: usize = 100;
/// A client that takes nothing of its answer for so long is gone: its sequence holds memory that others wait for.
const STALL_TIME: Duration = Duration::from_secs(60);
/// After a failed accept (no more files, mostly) things need a moment to get better.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Said without reading the request: whoever is turned away costs nothing.
const CROWDED: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
    content-length: 131\r\nconnection: close\r\n\r\n\
    {\"error\":{\"message\":\"too many connections; try again in a moment\",\"type\":\"server_error\",\"param\":null,\"code\":\"service_unavailable\"}}";

impl HttpServer {
    /// Binds the address, or another port of it where the options allow that.
    ///
    /// # Errors
    /// [`BindError`]
    pub async fn bind(options: HttpOptions) -> Result<Self, BindError> {
        let address = options.listen;
        let bound = match TcpListener::bind(address).await {
            Err(error) if options.any_port_will_do && error.kind() == std::io::ErrorKind::AddrInUse => {
                TcpListener::bind(SocketAddr::new(address.ip(), 0)).await
            }
            bound => bound,
        };
        let bound = bound.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (bound, listener) = bound.map_err(|source| BindError { address, source })?;
        Ok(Self { listener, bound, options })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.bound
    }

    /// Is the port another one than asked for?
    pub fn moved(&self) -> bool {
        self.options.listen.port() != 0 && self.bound.port() != self.options.listen.port()
    }

    /// The routes behind the guard of this listener. `own_hosts` are the node's names and addresses.
    pub fn router(&self, services: HttpServices, own_hosts: &[String]) -> Router {
        let hosts = own_hosts.iter().chain(&self.options.hosts).cloned();
        let hosts = hosts.chain((!self.bound.ip().is_unspecified()).then(|| self.bound.ip().to_string()));
        routes::router(services, Arc::new(Guard::new(hosts, self.options.origins.iter().cloned())))
    }

    /// Serves until `stop`; then running requests are finished, and none that is new is taken.
    pub async fn serve(self, router: Router, stop: CancellationToken) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept an HTTP connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match Arc::clone(&slots).try_acquire_owned() {
                Ok(slot) => {
                    let (router, stop) = (router.clone(), stop.clone());
                    connections.spawn(async move {
                        connection(stream, router, stop).await;
                        drop(slot);
                    });
                }
                Err(_) => turn_away(stream),
            }
        }
        while connections.join_next().await.is_some() {}
    }
}

/// Says so if that is possible at once: nobody waits for who is turned away.
fn turn_away(stream: TcpStream) {
    if let Ok(stream) = stream.into_std() {
        use std::io::Write as _;
        let _ = (&stream).write(CROWDED);
    }
}

async fn connection(stream: TcpStream, router: Router, stop: CancellationToken) {
    // Tokens are small and wait for nobody.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(StalledWrites::new(stream, STALL_TIME));
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(io, TowerToHyperService::new(router));
    tokio::pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        debug!(%error, "an HTTP connection ended early");
    }
}
