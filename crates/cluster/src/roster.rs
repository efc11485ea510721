//! Who belongs to the cluster: a list of nodes, signed with the cluster's own key.
//!
//! The key was made with the cluster and is held by the coordinator. A node takes a roster from anybody who has one, because
//! the signature says whether it is genuine and the version says whether it is newer. Names are labels: the key is the
//! identity.

use crate::facts::{tame_addresses, tame_name};
use crate::key_file::{self, KeyError};
use crate::pin::{ClusterId, NodeId};
use crate::wire;
use prost::Message;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

/// Most nodes in a cluster. Heartbeats go between all pairs, so this is also what keeps them few.
pub const MAX_NODES: usize = 64;
/// Most removed keys that are remembered; the oldest by id are forgotten first, and unlisted keys are strangers anyway.
const MAX_REMOVED: usize = 1024;
/// Every P-256 public key in DER begins with these bytes; the 65 bytes of the point follow.
const P256_HEADER: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// What is signed begins with this, so that no other signature of the key can pass for one of a roster.
const SIGNED_AS: &[u8] = b"mlxnode roster v1\0";
const KEY_FILE: &str = "cluster.key";

/// One member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterEntry {
    /// The hash of its key.
    pub node_id: NodeId,
    /// What it is called; unique in the roster.
    pub name: String,
    /// Where it was last known to listen (HOST:PORT): hints for the first dial.
    pub addresses: Vec<String>,
}

/// The members of a cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct Roster {
    pub(crate) cluster_key: Vec<u8>,
    pub(crate) cluster_name: String,
    pub(crate) version: u64,
    pub(crate) nodes: Vec<RosterEntry>,
    pub(crate) removed: BTreeSet<NodeId>,
    pub(crate) coordinator: NodeId,
}

/// What is wrong with a roster or a change to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RosterError {
    /// Not signed by the cluster's key.
    #[error("the roster's signature is not the cluster's")]
    Forged,
    /// Of another cluster.
    #[error("the roster is of the cluster {}, this node belongs to {}", found.short(), expected.short())]
    OtherCluster {
        /// Whose roster it is.
        found: ClusterId,
        /// Whose it should be.
        expected: ClusterId,
    },
    /// Not decodable, or against its own rules.
    #[error("the roster is damaged: {0}")]
    Malformed(&'static str),
    /// No room.
    #[error("a cluster has at most {MAX_NODES} nodes: forget one first, see `mlxnode forget`")]
    Full,
    /// The node is in already.
    #[error("the node {0} is a member already")]
    Member(NodeId),
    /// No member of that name or id.
    #[error("no node is called {0:?} and no node id begins so: see `mlxnode status`")]
    Unknown(String),
    /// Several ids begin so.
    #[error("{0:?} fits several nodes: give more digits of the id, see `mlxnode status`")]
    Ambiguous(String),
    /// The coordinator cannot be taken out.
    #[error("the node {0} coordinates the cluster and cannot be removed")]
    Coordinator(NodeId),
    /// The key library failed.
    #[error("cannot sign the roster")]
    Signing,
}

impl Roster {
    /// The roster of a new cluster: its founder, which also coordinates.
    pub fn found(key: &ClusterKey, cluster_name: &str, mut founder: RosterEntry) -> Self {
        founder.name = tame_name(&founder.name);
        founder.addresses = tame_addresses(founder.addresses);
        Self {
            cluster_key: key.public_key(),
            cluster_name: tame_name(cluster_name),
            version: 1,
            coordinator: founder.node_id,
            nodes: vec![founder],
            removed: BTreeSet::new(),
        }
    }

    /// The hash of the cluster's key.
    pub fn cluster(&self) -> ClusterId {
        ClusterId::of_public_key(&self.cluster_key)
    }

    /// What people call the cluster.
    pub fn cluster_name(&self) -> &str {
        &self.cluster_name
    }

    /// Raised by every change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The members, in the order in which they joined.
    pub fn nodes(&self) -> &[RosterEntry] {
        &self.nodes
    }

    /// The node that decides.
    pub fn coordinator(&self) -> NodeId {
        self.coordinator
    }

    /// The member with this id.
    pub fn get(&self, id: &NodeId) -> Option<&RosterEntry> {
        self.nodes.iter().find(|entry| entry.node_id == *id)
    }

    /// Was the key a member once, and was taken out?
    pub fn was_removed(&self, id: &NodeId) -> bool {
        self.removed.contains(id)
    }

