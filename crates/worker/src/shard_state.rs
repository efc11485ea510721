//! A worker's way from empty to linked, and the tasks that run once it is.
//!
//! ```text
//! Empty ──Load──▶ Loading ──weights there──▶ Loaded ──SetLinks──▶ Linked        (each once, in this order)
//! ```
//!
//! [`ShardState`] owns the tasks: it ends them when the worker's lifeline ends.

use crate::compute_thread::{self, LoadShard, StageFactory};
use crate::drive::driver::{Driver, Limits};
use crate::drive::session::{self, Ring, Session};
use crate::errand::{Errands, Order};
use crate::error::{Fault, Side};
use crate::lifeline::Lifeline;
use crate::link::{
    self, CreditLedger, Direction, LinkPlan, LinkTarget, OUTBOX_MESSAGES, Received, WINDOW_FRAMES,
};
use crate::message::Message;
use crate::progress::Progress;
use mlxnode_cluster::{AccessList, Identity, KeyPin, Role};
use mlxnode_compute::{SpanSink, StageInfo};
use mlxnode_proto::internal::v1 as proto;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::Stream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::info;

/// One shard of a replica, as the services see it.
pub(crate) struct ShardState {
    pub(crate) parent: KeyPin,
    pub(crate) access: Arc<AccessList>,
    pub(crate) progress: Arc<Progress>,
    identity: Arc<Identity>,
    link_deadline: Duration,
    lifeline: Lifeline,
    tasks: TaskTracker,
    contents: Mutex<Contents>,
    /// Cancelled when the previous stage has linked.
    previous_linked: CancellationToken,
    /// Where spans of requests go.
    spans: Option<Arc<dyn SpanSink>>,
}

#[derive(Default)]
struct Contents {
    factory: Option<StageFactory>,
    /// The thread's ends, from the start of loading until the links take them.
    inbox: Option<mpsc::Sender<Received>>,
    outbox: Option<mpsc::Receiver<Message>>,
    dropped: Option<oneshot::Receiver<()>>,
    errands: Option<Errands>,
    loaded: Option<LoadedShard>,
    links: Option<Links>,
}

/// Facts about the shard once its weights are there.
#[derive(Clone)]
pub(crate) struct LoadedShard {
    pub(crate) info: StageInfo,
    pub(crate) shard: LoadShard,
    pub(crate) epoch: u64,
}

struct Links {
    previous: Option<(KeyPin, LinkEnd)>,
    drivers: HashSet<KeyPin>,
    /// First stage only.
    sessions: Option<mpsc::Sender<Session>>,
}

/// Where the previous stage's messages go.
pub(crate) struct LinkEnd {
    pub(crate) plan: LinkPlan,
    pub(crate) inbox: mpsc::Sender<Received>,
}

/// A load under way.
pub(crate) struct Loading {
    pub(crate) progress: watch::Receiver<(u64, u64)>,
    pub(crate) loaded: oneshot::Receiver<Result<StageInfo, Fault>>,
}

impl ShardState {
    pub(crate) fn new(
        parent: KeyPin,
        identity: Arc<Identity>,
        factory: StageFactory,
        link_deadline: Duration,
        lifeline: Lifeline,
    ) -> Self {
        Self {
            parent,
            access: Arc::new(AccessList::new([(parent, Role::Parent)])),
            progress: Arc::new(Progress::new()),
            identity,
            link_deadline,
            lifeline,
            tasks: TaskTracker::new(),
            contents: Mutex::new(Contents { factory: Some(factory), ..Contents::default() }),
            previous_linked: CancellationToken::new(),
            spans: None,
        }
    }

    /// With a place for spans of requests.
    pub(crate) fn telling(self, spans: Option<Arc<dyn SpanSink>>) -> Self {
        Self { spans, ..self }
    }

