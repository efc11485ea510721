//! Who is here and may be: identity and pairing, mDNS discovery, membership, control log, link and machine profiles.
//!
//! ```text
//! Identity ─▶ tls ─▶ serve / connect ─▶ Mesh (heartbeats, roster exchange) ─▶ MeshHandle: who is alive
//!                      │        ▲                    ▲
//!    Admission ◀── RosterStore ─┴── pairing ── Discovery (where to look; never who to trust)
//! ```
//! A process is its key. A [`NodeId`] is the hash of a public key, a link is mutual TLS 1.3 pinned to such hashes, and who
//! may connect is what an [`Admission`] says, for nodes by the signed [`Roster`]. Addresses, names and mDNS only suggest.

mod admission;
mod control_log;
mod discovery;
mod facts;
mod identity;
mod key_file;
mod membership;
mod mesh;
mod pairing;
mod peer_service;
mod pin;
mod roster;
mod roster_store;
mod tls;
mod transport;
mod wire;

pub use admission::{AccessList, Admission, PeerKey, Role};
pub use control_log::{
    ControlEntry, ControlEpoch, ControlLog, ControlLogError, ControlSnapshot, MAX_RECORD, MAX_SNAPSHOT,
    SqliteControlLog,
};
pub use discovery::{
    Candidate, Discovery, MAX_CANDIDATES, MdnsDiscovery, MdnsError, MdnsOptions, StaticDiscovery,
    announce_invites, find_inviters,
};
pub use facts::NodeFacts;
pub use identity::{CERTIFICATE_NAME, Identity};
pub use key_file::KeyError;
pub use membership::{PeerState, Timing};
pub use mesh::{MeshHandle, MeshOptions, PeerView};
pub use pairing::{
    Admit, Invite, InviteCode, InviteError, InviteSecret, InviteToken, Inviter, JoinError, JoinRequest,
    Joined, Refusal, join,
};
pub use peer_service::{Departures, PeerService, peer_service};
pub use pin::{ClusterId, IdError, KeyPin, NodeId};
pub use roster::{ClusterKey, MAX_NODES, Roster, RosterEntry, RosterError, SignedRoster};
pub use roster_store::{ClusterAdmission, RosterStore, RosterStoreError};
pub use tls::ExpectedKey;
pub use transport::{
    ConnectError, ConnectOptions, Link, ServeError, ServeOptions, connect, dial, serve, server_builder,
};
pub use wire::signed_roster_to_wire;
