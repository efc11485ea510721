//! The cluster's API keys: the service `Keys`, and the keys as every node knows them.

mod service;
mod wire;

pub use mlxnode_coordinator::keys::{KeyEntry, KeyHash, KeyLimits, KeyRole, KeyText, find};
pub use service::KeysService;
pub use wire::{key_from_wire, key_to_wire};

/// What a node knows about the keys now. A key that was revoked while the coordinator cannot be reached stays valid here until it can.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeysView {
    /// All of them, by name.
    pub keys: Vec<KeyEntry>,
    /// False until the coordinator has told them for the first time: until then nobody can be let in, with or without a key.
    pub is_known: bool,
}