    /// The member that a person means: by name, or by the beginning of its id.
    ///
    /// # Errors
    /// [`RosterError::Unknown`], [`RosterError::Ambiguous`].
    pub fn find(&self, reference: &str) -> Result<&RosterEntry, RosterError> {
        let reference = reference.trim();
        if let Some(named) = self.nodes.iter().find(|entry| entry.name == reference) {
            return Ok(named);
        }
        let mut fitting = self.nodes.iter().filter(|entry| entry.node_id.starts_with(reference));
        match (fitting.next(), fitting.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => Err(RosterError::Unknown(reference.to_owned())),
            _ => Err(RosterError::Ambiguous(reference.to_owned())),
        }
    }

    /// Takes a node in, with a suffix to its name when that is taken ("studio-2"), and also when it was removed before:
    /// that takes an invite, so somebody wants it back. Answers with the entry as it is now.
    ///
    /// # Errors
    /// [`RosterError::Member`], [`RosterError::Full`].
    pub fn admit(
        &mut self,
        node_id: NodeId,
        name: &str,
        addresses: Vec<String>,
    ) -> Result<RosterEntry, RosterError> {
        if self.get(&node_id).is_some() {
            return Err(RosterError::Member(node_id));
        }
        if self.nodes.len() >= MAX_NODES {
            return Err(RosterError::Full);
        }
        let name = self.free_name(name);
        let entry = RosterEntry { node_id, name, addresses: tame_addresses(addresses) };
        self.removed.remove(&node_id);
        self.nodes.push(entry.clone());
        self.version += 1;
        Ok(entry)
    }

    /// Takes a node out, for good unless it is invited again.
    ///
    /// # Errors
    /// [`RosterError::Unknown`], [`RosterError::Coordinator`].
    pub fn remove(&mut self, id: &NodeId) -> Result<RosterEntry, RosterError> {
        let Some(place) = self.nodes.iter().position(|entry| entry.node_id == *id) else {
            return Err(RosterError::Unknown(id.short()));
        };
        if *id == self.coordinator {
            return Err(RosterError::Coordinator(*id));
        }
        self.removed.insert(*id);
        while self.removed.len() > MAX_REMOVED {
            self.removed.pop_first();
        }
        self.version += 1;
        Ok(self.nodes.remove(place))
    }

    /// Notes where a member listens now. True when that is news; only then the roster has a new version.
    pub fn set_addresses(&mut self, id: &NodeId, addresses: Vec<String>) -> bool {
        let addresses = tame_addresses(addresses);
        match self.nodes.iter_mut().find(|entry| entry.node_id == *id) {
            Some(entry) if entry.addresses != addresses => {
                entry.addresses = addresses;
                self.version += 1;
                true
            }
            _ => false,
        }
    }

    fn free_name(&self, wish: &str) -> String {
        let wish = tame_name(wish);
        let taken = |name: &str| self.nodes.iter().any(|entry| entry.name == name);
        if !taken(&wish) {
            return wish;
        }
        // There are at most MAX_NODES names, so one of these is free.
        (2..).map(|number| format!("{wish}-{number}")).find(|name| !taken(name)).unwrap_or(wish)
    }

    /// The rules that every roster keeps, checked on those that come from elsewhere.
    fn check(&self) -> Result<(), RosterError> {
        let ids: BTreeSet<_> = self.nodes.iter().map(|entry| entry.node_id).collect();
        let names: BTreeSet<_> = self.nodes.iter().map(|entry| entry.name.as_str()).collect();
        let broken = if self.nodes.len() > MAX_NODES || self.removed.len() > MAX_REMOVED {
            "it has too many entries"
        } else if ids.len() != self.nodes.len() || names.len() != self.nodes.len() {
            "a node is in it twice"
        } else if !ids.contains(&self.coordinator) {
            "its coordinator is no member"
        } else if !ids.is_disjoint(&self.removed) {
            "a removed node is a member"
        } else {
            return Ok(());
        };
        Err(RosterError::Malformed(broken))
    }
}

impl fmt::Debug for Roster {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Roster")
            .field("cluster", &self.cluster())
            .field("version", &self.version)
            .field("nodes", &self.nodes)
            .field("removed", &self.removed.len())
            .field("coordinator", &self.coordinator)
            .finish()
    }
}

