//! The front's way to schedulers: those of this node directly, those of other nodes by `Replica`.

use crate::schedulers::Schedulers;
use crate::wire;
use crate::workers::Workers;
use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mlxnode_api::deployments::DeploymentView;
use mlxnode_api::front::{Replicas, RunEvents};
use mlxnode_cluster::{MeshHandle, NodeId};
use mlxnode_compute::ByteCount;
use mlxnode_coordinator::scheduler::{RunError, RunEvent, RunRequest};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::replica_client::ReplicaClient;
use mlxnode_text::TextFiles;
use std::collections::{BTreeMap, BTreeSet};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Prompts of a million tokens and tokenizers of a quarter million entries fit; nodes of one cluster send nothing larger.
const LARGEST_MESSAGE: usize = 64 << 20;

/// All schedulers of the cluster, from this node.
pub(crate) struct ClusterReplicas {
    pub(crate) own: NodeId,
    pub(crate) mesh: MeshHandle,
    pub(crate) schedulers: Schedulers,
    pub(crate) workers: Workers,
}

impl ClusterReplicas {
    fn client(&self, node: NodeId, deployment: &DeploymentView) -> Result<ReplicaClient<Channel>, RunError> {
        let channel = self.mesh.channel(&node).ok_or_else(|| {
            let name = deployment
                .stages
                .iter()
                .find(|stage| stage.node == node)
                .map(|stage| stage.node_name.as_str());
            RunError::Unavailable(format!(
                "{} cannot be reached, which runs a part of {}",
                name.unwrap_or("a node"),
                deployment.name
            ))
        })?;
        Ok(ReplicaClient::new(channel)
            .max_decoding_message_size(LARGEST_MESSAGE)
            .max_encoding_message_size(LARGEST_MESSAGE))
    }

    fn scheduler_node(deployment: &DeploymentView) -> Result<NodeId, RunError> {
        let node = deployment.scheduler;
        node.ok_or_else(|| RunError::Unavailable(format!("no scheduler of {} is running", deployment.name)))
    }
}

#[async_trait]
impl Replicas for ClusterReplicas {
    async fn run(&self, deployment: &DeploymentView, request: RunRequest) -> Result<RunEvents, RunError> {
        let node = Self::scheduler_node(deployment)?;
        if node == self.own {
            return Ok(self.schedulers.run(&deployment.instance(), request)?.boxed());
        }
        let mut client = self.client(node, deployment)?;
        let message = wire::run_to_proto(&deployment.instance(), &request)
            .map_err(|error| RunError::Invalid(error.to_string()))?;
        let events = client.run(message).await.map_err(lost)?.into_inner();
        Ok(until(remote(events), request.deadline))
    }

    async fn text_files(&self, deployment: &DeploymentView) -> Result<TextFiles, RunError> {
        let node = Self::scheduler_node(deployment)?;
        if node == self.own {
            return self.schedulers.text_files(&deployment.instance()).await;
        }
        let request = proto::TextFilesRequest { deployment: deployment.instance() };
        let files =
            self.client(node, deployment)?.text_files(request).await.map_err(lost)?.into_inner().files;
        let files: BTreeMap<_, _> = files.into_iter().map(|(name, bytes)| (name, bytes.to_vec())).collect();
        TextFiles::from_map(files).map_err(|error| RunError::Failed(crate::error::chain(&error)))
    }

    async fn peak_memory(&self, deployment: &DeploymentView) -> ByteCount {
        let nodes: BTreeSet<NodeId> = deployment.stages.iter().map(|stage| stage.node).collect();
        let peaks = nodes.into_iter().map(|node| async move {
            if node == self.own {
                return self.workers.memory_of(&deployment.instance()).await.peak;
            }
            let Ok(mut client) = self.client(node, deployment) else { return ByteCount(0) };
            let request = proto::MemoryRequest { deployment: deployment.instance() };
            client
                .memory(request)
                .await
                .map_or(ByteCount(0), |answer| ByteCount(answer.into_inner().peak_bytes))
        });
        futures::future::join_all(peaks).await.into_iter().max().unwrap_or_default()
    }
}

/// The events of a sequence on another node. Dropping the stream drops the call, which cancels the sequence there.
fn remote(events: Streaming<proto::RunEvent>) -> BoxStream<'static, Result<RunEvent, RunError>> {
    let next = |events: Option<Streaming<proto::RunEvent>>| async move {
        let mut events = events?;
        match events.message().await {
            Ok(Some(event)) => {
                let event = wire::run_event(event);
                let rest = event.is_ok().then_some(events);
                Some((event, rest))
            }
            Ok(None) => None,
            Err(status) => Some((Err(lost(status)), None)),
        }
    };
    futures::stream::unfold(Some(events), next).boxed()
}

/// Ends a stream when its time is up.
fn until(events: RunEvents, deadline: Option<std::time::Instant>) -> RunEvents {
    let Some(deadline) = deadline else { return events };
    let alarm = Box::pin(tokio::time::sleep_until(deadline.into()));
    let next = |(mut events, mut alarm, is_over): (
        RunEvents,
        std::pin::Pin<Box<tokio::time::Sleep>>,
        bool,
    )| async move {
        if is_over {
            return None;
        }
        let event = tokio::select! {
            biased;
            event = events.next() => event?,
            () = &mut alarm => Err(RunError::DeadlineExceeded),
        };
        let is_over = event.is_err();
        Some((event, (events, alarm, is_over)))
    };
    futures::stream::unfold((events, alarm, false), next).boxed()
}

fn lost(status: Status) -> RunError {
    RunError::Unavailable(format!("the node of its first stage does not answer ({})", status.message()))
}
