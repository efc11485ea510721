//! What the network side and the trainer's side of a stage hold on to together.

use super::endpoint::StageOptions;
use super::lanes::{Lane, LaneStream, lane};
use crate::collective::GroupPeer;
use crate::job::Waited;
use mlxnode_cluster::{AccessList, Identity, KeyPin, Role};
use mlxnode_proto::internal::v1::LineLane;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Ends the line for this stage, once, with one reason.
#[derive(Default)]
pub(super) struct Over {
    token: CancellationToken,
    why: OnceLock<String>,
}

impl Over {
    /// It is over. The first reason is the cause, later ones follow from it.
    pub(super) fn now(&self, why: impl Into<String>) {
        let _ = self.why.set(why.into());
        self.token.cancel();
    }

    pub(super) fn why(&self) -> String {
        self.why.get().cloned().unwrap_or_else(|| "the line is over".to_owned())
    }

    pub(super) fn token(&self) -> &CancellationToken {
        &self.token
    }
}

/// The trainer's ends of all lanes of a stage.
pub(super) struct Lanes {
    /// Of stage 0: one to each other stage, in order. Of another one: the one to stage 0.
    pub(super) lead: Vec<Lane>,
    pub(super) previous: Option<Lane>,
    pub(super) next: Option<Lane>,
}

/// One process of a line.
pub(super) struct Shared {
    pub(super) stage: usize,
    pub(super) stages: usize,
    pub(super) parent: KeyPin,
    pub(super) options: StageOptions,
    pub(super) identity: Arc<Identity>,
    pub(super) access: Arc<AccessList>,
    pub(super) runtime: Handle,
    pub(super) over: Over,
    /// By the trainer.
    pub(super) waited: Waited,
    pub(super) tasks: TaskTracker,
    /// Lanes that are open; all of them: the line is formed here.
    pub(super) open: watch::Sender<usize>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    peers: Vec<GroupPeer>,
    /// Not opened yet.
    waiting: BTreeMap<(usize, i32), LaneStream>,
    /// Until the trainer takes them.
    lanes: Option<Lanes>,
}

impl Shared {
    pub(super) fn new(
        (stage, stages): (usize, usize),
        parent: KeyPin,
        options: StageOptions,
        identity: Arc<Identity>,
        runtime: Handle,
    ) -> Self {
        let mut waiting = BTreeMap::new();
        let mut made = |peer, kind: LineLane| {
            let (lane, stream) = lane(peer, kind, stages);
            waiting.insert((peer, kind.into()), stream);
            lane
        };
        let others = if stage == 0 { 1..stages } else { 0..1 };
        let lanes = Lanes {
            lead: others.map(|peer| made(peer, LineLane::Lead)).collect(),
            previous: (stage > 0).then(|| made(stage - 1, LineLane::Pass)),
            next: (stage + 1 < stages).then(|| made(stage + 1, LineLane::Pass)),
        };
        Self {
            stage,
            stages,
            parent,
            options,
            identity,
            access: Arc::new(AccessList::new([(parent, Role::Parent)])),
            runtime,
            over: Over::default(),
            waited: Waited::default(),
            tasks: TaskTracker::new(),
            open: watch::Sender::new(0),
            inner: Mutex::new(Inner { peers: Vec::new(), waiting, lanes: Some(lanes) }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lanes of this stage.
    pub(super) fn lane_count(&self) -> usize {
        let others = if self.stage == 0 { self.stages - 1 } else { 1 };
        others + usize::from(self.stage > 0) + usize::from(self.stage + 1 < self.stages)
    }

    /// The node's order: where all stages are. Lets them in.
    pub(super) fn form(&self, peers: Vec<GroupPeer>) {
        let others = peers.iter().enumerate().filter(|(stage, _)| *stage != self.stage);
        self.access.replace(Role::Neighbour, others.map(|(_, peer)| peer.key_pin));
        self.inner().peers = peers;
    }

    /// Where a stage is, and its key.
    pub(super) fn peer(&self, stage: usize) -> Option<GroupPeer> {
        self.inner().peers.get(stage).cloned()
    }

    /// The network's end of a lane; once.
    pub(super) fn take_stream(&self, peer: usize, kind: LineLane) -> Option<LaneStream> {
        self.inner().waiting.remove(&(peer, kind.into()))
    }

    /// The trainer's ends; once.
    pub(super) fn take_lanes(&self) -> Option<Lanes> {
        self.inner().lanes.take()
    }

    /// One more lane is open.
    pub(super) fn opened(&self) {
        self.open.send_modify(|open| *open += 1);
    }

    /// Waits until all lanes are open.
    pub(super) async fn formed(&self) {
        let all = self.lane_count();
        // The sender lives as long as this does.
        let _ = self.open.subscribe().wait_for(|open| *open == all).await;
    }
}
