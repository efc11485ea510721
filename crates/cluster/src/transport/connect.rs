//! The side that dials.

use super::io::LinkIo;
use super::{CONNECTION_WINDOW, HTTP2_FRAME, KEEPALIVE, STREAM_WINDOW};
use crate::admission::{PeerKey, Role};
use crate::identity::Identity;
use crate::pin::KeyPin;
use crate::tls::{self, ExpectedKey, FoundKey};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

/// How to dial.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// How long resolving, connecting and the handshake may take together.
    pub timeout: Duration,
    /// Cancelling this ends the connection at once, and the channel dials no more.
    pub end: CancellationToken,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5), end: CancellationToken::new() }
    }
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address does not resolve.
    #[error("{address} is not an address of the form HOST:PORT that can be resolved")]
    Address {
        /// The address.
        address: String,
        /// The resolver's reason.
        #[source]
        source: io::Error,
    },
    /// Nothing listens there.
    #[error("nothing listens on {address}: is mlxnode running there")]
    Refused {
        /// The address.
        address: String,
    },
    /// No answer in time.
    #[error("{address} did not answer within {} ms: is it on, and in the same network", after.as_millis())]
    TimedOut {
        /// The address.
        address: String,
        /// How long we waited.
        after: Duration,
    },
    /// Another failure of the network.
    #[error("cannot reach {address}")]
    Unreachable {
        /// The address.
        address: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Somebody else is there.
    #[error("{address} answered with the key {}, which is not the expected one", found.short())]
    WrongKey {
        /// The address.
        address: String,
        /// The key that answered.
        found: KeyPin,
    },
    /// The other side does not let this key in (or does not speak the protocol now).
    #[error("{address} refused this key ({alert}): it must be in the roster there, see `mlxnode invite`")]
    Rejected {
        /// The address.
        address: String,
        /// The TLS alert, such as "AccessDenied".
        alert: String,
    },
    /// Not an mlxnode, or a broken one.
    #[error("{address} does not speak mlxnode's protocol: {reason}")]
    Protocol {
        /// The address.
        address: String,
        /// What was wrong.
        reason: String,
    },
    /// The link was ended on this side, see [`ConnectOptions::end`].
    #[error("the link to {address} was ended here")]
    Ended {
        /// The address.
        address: String,
    },
}

impl ConnectError {
    /// Did the host answer that nothing listens there? Then the process that listened there is gone.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// An open link and who is at its other end.
#[derive(Clone, Debug)]
pub struct Link {
    /// For gRPC clients; clones share the connection. When it broke, the next call dials again, with the same pin.
    pub channel: Channel,
    /// The key that answered.
    pub pin: KeyPin,
}

/// Dials `address` (HOST:PORT), checks the key that answers, and waits until the other side let this one in.
///
/// # Errors
/// [`ConnectError`], each kind with what the person can do.
pub async fn connect(
    address: &str,
    identity: &Identity,
    expected: ExpectedKey,
    options: ConnectOptions,
) -> Result<Channel, ConnectError> {
    dial(address, identity, expected, options).await.map(|link| link.channel)
}

/// As [`connect`], and says which key answered.
///
/// # Errors
/// As [`connect`].
pub async fn dial(
    address: &str,
    identity: &Identity,
    expected: ExpectedKey,
    options: ConnectOptions,
) -> Result<Link, ConnectError> {
    let protocol = |reason: String| ConnectError::Protocol { address: address.to_owned(), reason };
    let (stream, pin) = open_admitted(address, identity, expected, &options).await?;
    // Whoever answered first must answer after a reconnect too.
    let (config, found) = tls::client_config(identity, ExpectedKey::Pin(pin), tls::ALPN_LINK)
        .map_err(|error| protocol(error.to_string()))?;
    let first = Arc::new(Mutex::new(Some(stream)));
    let dialer = Dialer { address: address.to_owned(), config, found, options, pin };
    let connector = tower::service_fn(move |_: Uri| {
        let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let dialer = dialer.clone();
        async move {
            match first {
                Some(stream) => Ok(TokioIo::new(stream)),
                None => dialer.reopen().await.map(TokioIo::new),
            }
        }
    });
    let channel = Endpoint::from_static("http://mlxnode.local")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| protocol(error.to_string()))?;
    Ok(Link { channel, pin })
}

type ClientIo = LinkIo<TlsStream<TcpStream>>;

/// What is needed to open the same link again.
#[derive(Clone)]
struct Dialer {
    address: String,
    config: Arc<ClientConfig>,
    found: FoundKey,
    options: ConnectOptions,
    pin: KeyPin,
}