    /// Runs `task` until it is through or the worker ends.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let ended = self.lifeline.token().clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = ended.cancelled() => {}
            }
        });
    }

    /// Runs `task`, which watches the lifeline itself because it has something to say at the end.
    pub(crate) fn spawn_to_the_end(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Why the worker is ending, for whoever still listens.
    pub(crate) fn last_words(&self) -> String {
        self.lifeline.last_words()
    }

    /// Resolves when the worker begins to end.
    pub(crate) fn ending(&self) -> WaitForCancellationFutureOwned {
        self.lifeline.token().clone().cancelled_owned()
    }

    /// As [`Self::spawn`], for what ends only by a fault.
    fn spawn_until_fault(&self, task: impl Future<Output = Fault> + Send + 'static) {
        let lifeline = self.lifeline.clone();
        self.spawn(async move { lifeline.fail(task.await) });
    }

    pub(crate) fn begin_load(&self, shard: LoadShard) -> Result<Loading, Status> {
        let mut contents = self.contents();
        let factory = contents.factory.take();
        let factory =
            factory.ok_or_else(|| Status::failed_precondition("this worker has been given its shard"))?;
        // Whatever the driver can have under way fits, see `Driver`: an open and a close for each sequence, and few batches.
        let inbox_messages = WINDOW_FRAMES as usize + 4 * shard.max_sequences;
        let thread = compute_thread::spawn(
            factory,
            shard,
            inbox_messages,
            OUTBOX_MESSAGES,
            self.progress.clone(),
            self.lifeline.clone(),
            self.spans.clone(),
        )
        .map_err(|error| Status::internal(format!("cannot start the compute thread: {error}")))?;
        contents.inbox = Some(thread.inbox);
        contents.outbox = Some(thread.outbox);
        contents.dropped = Some(thread.dropped);
        contents.errands = Some(thread.errands);
        Ok(Loading { progress: thread.loading, loaded: thread.loaded })
    }

    pub(crate) fn loaded(&self, loaded: LoadedShard) {
        info!(layers = %loaded.info.layers, weights = %loaded.info.weights, epoch = loaded.epoch, "shard loaded");
        self.contents().loaded = Some(loaded);
    }

    pub(crate) fn set_links(&self, links: proto::WorkerLinks) -> Result<(), Status> {
        let mut contents = self.contents();
        if contents.links.is_some() {
            return Err(Status::failed_precondition("the links of this worker are set already"));
        }
        let loaded = contents.loaded.clone();
        let loaded = loaded.ok_or_else(|| Status::failed_precondition("the shard is not loaded yet"))?;
        let (is_first, is_last) = (loaded.info.is_first(), loaded.info.is_last());
        let next = links.next.map(|next| neighbour("next", next)).transpose()?;
        let previous = links.previous.map(|previous| neighbour("previous", previous)).transpose()?;
        let alone = is_first && is_last;
        if next.is_some() == alone || previous.is_some() == alone {
            return Err(Status::invalid_argument(if alone {
                "a stage that holds all layers has no neighbours"
            } else {
                "a stage that holds a part of the layers needs the next and the previous stage"
            }));
        }
        let drivers = links.drivers.iter().map(|pin| pin_of("drivers", pin));
        let drivers = drivers.collect::<Result<HashSet<_>, _>>()?;
        if is_first && drivers.is_empty() {
            return Err(Status::invalid_argument("nobody may drive the first stage"));
        }
        let (Some(inbox), Some(outbox)) = (contents.inbox.take(), contents.outbox.take()) else {
            return Err(Status::failed_precondition("the compute thread has ended"));
        };

        let mut sessions = None;
        let mut previous_end = None;
        let ring = if let (Some(next), Some((_, previous_pin))) = (next, previous) {
            let target = LinkTarget { address: next.0, pin: next.1, deadline: self.link_deadline };
            let (identity, end) = (self.identity.clone(), self.lifeline.token().clone());
            self.spawn_until_fault(link::send(
                target,
                identity,
                loaded.epoch,
                outbox,
                self.progress.clone(),
                end,
            ));
            self.expect_previous();
            let (ring_inbox, ring) = mpsc::channel(WINDOW_FRAMES as usize);
            let inbox = if is_first { ring_inbox } else { inbox.clone() };
            previous_end = Some((previous_pin, LinkEnd { plan: plan_of(&loaded, is_first), inbox }));
            self.access.allow(previous_pin, Role::Neighbour);
            Ring::Link(ring)
        } else {
            Ring::Local(outbox)
        };
        if is_first {
            let (newcomers, incoming) = mpsc::channel(1);
            let driver = Driver::new(Limits {
                context_tokens: loaded.shard.context_tokens,
                max_sequences: loaded.shard.max_sequences,
                prefill_chunk: loaded.shard.prefill_chunk,
                vocabulary: loaded.info.vocabulary,
            });
            // Not through `spawn`: it ends by itself, after it has told the scheduler what was lost.
            self.tasks.spawn(session::run(driver, inbox, ring, incoming, self.lifeline.clone()));
            for driver in drivers.iter().filter(|pin| **pin != self.parent) {
                self.access.allow(*driver, Role::Driver);
            }
            sessions = Some(newcomers);
        }
        contents.links = Some(Links { previous: previous_end, drivers, sessions });
        Ok(())
    }

    /// Has the compute thread do something for the node, once the shard is loaded.
    pub(crate) async fn errand(&self, order: Order) -> Result<(), Status> {
        let errands = {
            let contents = self.contents();
            contents.errands.clone().filter(|_| contents.loaded.is_some())
        };
        let errands = errands.ok_or_else(|| Status::failed_precondition("the shard is not loaded yet"))?;
        errands.run(order).await
    }

    /// The end of the link for the key `pin`, once.
    pub(crate) fn take_link(&self, pin: KeyPin) -> Result<LinkEnd, Status> {
        let mut contents = self.contents();
        let links = contents.links.as_mut();
        let links =
            links.ok_or_else(|| Status::failed_precondition("the links of this worker are not set yet"))?;
        match links.previous.take() {
            Some((expected, end)) if expected == pin => Ok(end),
            other => {
                links.previous = other;
                Err(Status::permission_denied(
                    "only the previous stage may link to this worker, and only once",
                ))
            }
        }
    }

    /// Starts to receive from the previous stage. What comes back are its credits.
    pub(crate) fn receive_link(
        &self,
        frames: impl Stream<Item = Result<proto::Frame, Status>> + Unpin + Send + 'static,
        plan: LinkPlan,
        inbox: mpsc::Sender<Received>,
    ) -> mpsc::Receiver<Result<proto::Credit, Status>> {
        self.previous_linked.cancel();
        let (replies, credits) = mpsc::channel(4);
        let ledger = CreditLedger::open(WINDOW_FRAMES, replies.clone());
        let lifeline = self.lifeline.clone();
        self.spawn_to_the_end(async move {
            tokio::select! {
                fault = link::receive(frames, plan, ledger, replies.clone(), inbox) => lifeline.fail(fault),
                () = lifeline.token().cancelled() => {
                    // The previous stage, and whoever reads its log, learns the cause and not just the end.
                    let _ = replies.try_send(Err(Status::unavailable(lifeline.last_words())));
                }
            }
        });
        credits
    }

    /// Where a scheduler with the key `pin` reports.
    pub(crate) fn sessions_for(&self, pin: KeyPin) -> Result<mpsc::Sender<Session>, Status> {
        let contents = self.contents();
        let links = contents.links.as_ref();
        let links =
            links.ok_or_else(|| Status::failed_precondition("the links of this worker are not set yet"))?;
        if !links.drivers.contains(&pin) {
            return Err(Status::permission_denied("this key may not drive this worker"));
        }
        let sessions = links.sessions.clone();
        sessions.ok_or_else(|| Status::failed_precondition("only the first stage of a replica is driven"))
    }

    /// Ends all tasks, drops the stage and waits for both, at most `within`.
    pub(crate) async fn end(&self, within: Duration) {
        let dropped = {
            let mut contents = self.contents();
            std::mem::take(&mut *contents).dropped // the thread's inbox goes with the rest of the state
        };
        self.tasks.close();
        let deadline = tokio::time::Instant::now() + within;
        let tasks_ended = tokio::time::timeout_at(deadline, self.tasks.wait()).await.is_ok();
        let stage_dropped = match dropped {
            Some(dropped) => tokio::time::timeout_at(deadline, dropped).await.is_ok(),
            None => true,
        };
        if !tasks_ended || !stage_dropped {
            tracing::warn!(tasks_ended, stage_dropped, "ending while a step is still under way");
        }
    }

    fn expect_previous(&self) {
        let (linked, deadline) = (self.previous_linked.clone(), self.link_deadline);
        let lifeline = self.lifeline.clone();
        self.spawn(async move {
            if tokio::time::timeout(deadline, linked.cancelled()).await.is_err() {
                let reason = "it did not link to this worker".to_owned();
                lifeline.fail(Fault::NoLink { side: Side::Previous, deadline, reason });
            }
        });
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn plan_of(loaded: &LoadedShard, is_first: bool) -> LinkPlan {
    LinkPlan {
        epoch: loaded.epoch,
        direction: if is_first { Direction::Ring } else { Direction::Down },
        hidden: loaded.info.hidden,
        dtype: loaded.info.dtype,
        most_tokens: loaded.shard.most_tokens(),
        most_rows: loaded.shard.max_sequences,
        context_tokens: loaded.shard.context_tokens,
    }
}

fn neighbour(name: &'static str, neighbour: proto::Neighbour) -> Result<(String, KeyPin), Status> {
    let pin = pin_of(name, &neighbour.key_pin)?;
    if neighbour.address.is_empty() || neighbour.address.len() > 300 {
        return Err(Status::invalid_argument(format!(
            "the {name} stage has no address of the form HOST:PORT"
        )));
    }
    Ok((neighbour.address, pin))
}

fn pin_of(name: &'static str, bytes: &[u8]) -> Result<KeyPin, Status> {
    KeyPin::try_from(bytes).map_err(|error| Status::invalid_argument(format!("{name}: {error}")))
}