/// A roster whose signature was found good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRoster {
    roster: Roster,
    bytes: Vec<u8>,
    signature: Vec<u8>,
}

impl SignedRoster {
    /// Checks a roster that came from elsewhere. `expected` is the cluster that this node belongs to; without one (a node
    /// that joins) any cluster will do, and whoever handed it over must be trusted for that.
    ///
    /// # Errors
    /// [`RosterError::Forged`], [`RosterError::OtherCluster`], [`RosterError::Malformed`].
    pub fn verify(
        bytes: Vec<u8>,
        signature: Vec<u8>,
        expected: Option<ClusterId>,
    ) -> Result<Self, RosterError> {
        let message = mlxnode_proto::internal::v1::Roster::decode(bytes.as_slice())
            .map_err(|_| RosterError::Malformed("it cannot be decoded"))?;
        let claimed = message.cluster_id.clone();
        let roster = wire::roster_from_wire(message)?;
        let found = roster.cluster();
        if claimed.as_ref() != found.as_bytes() {
            return Err(RosterError::Malformed("its cluster id is not that of its key"));
        }
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(RosterError::OtherCluster { found, expected });
        }
        let point = roster.cluster_key.strip_prefix(&P256_HEADER).filter(|point| point.len() == 65);
        let point = point.ok_or(RosterError::Malformed("its key is not a P-256 key"))?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
            .verify(&signed_message(&bytes), &signature)
            .map_err(|_| RosterError::Forged)?;
        roster.check()?;
        Ok(Self { roster, bytes, signature })
    }

    /// The roster.
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// The signed bytes and the signature over them.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        (&self.bytes, &self.signature)
    }
}

fn signed_message(bytes: &[u8]) -> Vec<u8> {
    [SIGNED_AS, bytes].concat()
}

/// The key that signs rosters. Made with the cluster, kept by its coordinator.
pub struct ClusterKey {
    pair: EcdsaKeyPair,
}

