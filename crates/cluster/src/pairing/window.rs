//! When an invite is good: one at a time, for ten minutes, for one use, with five tries.
//!
//! Pure: the time is handed in. A try counts from the moment on which the other side could check a guess, not when it
//! admits that it failed, or else breaking off the conversation would make guesses free.

use super::code::InviteCode;
use super::token::InviteToken;
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// How long an invite is good.
pub(super) const INVITE_LIFE: Duration = Duration::from_secs(600);
/// How many wrong secrets close it. Five guesses at 40 bits: 4.5e-12.
const TRIES: u8 = 5;
/// How many used tokens are remembered, to tell "used" from "unknown".
const REMEMBERED: usize = 64;

/// Why a joiner is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No invite is open.
    #[error(
        "no invite is open at this node: it ran out, was used, or five wrong codes closed it, or it was opened at another \
         address; run `mlxnode invite` again and use the address that it prints"
    )]
    Closed,
    /// The code or token is not the one.
    #[error("the invite is wrong: compare it with what `mlxnode invite` printed there")]
    WrongSecret,
    /// The token was used before.
    #[error("the invite was used already: run `mlxnode invite` there again")]
    Used,
    /// The other side has another version.
    #[error("{0}")]
    ProtocolVersion(String),
    /// The coordinator does not take it, and says why.
    #[error("{0}")]
    Member(String),
    /// Something failed on the inviter's side.
    #[error("the other side could not finish: {0}")]
    Failed(String),
}

/// The one invite that may be open.
#[derive(Default)]
pub(super) struct InviteWindow {
    open: Option<OpenInvite>,
    opened: u64,
    used: VecDeque<[u8; 8]>,
}

struct OpenInvite {
    number: u64,
    code: InviteCode,
    token: InviteToken,
    closes_at: Instant,
    tries_left: u8,
}

/// Which invite a conversation uses: a newer one that was opened meanwhile is another matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InviteNumber(u64);

impl InviteWindow {
    /// Opens an invite; one that was open is void.
    pub(super) fn open(&mut self, code: InviteCode, token: InviteToken, life: Duration, now: Instant) {
        self.opened += 1;
        let closes_at = now + life;
        self.open = Some(OpenInvite { number: self.opened, code, token, closes_at, tries_left: TRIES });
    }

    /// Closes the invite, if one is open.
    pub(super) fn close(&mut self) {
        self.open = None;
    }

    /// Until when joiners are answered, or `None` when they are not.
    pub(super) fn closes_at(&self, now: Instant) -> Option<Instant> {
        self.open.as_ref().map(|invite| invite.closes_at).filter(|closes_at| now < *closes_at)
    }

    /// A joiner wants to use the code. Costs a try, given back by success.
    pub(super) fn try_code(&mut self, now: Instant) -> Result<(InviteNumber, InviteCode), Refusal> {
        let invite = self.current(now)?;
        invite.tries_left -= 1;
        Ok((InviteNumber(invite.number), invite.code.clone()))
    }

    /// A joiner wants to use a token. Costs a try, given back by success.
    pub(super) fn try_token(
        &mut self,
        id: &[u8],
        now: Instant,
    ) -> Result<(InviteNumber, Zeroizing<[u8; 16]>), Refusal> {
        if self.used.iter().any(|used| used == id) {
            return Err(Refusal::Used);
        }
        let invite = self.current(now)?;
        invite.tries_left -= 1;
        if invite.token.id != id {
            self.close_when_spent();
            return Err(Refusal::WrongSecret);
        }
        Ok((InviteNumber(invite.number), invite.token.secret.clone()))
    }

    /// The joiner did not prove that it knows the secret.
    pub(super) fn failed(&mut self, number: InviteNumber) {
        if self.is(number) {
            self.close_when_spent();
        }
    }

    /// The joiner proved that it knows the secret, but could not be admitted for another reason: the invite stays good.
    pub(super) fn give_back(&mut self, number: InviteNumber) {
        if let Some(invite) = self.open.as_mut().filter(|invite| invite.number == number.0) {
            invite.tries_left = (invite.tries_left + 1).min(TRIES);
        }
    }

