//! Which models are wanted, how far each is, and what has to be done next.
//!
//! [`Deployments`] is a plain struct: events and `now` in, [`Effect`]s out. Each effect is answered by exactly one [`Event`] (unless
//! its epoch is abandoned), and the answer leads to the next step, so that nothing is ever forgotten half-way:
//!
//! ```text
//! load ─▶ Recording ─▶ Planning ─▶ Preparing ─▶ Starting ─▶ Linking ─▶ StartingScheduler ─▶ Ready
//!            ▲  (after a restart:       │ any failure, a dead worker, a lost node, unload     │
//!            │   Sweeping first)        └──────────────▶ Stopping ◀───────────────────────────┘
//!            └──── Waiting (backoff) ◀── retry ──┴── give up ─▶ Failed      unloaded ─▶ Forgetting ─▶ gone
//! ```
//!
//! Rules:
//! - An epoch is one attempt to run a deployment. Epochs rise over all deployments and are durable before they are used, so no two
//!   attempts ever share one. No worker of an attempt is started before every node of the one before has stopped its workers, or
//!   is lost; a lost node that comes back is told to stop them.
//! - A first load that fails is an answer to who asked: it is cleaned up and forgotten. What was ready once is wanted: it is tried
//!   again, with growing pauses, and after [`MAX_FAILURES`] failures in [`FAILURE_WINDOW`] it stays failed until somebody loads it again.
//!   The loss of a node explains the failures around it: the count begins anew.
//! - A deployment has one or several replicas, on different nodes, each with attempts of its own. They are loaded and unloaded together.
//! - What nobody asked for as long as its wish says is unloaded, and so is what was not used for longest when a load may make room: never
//!   what is pinned, and never before its running requests have finished (`keeping`).
//! - What fits no longer because a node is gone is tried again when the nodes change.

mod adapters;
mod back;
mod entry;
mod forward;
mod keeping;
mod machine;
mod name;
mod replicas;
mod retry;

pub use adapters::{AdapterView, AdapterWish, MAX_ADAPTERS};
pub use machine::{Deployments, Loaded};
pub use name::{
    check_adapter_name, check_name, default_adapter_name, default_name, replica_name, replica_of,
};
pub use replicas::MAX_REPLICAS;
pub use retry::{FAILURE_WINDOW, MAX_FAILURES};

use crate::placement::{Guessing, ModelCost, Offer, Wish};
use crate::{Error, NodeId};
use mlxnode_compute::{ByteCount, LayerRange};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Most deployments at a time, failed ones included.
pub const MAX_DEPLOYMENTS: usize = 64;

/// Longest prefill chunk of a worker, in tokens: some ten milliseconds of a layer, so that decoding is not held up for long.
pub const PREFILL_CHUNK: usize = 512;

/// A model that somebody wants on the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentWish {
    /// What clients write into `model`.
    pub name: String,
    /// A folder, a Hugging Face id, or "demo".
    pub source: String,
    /// Where and how large.
    #[serde(flatten)]
    pub wish: Wish,
    /// What changes it for the requests that ask for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")] // records of before there were adapters
    pub adapters: Vec<AdapterWish>,
    /// Complete copies, on different nodes; 0 means 1.
    #[serde(default)]
    pub replicas: usize,
    /// Stays until somebody unloads it, whatever others need.
    #[serde(default)]
    pub is_pinned: bool,
    /// Is unloaded when nobody asked for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    /// When it does not fit, others may be unloaded that were not used for longest. Only for the first time.
    #[serde(skip)]
    pub makes_room: bool,
}

/// A durable decision. Replayed in order; the last one about a name counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// Wanted, and attempted under this epoch.
    Wanted {
        /// What.
        deployment: DeploymentWish,
        /// Of the attempt.
        epoch: u64,
    },
    /// Epochs up to this one are used up. Stands in snapshots, where the records that used them are gone.
    Epochs {
        /// The highest.
        used: u64,
    },
    /// An adapter is wanted beside a deployment.
    AdapterAdded {
        /// The deployment.
        name: String,
        /// What.
        adapter: AdapterWish,
    },
    /// It is not any more.
    AdapterRemoved {
        /// The deployment.
        name: String,
        /// The adapter's name.
        adapter: String,
    },
    /// Not wanted any more.
    Removed {
        /// Which.
        name: String,
        /// Highest epoch that it had.
        epoch: u64,
    },
}

/// What a worker must know of its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which layers.
    pub layers: LayerRange,
    /// Layers of the whole model.
    pub layer_count: usize,
    /// Longest sequence, in tokens.
    pub context_tokens: usize,
    /// Sequences at the same time.
    pub max_sequences: usize,
    /// Longest prefill chunk, in tokens.
    pub prefill_chunk: usize,
    /// Memory for blocks of prompts; 0: none are kept.
    pub prompts: ByteCount,
    /// How tokens are guessed ahead; on the first stage only.
    pub guessing: Option<Guessing>,
}

