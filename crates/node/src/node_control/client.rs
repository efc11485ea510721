//! The coordinator's arm: gives orders to nodes, to this one directly and to others by `NodeControl`.

use crate::addresses;
use crate::schedulers::{Schedulers, SchedulersError};
use crate::wire;
use crate::workers::{Workers, WorkersError};
use futures::future::BoxFuture;
use mlxnode_api::panorama::{NodeSeen, node_seen};
use mlxnode_checkpoint::{Checkpoint, CheckpointError, ModelProfile, TrainingCost};
use mlxnode_cluster::{MeshHandle, NodeId, PeerState, RosterStore};
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::Error;
use mlxnode_coordinator::coordinator::{
    LinkWorker, LoadAdapter, Nodes, ProgressSink, StartScheduler, StartWorker,
};
use mlxnode_coordinator::deployments::{Attempt, StartedWorker, Usage};
use mlxnode_coordinator::placement::{ModelCost, Offer};
use mlxnode_coordinator::scheduler::Limits;
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::node_control_client::NodeControlClient;
use mlxnode_worker::ProcessError;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// All nodes of the cluster, from the coordinator's.
#[derive(Clone)]
pub(crate) struct ClusterNodes {
    pub(crate) own: NodeId,
    pub(crate) mesh: MeshHandle,
    pub(crate) roster: Arc<RosterStore>,
    pub(crate) workers: Workers,
    pub(crate) schedulers: Schedulers,
    /// Is this node's listener bound to all addresses?
    pub(crate) listens_everywhere: bool,
}

/// What another node does now.
pub(crate) async fn observe(channel: Channel) -> Result<NodeSeen, Status> {
    let figures = NodeControlClient::new(channel).observe(proto::ObserveRequest {}).await?;
    node_seen(figures.into_inner())
}

impl ClusterNodes {
    /// What config and tensor index of a model say; fetched, if need be.
    fn read<T: Send + 'static>(
        &self,
        source: String,
        of: impl FnOnce(&Checkpoint) -> Result<T, CheckpointError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, Error>> {
        let workers = self.workers.clone();
        Box::pin(async move {
            let folder = workers.resolve(&source).await.map_err(|error| super::not_here(&error))?;
            match tokio::task::spawn_blocking(move || of(&Checkpoint::open(&folder)?)).await {
                Ok(Ok(read)) => Ok(read),
                Ok(Err(error)) => Err(Error::Invalid(crate::error::chain(&error))),
                Err(error) => Err(Error::Failed(format!("reading {source} failed: {error}"))),
            }
        })
    }

    /// A node's name, for messages.
    fn name(&self, node: NodeId) -> String {
        let roster = self.roster.current();
        let entry = roster.as_ref().and_then(|signed| signed.roster().get(&node));
        entry.map_or_else(|| node.short(), |entry| entry.name.clone())
    }

    fn client(&self, node: NodeId) -> Result<NodeControlClient<Channel>, Error> {
        let channel = self.mesh.channel(&node);
        let channel =
            channel.ok_or_else(|| Error::Unavailable(format!("{} cannot be reached", self.name(node))))?;
        Ok(NodeControlClient::new(channel))
    }

    /// The worker of another node, under the host where that node itself was reached: a node with several networks does not know
    /// which of its addresses the others can use.
    fn as_reached_from_here(&self, node: NodeId, started: StartedWorker) -> StartedWorker {
        let peers = self.mesh.peers();
        let reached = peers.iter().find(|peer| peer.node_id == node).and_then(|peer| peer.address.as_deref());
        StartedWorker { address: addresses::with_host_of(&started.address, reached), ..started }
    }

    /// The worker of this node, under the address from which this machine talks to the others.
    fn as_peers_reach_it(&self, started: StartedWorker) -> StartedWorker {
        let peers = self.mesh.peers();
        let mut reached = peers.iter().filter_map(|peer| peer.address.as_deref());
        let own = self.listens_everywhere.then(|| reached.find_map(addresses::source_toward)).flatten();
        StartedWorker { address: addresses::with_host_of(&started.address, own.as_deref()), ..started }
    }

    /// What a failed order means. Errors name the node, since people do not see the order.
    fn failure(&self, node: NodeId, status: &Status) -> Error {
        let text = format!("{}: {}", self.name(node), status.message());
        match status.code() {
            Code::NotFound => Error::NotFound(text),
            Code::InvalidArgument => Error::Invalid(text),
            Code::FailedPrecondition => Error::Refused(text),
            Code::DeadlineExceeded => Error::TimedOut(text),
            Code::Unavailable | Code::Cancelled | Code::Unknown => Error::Unavailable(format!(
                "{} does not answer any more ({})",
                self.name(node),
                status.message()
            )),
            _ => Error::Failed(text),
        }
    }

