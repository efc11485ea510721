//! `KeyRing` messages to the keys that a node knows and back.

use mlxnode_api::keys::{KeyEntry, KeyHash, key_from_wire, key_to_wire};
use mlxnode_proto::internal::v1::{HashedKey, KeyList};
use tonic::Status;

pub(super) fn list_to_proto(keys: &[KeyEntry]) -> KeyList {
    let hashed =
        |key: &KeyEntry| HashedKey { key: Some(key_to_wire(key)), hash: key.hash.as_bytes().to_vec().into() };
    KeyList { keys: keys.iter().map(hashed).collect() }
}

/// A key that cannot be read is left out: it is refused, and the others count.
pub(super) fn list(list: KeyList) -> Vec<KeyEntry> {
    let read = |hashed: HashedKey| {
        let name = hashed.key.as_ref().map(|key| key.name.clone()).unwrap_or_default();
        key(hashed)
            .inspect_err(|status| tracing::warn!(key = name, reason = status.message(), "a key is refused"))
            .ok()
    };
    list.keys.into_iter().filter_map(read).collect()
}

fn key(hashed: HashedKey) -> Result<KeyEntry, Status> {
    let hash: [u8; 32] =
        hashed.hash.as_ref().try_into().map_err(|_| Status::internal("the hash of a key has 32 bytes"))?;
    let key = hashed.key.ok_or_else(|| Status::internal("a hash without its key"))?;
    key_from_wire(key, KeyHash::from_bytes(hash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_api::keys::{KeyLimits, KeyRole};

    #[test]
    fn a_broken_key_is_refused_and_the_others_count() {
        let entry = KeyEntry {
            name: "ann".into(),
            hash: KeyHash::from_bytes([1; 32]),
            role: KeyRole::User,
            models: Vec::new(),
            limits: KeyLimits::default(),
            created_unix: 5,
        };
        let mut told = list_to_proto(std::slice::from_ref(&entry));
        let mut short = told.keys[0].clone();
        short.hash = vec![1, 2].into();
        told.keys.push(short);
        told.keys.push(HashedKey { key: None, hash: vec![2; 32].into() });
        assert_eq!(list(told), [entry]);
    }
}
