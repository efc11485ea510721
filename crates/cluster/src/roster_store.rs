//! The newest roster that this node knows: checked, kept in a file, and watched by whoever depends on it.
//!
//! A roster is taken from anybody, because its signature and version say what it is worth. It is on disk before anyone
//! here acts on it, so a restart never goes back to an older one that still lists a forgotten node.

use crate::admission::{AccessList, Admission, Role};
use crate::pin::{ClusterId, KeyPin};
use crate::roster::{RosterError, SignedRoster};
use crate::wire;
use mlxnode_proto::internal::v1 as proto;
use prost::Message;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

const FILE: &str = "roster.pb";
/// 64 nodes with 16 addresses each stay far below.
const MAX_FILE: u64 = 1024 * 1024;

/// Why a roster was not loaded or not taken.
#[derive(Debug, thiserror::Error)]
pub enum RosterStoreError {
    /// The file system said no.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file holds no genuine roster.
    #[error("{} holds no genuine roster: delete it and join again with a new invite", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: RosterError,
    },
    /// The offered roster is not genuine, or of another cluster.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// This node is in a cluster already.
    #[error("this node belongs to the cluster {} already: run `mlxnode leave` first", .0.short())]
    AlreadyMember(ClusterId),
}

/// Keeps the newest roster.
#[derive(Debug)]
pub struct RosterStore {
    path: PathBuf,
    /// Held while a roster is checked, written and published, so that versions only rise.
    writing: Mutex<()>,
    current: watch::Sender<Option<Arc<SignedRoster>>>,
}

impl RosterStore {
    /// Loads the roster kept in `directory` (`roster.pb`), if there is one.
    ///
    /// # Errors
    /// [`RosterStoreError::File`], [`RosterStoreError::Damaged`].
    pub fn open(directory: &Path) -> Result<Self, RosterStoreError> {
        let path = directory.join(FILE);
        let damaged = |source| RosterStoreError::Damaged { path: path.clone(), source };
        let failed = |source| RosterStoreError::File { action: "read", path: path.clone(), source };
        let kept = match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_FILE => {
                return Err(damaged(RosterError::Malformed("it is too long")));
            }
            Ok(_) => Some(fs::read(&path).map_err(failed)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let current = match kept {
            None => None,
            Some(bytes) => {
                let message = proto::SignedRoster::decode(bytes.as_slice())
                    .map_err(|_| damaged(RosterError::Malformed("it cannot be decoded")))?;
                let signed = SignedRoster::verify(message.roster.to_vec(), message.signature.to_vec(), None);
                Some(Arc::new(signed.map_err(damaged)?))
            }
        };
        Ok(Self { path, writing: Mutex::default(), current: watch::Sender::new(current) })
    }

    /// The roster, or `None` while this node belongs to no cluster.
    pub fn current(&self) -> Option<Arc<SignedRoster>> {
        self.current.borrow().clone()
    }

    /// Follows the roster.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<SignedRoster>>> {
        self.current.subscribe()
    }

    /// The version of the roster; 0 without one.
    pub fn version(&self) -> u64 {
        self.current.borrow().as_ref().map_or(0, |signed| signed.roster().version())
    }

    /// Makes this node a member: of the cluster that it founded or joined.
    ///
    /// # Errors
    /// [`RosterStoreError::AlreadyMember`] when it is one of another cluster, [`RosterStoreError::File`].
    pub fn adopt(&self, signed: SignedRoster) -> Result<(), RosterStoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = self.current() {
            let cluster = current.roster().cluster();
            if cluster != signed.roster().cluster() {
                return Err(RosterStoreError::AlreadyMember(cluster));
            }
            if current.roster().version() >= signed.roster().version() {
                return Ok(());
            }
        }
        self.keep(signed)
    }

    /// Takes a roster that a peer handed over, if it is genuine, of this cluster and newer. True when it was.
    ///
    /// # Errors
    /// [`RosterStoreError::Roster`] when it is not genuine or not this cluster's, [`RosterStoreError::File`].
    pub fn offer(&self, offered: &proto::SignedRoster) -> Result<bool, RosterStoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(current) = self.current() else {
            // Only an invite makes this node a member.
            return Err(RosterError::Malformed("this node belongs to no cluster").into());
        };
        let expected = Some(current.roster().cluster());
        let signed = SignedRoster::verify(offered.roster.to_vec(), offered.signature.to_vec(), expected)?;
        if signed.roster().version() <= current.roster().version() {
            return Ok(false);
        }
        self.keep(signed)?;
        Ok(true)
    }

    /// Forgets the cluster: this node left it.
    ///
    /// # Errors
    /// [`RosterStoreError::File`].
    pub fn clear(&self) -> Result<(), RosterStoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(RosterStoreError::File {
                    action: "delete",
                    path: self.path.clone(),
                    source: error,
                });
            }
            _ => {}
        }
        self.current.send_replace(None);
        Ok(())
    }

    fn keep(&self, signed: SignedRoster) -> Result<(), RosterStoreError> {
        let bytes = wire::signed_roster_to_wire(&signed).encode_to_vec();
        replace_file(&self.path, &bytes).map_err(|source| RosterStoreError::File {
            action: "write",
            path: self.path.clone(),
            source,
        })?;
        self.current.send_replace(Some(Arc::new(signed)));
        Ok(())
    }
}