    /// May the joiner, who proved that it knows the secret, be admitted now?
    pub(super) fn still_open(&self, number: InviteNumber, now: Instant) -> Result<(), Refusal> {
        if self.is(number) && self.closes_at(now).is_some() { Ok(()) } else { Err(Refusal::Closed) }
    }

    /// The joiner was admitted: the invite is used.
    pub(super) fn used(&mut self, number: InviteNumber) {
        if let Some(invite) = self.open.take_if(|invite| invite.number == number.0) {
            self.used.push_back(invite.token.id);
            if self.used.len() > REMEMBERED {
                self.used.pop_front();
            }
        }
    }

    fn is(&self, number: InviteNumber) -> bool {
        self.open.as_ref().is_some_and(|invite| invite.number == number.0)
    }

    fn current(&mut self, now: Instant) -> Result<&mut OpenInvite, Refusal> {
        if self.closes_at(now).is_none() {
            self.open = None;
        }
        self.open.as_mut().filter(|invite| invite.tries_left > 0).ok_or(Refusal::Closed)
    }

    fn close_when_spent(&mut self) {
        self.open.take_if(|invite| invite.tries_left == 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pin::{ClusterId, KeyPin};

    fn opened(now: Instant) -> (InviteWindow, InviteToken) {
        let token =
            InviteToken::generate(ClusterId::from_bytes([1; 32]), KeyPin::from_bytes([2; 32]), &[], 0);
        let mut window = InviteWindow::default();
        window.open(InviteCode::generate(), token.clone(), INVITE_LIFE, now);
        (window, token)
    }

    #[test]
    fn an_invite_is_for_one_use() {
        let now = Instant::now();
        let (mut window, token) = opened(now);
        let (number, _) = window.try_token(&token.id, now).unwrap();
        window.still_open(number, now).unwrap();
        window.used(number);
        assert_eq!(window.closes_at(now), None);
        assert_eq!(window.try_code(now).unwrap_err(), Refusal::Closed);
        assert_eq!(window.try_token(&token.id, now).unwrap_err(), Refusal::Used);
        let (mut window, other) = (window, opened(now).1);
        window.open(InviteCode::generate(), other, INVITE_LIFE, now);
        assert_eq!(
            window.try_token(&token.id, now).unwrap_err(),
            Refusal::Used,
            "also while another is open"
        );
    }

    #[test]
    fn an_invite_runs_out() {
        let now = Instant::now();
        let (mut window, _) = opened(now);
        let (number, _) = window.try_code(now).unwrap();
        let later = now + INVITE_LIFE;
        assert_eq!(window.still_open(number, later), Err(Refusal::Closed));
        assert_eq!(window.try_code(later).unwrap_err(), Refusal::Closed);
    }

    #[test]
    fn five_wrong_tries_close_it_even_when_broken_off() {
        let now = Instant::now();
        let (mut window, token) = opened(now);
        let wrong = [9; 8];
        for _ in 0..2 {
            assert_eq!(window.try_token(&wrong, now).unwrap_err(), Refusal::WrongSecret);
        }
        for _ in 0..2 {
            window.try_code(now).unwrap(); // broken off: nobody says that it failed
        }
        let (number, _) = window.try_code(now).unwrap();
        assert!(window.closes_at(now).is_some(), "the fifth try is still under way");
        assert_eq!(window.try_code(now).unwrap_err(), Refusal::Closed);
        window.failed(number);
        assert_eq!(window.closes_at(now), None);
        assert_eq!(window.try_token(&token.id, now).unwrap_err(), Refusal::Closed);
    }

    #[test]
    fn a_proven_joiner_that_cannot_be_admitted_costs_no_try() {
        let now = Instant::now();
        let (mut window, _) = opened(now);
        for _ in 0..20 {
            let (number, _) = window.try_code(now).unwrap();
            window.give_back(number);
        }
        assert!(window.closes_at(now).is_some());
    }

    #[test]
    fn a_conversation_ends_with_the_invite_it_began_with() {
        let now = Instant::now();
        let (mut window, token) = opened(now);
        let (number, _) = window.try_code(now).unwrap();
        window.open(InviteCode::generate(), token, INVITE_LIFE, now);
        assert_eq!(window.still_open(number, now), Err(Refusal::Closed));
        window.used(number);
        assert!(window.closes_at(now).is_some());
    }
}
