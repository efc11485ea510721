//! Which keys may talk to a listener, and as what.
//!
//! A listener asks its [`Admission`] twice: in the TLS handshake, before a stranger gets one byte, and then twice a second
//! for every open connection, so that a key which was withdrawn loses its connections within a second.

use crate::pin::KeyPin;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

/// What an admitted key stands for. Services decide by it what the caller may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The listener's own key: the command line of whoever can read this node's data directory.
    Own,
    /// A node in the roster.
    Node,
    /// A client of the public API.
    Client,
    /// The node that started this worker.
    Parent,
    /// The node whose scheduler drives this worker.
    Driver,
    /// The worker of the stage before this one.
    Neighbour,
}

/// Who spoke: attached to every request as an extension (`request.extensions().get::<PeerKey>()`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerKey {
    /// The hash of its public key.
    pub pin: KeyPin,
    /// What it was admitted as when it connected. When the answer changes the connection ends.
    pub role: Role,
}

/// Decides who may connect.
pub trait Admission: Send + Sync + 'static {
    /// The role of the key, or `None` to keep it out. Asked often: must be quick and must not block.
    fn admit(&self, pin: &KeyPin) -> Option<Role>;
}

/// An [`Admission`] by list, changed as keys come and go.
#[derive(Debug, Default)]
pub struct AccessList {
    roles: RwLock<HashMap<KeyPin, Role>>,
}

impl AccessList {
    /// A list with these keys.
    pub fn new(keys: impl IntoIterator<Item = (KeyPin, Role)>) -> Self {
        Self { roles: RwLock::new(keys.into_iter().collect()) }
    }

    /// Lets a key in, or changes its role.
    pub fn allow(&self, pin: KeyPin, role: Role) {
        self.roles.write().unwrap_or_else(PoisonError::into_inner).insert(pin, role);
    }

    /// Keeps a key out from now on; its connections end within a second.
    pub fn withdraw(&self, pin: &KeyPin) {
        self.roles.write().unwrap_or_else(PoisonError::into_inner).remove(pin);
    }

    /// Makes these keys the ones that have `role`; keys with other roles stay.
    pub fn replace(&self, role: Role, keys: impl IntoIterator<Item = KeyPin>) {
        let mut roles = self.roles.write().unwrap_or_else(PoisonError::into_inner);
        roles.retain(|_, held| *held != role);
        for pin in keys {
            roles.entry(pin).or_insert(role);
        }
    }
}

impl Admission for AccessList {
    fn admit(&self, pin: &KeyPin) -> Option<Role> {
        self.roles.read().unwrap_or_else(PoisonError::into_inner).get(pin).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_says_who_may_come_in() {
        let [own, first, second] = [1, 2, 3].map(|byte| KeyPin::from_bytes([byte; 32]));
        let list = AccessList::new([(own, Role::Own)]);
        list.replace(Role::Node, [own, first, second]);
        assert_eq!(list.admit(&own), Some(Role::Own), "the own key keeps its role");
        assert_eq!(list.admit(&first), Some(Role::Node));
        list.replace(Role::Node, [first]);
        assert_eq!(list.admit(&second), None);
        list.allow(second, Role::Client);
        list.withdraw(&first);
        assert_eq!((list.admit(&first), list.admit(&second)), (None, Some(Role::Client)));
    }
}