    fn own_failure(&self, error: &WorkersError) -> Error {
        let text = format!("{}: {}", self.name(self.own), crate::error::chain(error));
        match error {
            WorkersError::Stale { .. } | WorkersError::Stopped { .. } | WorkersError::NoRoom { .. } => {
                Error::Refused(text)
            }
            WorkersError::UnknownWorker { .. } | WorkersError::Model(_) | WorkersError::Away(_) => {
                Error::NotFound(text)
            }
            WorkersError::Process(ProcessError::Refused(_)) => Error::Refused(text),
            WorkersError::Process(_) => Error::Failed(text),
        }
    }
}

impl Nodes for ClusterNodes {
    fn offers(&self) -> Vec<Offer> {
        let own = self.mesh.facts();
        let peers = self.mesh.peers();
        let round_trips = |of: NodeId| {
            peers
                .iter()
                .filter(|_| of == self.own)
                .filter_map(|peer| Some((peer.node_id, peer.rtt?)))
                .collect()
        };
        let own = Offer {
            node: self.own,
            name: self.name(self.own),
            budget: ByteCount(own.memory_budget_bytes),
            prompts: ByteCount(own.prompt_cache_bytes),
            used: ByteCount(0),
            bytes_per_second: None,
            coordinator: true,
            round_trips: round_trips(self.own),
        };
        let others = peers.iter().filter(|peer| peer.state == PeerState::Alive).filter_map(|peer| {
            let facts = peer.facts.as_ref()?;
            Some(Offer {
                node: peer.node_id,
                name: peer.name.clone(),
                budget: ByteCount(facts.memory_budget_bytes),
                prompts: ByteCount(facts.prompt_cache_bytes),
                used: ByteCount(0),
                bytes_per_second: None,
                coordinator: false,
                round_trips: round_trips(peer.node_id),
            })
        });
        std::iter::once(own).chain(others).collect()
    }