/// Who may connect to a node: its own key, the members of its cluster, and whoever else is listed.
#[derive(Debug)]
pub struct ClusterAdmission {
    own: KeyPin,
    roster: Arc<RosterStore>,
    others: Arc<AccessList>,
}

impl ClusterAdmission {
    /// `own` is the node's key, `others` its workers and clients.
    pub fn new(own: KeyPin, roster: Arc<RosterStore>, others: Arc<AccessList>) -> Self {
        Self { own, roster, others }
    }
}

impl Admission for ClusterAdmission {
    fn admit(&self, pin: &KeyPin) -> Option<Role> {
        if *pin == self.own {
            return Some(Role::Own);
        }
        let roster = self.roster.current.borrow();
        let is_member = roster.as_ref().is_some_and(|signed| signed.roster().get(&pin.node_id()).is_some());
        if is_member { Some(Role::Node) } else { self.others.admit(pin) }
    }
}

/// Replaces a file: after a crash there is the old content or the new, never a part.
fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pin::NodeId;
    use crate::roster::{ClusterKey, Roster, RosterEntry};

    fn founded(key: &ClusterKey) -> Roster {
        let node_id = NodeId::from_bytes([1; 32]);
        Roster::found(key, "desk", RosterEntry { node_id, name: "studio".into(), addresses: vec![] })
    }

    #[test]
    fn the_newest_roster_is_kept_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let key = ClusterKey::generate().unwrap();
        let store = RosterStore::open(folder.path()).unwrap();
        assert!(store.current().is_none());
        let mut roster = founded(&key);
        let first = key.sign(roster.clone()).unwrap();
        assert!(
            store.offer(&wire::signed_roster_to_wire(&first)).is_err(),
            "no member yet: an offer is nothing"
        );
        store.adopt(first.clone()).unwrap();
        roster.admit(NodeId::from_bytes([2; 32]), "mini", vec![]).unwrap();
        let second = key.sign(roster).unwrap();
        assert!(store.offer(&wire::signed_roster_to_wire(&second)).unwrap());
        assert!(
            !store.offer(&wire::signed_roster_to_wire(&first)).unwrap(),
            "an older one is not taken back"
        );
        assert_eq!(RosterStore::open(folder.path()).unwrap().version(), 2);
        store.clear().unwrap();
        assert_eq!(RosterStore::open(folder.path()).unwrap().version(), 0);
    }

    #[test]
    fn a_roster_of_another_cluster_or_a_forged_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (key, other) = (ClusterKey::generate().unwrap(), ClusterKey::generate().unwrap());
        let store = RosterStore::open(folder.path()).unwrap();
        store.adopt(key.sign(founded(&key)).unwrap()).unwrap();
        let foreign = other.sign(founded(&other)).unwrap();
        let refused = store.offer(&wire::signed_roster_to_wire(&foreign));
        assert!(matches!(refused, Err(RosterStoreError::Roster(RosterError::OtherCluster { .. }))));
        assert!(matches!(store.adopt(foreign), Err(RosterStoreError::AlreadyMember(_))));
        let mut newer = founded(&key);
        newer.admit(NodeId::from_bytes([6; 32]), "thief", vec![]).unwrap();
        let mut forged = wire::signed_roster_to_wire(&key.sign(newer).unwrap());
        forged.signature = wire::signed_roster_to_wire(&store.current().unwrap()).signature;
        let refused = store.offer(&forged);
        assert!(matches!(refused, Err(RosterStoreError::Roster(RosterError::Forged))));
        assert_eq!(store.version(), 1);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), b"not a roster").unwrap();
        let error = RosterStore::open(folder.path()).unwrap_err();
        assert!(matches!(error, RosterStoreError::Damaged { .. }) && error.to_string().contains("roster.pb"));
    }

    #[test]
    fn members_and_listed_keys_come_in() {
        let folder = tempfile::tempdir().unwrap();
        let key = ClusterKey::generate().unwrap();
        let store = Arc::new(RosterStore::open(folder.path()).unwrap());
        let [own, member, client, stranger] = [9, 1, 7, 8].map(|byte| KeyPin::from_bytes([byte; 32]));
        let others = Arc::new(AccessList::new([(client, Role::Client)]));
        let admission = ClusterAdmission::new(own, store.clone(), others);
        assert_eq!(admission.admit(&member), None);
        store.adopt(key.sign(founded(&key)).unwrap()).unwrap();
        let answers = [own, member, client, stranger].map(|pin| admission.admit(&pin));
        assert_eq!(answers, [Some(Role::Own), Some(Role::Node), Some(Role::Client), None]);
    }
}
