//! The new node's side of a pairing.

use super::InviteSecret;
use super::exchange::{self, Binding, EXPORTER_LABEL, MAX_FROM_INVITER, Side};
use super::window::Refusal;
use crate::facts::NodeFacts;
use crate::identity::Identity;
use crate::pin::NodeId;
use crate::roster::{RosterError, SignedRoster};
use crate::tls::{ALPN_PAIRING, ExpectedKey};
use crate::transport::{ConnectError, open_tls};
use crate::wire;
use mlxnode_proto::PROTOCOL_VERSION;
use mlxnode_proto::internal::v1 as proto;
use prost::Message;
use spake2::{Ed25519Group, Spake2};
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

/// How long one address may take to answer the handshake.
const DIAL_TIME: Duration = Duration::from_secs(4);
/// How long one conversation may take.
const TALK_TIME: Duration = Duration::from_secs(20);
/// With a code, every address tried is a guess allowed to whoever listens there. Few are enough.
const MAX_CODE_TARGETS: usize = 8;

/// The outcome of a pairing: this node is a member now.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The roster, with this node in it.
    pub roster: SignedRoster,
    /// Who invited.
    pub inviter: NodeId,
    /// Where it answered: the first peer to talk to.
    pub address: String,
}

/// Why this node is no member.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nowhere to go.
    #[error(
        "no node that takes new ones was found: is `mlxnode invite` open on one in this network? else say where with `--peer HOST:PORT`"
    )]
    NoTarget,
    /// Nobody answered.
    #[error("cannot reach the inviting node")]
    Connect(#[source] ConnectError),
    /// The invite is not good there.
    #[error("{address}: {refusal}")]
    Refused {
        /// Who refused.
        address: String,
        /// Why.
        refusal: Refusal,
    },
    /// The time in the token has passed.
    #[error("the invite token ran out: run `mlxnode invite` on a member again")]
    Expired,
    /// The other side does not know the code: it was mistyped, or somebody sits in between.
    #[error(
        "{address} does not know this invite code: compare it with what `mlxnode invite` printed; if it is right, somebody may be listening in"
    )]
    Unproven {
        /// Who answered.
        address: String,
    },
    /// The conversation broke.
    #[error("the pairing with {address} broke off: try again")]
    Broken {
        /// With whom.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// What was handed over is no roster with both of us in it.
    #[error("{address} handed over a roster that cannot be used")]
    Roster {
        /// Who did.
        address: String,
        /// What is wrong.
        #[source]
        source: RosterError,
    },
}

impl JoinError {
    /// Which of several failures tells the person most: the further it came, the higher.
    fn weight(&self) -> u8 {
        match self {
            Self::NoTarget => 0,
            Self::Connect(_) => 1,
            Self::Expired => 2,
            Self::Broken { .. } => 3,
            Self::Refused { refusal: Refusal::Closed, .. } => 4,
            Self::Unproven { .. } => 5,
            Self::Refused { .. } | Self::Roster { .. } => 6,
        }
    }
}

/// Pairs with the first of `targets` (HOST:PORT) that takes the invite. A token brings addresses of its own, which are
/// tried after these.
///
/// # Errors
/// [`JoinError`]: of several failures the most telling one.
pub async fn join(
    targets: &[String],
    secret: &InviteSecret,
    identity: &Identity,
    facts: &NodeFacts,
) -> Result<Joined, JoinError> {
    let mut addresses: Vec<&String> = Vec::new();
    let hints = match secret {
        InviteSecret::Code(_) => &[],
        InviteSecret::Token(token) => token.addresses.as_slice(),
    };
    for address in targets.iter().chain(hints) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if matches!(secret, InviteSecret::Code(_)) {
        addresses.truncate(MAX_CODE_TARGETS);
    }
    let mut worst = JoinError::NoTarget;
    for address in addresses {
        match join_at(address, secret, identity, facts).await {
            Ok(joined) => return Ok(joined),
            Err(error) if error.weight() >= worst.weight() => worst = error,
            Err(_) => {}
        }
    }
    Err(worst)
}

async fn join_at(
    address: &str,
    secret: &InviteSecret,
    identity: &Identity,
    facts: &NodeFacts,
) -> Result<Joined, JoinError> {
    // With a token the handshake itself fails at any other key than the inviter's, before anything is said.
    let expected = match secret {
        InviteSecret::Code(_) => ExpectedKey::Unproven,
        InviteSecret::Token(token) => ExpectedKey::Pin(token.inviter),
    };
    let opened = open_tls(address, identity, expected, ALPN_PAIRING, DIAL_TIME).await;
    let (mut stream, inviter) = opened.map_err(|error| no_conversation(error, secret))?;
    let mut exporter = [0; 32];
    let session = stream.get_ref().1;
    session.export_keying_material(&mut exporter, EXPORTER_LABEL, None).map_err(|error| {
        JoinError::Broken { address: address.to_owned(), source: io::Error::other(error) }
    })?;
    let binding = Binding { inviter, joiner: identity.key_pin(), exporter };
    let talk = converse(address, &mut stream, secret, &binding, facts);
    let signed = tokio::time::timeout(TALK_TIME, talk).await.unwrap_or_else(|_| {
        Err(JoinError::Broken { address: address.to_owned(), source: io::ErrorKind::TimedOut.into() })
    })?;
    let members = [identity.id(), inviter.node_id()];
    if members.iter().any(|member| signed.roster().get(member).is_none()) {
        let source = RosterError::Malformed("this node or the inviter is not in it");
        return Err(JoinError::Roster { address: address.to_owned(), source });
    }
    Ok(Joined { roster: signed, inviter: inviter.node_id(), address: address.to_owned() })
}

