//! The side that listens.
//!
//! ```text
//! accept ─▶ handshake (bounded in number and time) ─▶ h2: tonic          ends when the key is withdrawn
//!                                                  └▶ mlxnode-pair/1: one pairing conversation, while an invite is open
//! ```
//! Everything runs inside the future of [`serve`]: dropping it ends the listener and all its connections.

use super::io::LinkIo;
use super::{CONNECTION_WINDOW, HTTP2_FRAME, KEEPALIVE, STREAM_WINDOW};
use crate::admission::{Admission, PeerKey};
use crate::identity::Identity;
use crate::pairing::Inviter;
use crate::tls;
use rustls::ServerConfig;
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tracing::debug;

/// The limits of a listener. The defaults are those for strangers on the network.
#[derive(Clone)]
pub struct ServeOptions {
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Handshakes at a time; further connections wait in the system's queue.
    pub max_handshakes: usize,
    /// Handshakes at a time from one address; further connections are closed, so that one address cannot take all.
    pub max_handshakes_per_address: usize,
    /// Open connections; further ones are closed after their handshake.
    pub max_connections: usize,
    /// Calls at a time on one connection; further ones wait on the caller's side.
    pub max_streams: u32,
    /// How long calls may go on after `shutdown`; then their connections end.
    pub grace: Duration,
    /// Who answers joiners on this listener while an invite is open.
    pub pairing: Option<Arc<Inviter>>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            max_handshakes: 64,
            max_handshakes_per_address: 32,
            max_connections: 512,
            max_streams: 64,
            grace: Duration::from_secs(2),
            pairing: None,
        }
    }
}

/// Why a listener does not run (any more).
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The key or the certificate is not usable.
    #[error("cannot set up TLS with this node's key")]
    Tls(#[source] rustls::Error),
    /// The gRPC server ended.
    #[error("the gRPC server ended")]
    Grpc(#[source] tonic::transport::Error),
}

/// How often the keys of open connections are looked at again: withdrawal takes effect within a second.
const RECHECK: Duration = Duration::from_millis(500);
/// Joiners at a time. All but one wait for their turn; people pair one machine after the other.
const MAX_JOINERS: usize = 8;
/// A pairing conversation is four messages; the coordinator's signature may need a round trip to another node.
const PAIRING_TIME: Duration = Duration::from_secs(20);

/// A server with the windows, frames and headers that ours have.
pub fn server_builder() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME)
        .http2_max_header_list_size(16 * 1024)
}

/// Serves `routes` on `listener` to the keys that `admission` lets in, until `shutdown` is cancelled and the calls under
/// way ended or [`ServeOptions::grace`] ran out. Requests carry a [`PeerKey`] extension.
///
/// # Errors
/// [`ServeError`]; failures of single connections are not errors of the listener.
pub async fn serve(
    listener: TcpListener,
    identity: Arc<Identity>,
    admission: Arc<dyn Admission>,
    routes: Routes,
    options: ServeOptions,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let links =
        tls::server_config(&identity, Some(admission.clone()), tls::ALPN_LINK).map_err(ServeError::Tls)?;
    let pairing = tls::server_config(&identity, None, tls::ALPN_PAIRING).map_err(ServeError::Tls)?;
    let end_all = CancellationToken::new();
    let _end_with_this_future = end_all.clone().drop_guard();
    let (admitted, incoming) = mpsc::channel(16);

    let server = server_builder()
        .max_concurrent_streams(options.max_streams)
        .http2_max_pending_accept_reset_streams(Some(20))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_routes(routes)
        .serve_with_incoming_shutdown(
            ReceiverStream::new(incoming).map(Ok::<_, Infallible>),
            shutdown.clone().cancelled_owned(),
        );

    let connections = Arc::new(Connections { admission, open: Mutex::default(), end_all: end_all.clone() });
    let grace = options.grace;
    let joiners = Semaphore::new(MAX_JOINERS);
    let door = Arc::new(Door { links, pairing, options, connections: connections.clone(), joiners });
    let helpers = async {
        let force = async {
            shutdown.cancelled().await;
            tokio::time::sleep(grace).await;
            end_all.cancel();
        };
        let recheck = async {
            loop {
                tokio::time::sleep(RECHECK).await;
                connections.end_withdrawn();
            }
        };
        tokio::join!(door.accept(listener, admitted, shutdown.clone()), force, recheck);
        pending::<()>().await
    };
    tokio::select! {
        ended = server => ended.map_err(ServeError::Grpc),
        () = helpers => Ok(()),
    }
}

type ServerIo = LinkIo<TlsStream<TcpStream>>;

/// Where connections come in.
struct Door {
    links: Arc<ServerConfig>,
    pairing: Arc<ServerConfig>,
    options: ServeOptions,
    connections: Arc<Connections>,
    joiners: Semaphore,
}

