//! What the coordinator asks of the nodes. The node crate carries it out: over gRPC on other nodes, directly on its own.

use super::progress::ProgressSink;
use crate::deployments::{AdapterWish, Attempt, Links, Shard, StartedWorker, Usage};
use crate::placement::{ModelCost, Offer};
use crate::{Error, NodeId};
use futures::future::BoxFuture;
use mlxnode_checkpoint::TrainingCost;
use mlxnode_compute::ByteCount;

/// The nodes of the cluster, as the coordinator gives them orders.
///
/// Every order names an [`Attempt`], the fence: a node refuses what is older than the newest epoch that it has seen for the
/// deployment. Orders may be given up by dropping their future; what they began is then undone by [`Nodes::stop_workers`].
/// The coordinator bounds each of them in time.
pub trait Nodes: Send + Sync + 'static {
    /// What the nodes that are alive offer now. `used` is what is used by others than the cluster's deployments: those the
    /// coordinator adds itself, from its plans.
    fn offers(&self) -> Vec<Offer>;

    /// What a model costs, from its config and tensor index (fetched, if need be; not the weights).
    fn weigh(&self, source: String) -> BoxFuture<'static, Result<ModelCost, Error>>;

    /// What training a model costs, likewise.
    fn weigh_training(&self, source: String) -> BoxFuture<'static, Result<TrainingCost, Error>>;

    /// Gets the model onto a node. Answers with a fingerprint of config and tensor index, equal on nodes that hold the same model.
    fn prepare(
        &self,
        node: NodeId,
        source: String,
        progress: ProgressSink,
    ) -> BoxFuture<'static, Result<Vec<u8>, Error>>;

    /// Starts a worker and loads its shard.
    fn start_worker(
        &self,
        node: NodeId,
        order: StartWorker,
        progress: ProgressSink,
    ) -> BoxFuture<'static, Result<StartedWorker, Error>>;

    /// Tells a worker its neighbours.
    fn link_worker(&self, node: NodeId, order: LinkWorker) -> BoxFuture<'static, Result<(), Error>>;

    /// Starts the replica's scheduler, beside the worker of its first stage.
    fn start_scheduler(&self, node: NodeId, order: StartScheduler) -> BoxFuture<'static, Result<(), Error>>;

    /// Reads an adapter into the attempt's workers on a node, in place of an earlier one of its name. Answers with the memory that it takes. Refused when
    /// that is more than there is.
    fn load_adapter(&self, node: NodeId, order: LoadAdapter) -> BoxFuture<'static, Result<ByteCount, Error>>;

    /// Takes an adapter out of the attempt's workers on a node. One that is not there is fine.
    fn unload_adapter(
        &self,
        node: NodeId,
        attempt: Attempt,
        adapter: String,
    ) -> BoxFuture<'static, Result<(), Error>>;

    /// How busy the attempt's scheduler on a node is.
    fn usage(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<Usage, Error>>;

    /// Has the attempt's scheduler take no further requests; done when those that it has have ended.
    fn drain(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<(), Error>>;

    /// Ends the deployment's workers and its scheduler on a node, those of epochs up to the attempt's, and waits until they are
    /// gone. A start of such an epoch that is under way or comes later must fail.
    fn stop_workers(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<(), Error>>;
}

/// An order to start a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartWorker {
    /// For which attempt.
    pub attempt: Attempt,
    /// Of which model.
    pub source: String,
    /// Which part.
    pub shard: Shard,
}

/// An order to link a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkWorker {
    /// For which attempt.
    pub attempt: Attempt,
    /// Which of the node's workers.
    pub pid: u32,
    /// Whom to.
    pub links: Links,
}

/// Reads an adapter beside a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadAdapter {
    /// Whose workers.
    pub attempt: Attempt,
    /// Which.
    pub adapter: AdapterWish,
    /// What all adapters of the deployment may take of the node.
    pub room: ByteCount,
}

/// An order to start a scheduler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartScheduler {
    /// For which attempt.
    pub attempt: Attempt,
    /// Of which model: the scheduler's node hands out its text files.
    pub source: String,
    /// Sequences of the greatest length for which memory is reserved.
    pub max_sequences: usize,
    /// Longest sequence, in tokens.
    pub context_tokens: usize,
    /// What each takes whatever its length, in tokens of a whole context.
    pub fixed_tokens: usize,
}
