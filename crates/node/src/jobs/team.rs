//! A job on several nodes: the one that leads it brings the workers together, the others run one each.
//!
//! ```text
//! leading node: Attempt ─▶ worker 1 ◀══ gradients ══▶ worker 2 ◀─ Helper :another node
//!                  └─ Team: conductor ── who the members are ──▶ both
//!                       └──────────── JobRunner.Help ─────────────────▲
//! ```
//! A node that is lost is replaced by another one, or by itself when it is back. When the leading node is lost, the job's next
//! attempt goes on from a checkpoint.

use super::help_client::{Asked, Listening, Said};
use super::peer_client::Peers;
use super::store::states_name;
use crate::addresses;
use mlxnode_cluster::{Identity, KeyPin, NodeId, PeerState};
use mlxnode_collective::{MemberId, RoundsOptions};
use mlxnode_compute::JobError;
use mlxnode_coordinator::jobs::{Report, RunJob};
use mlxnode_worker::{
    ConductorEvent, GroupConductor, GroupPeer, GroupPlace, GroupWorker, JobCallError, JobProcess, JobSetup,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
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
    /// Where one of its workers is, as itself and as other nodes reach it.
    pub(super) fn reached(&self, peers: &Peers, listens: SocketAddr, key_pin: KeyPin) -> Listening {
        let seen = peers.mesh.peers();
        let others: Vec<String> = seen.iter().filter_map(|peer| peer.address.clone()).collect();
        let own = self.listen.is_unspecified();
        let own = own.then(|| others.iter().find_map(|address| addresses::source_toward(address))).flatten();
        let advertised = format!("{}:{}", self.advertised, listens.port());
        let address = addresses::with_host_of(&advertised, own.as_deref());
        Listening { control: addresses::local(listens), peer: GroupPeer { address, key_pin } }
    }

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

/// Workers whose nodes were let go, until the team hears of it.
const FEW: usize = 8;

/// The workers of a job that this node leads. Dropping it ends those on other nodes.
pub(super) struct Team {
    /// Workers whose nodes stop, and what people call these.
    leaving: watch::Receiver<Vec<(MemberId, String)>>,
    let_go: mpsc::Sender<Vec<MemberId>>,
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
        let Listening { control, peer } = place.reached(peers, listens, key_pin);
        conductor.add(GroupWorker { member: LEADER, control, peer }).await;
        let (leaving, leaves) = watch::channel(Vec::new());
        let (let_go, released) = mpsc::channel(FEW);
        let gathering = Gathering {
            leaving,
            released,
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
        let gathering = AbortOnDropHandle::new(tokio::spawn(gathering.run(events)));
        Ok(Self { leaving: leaves, let_go, _gathering: gathering })
    }

    /// Workers whose nodes stop and wait for a checkpoint, when there are new ones.
    pub(super) fn leaving(&mut self) -> Option<Vec<(MemberId, String)>> {
        if !self.leaving.has_changed().is_ok_and(|changed| changed) {
            return None;
        }
        Some(self.leaving.borrow_and_update().clone())
    }

    /// These are needed no more.
    pub(super) fn let_go(&self, members: Vec<MemberId>) {
        // Without room for it their nodes go by themselves, a while later.
        let _ = self.let_go.try_send(members);
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
    leaving: watch::Sender<Vec<(MemberId, String)>>,
    released: mpsc::Receiver<Vec<MemberId>>,
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
                Some((member, said)) = workers.recv() => match said {
                    Said::There(found) => {
                        let Listening { control, peer } = found.at;
                        self.conductor.add(GroupWorker { member, control, peer }).await;
                    }
                    Said::Leaves => self.leaves(member),
                },
                Some(members) = self.released.recv() => {
                    let helping = self.helping.values();
                    helping.filter(|(_, member, _)| members.contains(member)).for_each(|(_, _, task)| task.abort());
                }
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

    /// The node of this worker stops.
    fn leaves(&self, member: MemberId) {
        let Some((node, ..)) = self.helping.values().find(|(_, helping, _)| *helping == member) else {
            return;
        };
        let name = self.peers.name(*node);
        self.leaving.send_modify(|leaving| {
            leaving.retain(|(other, _)| self.helping.values().any(|(_, helping, _)| helping == other));
            leaving.push((member, name));
        });
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
    fn look(&mut self, found: &mpsc::Sender<(MemberId, Said)>) {
        let missing = (self.order.spec.workers as usize).saturating_sub(1 + self.helping.len());
        let helps = |node: &NodeId| self.helping.values().any(|(helping, _, _)| helping == node);
        let seen = self.peers.mesh.peers();
        let alive = seen.iter().filter(|peer| peer.state == PeerState::Alive);
        let free: Vec<NodeId> = alive.map(|peer| peer.node_id).filter(|node| !helps(node)).collect();
        for node in in_turn(free, &self.ended).into_iter().take(missing) {
            self.next += 1;
            let member = MemberId(self.next);
            let asking = help(self.peers.clone(), self.order.clone(), node, member, found.clone());
            let task = self.tasks.spawn(asking);
            self.helping.insert(task.id(), (node, member, task));
        }
    }
}

/// Those first that have not ended yet, then those whose end is longest ago: one that cannot help does not keep others from it.
fn in_turn(mut free: Vec<NodeId>, ended: &[NodeId]) -> Vec<NodeId> {
    free.sort_by_key(|node| ended.iter().position(|other| other == node).map_or(0, |place| place + 1));
    free
}

/// Has a node run a worker, until it ends: how.
async fn help(
    peers: Peers,
    order: RunJob,
    node: NodeId,
    member: MemberId,
    found: mpsc::Sender<(MemberId, Said)>,
) -> String {
    // It begins with what it has of checkpoints, or from nothing: the others give it their state.
    let helping = async {
        let mut asked = Asked::to_help(&peers, &order, node, member).await?;
        while let Some(said) = asked.next().await? {
            let _ = found.send((member, said)).await; // the job may be over
        }
        Ok::<_, tonic::Status>(())
    };
    match helping.await {
        Ok(()) => "it ended".to_owned(),
        Err(status) => format!("{}: {}", peers.name(node), status.message()),
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