impl Door {
    async fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        admitted: mpsc::Sender<ServerIo>,
        shutdown: CancellationToken,
    ) {
        let permits = Arc::new(Semaphore::new(self.options.max_handshakes));
        let busy = Arc::new(Mutex::new(HashMap::<IpAddr, usize>::new()));
        let mut handshakes = JoinSet::new();
        loop {
            while handshakes.try_join_next().is_some() {}
            let next = async {
                let permit = permits.clone().acquire_owned().await;
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                next = next => next,
                () = shutdown.cancelled() => break,
            };
            let (tcp, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely. A pause lets others close some.
                    debug!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(place) = Place::take(&busy, from.ip(), self.options.max_handshakes_per_address) else {
                debug!(%from, "too many handshakes from one address");
                continue;
            };
            let (door, admitted) = (self.clone(), admitted.clone());
            handshakes.spawn(async move {
                let _held = (permit, place);
                let limit = door.options.handshake_timeout;
                match tokio::time::timeout(limit, door.handshake(tcp)).await {
                    Ok(Ok(Arrival::Link(io))) => {
                        // Full only while tonic is busy accepting; it never stops before this loop does.
                        let _ = admitted.send(io).await;
                    }
                    Ok(Ok(Arrival::Joiner(stream, inviter))) => {
                        drop(_held);
                        let Ok(_place) = door.joiners.try_acquire() else {
                            debug!(%from, "too many joiners at a time");
                            return;
                        };
                        if tokio::time::timeout(PAIRING_TIME, inviter.converse(stream, from)).await.is_err() {
                            debug!(%from, "a pairing conversation took too long");
                        }
                    }
                    Ok(Err(error)) => debug!(%from, %error, "connection refused"),
                    Err(_) => debug!(%from, "a handshake took too long"),
                }
            });
        }
        drop(listener);
        handshakes.shutdown().await;
    }

    async fn handshake(&self, tcp: TcpStream) -> io::Result<Arrival> {
        tcp.set_nodelay(true)?;
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp).await?;
        let wants_pairing =
            hello.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == tls::ALPN_PAIRING));
        // Without an open invite the ordinary configuration answers, which knows no pairing: a TLS alert.
        let inviter = self.options.pairing.as_ref().filter(|inviter| wants_pairing && inviter.is_open());
        let config = if inviter.is_some() { &self.pairing } else { &self.links };
        let stream = hello.into_stream(config.clone()).await?;
        if let Some(inviter) = inviter {
            return Ok(Arrival::Joiner(stream, inviter.clone()));
        }
        let session = stream.get_ref().1;
        if session.alpn_protocol() != Some(tls::ALPN_LINK) {
            return Err(io::Error::other("no protocol was agreed on"));
        }
        let pin = tls::peer_pin(session.peer_certificates());
        let pin = pin.ok_or_else(|| io::Error::other("no certificate was shown"))?;
        let place = self.connections.enter(pin, self.options.max_connections)?;
        let (peer, end) = (place.peer, place.end.clone());
        Ok(Arrival::Link(LinkIo::new(stream, peer, Vec::new(), end, place)))
    }
}

enum Arrival {
    Link(ServerIo),
    Joiner(TlsStream<TcpStream>, Arc<Inviter>),
}

/// One handshake's share of what its address may have at a time.
struct Place {
    busy: Arc<Mutex<HashMap<IpAddr, usize>>>,
    address: IpAddr,
}

impl Place {
    fn take(busy: &Arc<Mutex<HashMap<IpAddr, usize>>>, address: IpAddr, limit: usize) -> Option<Self> {
        let mut counts = busy.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Self { busy: busy.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// The open connections of a listener.
struct Connections {
    admission: Arc<dyn Admission>,
    open: Mutex<HashMap<u64, (PeerKey, CancellationToken)>>,
    end_all: CancellationToken,
}

impl Connections {
    fn enter(self: &Arc<Self>, pin: crate::pin::KeyPin, limit: usize) -> io::Result<Entered> {
        let role = self.admission.admit(&pin).ok_or_else(|| io::Error::other("the key was withdrawn"))?;
        let peer = PeerKey { pin, role };
        let end = self.end_all.child_token();
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= limit {
            return Err(io::Error::other("too many connections are open"));
        }
        let mut number = rand::random();
        while open.contains_key(&number) {
            number = rand::random();
        }
        open.insert(number, (peer, end.clone()));
        Ok(Entered { connections: self.clone(), number, peer, end })
    }

    fn end_withdrawn(&self) {
        for (peer, end) in self.open.lock().unwrap_or_else(PoisonError::into_inner).values() {
            if self.admission.admit(&peer.pin) != Some(peer.role) && !end.is_cancelled() {
                debug!(key = %peer.pin.short(), "a key was withdrawn: its connection ends");
                end.cancel();
            }
        }
    }
}

/// A connection's entry among the open ones; leaves when dropped.
struct Entered {
    connections: Arc<Connections>,
    number: u64,
    peer: PeerKey,
    end: CancellationToken,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.connections.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}
