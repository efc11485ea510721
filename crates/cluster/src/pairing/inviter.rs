//! The member's side of a pairing.

use super::code::InviteCode;
use super::exchange::{self, Binding, EXPORTER_LABEL, MAX_FROM_STRANGER, Side};
use super::token::InviteToken;
use super::window::{INVITE_LIFE, InviteNumber, InviteWindow, Refusal};
use crate::facts::NodeFacts;
use crate::identity::Identity;
use crate::pin::{ClusterId, KeyPin, NodeId};
use crate::roster::SignedRoster;
use crate::{tls, wire};
use async_trait::async_trait;
use mlxnode_proto::PROTOCOL_VERSION;
use mlxnode_proto::internal::v1 as proto;
use prost::Message;
use spake2::{Ed25519Group, Spake2};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};
use zeroize::Zeroizing;

/// How long a joiner may take for its next message. It is a program that has all it needs, so moments suffice, and nobody
/// keeps others waiting by saying nothing.
const MESSAGE_TIME: Duration = Duration::from_secs(4);

/// Who wants in. Its key is proven, the rest is what it says about itself.
#[derive(Clone, Debug)]
pub struct JoinRequest {
    /// The id that goes with the joiner's key.
    pub node_id: NodeId,
    /// What it says about itself.
    pub facts: NodeFacts,
}

/// Has a proven joiner taken into the roster: by the coordinator, wherever that is.
#[async_trait]
pub trait Admit: Send + Sync + 'static {
    /// The signed roster with the joiner in it. A joiner that is in already (its first answer got lost) should be given the
    /// present roster.
    ///
    /// # Errors
    /// [`Refusal::Member`] or [`Refusal::Failed`], with a sentence for the person at the joiner. The invite stays good.
    async fn admit(&self, joiner: JoinRequest) -> Result<SignedRoster, Refusal>;
}

/// An open invite, for the person who asked for it.
#[derive(Clone, Debug)]
pub struct Invite {
    /// For typing.
    pub code: InviteCode,
    /// For scripts.
    pub token: InviteToken,
    /// How long it is good.
    pub life: Duration,
}

impl Invite {
    /// When it runs out, in seconds since 1970.
    pub fn expires_unix(&self) -> u64 {
        self.token.expires_unix
    }
}

/// Opens invites and answers joiners. Handed to [`serve`](crate::serve) by
/// [`ServeOptions::pairing`](crate::ServeOptions::pairing).
pub struct Inviter {
    identity: Arc<Identity>,
    admit: Arc<dyn Admit>,
    window: Mutex<InviteWindow>,
    /// One conversation at a time: a second joiner, once it has greeted, waits within its own time limit.
    talking: tokio::sync::Mutex<()>,
    open_until: watch::Sender<Option<Instant>>,
}

impl Inviter {
    /// No invite is open at first.
    pub fn new(identity: Arc<Identity>, admit: Arc<dyn Admit>) -> Self {
        Self {
            identity,
            admit,
            window: Mutex::default(),
            talking: tokio::sync::Mutex::default(),
            open_until: watch::Sender::new(None),
        }
    }

    /// Opens an invite into `cluster` for ten minutes; one that was open is void. `addresses` are where this node's
    /// listener can be reached, as hints in the token.
    pub fn open(&self, cluster: ClusterId, addresses: &[String]) -> Invite {
        self.open_for(cluster, addresses, INVITE_LIFE)
    }

    /// As [`Inviter::open`], for another time than ten minutes.
    pub fn open_for(&self, cluster: ClusterId, addresses: &[String], life: Duration) -> Invite {
        let expires = (SystemTime::now() + life).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let token = InviteToken::generate(cluster, self.identity.key_pin(), addresses, expires);
        let code = InviteCode::generate();
        self.window().open(code.clone(), token.clone(), life, Instant::now());
        self.publish();
        Invite { code, token, life }
    }

    /// Closes the invite, if one is open.
    pub fn close(&self) {
        self.window().close();
        self.publish();
    }

    /// Is an invite open now?
    pub fn is_open(&self) -> bool {
        self.window().closes_at(Instant::now()).is_some()
    }

    /// Until when an invite is open: changes when one is opened, used or closed (not when it runs out: that is the time
    /// it says). For whoever announces it.
    pub fn open_until(&self) -> watch::Receiver<Option<Instant>> {
        self.open_until.subscribe()
    }

    /// Talks to one joiner, whose TLS connection was accepted under the pairing protocol.
    pub(crate) async fn converse(&self, mut stream: TlsStream<TcpStream>, from: SocketAddr) {
        match self.answer(&mut stream).await {
            Ok(Ok(node)) => info!(%node, %from, "a node joined"),
            Ok(Err(refusal)) => warn!(%from, %refusal, "a joiner was turned away"),
            Err(error) => warn!(%from, %error, "a joiner broke off"),
        }
        self.publish();
        // Tell the other side that this was all, so that it reads the last message before the connection goes.
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
    }

