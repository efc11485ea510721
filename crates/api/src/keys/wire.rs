//! `Keys` messages to the coordinator's types and back.

use super::{KeyEntry, KeyHash, KeyLimits, KeyRole};
use mlxnode_coordinator::keys::KeyWish;
use mlxnode_proto::v1;
use tonic::Status;

/// A key without what its text can be told by.
pub fn key_to_wire(key: &KeyEntry) -> v1::ApiKey {
    let role = match key.role {
        KeyRole::User => v1::KeyRole::User,
        KeyRole::Trainer => v1::KeyRole::Trainer,
        KeyRole::Admin => v1::KeyRole::Admin,
        KeyRole::Metrics => v1::KeyRole::Metrics,
    };
    v1::ApiKey {
        name: key.name.clone(),
        role: role.into(),
        models: key.models.clone(),
        requests_per_minute: key.limits.requests_per_minute.unwrap_or_default(),
        tokens_per_minute: key.limits.tokens_per_minute.unwrap_or_default(),
        created_unix: i64::try_from(key.created_unix).unwrap_or(i64::MAX),
        id: key.hash.id(),
    }
}

/// A key as the coordinator's node tells it, with its hash.
///
/// # Errors
/// When its role is of a later release: such a key must not be taken for one that may less or more.
pub fn key_from_wire(key: v1::ApiKey, hash: KeyHash) -> Result<KeyEntry, Status> {
    let created_unix = u64::try_from(key.created_unix).unwrap_or_default();
    let KeyWish { name, role, models, limits } = wish(key)?;
    Ok(KeyEntry { name, hash, role, models, limits, created_unix })
}

/// What a client wishes for.
pub(super) fn wish(key: v1::ApiKey) -> Result<KeyWish, Status> {
    let role = match v1::KeyRole::try_from(key.role) {
        Ok(v1::KeyRole::User | v1::KeyRole::Unspecified) => KeyRole::User,
        Ok(v1::KeyRole::Trainer) => KeyRole::Trainer,
        Ok(v1::KeyRole::Admin) => KeyRole::Admin,
        Ok(v1::KeyRole::Metrics) => KeyRole::Metrics,
        Err(_) => {
            return Err(Status::invalid_argument(format!(
                "role is {}, which this release does not know",
                key.role
            )));
        }
    };
    let some = |value: u32| Some(value).filter(|value| *value > 0);
    let limits = KeyLimits {
        requests_per_minute: some(key.requests_per_minute),
        tokens_per_minute: some(key.tokens_per_minute),
    };
    Ok(KeyWish { name: key.name, role, models: key.models, limits })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_the_way_to_another_node_and_an_unknown_role_is_refused() {
        let hash = KeyHash::from_bytes([7; 32]);
        let key = KeyEntry {
            name: "ann".into(),
            hash,
            role: KeyRole::Metrics,
            models: vec!["small".into()],
            limits: KeyLimits { requests_per_minute: Some(3), tokens_per_minute: None },
            created_unix: 99,
        };
        assert_eq!(key_from_wire(key_to_wire(&key), hash).unwrap(), key);
        let later = v1::ApiKey { role: 17, ..key_to_wire(&key) };
        assert!(key_from_wire(later, hash).is_err());
    }
}
