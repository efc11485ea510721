//! The members as messages.

use super::view::{ClusterView, HouseholdError, NodeState, NodeView};
use mlxnode_cluster::Invite;
use mlxnode_proto::v1;
use tonic::Status;

pub(super) fn status(
    view: ClusterView,
    deployments: Vec<v1::Deployment>,
    coordinator_reachable: bool,
) -> v1::ClusterStatus {
    v1::ClusterStatus {
        cluster_id: view.cluster.to_string(),
        cluster_name: view.cluster_name,
        self_node_id: view.own.to_string(),
        coordinator_node_id: view.coordinator.to_string(),
        nodes: view.nodes.into_iter().map(node).collect(),
        deployments,
        roster_version: view.roster_version,
        coordinator_reachable,
    }
}

pub(super) fn node(node: NodeView) -> v1::Node {
    let state = match node.state {
        NodeState::Connecting => v1::NodeState::Connecting,
        NodeState::Alive => v1::NodeState::Alive,
        NodeState::Suspect => v1::NodeState::Suspect,
        NodeState::Dead => v1::NodeState::Dead,
    };
    let links = node.links.iter().map(|link| v1::Link {
        to_node_id: link.to.to_string(),
        rtt_seconds: link.rtt.map_or(0.0, |rtt| rtt.as_secs_f64()),
    });
    v1::Node {
        id: node.id.to_string(),
        name: node.name,
        address: node.address,
        state: state.into(),
        memory_total_bytes: node.facts.memory_total_bytes,
        memory_budget_bytes: node.facts.memory_budget_bytes,
        memory_used_bytes: node.facts.memory_used_bytes,
        chip: node.facts.chip,
        version: node.facts.version,
        links: links.collect(),
        problem: node.problem.unwrap_or_default(),
    }
}

/// The only place where an invite's secrets become text: on their way to the person who asked.
pub(super) fn invite(invite: &Invite) -> v1::InviteResponse {
    v1::InviteResponse {
        code: invite.code.reveal(),
        token: invite.token.reveal(),
        expires_unix: invite.expires_unix().try_into().unwrap_or(i64::MAX),
    }
}

pub(super) fn failure(error: HouseholdError) -> Status {
    let text = error.to_string();
    match error {
        HouseholdError::UnknownNode(_) => Status::not_found(text),
        HouseholdError::Refused(_) => Status::failed_precondition(text),
        HouseholdError::Unavailable(_) => Status::unavailable(text),
        HouseholdError::Failed(_) => Status::internal(text),
    }
}
