//! How a new node becomes a member: by an invite, once.
//!
//! ```text
//! person ── `mlxnode invite` ──▶ [Inviter] opens an an invite window: one short code and one long token, one use, 10 minutes
//! joiner ── [join] ── TLS, ALPN "mlxnode-pair/1" ──▶ Inviter::converse ── [Admit] ──▶ the coordinator signs a roster
//! ```
//! The TLS connection of a joiner proves nothing yet. What does is the exchange on it: with a code SPAKE2, which gives a
//! listener or a man in the middle nothing to guess at; with a token a MAC under its 128-bit secret, sent only to the key
//! that the token names. Both sides then prove that they know the secret, over both keys and the exporter of this very
//! TLS session, so that nobody sits in between with a session to each.

mod code;
mod exchange;
mod inviter;
mod joiner;
mod token;
mod window;

pub use code::InviteCode;
pub use inviter::{Admit, Invite, Inviter, JoinRequest};
pub use joiner::{JoinError, Joined, join};
pub use token::InviteToken;
pub use window::Refusal;

use std::str::FromStr;

/// What a person typed after `--invite`.
#[derive(Debug)]
pub enum InviteSecret {
    /// The short code, for typing.
    Code(InviteCode),
    /// The long token, for scripts.
    Token(Box<InviteToken>),
}

/// Why a text is no invite.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// Not a code.
    #[error(
        "an invite code has 8 letters and digits, like 7H2K-93QF; this has {found}: see `mlxnode invite` on a member"
    )]
    CodeLength {
        /// How many it has.
        found: usize,
    },
    /// A character that no code has.
    #[error("{0:?} is in no invite code: see `mlxnode invite` on a member")]
    CodeCharacter(char),
    /// A token that lost or changed characters.
    #[error("the invite token is damaged ({0}): copy it whole, from \"mlxn1\" to the end")]
    Token(&'static str),
    /// A token of another version of mlxnode.
    #[error("the invite token is of another version of mlxnode: install the same one on both sides")]
    TokenVersion,
}

impl FromStr for InviteSecret {
    type Err = InviteError;
    fn from_str(text: &str) -> Result<Self, InviteError> {
        let text = text.trim();
        if text.to_ascii_lowercase().starts_with("mlxn") && text.len() > 16 {
            return text.parse().map(|token| Self::Token(Box::new(token)));
        }
        text.parse().map(Self::Code)
    }
}
