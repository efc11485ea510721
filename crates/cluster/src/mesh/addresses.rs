//! Where a peer may be: what it says, what the roster says, what discovery hints at, best first.
//!
//! A hint of discovery names no node. Whoever dials it learns from the handshake whose it is, and notes that here, so that
//! not every link task has to knock at every hint.

use crate::pin::{KeyPin, NodeId};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whose an address is may change: a process ends, another takes the port.
const BELIEVED: Duration = Duration::from_secs(30);
/// Most addresses of which it is noted whose they are. Beyond that all is forgotten and learned anew.
const MAX_OWNERS: usize = 256;
/// Most addresses that are dialled for one peer in one go.
const MAX_TARGETS: usize = 32;

#[derive(Default)]
pub(super) struct AddressBook {
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    /// Where a link to the peer stood last.
    proven: HashMap<NodeId, String>,
    /// Where the peer says that it listens.
    claimed: HashMap<NodeId, Vec<String>>,
    /// Who answered at an address.
    owners: HashMap<String, (KeyPin, Instant)>,
}

impl AddressBook {
    /// A link to the peer stands there.
    pub(super) fn proven(&self, peer: NodeId, address: &str) {
        self.notes().proven.insert(peer, address.to_owned());
    }

    /// The peer says that it listens there.
    pub(super) fn claimed(&self, peer: NodeId, addresses: &[String]) {
        let mut notes = self.notes();
        if notes.claimed.get(&peer).is_none_or(|known| known != addresses) {
            notes.claimed.insert(peer, addresses.to_vec());
        }
    }

    /// This key answered there.
    pub(super) fn answered(&self, address: &str, pin: KeyPin) {
        let mut notes = self.notes();
        if notes.owners.len() >= MAX_OWNERS {
            notes.owners.clear();
        }
        notes.owners.insert(address.to_owned(), (pin, Instant::now()));
    }

    /// The peer is no member any more.
    pub(super) fn forget(&self, peer: &NodeId) {
        let mut notes = self.notes();
        notes.proven.remove(peer);
        notes.claimed.remove(peer);
    }

    /// Where to dial the peer, best first. `hints` are discovery's: those of other peers are left out.
    pub(super) fn targets(&self, peer: &NodeId, roster: &[String], hints: &[String]) -> Vec<String> {
        let notes = self.notes();
        let owner = |address: &String| {
            notes
                .owners
                .get(address)
                .filter(|(_, since)| since.elapsed() < BELIEVED)
                .map(|(pin, _)| pin.node_id())
        };
        let (known, unknown): (Vec<&String>, Vec<&String>) = hints
            .iter()
            .filter(|hint| owner(hint).is_none_or(|id| id == *peer))
            .partition(|hint| owner(hint).is_some());
        let mut targets: Vec<String> = Vec::new();
        let proven = notes.proven.get(peer).into_iter();
        let claimed = notes.claimed.get(peer).into_iter().flatten();
        for address in proven.chain(known).chain(claimed).chain(roster).chain(unknown) {
            if targets.len() < MAX_TARGETS && !targets.contains(address) {
                targets.push(address.clone());
            }
        }
        targets
    }

    /// Where the last link to the peer stood.
    pub(super) fn last_proven(&self, peer: &NodeId) -> Option<String> {
        self.notes().proven.get(peer).cloned()
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_address_comes_first_and_those_of_others_not_at_all() {
        let [peer, other] = [1, 2].map(|byte| NodeId::from_bytes([byte; 32]));
        let text = |addresses: &[&str]| addresses.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let book = AddressBook::default();
        let hints = text(&["hint-a:1", "hint-b:1", "hint-c:1"]);
        let roster = text(&["roster:1"]);
        assert_eq!(
            book.targets(&peer, &roster, &hints),
            text(&["roster:1", "hint-a:1", "hint-b:1", "hint-c:1"])
        );
        book.answered("hint-a:1", other.pin());
        book.answered("hint-b:1", peer.pin());
        book.claimed(peer, &text(&["claim:1", "roster:1"]));
        book.proven(peer, "last:1");
        let expected = text(&["last:1", "hint-b:1", "claim:1", "roster:1", "hint-c:1"]);
        assert_eq!(book.targets(&peer, &roster, &hints), expected);
        book.forget(&peer);
        assert_eq!(book.targets(&peer, &roster, &[]), roster);
        let many: Vec<String> = (0..100).map(|n| format!("h{n}:1")).collect();
        assert_eq!(book.targets(&peer, &[], &many).len(), MAX_TARGETS);
    }
}