impl Dialer {
    async fn reopen(&self) -> Result<ClientIo, ConnectError> {
        if self.options.end.is_cancelled() {
            return Err(ConnectError::Ended { address: self.address.clone() });
        }
        let opening = async {
            let stream = handshake(&self.address, self.config.clone(), &self.found).await?;
            await_admission(&self.address, stream, self.pin, &self.options.end).await
        };
        in_time(&self.address, &self.options, opening).await
    }
}

async fn open_admitted(
    address: &str,
    identity: &Identity,
    expected: ExpectedKey,
    options: &ConnectOptions,
) -> Result<(ClientIo, KeyPin), ConnectError> {
    let opening = async {
        let (stream, pin) = tls_stream(address, identity, expected, tls::ALPN_LINK).await?;
        Ok((await_admission(address, stream, pin, &options.end).await?, pin))
    };
    in_time(address, options, opening).await
}

/// A TLS connection for something else than gRPC: pairing.
pub(crate) async fn open_tls(
    address: &str,
    identity: &Identity,
    expected: ExpectedKey,
    alpn: &[u8],
    timeout: Duration,
) -> Result<(TlsStream<TcpStream>, KeyPin), ConnectError> {
    let options = ConnectOptions { timeout, ..ConnectOptions::default() };
    in_time(address, &options, tls_stream(address, identity, expected, alpn)).await
}

async fn tls_stream(
    address: &str,
    identity: &Identity,
    expected: ExpectedKey,
    alpn: &[u8],
) -> Result<(TlsStream<TcpStream>, KeyPin), ConnectError> {
    let protocol = |reason: String| ConnectError::Protocol { address: address.to_owned(), reason };
    let (config, found) =
        tls::client_config(identity, expected, alpn).map_err(|error| protocol(error.to_string()))?;
    let stream = handshake(address, config, &found).await?;
    let pin = tls::peer_pin(stream.get_ref().1.peer_certificates())
        .ok_or_else(|| protocol("it showed no certificate".to_owned()))?;
    Ok((stream, pin))
}

async fn in_time<T>(
    address: &str,
    options: &ConnectOptions,
    opening: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    tokio::select! {
        outcome = tokio::time::timeout(options.timeout, opening) => outcome.unwrap_or_else(|_| {
            Err(ConnectError::TimedOut { address: address.to_owned(), after: options.timeout })
        }),
        () = options.end.cancelled() => Err(ConnectError::Ended { address: address.to_owned() }),
    }
}

async fn handshake(
    address: &str,
    config: Arc<ClientConfig>,
    found: &FoundKey,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let named = || address.to_owned();
    let targets: Vec<_> = tokio::net::lookup_host(address)
        .await
        .map_err(|source| ConnectError::Address { address: named(), source })?
        .collect();
    let tcp = TcpStream::connect(targets.as_slice()).await.map_err(|source| match source.kind() {
        io::ErrorKind::ConnectionRefused => ConnectError::Refused { address: named() },
        io::ErrorKind::TimedOut => ConnectError::TimedOut { address: named(), after: Duration::ZERO },
        _ => ConnectError::Unreachable { address: named(), source },
    })?;
    tcp.set_nodelay(true).map_err(|source| ConnectError::Unreachable { address: named(), source })?;
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()); // not looked at, see tls
    TlsConnector::from(config).connect(name, tcp).await.map_err(|error| refusal(address, error, found.get()))
}

/// In TLS 1.3 the dialling side is through with the handshake before the other one has looked at its certificate. So wait
/// for the first bytes, HTTP/2's settings, or for the alert that comes in their place.
async fn await_admission(
    address: &str,
    mut stream: TlsStream<TcpStream>,
    pin: KeyPin,
    end: &CancellationToken,
) -> Result<ClientIo, ConnectError> {
    let mut ahead = vec![0; 256];
    let count = stream.read(&mut ahead).await.map_err(|error| refusal(address, error, None))?;
    if count == 0 {
        let reason = "it closed the connection without a word".to_owned();
        return Err(ConnectError::Protocol { address: address.to_owned(), reason });
    }
    ahead.truncate(count);
    let peer = PeerKey { pin, role: Role::Node };
    Ok(LinkIo::new(stream, peer, ahead, end.child_token(), ()))
}

/// What a failed handshake means.
pub(crate) fn refusal(address: &str, error: io::Error, found: Option<KeyPin>) -> ConnectError {
    let address = address.to_owned();
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match (tls, found) {
        (Some(rustls::Error::AlertReceived(alert)), _) => {
            ConnectError::Rejected { address, alert: format!("{alert:?}") }
        }
        (Some(rustls::Error::InvalidCertificate(_)), Some(found)) => {
            ConnectError::WrongKey { address, found }
        }
        _ => ConnectError::Protocol { address, reason: error.to_string() },
    }
}