/// A worker that has loaded its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartedWorker {
    /// HOST:PORT of its own listener, as its neighbours reach it.
    pub address: String,
    /// SHA-256 of its public key.
    pub key_pin: [u8; 32],
    /// Its process.
    pub pid: u32,
    /// What it loaded.
    pub weights: ByteCount,
}

/// Who a worker talks to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Links {
    /// Address and key of the stage after this one; for the last stage the first one. `None` when one stage does all.
    pub next: Option<(String, [u8; 32])>,
    /// The stage before, likewise.
    pub previous: Option<(String, [u8; 32])>,
    /// The nodes that may drive it: that of the scheduler.
    pub drivers: Vec<NodeId>,
}

/// Names one attempt. Everything that is done for it, and every answer, carries this.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    /// The deployment.
    pub name: String,
    /// Its epoch.
    pub epoch: u64,
}

/// What has to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Make a decision durable. Answered by [`Event::Recorded`].
    Record {
        /// Whose.
        attempt: Attempt,
        /// What.
        record: Record,
    },
    /// After a restart: end what any node still runs of this deployment from epochs below the attempt's. Answered by [`Event::Swept`].
    Sweep {
        /// Below this one.
        attempt: Attempt,
    },
    /// Read what the model costs and what the nodes offer. Answered by [`Event::Weighed`].
    Weigh {
        /// For.
        attempt: Attempt,
        /// Which model.
        source: String,
        /// Which draft model beside it.
        draft: Option<String>,
    },
    /// Get the model onto a node. Answered by [`Event::Prepared`].
    Prepare {
        /// For.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// Which model.
        source: String,
        /// Which draft model beside it.
        draft: Option<String>,
    },
    /// Start a worker and load its shard. Answered by [`Event::Started`].
    Start {
        /// For.
        attempt: Attempt,
        /// Number of the stage.
        stage: usize,
        /// Where.
        node: NodeId,
        /// Which model.
        source: String,
        /// Which part.
        shard: Shard,
    },
    /// Tell a worker its neighbours. Answered by [`Event::Linked`].
    Link {
        /// For.
        attempt: Attempt,
        /// Number of the stage.
        stage: usize,
        /// Where.
        node: NodeId,
        /// Which of the node's workers.
        pid: u32,
        /// Whom.
        links: Links,
    },
    /// Read an adapter into the attempt's workers on a node. Answered by [`Event::AdapterLoaded`].
    LoadAdapter {
        /// For.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// Which.
        adapter: AdapterWish,
    },
    /// Take it out of them. Answered by [`Event::AdapterUnloaded`].
    UnloadAdapter {
        /// For.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// What they call it: [`AdapterWish::key`].
        adapter: String,
    },
    /// Make a decision about an adapter durable. Answered by [`Event::AdapterRecorded`].
    RecordAdapter {
        /// Of which deployment.
        name: String,
        /// Its name.
        adapter: String,
        /// What.
        record: Record,
    },
    /// The load or unload of an adapter is over: tell who waits for it. Not answered.
    AdapterSettled {
        /// Of which deployment.
        name: String,
        /// The adapter's name.
        adapter: String,
        /// Done, or why not.
        result: Result<(), Error>,
    },
    /// Ask the scheduler how busy it is. Answered by [`Event::Used`].
    AskUsage {
        /// Of.
        attempt: Attempt,
        /// Where.
        node: NodeId,
    },
    /// Take no further requests, and let those that run and wait finish. Answered by [`Event::Drained`].
    Drain {
        /// Of.
        attempt: Attempt,
        /// Where.
        node: NodeId,
    },
    /// Start the scheduler beside the first stage. Answered by [`Event::SchedulerStarted`].
    StartScheduler {
        /// For.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// Which model.
        source: String,
        /// Sequences of the greatest length for which memory is reserved.
        max_sequences: usize,
        /// Longest sequence, in tokens.
        context_tokens: usize,
        /// What each takes whatever its length, in tokens of a whole context.
        fixed_tokens: usize,
    },
    /// Give up what is under way for this attempt (but not records and stops): none of its answers counts any more. Not answered.
    Abandon {
        /// Which.
        attempt: Attempt,
    },
    /// End the deployment's workers and scheduler of epochs up to the attempt's on a node. Answered by [`Event::Stopped`].
    Stop {
        /// Up to this one.
        attempt: Attempt,
        /// Where.
        node: NodeId,
    },
    /// A load is over: tell who waits for it. Not answered.
    Settled {
        /// Which deployment.
        name: String,
        /// Ready, or why not.
        result: Result<(), Error>,
    },
    /// An unload is over: tell who waits for it. Not answered.
    Gone {
        /// Which deployment.
        name: String,
        /// Gone, or why not.
        result: Result<(), Error>,
    },
}