async fn converse(
    address: &str,
    stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    secret: &InviteSecret,
    binding: &Binding,
    facts: &NodeFacts,
) -> Result<SignedRoster, JoinError> {
    let named = || address.to_owned();
    let broken = |source| JoinError::Broken { address: named(), source };
    let refused = |refusal| JoinError::Refused { address: named(), refusal };
    let malformed = |what| broken(io::Error::new(io::ErrorKind::InvalidData, what));

    let (exchange, method) = match secret {
        InviteSecret::Code(code) => {
            let (exchange, message) = Spake2::<Ed25519Group>::start_a(
                &spake2::Password::new(code.password()),
                &spake2::Identity::new(binding.joiner.as_bytes()),
                &spake2::Identity::new(binding.inviter.as_bytes()),
            );
            (Some(exchange), proto::pairing_hello::Method::Spake2(message.into()))
        }
        InviteSecret::Token(token) => (None, proto::pairing_hello::Method::TokenId(token.id.to_vec().into())),
    };
    let greeting = proto::PairingHello {
        protocol_version: PROTOCOL_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        facts: Some(wire::facts_to_wire(facts)),
        method: Some(method),
    }
    .encode_to_vec();
    exchange::send(stream, &greeting).await.map_err(broken)?;

    let challenge: proto::PairingChallenge =
        exchange::receive(stream, MAX_FROM_INVITER).await.map_err(broken)?;
    let answer = match challenge.answer {
        Some(proto::pairing_challenge::Answer::Refusal(refusal)) => {
            return Err(refused(refusal_from_wire(refusal)));
        }
        Some(proto::pairing_challenge::Answer::Spake2(answer)) => answer,
        None => return Err(malformed("the challenge is empty")),
    };
    let key: Zeroizing<Vec<u8>> = match (exchange, secret) {
        (Some(exchange), _) => {
            let key = exchange.finish(&answer).map_err(|_| JoinError::Unproven { address: named() })?;
            Zeroizing::new(key)
        }
        (None, InviteSecret::Token(token)) => Zeroizing::new(token.secret.to_vec()),
        (None, InviteSecret::Code(_)) => return Err(malformed("the exchange was not begun")),
    };
    let transcript = exchange::transcript(&greeting, &answer);
    if !binding.check(&key, Side::Inviter, &transcript, &challenge.confirmation) {
        return Err(JoinError::Unproven { address: named() });
    }
    let proof = proto::PairingProof { confirmation: binding.prove(&key, Side::Joiner, &transcript).into() };
    exchange::send(stream, &proof.encode_to_vec()).await.map_err(broken)?;

    let welcome: proto::PairingWelcome = exchange::receive(stream, MAX_FROM_INVITER).await.map_err(broken)?;
    let signed = match welcome.result {
        Some(proto::pairing_welcome::Result::Roster(signed)) => signed,
        Some(proto::pairing_welcome::Result::Refusal(refusal)) => {
            return Err(refused(refusal_from_wire(refusal)));
        }
        None => return Err(malformed("the welcome is empty")),
    };
    let expected = match secret {
        InviteSecret::Code(_) => None,
        InviteSecret::Token(token) => Some(token.cluster),
    };
    SignedRoster::verify(signed.roster.to_vec(), signed.signature.to_vec(), expected)
        .map_err(|source| JoinError::Roster { address: named(), source })
}

/// A listener without an open invite refuses the handshake itself.
fn no_conversation(error: ConnectError, secret: &InviteSecret) -> JoinError {
    let ConnectError::Rejected { address, .. } = error else {
        return JoinError::Connect(error);
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match secret {
        InviteSecret::Token(token) if token.expires_unix < now => JoinError::Expired,
        _ => JoinError::Refused { address, refusal: Refusal::Closed },
    }
}

fn refusal_from_wire(refusal: proto::PairingRefusal) -> Refusal {
    use proto::pairing_refusal::Reason;
    let reason = refusal.reason();
    let text: String = refusal.text.chars().filter(|c| !c.is_control()).take(400).collect();
    match reason {
        Reason::Closed => Refusal::Closed,
        Reason::WrongSecret => Refusal::WrongSecret,
        Reason::Used => Refusal::Used,
        Reason::ProtocolVersion => Refusal::ProtocolVersion(text),
        Reason::Member => Refusal::Member(text),
        Reason::Unspecified => Refusal::Failed(text),
    }
}
