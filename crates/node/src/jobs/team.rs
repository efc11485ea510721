//! A job on several nodes: the one that leads it brings the workers together, the others run one each.
//!
//! ```text
//! leading node: Attempt ─▶ worker 1 ◀══ gradients ══▶ worker 2 ◀─ Helper :another node
//!                  └─ Team: conductor ── who the members are ──▶ both
//!                       └──────────── JobRunner.Help ─────────────────▲
//! ```
//! A node that is lost is replaced by another one, or by itself when it is back. When the leading node is lost, the job's next
//! attempt goes on from a checkpoint.

use super::client::json;
use super::peer_client::Peers;
use super::store::states_name;
use crate::addresses;
use mlxnode_cluster::{Identity, KeyPin, NodeId, PeerState};
use mlxnode_collective::{MemberId, RoundsOptions};
use mlxnode_compute::JobError;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::jobs::{Report, RunJob};
use mlxnode_proto::internal::v1::HelpJobRequest;
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use mlxnode_worker::{
    ConductorEvent, GroupConductor, GroupPeer, GroupPlace, GroupWorker, JobCallError, JobProcess, JobSetup,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinSet};
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

/// Between two looks for nodes that could help.
const LOOK: Duration = Duration::from_secs(5);
/// The worker of the leading node.
pub(super) const LEADER: MemberId = MemberId(1);

/// What a node is to workers.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) identity: Arc<Identity>,
    pub(super) listen: IpAddr,
    /// The host under which other nodes reach it.
    pub(super) advertised: String,
}

impl Place {
    /// A worker's place in its group.
    pub(super) fn of(
        &self,
        member: MemberId,
        conductor: KeyPin,
        peers: &Peers,
        order: &RunJob,
    ) -> Result<GroupPlace, JobCallError> {
        let job = peers.store.job(&order.spec.id);
        let job = job.map_err(|error| JobError::Failed(format!("cannot use the job's folder: {error}")))?;
        let folder = job.join(states_name(order.epoch, member));
        Ok(GroupPlace { member, conductor, listen: self.listen, folder })
    }
}

/// The workers of a job that this node leads. Dropping it ends those on other nodes.
pub(super) struct Team {
    _gathering: AbortOnDropHandle<()>,
}

impl Team {
    /// Makes the job in `process`, as the first of several workers, and looks for the others.
    pub(super) async fn lead(
        place: &Place,
        peers: &Peers,
        order: &RunJob,
        process: &mut JobProcess,
        setup: JobSetup,
        reports: mpsc::Sender<Report>,
    ) -> Result<Self, JobCallError> {
        let joins = place.of(LEADER, place.identity.key_pin(), peers, order)?;
        let (listens, key_pin) = process.join(joins).await?;
        process.begin(setup).await?;
        let wanted = order.spec.workers as usize;
        let there = peers.mesh.peers().iter().filter(|peer| peer.state == PeerState::Alive).count() + 1;
        let options = RoundsOptions { expected: wanted.min(there), ..RoundsOptions::default() };
        let (conductor, events) = GroupConductor::start(options, 0, place.identity.clone());
        let seen = peers.mesh.peers();
        let others: Vec<String> = seen.iter().filter_map(|peer| peer.address.clone()).collect();
        let own = place
            .listen
            .is_unspecified()
            .then(|| others.iter().find_map(|address| addresses::source_toward(address)));
        let advertised = format!("{}:{}", place.advertised, listens.port());
        let address = addresses::with_host_of(&advertised, own.flatten().as_deref());
        let control = addresses::local(listens);
        let peer = GroupPeer { address, key_pin };
        conductor.add(GroupWorker { member: LEADER, control, peer }).await;
        let gathering = Gathering {
            peers: peers.clone(),
            order: order.clone(),
            conductor,
            helping: BTreeMap::new(),
            tasks: JoinSet::new(),
            next: LEADER.0,
            ended: Vec::new(),
            reports,
            told: Vec::new(),
        };
        Ok(Self { _gathering: AbortOnDropHandle::new(tokio::spawn(gathering.run(events))) })
    }
}

/// Looks for nodes that help, as long as the job runs.
struct Gathering {
    peers: Peers,
    order: RunJob,
    conductor: GroupConductor,
    /// By the task that listens to it.
    helping: BTreeMap<Id, (NodeId, MemberId, tokio::task::AbortHandle)>,
    tasks: JoinSet<String>,
    next: u64,
    /// Nodes that helped no more, the last one last.
    ended: Vec<NodeId>,
    /// The coordinator hears who helps, and last heard this.
    reports: mpsc::Sender<Report>,
    told: Vec<NodeId>,
}

impl Gathering {
    async fn run(mut self, mut events: mpsc::Receiver<ConductorEvent>) {
        let mut looks = tokio::time::interval(LOOK);
        let (found, mut workers) = mpsc::channel(8);
        loop {
            self.tell();
            tokio::select! {
                _ = looks.tick() => self.look(&found),
                Some(worker) = workers.recv() => self.conductor.add(worker).await,
                Some(ended) = self.tasks.join_next_with_id() => {
                    let (id, reason) = match ended {
                        Ok((id, reason)) => (id, reason),
                        Err(error) => (error.id(), "it was let go".to_owned()),
                    };
                    if let Some((node, member, _)) = self.helping.remove(&id) {
                        info!(job = self.order.spec.id, node = self.peers.name(node), reason, "a node helps no more");
                        self.ended.retain(|other| *other != node);
                        self.ended.push(node);
                        self.conductor.lost(member, reason).await;
                    }
                }
                Some(event) = events.recv() => match event {
                    ConductorEvent::Lost { member, .. } => {
                        let held = self.helping.values().find(|(_, helping, _)| *helping == member);
                        if let Some((_, _, task)) = held {
                            task.abort();
                        }
                    }
                    // The workers leave the group with its conductor, which is what the job then says.
                    ConductorEvent::Failed { reason } => {
                        tracing::warn!(job = self.order.spec.id, reason, "the job's workers do not agree");
                        return;
                    }
                }
            }
        }
    }