impl ClusterKey {
    /// A key in memory, for a test.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub fn generate() -> Result<Self, KeyError> {
        Self::from_der(&key_file::generate()?)
    }

    /// The key in `directory` (`cluster.key`, mode 0600), made now if there is none.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn load_or_create(directory: &Path) -> Result<Self, KeyError> {
        Self::from_der(&key_file::load_or_create(&directory.join(KEY_FILE))?)
    }

    /// The key in `directory`, if this node has it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn load(directory: &Path) -> Result<Option<Self>, KeyError> {
        key_file::load(&directory.join(KEY_FILE))?.map(|key| Self::from_der(&key)).transpose()
    }

    fn from_der(key: &[u8]) -> Result<Self, KeyError> {
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key, &SystemRandom::new())
            .map(|pair| Self { pair })
            .map_err(|error| KeyError::Crypto(error.to_string()))
    }

    /// The public key, DER SubjectPublicKeyInfo.
    pub fn public_key(&self) -> Vec<u8> {
        [P256_HEADER.as_slice(), self.pair.public_key().as_ref()].concat()
    }

    /// The id of the cluster that this is the key of.
    pub fn cluster(&self) -> ClusterId {
        ClusterId::of_public_key(&self.public_key())
    }

    /// Signs a roster.
    ///
    /// # Errors
    /// [`RosterError::OtherCluster`] when the roster names another key, [`RosterError::Signing`].
    pub fn sign(&self, roster: Roster) -> Result<SignedRoster, RosterError> {
        if roster.cluster() != self.cluster() {
            return Err(RosterError::OtherCluster { found: roster.cluster(), expected: self.cluster() });
        }
        roster.check()?;
        let bytes = wire::roster_to_wire(&roster).encode_to_vec();
        let signature = self
            .pair
            .sign(&SystemRandom::new(), &signed_message(&bytes))
            .map_err(|_| RosterError::Signing)?
            .as_ref()
            .to_vec();
        Ok(SignedRoster { roster, bytes, signature })
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ClusterKey({:?})", self.cluster())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> NodeId {
        NodeId::from_bytes([byte; 32])
    }

    fn entry(byte: u8, name: &str) -> RosterEntry {
        RosterEntry { node_id: id(byte), name: name.into(), addresses: vec![format!("10.0.0.{byte}:7070")] }
    }

    fn parts(signed: &SignedRoster) -> (Vec<u8>, Vec<u8>) {
        (signed.bytes.clone(), signed.signature.clone())
    }

    #[test]
    fn members_come_and_go_and_names_stay_unique() {
        let key = ClusterKey::generate().unwrap();
        let mut roster = Roster::found(&key, "desk", entry(1, "studio"));
        assert_eq!(roster.admit(id(2), "studio", vec![]).unwrap().name, "studio-2");
        assert_eq!(roster.admit(id(3), "studio", vec![]).unwrap().name, "studio-3");
        assert_eq!(roster.admit(id(2), "x", vec![]), Err(RosterError::Member(id(2))));
        assert_eq!(roster.version(), 3);
        assert_eq!(roster.remove(&id(2)).unwrap().name, "studio-2");
        assert!(roster.was_removed(&id(2)));
        assert_eq!(roster.remove(&id(1)), Err(RosterError::Coordinator(id(1))));
        assert!(roster.admit(id(2), "mini", vec![]).is_ok() && !roster.was_removed(&id(2)));
        assert_eq!(roster.find("mini").unwrap().node_id, id(2));
        assert_eq!(roster.find("0303").unwrap().node_id, id(3));
        assert_eq!(roster.find("0"), Err(RosterError::Ambiguous("0".into())));
        assert_eq!(roster.find("ff"), Err(RosterError::Unknown("ff".into())));
        for byte in 4..=(MAX_NODES as u8) {
            roster.admit(id(byte), "node", vec![]).unwrap();
        }
        assert_eq!(roster.admit(id(200), "node", vec![]), Err(RosterError::Full));
    }

    #[test]
    fn a_signed_roster_survives_the_wire() {
        let key = ClusterKey::generate().unwrap();
        let mut roster = Roster::found(&key, "desk", entry(1, "studio"));
        roster.admit(id(2), "mini", vec!["10.0.0.2:7070".into()]).unwrap();
        roster.remove(&id(2)).unwrap();
        let signed = key.sign(roster).unwrap();
        let (bytes, signature) = parts(&signed);
        assert_eq!(SignedRoster::verify(bytes, signature, Some(key.cluster())).unwrap(), signed);
    }

    #[test]
    fn forged_rosters_are_refused() {
        let (key, other) = (ClusterKey::generate().unwrap(), ClusterKey::generate().unwrap());
        let roster = Roster::found(&key, "desk", entry(1, "studio"));
        let (bytes, signature) = parts(&key.sign(roster.clone()).unwrap());

        // Every flipped byte of the signature or the content is noticed.
        for place in 0..bytes.len() {
            let mut bent = bytes.clone();
            bent[place] ^= 1;
            assert!(SignedRoster::verify(bent, signature.clone(), None).is_err(), "byte {place}");
        }
        for place in 0..signature.len() {
            let mut bent = signature.clone();
            bent[place] ^= 1;
            assert!(SignedRoster::verify(bytes.clone(), bent, None).is_err());
        }
        // Signed by a key that is not the one it names.
        let forged = other.pair.sign(&SystemRandom::new(), &signed_message(&bytes)).unwrap();
        let forged = SignedRoster::verify(bytes.clone(), forged.as_ref().to_vec(), None);
        assert_eq!(forged, Err(RosterError::Forged));
        // Genuine, but of another cluster.
        let found = SignedRoster::verify(bytes, signature, Some(other.cluster()));
        assert_eq!(found, Err(RosterError::OtherCluster { found: key.cluster(), expected: other.cluster() }));
        assert!(matches!(other.sign(roster), Err(RosterError::OtherCluster { .. })));
    }

    #[test]
    fn a_roster_against_its_own_rules_is_refused_even_when_signed() {
        let key = ClusterKey::generate().unwrap();
        let good = Roster::found(&key, "desk", entry(1, "studio"));
        let twice = Roster { nodes: vec![entry(1, "studio"), entry(1, "again")], ..good.clone() };
        let headless = Roster { coordinator: id(9), ..good.clone() };
        let revenant = Roster { removed: [id(1)].into(), ..good };
        for broken in [twice, headless, revenant] {
            assert!(matches!(key.sign(broken), Err(RosterError::Malformed(_))));
        }
    }

    #[test]
    fn the_cluster_key_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        assert!(ClusterKey::load(folder.path()).unwrap().is_none());
        let key = ClusterKey::load_or_create(folder.path()).unwrap();
        assert_eq!(ClusterKey::load(folder.path()).unwrap().unwrap().cluster(), key.cluster());
    }
}
