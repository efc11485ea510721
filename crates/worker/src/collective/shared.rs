//! What the network side and the trainer's side of a worker hold on to together: the member, and what follows from it.

use super::client::GroupPeer;
use super::endpoint::CollectiveOptions;
use super::outbox::Outbox;
use super::peers;
use crate::error::shortened;
use crate::job::Waited;
use mlxnode_cluster::{AccessList, Identity, KeyPin, Role};
use mlxnode_collective::{Answer, Formation, Frame, Member, MemberEffect, MemberId, Report};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

/// Reports that the node has not read yet: a few a step.
const MOST_REPORTS: usize = 4096;
/// Frames on their way to one member: the pieces of one step's parts, their sums and one whole sum. A gradient of 16 GiB has 16 384.
const MOST_FRAMES: usize = 1 << 20;

/// Where a member is, for those who wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// The formation under way.
    pub(super) running: Option<u64>,
    /// The newest epoch that it has heard of.
    pub(super) newest: u64,
    /// The epoch whose state is written here for others.
    pub(super) saved: Option<u64>,
}

/// One worker of a group.
pub(super) struct Shared {
    pub(super) me: MemberId,
    pub(super) parent: KeyPin,
    pub(super) options: CollectiveOptions,
    pub(super) identity: Arc<Identity>,
    pub(super) access: Arc<AccessList>,
    pub(super) reports: Outbox<Report>,
    pub(super) standing: watch::Sender<Standing>,
    pub(super) runtime: Handle,
    /// Cancelled when it does not belong to the group any more.
    pub(super) gone: CancellationToken,
    /// Ends everything.
    pub(super) end: CancellationToken,
    pub(super) tasks: TaskTracker,
    /// Connections to other members, which outlive formations.
    pub(super) channels: Mutex<HashMap<KeyPin, Channel>>,
    pub(super) answered: Condvar,
    /// By the trainer.
    pub(super) waited: Waited,
    inner: Mutex<Inner>,
}

/// What changes together.
#[derive(Default)]
pub(super) struct Inner {
    /// There once the trainer is.
    pub(super) member: Option<Member>,
    pub(super) answer: Option<Answer>,
    /// Why it does not belong to its group any more.
    pub(super) left: Option<String>,
    pub(super) peers: BTreeMap<MemberId, GroupPeer>,
    /// Ends the streams of the formation under way.
    pub(super) formation_end: CancellationToken,
    outboxes: BTreeMap<MemberId, Arc<Outbox<Frame>>>,
    /// Members whose stream of this formation has come.
    pub(super) arrived: BTreeSet<MemberId>,
    /// Where the trainer writes its state.
    pub(super) saving: Option<PathBuf>,
    /// The state that was written for others, for the epoch of [`Standing::saved`].
    pub(super) saved: Option<PathBuf>,
    /// The state that was fetched.
    pub(super) fetched: Option<PathBuf>,
}