    /// Says who helps, when that has changed: it counts as taken on those nodes.
    fn tell(&mut self) {
        let mut nodes: Vec<NodeId> = self.helping.values().map(|(node, _, _)| *node).collect();
        nodes.sort();
        if nodes != self.told && self.reports.try_send(Report::Helped(nodes.clone())).is_ok() {
            self.told = nodes; // one that has no room for it hears it after the next look
        }
    }

    /// Asks nodes that do not help yet, as many as are missing.
    fn look(&mut self, found: &mpsc::Sender<GroupWorker>) {
        let missing = (self.order.spec.workers as usize).saturating_sub(1 + self.helping.len());
        let helps = |node: &NodeId| self.helping.values().any(|(helping, _, _)| helping == node);
        let seen = self.peers.mesh.peers();
        let alive = seen.iter().filter(|peer| peer.state == PeerState::Alive);
        let free: Vec<NodeId> = alive.map(|peer| peer.node_id).filter(|node| !helps(node)).collect();
        for node in in_turn(free, &self.ended).into_iter().take(missing) {
            self.next += 1;
            let member = MemberId(self.next);
            let asking = help(self.peers.clone(), self.order.clone(), node, member, found.clone());
            let task = self.tasks.spawn(async move {
                asking.await.map_or_else(|error| error.to_string(), |()| "it ended".into())
            });
            self.helping.insert(task.id(), (node, member, task));
        }
    }
}

/// Those first that have not ended yet, then those whose end is longest ago: one that cannot help does not keep others from it.
fn in_turn(mut free: Vec<NodeId>, ended: &[NodeId]) -> Vec<NodeId> {
    free.sort_by_key(|node| ended.iter().position(|other| other == node).map_or(0, |place| place + 1));
    free
}

/// Has a node run a worker, until it ends.
async fn help(
    peers: Peers,
    order: RunJob,
    node: NodeId,
    member: MemberId,
    found: mpsc::Sender<GroupWorker>,
) -> Result<(), Error> {
    let name = peers.name(node);
    let gone = |what: String| Error::Unavailable(format!("{name}: {what}"));
    let channel = peers.mesh.channel(&node).ok_or_else(|| gone("it cannot be reached".into()))?;
    // It begins with what it has of checkpoints, or from nothing: the others give it their state.
    let request = HelpJobRequest { order: json(&order)?, member: member.0 };
    let answer = JobRunnerClient::new(channel).help(request).await;
    let mut told = answer.map_err(|status| gone(status.message().to_owned()))?.into_inner();
    while let Some(report) = told.message().await.map_err(|status| gone(status.message().to_owned()))? {
        let pin = <[u8; 32]>::try_from(&report.key_pin[..]);
        let pin = pin.map_err(|_| gone("its worker's key is not 32 bytes long".into()))?;
        let reached = {
            let peers = peers.mesh.peers();
            peers.iter().find(|peer| peer.node_id == node).and_then(|peer| peer.address.clone())
        };
        let address = addresses::with_host_of(&report.address, reached.as_deref());
        let control = tokio::net::lookup_host(&address).await.ok().and_then(|mut found| found.next());
        let control = control.ok_or_else(|| gone(format!("{address} is no address")))?;
        let peer = GroupPeer { address, key_pin: KeyPin::from_bytes(pin) };
        let _ = found.send(GroupWorker { member, control, peer }).await; // the job may be over
    }
    Ok(())
}

/// A worker of a job that another node leads. Dropping it ends it.
pub(crate) struct Helper {
    joined: Option<oneshot::Receiver<(SocketAddr, KeyPin)>>,
    task: AbortOnDropHandle<Result<(), Error>>,
}

impl Helper {
    pub(super) fn start<F>(work: impl FnOnce(oneshot::Sender<(SocketAddr, KeyPin)>) -> F) -> Self
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (sender, joined) = oneshot::channel();
        Self { joined: Some(joined), task: AbortOnDropHandle::new(tokio::spawn(work(sender))) }
    }

    /// Where its worker listens, once; then `None` when it has ended.
    ///
    /// # Errors
    /// Why it ended.
    pub(crate) async fn next(&mut self) -> Result<Option<(String, KeyPin)>, Error> {
        if let Some(joined) = self.joined.take()
            && let Ok((address, key_pin)) = joined.await
        {
            return Ok(Some((address.to_string(), key_pin)));
        }
        let ended = (&mut self.task).await;
        ended.unwrap_or_else(|error| Err(Error::Failed(error.to_string()))).map(|()| None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_cannot_help_does_not_keep_others_from_it() {
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let free = || vec![node(1), node(2), node(3)];
        assert_eq!(in_turn(free(), &[]), free());
        assert_eq!(in_turn(free(), &[node(1)]), [node(2), node(3), node(1)]);
        assert_eq!(in_turn(free(), &[node(2), node(9), node(1)]), [node(3), node(2), node(1)]);
    }
}
