//! Names made of keys: SHA-256 of a public key, as DER SubjectPublicKeyInfo.
//!
//! Every process here is known by its key and nothing else. [`KeyPin`] is the hash of any key, [`NodeId`] that of a node's
//! key, [`ClusterId`] that of the key that signs a cluster's roster. All print as 64 hex digits.

use data_encoding::HEXLOWER;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// What is wrong with a text that should be an id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 32 bytes.
    #[error("an id has 32 bytes, this one has {0}")]
    Length(usize),
    /// Not 64 hex digits.
    #[error("{0:?} is not an id of 64 hex digits")]
    Digits(String),
}

macro_rules! key_hash {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 32]);

        impl $name {
            /// From the 32 bytes of the hash.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The hash of a public key, given as DER SubjectPublicKeyInfo.
            pub fn of_public_key(spki: &[u8]) -> Self {
                let digest = ring::digest::digest(&ring::digest::SHA256, spki);
                let mut bytes = [0; 32];
                bytes.copy_from_slice(digest.as_ref());
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first 8 hex digits: enough for a person to tell the nodes of a cluster apart.
            pub fn short(&self) -> String {
                HEXLOWER.encode(&self.0[..4])
            }

            /// Do the hex digits of the id begin with `prefix`? Upper and lower case are the same.
            pub fn starts_with(&self, prefix: &str) -> bool {
                !prefix.is_empty() && self.to_string().starts_with(&prefix.to_ascii_lowercase())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(&HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let bytes = HEXLOWER
                    .decode(text.trim().to_ascii_lowercase().as_bytes())
                    .map_err(|_| IdError::Digits(text.chars().take(80).collect()))?;
                Self::try_from(bytes.as_slice())
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = IdError;
            fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
                bytes.try_into().map(Self).map_err(|_| IdError::Length(bytes.len()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

key_hash!(
    /// The hash of a public key: of a node, a worker or a client. Links are pinned to it.
    KeyPin
);
key_hash!(
    /// The hash of a node's public key: who the node is, whatever it is called and wherever it listens.
    NodeId
);
key_hash!(
    /// The hash of the public key that signs the cluster's roster.
    ClusterId
);

impl NodeId {
    /// The pin of links to this node.
    pub const fn pin(&self) -> KeyPin {
        KeyPin(self.0)
    }
}

impl KeyPin {
    /// The id of the node that owns the key, if it is a node's.
    pub const fn node_id(&self) -> NodeId {
        NodeId(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_prints_and_parses_and_has_prefixes() {
        let id = NodeId::of_public_key(b"a key");
        let text = id.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.to_uppercase().parse::<NodeId>().unwrap(), id);
        assert!(text.starts_with(&id.short()) && id.short().len() == 8);
        assert!(id.starts_with(&text[..5].to_uppercase()) && !id.starts_with("") && !id.starts_with("xyz"));
        assert_eq!(serde_json::from_str::<NodeId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
    }

    #[test]
    fn texts_that_are_no_id_are_refused() {
        assert_eq!("abcd".parse::<NodeId>(), Err(IdError::Length(2)));
        assert!(matches!("zz".parse::<NodeId>(), Err(IdError::Digits(_))));
        assert_eq!(KeyPin::try_from([0u8; 31].as_slice()), Err(IdError::Length(31)));
    }
}
