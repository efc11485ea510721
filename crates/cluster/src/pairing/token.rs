//! The long token, `mlxn1…`: everything a script needs to join, in one word.
//!
//! It names the cluster and the inviter's key, so a joiner checks whom it talks to before it sends anything; it carries a
//! 128-bit secret, addresses as hints, the time it runs out (for a better error message: the inviter's clock decides), and
//! a checksum that finds copying mistakes. Layout after the prefix, base64url without padding:
//! cluster 32 · key 32 · id 8 · secret 16 · expiry 8 · number of addresses 1 · (length 1, address)… · checksum 4.

use super::InviteError;
use crate::pin::{ClusterId, KeyPin};
use data_encoding::BASE64URL_NOPAD;
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

const FAMILY: &str = "mlxn";
const PREFIX: &str = "mlxn1";
const MAX_ADDRESSES: usize = 8;
const MAX_TOKEN: usize = 4096;

/// A long invite token. Its text is a secret: it prints with [`InviteToken::reveal`] only.
#[derive(Clone, PartialEq, Eq)]
pub struct InviteToken {
    /// The cluster that it leads into.
    pub cluster: ClusterId,
    /// The key of the node that invites.
    pub inviter: KeyPin,
    /// Where that node can be reached (HOST:PORT).
    pub addresses: Vec<String>,
    /// When it runs out, in seconds since 1970.
    pub expires_unix: u64,
    pub(super) id: [u8; 8],
    pub(super) secret: Zeroizing<[u8; 16]>,
}

impl InviteToken {
    /// A new token with a random id and secret.
    pub fn generate(cluster: ClusterId, inviter: KeyPin, addresses: &[String], expires_unix: u64) -> Self {
        let fits = |address: &&String| address.len() <= usize::from(u8::MAX);
        let addresses = addresses.iter().filter(fits).take(MAX_ADDRESSES).cloned().collect();
        let (id, secret) = (rand::random(), Zeroizing::new(rand::random()));
        Self { cluster, inviter, addresses, expires_unix, id, secret }
    }

    /// The token as text.
    pub fn reveal(&self) -> String {
        let mut bytes = Zeroizing::new(Vec::with_capacity(256));
        bytes.extend_from_slice(self.cluster.as_bytes());
        bytes.extend_from_slice(self.inviter.as_bytes());
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(self.secret.as_slice());
        bytes.extend_from_slice(&self.expires_unix.to_be_bytes());
        bytes.push(self.addresses.len() as u8);
        for address in &self.addresses {
            bytes.push(address.len() as u8);
            bytes.extend_from_slice(address.as_bytes());
        }
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for InviteToken {
    type Err = InviteError;
    fn from_str(text: &str) -> Result<Self, InviteError> {
        if text.len() > MAX_TOKEN {
            return Err(InviteError::Token("it is too long"));
        }
        let body: Zeroizing<String> = Zeroizing::new(text.split_whitespace().collect());
        let Some(body) = body.strip_prefix(PREFIX) else {
            let known = body.starts_with(FAMILY);
            return Err(if known {
                InviteError::TokenVersion
            } else {
                InviteError::Token("it begins otherwise")
            });
        };
        let bytes = BASE64URL_NOPAD.decode(body.as_bytes()).map(Zeroizing::new);
        let bytes = bytes.map_err(|_| InviteError::Token("characters are missing or wrong"))?;
        let (content, sum) = bytes.split_last_chunk::<4>().ok_or(InviteError::Token("it is too short"))?;
        if checksum(content) != *sum {
            return Err(InviteError::Token("characters are missing or wrong"));
        }
        read(content).ok_or(InviteError::Token("its content is incomplete"))
    }
}

fn read(mut bytes: &[u8]) -> Option<InviteToken> {
    fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (taken, rest) = bytes.split_first_chunk::<N>()?;
        *bytes = rest;
        Some(*taken)
    }
    let cluster = ClusterId::from_bytes(take(&mut bytes)?);
    let inviter = KeyPin::from_bytes(take(&mut bytes)?);
    let id = take(&mut bytes)?;
    let secret = Zeroizing::new(take(&mut bytes)?);
    let expires_unix = u64::from_be_bytes(take(&mut bytes)?);
    let [count] = take::<1>(&mut bytes)?;
    let mut addresses = Vec::new();
    for _ in 0..count {
        let [length] = take::<1>(&mut bytes)?;
        let (address, rest) = bytes.split_at_checked(usize::from(length))?;
        addresses.push(std::str::from_utf8(address).ok()?.to_owned());
        bytes = rest;
    }
    bytes.is_empty().then_some(InviteToken { cluster, inviter, addresses, expires_unix, id, secret })
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let hash = blake3::hash(bytes);
    let [a, b, c, d, ..] = *hash.as_bytes();
    [a, b, c, d]
}

impl fmt::Debug for InviteToken {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("InviteToken")
            .field("cluster", &self.cluster)
            .field("inviter", &self.inviter)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairing::InviteSecret;

    fn token() -> InviteToken {
        let addresses = ["10.0.0.1:7070".to_owned(), "studio.local:7070".to_owned()];
        InviteToken::generate(
            ClusterId::from_bytes([1; 32]),
            KeyPin::from_bytes([2; 32]),
            &addresses,
            1_800_000_000,
        )
    }

    #[test]
    fn a_token_is_read_as_it_was_written() {
        let token = token();
        let text = token.reveal();
        assert!(text.starts_with("mlxn1") && text.len() < 220);
        assert_eq!(text.parse::<InviteToken>().unwrap(), token);
        assert!(matches!(format!(" {text}\n").parse(), Ok(InviteSecret::Token(read)) if *read == token));
        assert!(!format!("{token:?}").contains(&data_encoding::HEXLOWER.encode(token.secret.as_slice())));
    }

    #[test]
    fn every_damaged_token_is_refused() {
        let text = token().reveal();
        for end in 5..text.len() {
            assert!(matches!(text[..end].parse::<InviteToken>(), Err(InviteError::Token(_))), "{end}");
        }
        for place in 5..text.len() {
            let mut bent = text.clone().into_bytes();
            bent[place] = if bent[place] == b'A' { b'B' } else { b'A' };
            let bent = String::from_utf8(bent).unwrap();
            assert!(bent == text || bent.parse::<InviteToken>().is_err());
        }
        assert_eq!(text.replace("mlxn1", "mlxn2").parse::<InviteToken>(), Err(InviteError::TokenVersion));
        assert!("x".repeat(10_000).parse::<InviteToken>().is_err());
    }
}