    async fn answer(&self, stream: &mut TlsStream<TcpStream>) -> io::Result<Result<NodeId, Refusal>> {
        let binding = self.binding(stream)?;
        let greeting = in_time(exchange::receive_bytes(stream, MAX_FROM_STRANGER)).await?;
        let _one_at_a_time = self.talking.lock().await;
        let hello = proto::PairingHello::decode(greeting.as_slice())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the greeting cannot be decoded"))?;
        let Begun { number, secret, answer } = match self.begin(&hello, &binding) {
            Ok(begun) => begun,
            Err(refusal) => {
                let answer = Some(proto::pairing_challenge::Answer::Refusal(refusal_to_wire(&refusal)));
                let challenge = proto::PairingChallenge { answer, confirmation: Default::default() };
                exchange::send(stream, &challenge.encode_to_vec()).await?;
                return Ok(Err(refusal));
            }
        };
        // From here on the try counts as wrong until the joiner proved otherwise, also when it breaks off.
        let mut trial = Trial { window: &self.window, number, settled: false };
        let transcript = exchange::transcript(&greeting, &answer);
        let challenge = proto::PairingChallenge {
            confirmation: binding.prove(&secret, Side::Inviter, &transcript).into(),
            answer: Some(proto::pairing_challenge::Answer::Spake2(answer.into())),
        };
        exchange::send(stream, &challenge.encode_to_vec()).await?;
        let proof: proto::PairingProof = in_time(exchange::receive(stream, MAX_FROM_STRANGER)).await?;

        let outcome = if binding.check(&secret, Side::Joiner, &transcript, &proof.confirmation) {
            let facts = wire::facts_from_wire(hello.facts.unwrap_or_default());
            let joiner = JoinRequest { node_id: binding.joiner.node_id(), facts };
            self.admit_proven(&mut trial, joiner).await
        } else {
            Err(Refusal::WrongSecret)
        };
        drop(trial);
        let result = match &outcome {
            Ok(signed) => proto::pairing_welcome::Result::Roster(wire::signed_roster_to_wire(signed)),
            Err(refusal) => proto::pairing_welcome::Result::Refusal(refusal_to_wire(refusal)),
        };
        exchange::send(stream, &proto::PairingWelcome { result: Some(result) }.encode_to_vec()).await?;
        Ok(outcome.map(|_| binding.joiner.node_id()))
    }

    async fn admit_proven(
        &self,
        trial: &mut Trial<'_>,
        joiner: JoinRequest,
    ) -> Result<SignedRoster, Refusal> {
        let number = trial.number;
        trial.settled = true;
        self.window().still_open(number, Instant::now())?;
        let admitted = self.admit.admit(joiner).await;
        match &admitted {
            Ok(_) => self.window().used(number),
            Err(_) => self.window().give_back(number),
        }
        admitted
    }

    /// What the joiner's greeting starts.
    fn begin(&self, hello: &proto::PairingHello, binding: &Binding) -> Result<Begun, Refusal> {
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Refusal::ProtocolVersion(format!(
                "this node speaks protocol {PROTOCOL_VERSION} (mlxnode {}), the joiner {} (mlxnode {}): install the same version on both",
                env!("CARGO_PKG_VERSION"),
                hello.protocol_version,
                hello.version.chars().filter(|c| c.is_ascii_graphic()).take(32).collect::<String>(),
            )));
        }
        let now = Instant::now();
        match &hello.method {
            Some(proto::pairing_hello::Method::TokenId(id)) => {
                let (number, secret) = self.window().try_token(id, now)?;
                Ok(Begun { number, secret: Zeroizing::new(secret.to_vec()), answer: Vec::new() })
            }
            Some(proto::pairing_hello::Method::Spake2(message)) => {
                let (number, code) = self.window().try_code(now)?;
                let (exchange, answer) = Spake2::<Ed25519Group>::start_b(
                    &spake2::Password::new(code.password()),
                    &spake2::Identity::new(binding.joiner.as_bytes()),
                    &spake2::Identity::new(binding.inviter.as_bytes()),
                );
                match exchange.finish(message) {
                    Ok(key) => Ok(Begun { number, secret: Zeroizing::new(key), answer }),
                    Err(_) => {
                        self.window().failed(number);
                        Err(Refusal::WrongSecret)
                    }
                }
            }
            None => Err(Refusal::WrongSecret),
        }
    }

    fn binding(&self, stream: &TlsStream<TcpStream>) -> io::Result<Binding> {
        let session = stream.get_ref().1;
        let joiner: KeyPin = tls::peer_pin(session.peer_certificates())
            .ok_or_else(|| io::Error::other("the joiner showed no certificate"))?;
        let exporter =
            session.export_keying_material([0; 32], EXPORTER_LABEL, None).map_err(io::Error::other)?;
        Ok(Binding { inviter: self.identity.key_pin(), joiner, exporter })
    }

    fn window(&self) -> MutexGuard<'_, InviteWindow> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self) {
        let until = self.window().closes_at(Instant::now());
        self.open_until.send_if_modified(|known| std::mem::replace(known, until) != until);
    }
}

async fn in_time<T>(message: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(MESSAGE_TIME, message).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A conversation after its greeting: which invite it is about, the secret that both sides should share now, and this side's
/// SPAKE2 message (empty with a token).
struct Begun {
    number: InviteNumber,
    secret: Zeroizing<Vec<u8>>,
    answer: Vec<u8>,
}

/// A try at the secret. Dropped unsettled (wrong proof, broken off, out of time) it counts as failed.
struct Trial<'a> {
    window: &'a Mutex<InviteWindow>,
    number: InviteNumber,
    settled: bool,
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.window.lock().unwrap_or_else(PoisonError::into_inner).failed(self.number);
        }
    }
}

fn refusal_to_wire(refusal: &Refusal) -> proto::PairingRefusal {
    use proto::pairing_refusal::Reason;
    let reason = match refusal {
        Refusal::Closed => Reason::Closed,
        Refusal::WrongSecret => Reason::WrongSecret,
        Refusal::Used => Reason::Used,
        Refusal::ProtocolVersion(_) => Reason::ProtocolVersion,
        Refusal::Member(_) => Reason::Member,
        Refusal::Failed(_) => Reason::Unspecified,
    };
    let text = match refusal {
        Refusal::Failed(why) => why.clone(),
        other => other.to_string(),
    };
    proto::PairingRefusal { reason: reason.into(), text }
}
