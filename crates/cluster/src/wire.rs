//! Messages of the mesh and of pairing, to and from our own types.

use crate::facts::{NodeFacts, tame_addresses, tame_name};
use crate::pin::NodeId;
use crate::roster::{Roster, RosterEntry, RosterError, SignedRoster};
use mlxnode_proto::internal::v1 as proto;

pub(crate) fn roster_to_wire(roster: &Roster) -> proto::Roster {
    let node = |entry: &RosterEntry| proto::RosterEntry {
        node_id: id_to_wire(&entry.node_id),
        name: entry.name.clone(),
        addresses: entry.addresses.clone(),
    };
    proto::Roster {
        cluster_id: roster.cluster().as_bytes().to_vec().into(),
        cluster_key: roster.cluster_key.clone().into(),
        cluster_name: roster.cluster_name.clone(),
        version: roster.version,
        nodes: roster.nodes.iter().map(node).collect(),
        removed: roster.removed.iter().map(id_to_wire).collect(),
        coordinator: id_to_wire(&roster.coordinator),
    }
}

/// The roster as it says; whether that makes sense and who says so is for [`SignedRoster::verify`].
pub(crate) fn roster_from_wire(roster: proto::Roster) -> Result<Roster, RosterError> {
    let id =
        |bytes: &[u8]| NodeId::try_from(bytes).map_err(|_| RosterError::Malformed("an id has not 32 bytes"));
    let node = |entry: &proto::RosterEntry| {
        Ok(RosterEntry {
            node_id: id(&entry.node_id)?,
            name: tame_name(&entry.name),
            addresses: tame_addresses(entry.addresses.clone()),
        })
    };
    Ok(Roster {
        cluster_key: roster.cluster_key.to_vec(),
        cluster_name: tame_name(&roster.cluster_name),
        version: roster.version,
        nodes: roster.nodes.iter().map(node).collect::<Result<_, _>>()?,
        removed: roster.removed.iter().map(|bytes| id(bytes)).collect::<Result<_, _>>()?,
        coordinator: id(&roster.coordinator)?,
    })
}

/// A signed roster for a peer.
pub fn signed_roster_to_wire(signed: &SignedRoster) -> proto::SignedRoster {
    let (bytes, signature) = signed.parts();
    proto::SignedRoster { roster: bytes.to_vec().into(), signature: signature.to_vec().into() }
}

pub(crate) fn facts_to_wire(facts: &NodeFacts) -> proto::NodeFacts {
    proto::NodeFacts {
        name: facts.name.clone(),
        addresses: facts.addresses.clone(),
        memory_total_bytes: facts.memory_total_bytes,
        memory_budget_bytes: facts.memory_budget_bytes,
        memory_used_bytes: facts.memory_used_bytes,
        prompt_cache_bytes: facts.prompt_cache_bytes,
        chip: facts.chip.clone(),
        version: facts.version.clone(),
    }
}

pub(crate) fn facts_from_wire(facts: proto::NodeFacts) -> NodeFacts {
    let facts = NodeFacts {
        name: facts.name,
        addresses: facts.addresses,
        memory_total_bytes: facts.memory_total_bytes,
        memory_budget_bytes: facts.memory_budget_bytes,
        memory_used_bytes: facts.memory_used_bytes,
        prompt_cache_bytes: facts.prompt_cache_bytes,
        chip: facts.chip,
        version: facts.version,
    };
    facts.tamed()
}

pub(crate) fn id_to_wire<B: From<Vec<u8>>>(id: &NodeId) -> B {
    id.as_bytes().to_vec().into()
}