    fn weigh(&self, source: String) -> BoxFuture<'static, Result<ModelCost, Error>> {
        let read =
            |checkpoint: &Checkpoint| ModelProfile::of(checkpoint).map(|profile| ModelCost::from(&profile));
        self.read(source, read)
    }

    fn weigh_training(&self, source: String) -> BoxFuture<'static, Result<TrainingCost, Error>> {
        self.read(source, TrainingCost::of)
    }

    fn prepare(
        &self,
        node: NodeId,
        source: String,
        progress: ProgressSink,
    ) -> BoxFuture<'static, Result<Vec<u8>, Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let prepared =
                    nodes.workers.prepare(&source, move |done, total| progress.report(done, total)).await;
                return prepared.map(|print| print.to_vec()).map_err(|error| nodes.own_failure(&error));
            }
            let request = proto::PrepareModelRequest { source };
            let failure = |status: Status| nodes.failure(node, &status);
            let mut reports = nodes.client(node)?.prepare_model(request).await.map_err(failure)?.into_inner();
            while let Some(report) = reports.message().await.map_err(failure)? {
                if !report.fingerprint.is_empty() {
                    return Ok(report.fingerprint.to_vec());
                }
                progress.report(ByteCount(report.done_bytes), ByteCount(report.total_bytes));
            }
            Err(Error::Failed(format!("{} stopped preparing the model without a reason", nodes.name(node))))
        })
    }

    fn start_worker(
        &self,
        node: NodeId,
        order: StartWorker,
        progress: ProgressSink,
    ) -> BoxFuture<'static, Result<StartedWorker, Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let report = move |done, total| progress.report(done, total);
                let started = nodes.workers.start(&order.attempt, &order.source, order.shard, report).await;
                let started = started.map_err(|error| nodes.own_failure(&error))?;
                return Ok(nodes.as_peers_reach_it(started));
            }
            let request = proto::StartWorkerRequest {
                fence: wire::fence_to_proto(&order.attempt),
                shard: Some(wire::shard_to_proto(&order.shard)),
                deployment: order.attempt.name,
                source: order.source,
            };
            let failure = |status: Status| nodes.failure(node, &status);
            let mut reports = nodes.client(node)?.start_worker(request).await.map_err(failure)?.into_inner();
            while let Some(report) = reports.message().await.map_err(failure)? {
                if let Some(started) = report.started {
                    let started = wire::started(started).map_err(failure)?;
                    return Ok(nodes.as_reached_from_here(node, started));
                }
                progress.report(ByteCount(report.done_bytes), ByteCount(report.total_bytes));
            }
            Err(Error::Failed(format!("{} stopped starting the worker without a reason", nodes.name(node))))
        })
    }

    fn link_worker(&self, node: NodeId, order: LinkWorker) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let linked = nodes.workers.link(&order.attempt, order.pid, order.links).await;
                return linked.map_err(|error| nodes.own_failure(&error));
            }
            let request = proto::LinkWorkerRequest {
                fence: wire::fence_to_proto(&order.attempt),
                links: Some(wire::links_to_proto(&order.links)),
                deployment: order.attempt.name,
                pid: order.pid,
            };
            let linked = nodes.client(node)?.link_worker(request).await;
            linked.map(|_| ()).map_err(|status| nodes.failure(node, &status))
        })
    }

    fn start_scheduler(&self, node: NodeId, order: StartScheduler) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let limits = Limits::shared(order.max_sequences, order.context_tokens, order.fixed_tokens);
                let started = nodes.schedulers.start(order.attempt, order.source, limits).await;
                return started.map_err(|error| match error {
                    SchedulersError::Workers(error) => nodes.own_failure(&error),
                    SchedulersError::Text(text) => Error::Refused(format!("{}: {text}", nodes.name(node))),
                    SchedulersError::Drive(text) => {
                        Error::Unavailable(format!("{}: {text}", nodes.name(node)))
                    }
                });
            }
            let request = proto::StartSchedulerRequest {
                fence: wire::fence_to_proto(&order.attempt),
                deployment: order.attempt.name,
                source: order.source,
                run: true,
                max_sequences: order.max_sequences as u32,
                context_tokens: order.context_tokens as u32,
                fixed_tokens: order.fixed_tokens as u32,
            };
            let started = nodes.client(node)?.start_scheduler(request).await;
            started.map(|_| ()).map_err(|status| nodes.failure(node, &status))
        })
    }

    fn load_adapter(&self, node: NodeId, order: LoadAdapter) -> BoxFuture<'static, Result<ByteCount, Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            let LoadAdapter { attempt, adapter, room } = order;
            if node == nodes.own {
                let loaded = nodes.workers.load_adapter(&attempt, &adapter, room).await;
                return loaded.map_err(|error| nodes.own_failure(&error));
            }
            let request = proto::LoadNodeAdapterRequest {
                fence: wire::fence_to_proto(&attempt),
                deployment: attempt.name,
                name: adapter.name,
                source: adapter.source,
                load: adapter.load,
                room_bytes: room.0,
            };
            let loaded = nodes.client(node)?.load_adapter(request).await;
            let loaded = loaded.map_err(|status| nodes.failure(node, &status))?.into_inner();
            Ok(ByteCount(loaded.memory_bytes))
        })
    }

    fn unload_adapter(
        &self,
        node: NodeId,
        attempt: Attempt,
        adapter: String,
    ) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let unloaded = nodes.workers.unload_adapter(&attempt, &adapter).await;
                return unloaded.map_err(|error| nodes.own_failure(&error));
            }
            let fence = wire::fence_to_proto(&attempt);
            let request = proto::UnloadNodeAdapterRequest { deployment: attempt.name, fence, key: adapter };
            let unloaded = nodes.client(node)?.unload_adapter(request).await;
            unloaded.map(|_| ()).map_err(|status| nodes.failure(node, &status))
        })
    }

    fn usage(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<Usage, Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let usage = nodes.schedulers.usage(&attempt);
                return usage.map_err(|error| Error::Unavailable(error.to_string()));
            }
            let fence = wire::fence_to_proto(&attempt);
            let request = proto::UsageRequest { deployment: attempt.name, fence };
            let usage = nodes.client(node)?.usage(request).await;
            let usage = usage.map_err(|status| nodes.failure(node, &status))?.into_inner();
            Ok(Usage { busy: usage.busy as usize, idle: Duration::from_millis(usage.idle_millis) })
        })
    }

    fn drain(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                let drained = nodes.schedulers.drain(&attempt).await;
                return drained.map_err(|error| Error::Unavailable(error.to_string()));
            }
            let fence = wire::fence_to_proto(&attempt);
            let request = proto::DrainRequest { deployment: attempt.name, fence };
            let drained = nodes.client(node)?.drain(request).await;
            drained.map(|_| ()).map_err(|status| nodes.failure(node, &status))
        })
    }

    fn stop_workers(&self, node: NodeId, attempt: Attempt) -> BoxFuture<'static, Result<(), Error>> {
        let nodes = self.clone();
        Box::pin(async move {
            if node == nodes.own {
                nodes.schedulers.stop(&attempt).await;
                return nodes.workers.stop(&attempt).await.map_err(|error| nodes.own_failure(&error));
            }
            let fence = wire::fence_to_proto(&attempt);
            let request = proto::StopWorkersRequest { deployment: attempt.name, fence };
            let stopped = nodes.client(node)?.stop_workers(request).await;
            stopped.map(|_| ()).map_err(|status| nodes.failure(node, &status))
        })
    }
}
