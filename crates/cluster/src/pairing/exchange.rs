//! What both sides of a pairing do alike: frames, the transcript, and the proofs.

use crate::pin::KeyPin;
use prost::Message;
use ring::{digest, hmac};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest message of a pairing. The roster is the longest: 64 nodes with 16 addresses each stay below.
const MAX_MESSAGE: usize = 512 * 1024;
/// Largest message that a stranger may send.
pub(super) const MAX_FROM_STRANGER: usize = 16 * 1024;
/// The label under which both sides draw the same secret bytes out of their TLS session (RFC 8446 §7.5).
pub(super) const EXPORTER_LABEL: &[u8] = b"EXPORTER-mlxnode-pair/1";

/// Which side makes a proof.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Inviter,
    Joiner,
}

/// What a proof is bound to: both keys and this very TLS session.
pub(super) struct Binding {
    pub(super) inviter: KeyPin,
    pub(super) joiner: KeyPin,
    pub(super) exporter: [u8; 32],
}

impl Binding {
    fn mac(&self, secret: &[u8], side: Side, transcript: &[u8; 32]) -> hmac::Context {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
        context.update(match side {
            Side::Inviter => b"mlxnode-pair/1 inviter",
            Side::Joiner => b"mlxnode-pair/1 joiner \0",
        });
        // All of fixed length, so the parts cannot run into each other.
        context.update(self.inviter.as_bytes());
        context.update(self.joiner.as_bytes());
        context.update(&self.exporter);
        context.update(transcript);
        context
    }

    /// This side's proof that it knows the secret.
    pub(super) fn prove(&self, secret: &[u8], side: Side, transcript: &[u8; 32]) -> Vec<u8> {
        self.mac(secret, side, transcript).sign().as_ref().to_vec()
    }

    /// Is this the other side's proof? Takes the same time for every wrong one.
    pub(super) fn check(&self, secret: &[u8], side: Side, transcript: &[u8; 32], proof: &[u8]) -> bool {
        use subtle::ConstantTimeEq;
        self.mac(secret, side, transcript).sign().as_ref().ct_eq(proof).into()
    }
}

/// The hash of what was said before the proofs: the joiner's whole greeting and the inviter's SPAKE2 message.
pub(super) fn transcript(greeting: &[u8], answer: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in [greeting, answer] {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

/// Writes one message: its length in four bytes, big-endian, then the message.
pub(super) async fn send(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    if message.len() > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a pairing message is too long"));
    }
    let length = (message.len() as u32).to_be_bytes();
    stream.write_all(&[&length, message].concat()).await?;
    stream.flush().await
}

/// Reads one message of at most `longest` bytes, undecoded.
pub(super) async fn receive_bytes(
    stream: &mut (impl AsyncRead + Unpin),
    longest: usize,
) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await? as usize;
    if length > longest.min(MAX_MESSAGE) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a pairing message is too long"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Reads one message.
pub(super) async fn receive<M: Message + Default>(
    stream: &mut (impl AsyncRead + Unpin),
    longest: usize,
) -> io::Result<M> {
    M::decode(receive_bytes(stream, longest).await?.as_slice())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a pairing message cannot be decoded"))
}

/// Longest answer that a joiner takes.
pub(super) const MAX_FROM_INVITER: usize = MAX_MESSAGE;

#[cfg(test)]
mod tests {
    use super::*;

    fn binding() -> Binding {
        Binding {
            inviter: KeyPin::from_bytes([1; 32]),
            joiner: KeyPin::from_bytes([2; 32]),
            exporter: [3; 32],
        }
    }

    #[test]
    fn a_proof_holds_for_one_secret_side_session_and_conversation() {
        let said = transcript(b"hello", b"answer");
        let proof = binding().prove(b"secret", Side::Joiner, &said);
        assert!(binding().check(b"secret", Side::Joiner, &said, &proof));
        assert!(!binding().check(b"other", Side::Joiner, &said, &proof));
        assert!(!binding().check(b"secret", Side::Inviter, &said, &proof), "an echoed proof is no proof");
        assert!(!binding().check(b"secret", Side::Joiner, &transcript(b"helloa", b"nswer"), &proof));
        let elsewhere = Binding { exporter: [4; 32], ..binding() };
        assert!(!elsewhere.check(b"secret", Side::Joiner, &said, &proof));
        let swapped = Binding { inviter: binding().joiner, joiner: binding().inviter, ..binding() };
        assert!(!swapped.check(b"secret", Side::Joiner, &said, &proof));
        assert!(!binding().check(b"secret", Side::Joiner, &said, &proof[..31]));
    }

    #[tokio::test]
    async fn a_message_longer_than_allowed_is_not_even_read() {
        let mut claimed: &[u8] = &[0xff, 0xff, 0xff, 0xff, 1, 2];
        assert!(receive_bytes(&mut claimed, MAX_FROM_STRANGER).await.is_err());
    }
}