impl Shared {
    pub(super) fn new(
        me: MemberId,
        parent: KeyPin,
        options: CollectiveOptions,
        identity: Arc<Identity>,
        runtime: Handle,
    ) -> Self {
        Self {
            me,
            parent,
            options,
            identity,
            access: Arc::new(AccessList::new([(parent, Role::Parent)])),
            reports: Outbox::new(MOST_REPORTS),
            standing: watch::Sender::new(Standing::default()),
            runtime,
            gone: CancellationToken::new(),
            end: CancellationToken::new(),
            tasks: TaskTracker::new(),
            channels: Mutex::default(),
            answered: Condvar::new(),
            waited: Waited::default(),
            inner: Mutex::default(),
        }
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the member hear an event, and carries out what follows before the next event can come.
    pub(super) fn tell(self: &Arc<Self>, event: impl FnOnce(&mut Member) -> Vec<MemberEffect>) {
        let mut inner = self.inner();
        if let Some(member) = &mut inner.member {
            let effects = event(member);
            self.carry_out(&mut inner, effects);
        }
    }

    /// It does not belong to the group any more. The trainer learns it from its next, or its present, call.
    pub(super) fn leave(&self, reason: &str) {
        self.leave_with(&mut self.inner(), reason);
    }

    fn leave_with(&self, inner: &mut Inner, reason: &str) {
        inner.left.get_or_insert_with(|| reason.to_owned());
        inner.formation_end.cancel();
        self.gone.cancel();
        self.answered.notify_all();
    }

    /// The node's order: a new formation, and where its members are.
    pub(super) fn form(self: &Arc<Self>, formation: Formation, peers: BTreeMap<MemberId, GroupPeer>) {
        let mut inner = self.inner();
        if inner.member.as_ref().is_none_or(|member| formation.epoch < member.epoch()) {
            return;
        }
        let others = peers.iter().filter(|(member, _)| **member != self.me);
        let pins: BTreeSet<_> = others.map(|(_, peer)| peer.key_pin).collect();
        let gone = inner.peers.values().map(|peer| peer.key_pin).filter(|pin| !pins.contains(pin));
        {
            let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
            gone.for_each(|pin| drop(channels.remove(&pin)));
        }
        self.access.replace(Role::Neighbour, pins);
        inner.peers = peers;
        let Some(member) = &mut inner.member else { return };
        let effects = member.form(formation);
        self.carry_out(&mut inner, effects);
    }

    pub(super) fn carry_out(self: &Arc<Self>, inner: &mut Inner, effects: Vec<MemberEffect>) {
        for effect in effects {
            match effect {
                MemberEffect::Send { to, frame } => {
                    let is_sent = inner.outboxes.get(&to).is_none_or(|outbox| outbox.push(frame));
                    if !is_sent {
                        self.leave_with(inner, &format!("worker {to} takes no gradients"));
                    }
                }
                MemberEffect::Report(report) => {
                    if !self.reports.push(report) {
                        self.leave_with(inner, "the node does not read what is reported");
                    }
                }
                MemberEffect::Formed { epoch, peers } => self.open_streams(inner, epoch, &peers),
                MemberEffect::Dissolved => {
                    inner.formation_end.cancel();
                    inner.outboxes.clear();
                }
                MemberEffect::Fetch { epoch, from } => self.fetch(inner, epoch, from),
                MemberEffect::Saved { epoch } => {
                    inner.saved = inner.saving.take();
                    self.standing.send_modify(|standing| standing.saved = Some(epoch));
                }
                MemberEffect::Answer(answer) => {
                    inner.answer = Some(answer);
                    self.answered.notify_all();
                }
            }
        }
        let Some(member) = &inner.member else { return };
        let (running, newest) = (member.running_epoch(), member.epoch());
        self.standing.send_if_modified(|standing| {
            let saved = standing.saved.filter(|saved| running == Some(*saved));
            let now = Standing { running, newest, saved };
            std::mem::replace(standing, now) != now
        });
    }

    fn open_streams(self: &Arc<Self>, inner: &mut Inner, epoch: u64, peers: &[MemberId]) {
        inner.formation_end.cancel();
        inner.formation_end = self.end.child_token();
        inner.arrived.clear();
        inner.outboxes.clear();
        for &peer in peers {
            let Some(target) = inner.peers.get(&peer).cloned() else { continue };
            let outbox = Arc::new(Outbox::new(MOST_FRAMES));
            inner.outboxes.insert(peer, outbox.clone());
            let (shared, end) = (self.clone(), inner.formation_end.clone());
            let streaming = async move {
                tokio::select! {
                    () = end.cancelled() => {}
                    reason = peers::send(&shared, epoch, &target, outbox) => {
                        let reason = shortened(&reason);
                        shared.tell(|member| member.broken(epoch, peer, reason));
                    }
                }
            };
            self.tasks.spawn_on(streaming, &self.runtime);
        }
    }

    fn fetch(self: &Arc<Self>, inner: &mut Inner, epoch: u64, from: MemberId) {
        let Some(target) = inner.peers.get(&from).cloned() else { return };
        let (shared, end) = (self.clone(), inner.formation_end.clone());
        let fetching = async move {
            tokio::select! {
                () = end.cancelled() => {}
                fetched = peers::fetch(&shared, epoch, &target) => match fetched {
                    Ok(folder) => {
                        shared.inner().fetched = Some(folder);
                        shared.tell(|member| member.state_arrived(epoch));
                    }
                    Err(reason) => {
                        let reason = shortened(&reason);
                        shared.tell(|member| member.broken(epoch, from, reason));
                    }
                }
            }
        };
        self.tasks.spawn_on(fetching, &self.runtime);
    }

    /// Waits until the formation of `epoch` is under way here.
    ///
    /// # Errors
    /// With the newest epoch, when that one is over.
    pub(super) async fn until_running(&self, epoch: u64) -> Result<(), u64> {
        self.until(epoch, |standing| standing.running == Some(epoch)).await
    }

    /// Waits until the state for the formation of `epoch` is written here.
    ///
    /// # Errors
    /// As [`Self::until_running`].
    pub(super) async fn until_saved(&self, epoch: u64) -> Result<(), u64> {
        self.until(epoch, |standing| standing.saved == Some(epoch)).await
    }

    async fn until(&self, epoch: u64, is_there: impl Fn(&Standing) -> bool) -> Result<(), u64> {
        let mut standing = self.standing.subscribe();
        let decided = |standing: &Standing| is_there(standing) || standing.newest > epoch;
        match standing.wait_for(decided).await {
            Ok(standing) if is_there(&standing) => Ok(()),
            Ok(standing) => Err(standing.newest),
            Err(_) => Err(epoch),
        }
    }
}
