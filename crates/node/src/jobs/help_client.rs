//! Asks other nodes to help with a job that this node leads: each runs a worker or a stage, and says where that is, that its node stops, and how it
//! ended. What they do then is in `helpers`.

use super::client::json;
use super::peer_client::Peers;
use crate::addresses;
use mlxnode_cluster::{KeyPin, NodeId, PeerState};
use mlxnode_collective::MemberId;
use mlxnode_coordinator::jobs::RunJob;
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use mlxnode_proto::internal::v1::{HelpJobReport, HelpJobRequest};
use mlxnode_worker::GroupPeer;
use std::net::SocketAddr;
use tonic::{Status, Streaming};

/// What a node says that was asked to help.
#[derive(Debug)]
pub(super) enum Said {
    /// Its worker can be reached.
    There(Worker),
    /// It stops, and waits a while until it is let go.
    Leaves,
}

/// Where a worker listens.
#[derive(Clone, Debug)]
pub(super) struct Listening {
    /// As the leading node reaches it.
    pub(super) control: SocketAddr,
    /// As the other workers reach it.
    pub(super) peer: GroupPeer,
}

/// A worker that listens.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    /// For the other workers, or for the other stages of its line.
    pub(super) at: Listening,
    /// For the same stage of other lines, where there are some.
    pub(super) exchange: Option<Listening>,
}

/// A node that was asked to help. Dropping it lets the node go.
pub(super) struct Asked {
    peers: Peers,
    node: NodeId,
    told: Streaming<HelpJobReport>,
}

impl Asked {
    /// Has a node run the worker `member` of this job.
    ///
    /// # Errors
    /// When it cannot be reached, or refuses.
    pub(super) async fn to_help(
        peers: &Peers,
        order: &RunJob,
        node: NodeId,
        member: MemberId,
    ) -> Result<Self, Status> {
        let is_there =
            peers.mesh.peers().iter().any(|peer| peer.node_id == node && peer.state == PeerState::Alive);
        let channel = peers.mesh.channel(&node).filter(|_| is_there);
        let channel = channel.ok_or_else(|| Status::unavailable("it cannot be reached"))?;
        let order = json(order).map_err(|error| Status::internal(error.to_string()))?;
        let request = HelpJobRequest { order, member: member.0 };
        let told = JobRunnerClient::new(channel).help(request).await?.into_inner();
        Ok(Self { peers: peers.clone(), node, told })
    }

    /// What it says next; none when its worker has ended.
    ///
    /// # Errors
    /// Why its worker ended, or the connection's end.
    pub(super) async fn next(&mut self) -> Result<Option<Said>, Status> {
        let Some(report) = self.told.message().await? else { return Ok(None) };
        if report.leaves {
            return Ok(Some(Said::Leaves));
        }
        let at = self.listening(&report.address, &report.key_pin).await?;
        let exchange = match report.exchange_address.as_str() {
            "" => None,
            address => Some(self.listening(address, &report.exchange_key_pin).await?),
        };
        Ok(Some(Said::There(Worker { at, exchange })))
    }

    async fn listening(&self, address: &str, key_pin: &[u8]) -> Result<Listening, Status> {
        let pin = <[u8; 32]>::try_from(key_pin);
        let pin = pin.map_err(|_| Status::unavailable("its worker's key is not 32 bytes long"))?;
        let reached = {
            let peers = self.peers.mesh.peers();
            peers.iter().find(|peer| peer.node_id == self.node).and_then(|peer| peer.address.clone())
        };
        let address = addresses::with_host_of(address, reached.as_deref());
        let control = tokio::net::lookup_host(&address).await.ok().and_then(|mut found| found.next());
        let control = control.ok_or_else(|| Status::unavailable(format!("{address} is no address")))?;
        let peer = GroupPeer { address, key_pin: KeyPin::from_bytes(pin) };
        Ok(Listening { control, peer })
    }
}