/// What was done, or happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Answers [`Effect::Record`].
    Recorded {
        /// Whose.
        attempt: Attempt,
        /// Durable, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::Sweep`].
    Swept {
        /// Whose.
        attempt: Attempt,
        /// The nodes that run nothing older any more. Others are told when they are back, or when a plan needs them.
        nodes: Vec<NodeId>,
    },
    /// Answers [`Effect::Weigh`].
    Weighed {
        /// Whose.
        attempt: Attempt,
        /// What the model costs, and what the nodes offer at the time of the answer (`used` without the deployments).
        result: Result<(ModelCost, Vec<Offer>), Error>,
    },
    /// Answers [`Effect::Prepare`].
    Prepared {
        /// Whose.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// A fingerprint of config and tensor index, equal on nodes that hold the same model.
        result: Result<Vec<u8>, Error>,
    },
    /// Answers [`Effect::Start`].
    Started {
        /// Whose.
        attempt: Attempt,
        /// Number of the stage.
        stage: usize,
        /// The worker, or why there is none.
        result: Result<StartedWorker, Error>,
    },
    /// Answers [`Effect::Link`].
    Linked {
        /// Whose.
        attempt: Attempt,
        /// Number of the stage.
        stage: usize,
        /// Done, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::LoadAdapter`].
    AdapterLoaded {
        /// Whose.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// The adapter's name.
        adapter: String,
        /// The memory that it takes there, or why it is not loaded.
        result: Result<ByteCount, Error>,
    },
    /// Answers [`Effect::UnloadAdapter`].
    AdapterUnloaded {
        /// Whose.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// What the workers called it.
        adapter: String,
        /// Done, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::RecordAdapter`].
    AdapterRecorded {
        /// Of which deployment.
        name: String,
        /// The adapter's name.
        adapter: String,
        /// Durable, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::AskUsage`].
    Used {
        /// Whose.
        attempt: Attempt,
        /// How busy it is, or why that is not known.
        result: Result<Usage, Error>,
    },
    /// Answers [`Effect::Drain`].
    Drained {
        /// Whose.
        attempt: Attempt,
        /// Nothing runs any more, or that is not known.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::StartScheduler`].
    SchedulerStarted {
        /// Whose.
        attempt: Attempt,
        /// Done, or why not.
        result: Result<(), Error>,
    },
    /// Answers [`Effect::Stop`].
    Stopped {
        /// Whose.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// Gone, or why that is not known.
        result: Result<(), Error>,
    },
    /// A worker's process ended.
    WorkerEnded {
        /// Whose.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// Its process.
        pid: u32,
        /// "ended with signal 9", "ended with status 1: …".
        reason: String,
    },
    /// A node is dead.
    NodeLost {
        /// Which.
        node: NodeId,
    },
    /// A node is there (again).
    NodeJoined {
        /// Which.
        node: NodeId,
    },
}

/// How busy a replica is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests that run or wait.
    pub busy: usize,
    /// Since the last one ended, when there is none.
    pub idle: Duration,
}

/// How far a deployment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// On its way to ready for the first time.
    Loading,
    /// Takes requests.
    Ready,
    /// Was ready; a part was lost and is being replaced.
    Recovering,
    /// Not running, and nothing is being done about it (except waiting for a node, if its detail says so).
    Failed,
    /// On its way out.
    Unloading,
}

/// A replica of a deployment, for those who look.
#[derive(Clone, Debug, PartialEq)]
pub struct DeploymentView {
    /// What clients write into `model`.
    pub name: String,
    /// Which of the deployment's replicas: 1, 2, …
    pub replica: usize,
    /// How many it has.
    pub replicas: usize,
    /// Stays until somebody unloads it.
    pub is_pinned: bool,
    /// Is unloaded when nobody asked for so long.
    pub ttl: Option<Duration>,
    /// Where the weights come from.
    pub source: String,
    /// Of the present attempt.
    pub epoch: u64,
    /// How far it is.
    pub state: State,
    /// What it is doing or why it is so, in words; may be empty.
    pub detail: String,
    /// By layers; empty while there is no plan.
    pub stages: Vec<StageView>,
    /// The node whose scheduler takes requests; while ready.
    pub scheduler: Option<NodeId>,
    /// The model's family; empty while there is no plan.
    pub architecture: String,
    /// Longest sequence in tokens; 0 while there is no plan.
    pub context_tokens: usize,
    /// Sequences at the same time; 0 while there is no plan.
    pub max_sequences: usize,
    /// What changes it for the requests that ask for it, by name.
    pub adapters: Vec<AdapterView>,
    /// How tokens are guessed ahead; `None`: they are not.
    pub guessing: Option<Guessing>,
}

impl DeploymentView {
    /// What nodes call this replica: [`replica_name`].
    pub fn instance(&self) -> String {
        replica_name(&self.name, self.replica)
    }
}

/// One worker's part of a deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageView {
    /// Where.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// Which layers.
    pub layers: LayerRange,
    /// Bytes of the weights.
    pub weights: ByteCount,
    /// Bytes reserved for the KV cache.
    pub kv: ByteCount,
    /// All memory that the stage takes of its node's budget.
    pub memory: ByteCount,
    /// The worker's process, while there is one.
    pub pid: Option<u32>,
}
