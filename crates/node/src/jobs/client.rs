//! The coordinator's arm for jobs: this node's runners directly, others by `JobRunner`.

use super::peer_client::Peers;
use super::runner::Runners;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use mlxnode_cluster::{NodeId, PeerState};
use mlxnode_coordinator::Error;
use mlxnode_coordinator::coordinator::{JobNodes, JobReports};
use mlxnode_coordinator::jobs::{Checkpoint, ContentHash, JobSpec, RunEnd, RunJob, Tidied, Wanted};
use mlxnode_proto::internal::v1 as proto;
use mlxnode_proto::internal::v1::job_runner_client::JobRunnerClient;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// For an answer to a small order.
const ANSWER: Duration = Duration::from_secs(10);

/// All nodes, for jobs.
#[derive(Clone)]
pub(crate) struct ClusterJobs {
    pub(crate) own: NodeId,
    pub(crate) runners: Runners,
}

/// The coordinator's notation.
pub(super) fn json(value: &impl Serialize) -> Result<bytes::Bytes, Error> {
    serde_json::to_vec(value)
        .map(bytes::Bytes::from)
        .map_err(|error| Error::Failed(format!("an order cannot be written: {error}")))
}

pub(super) fn parsed<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| {
        Error::Invalid(format!("{what} cannot be read; is the other node of another release? ({error})"))
    })
}

impl ClusterJobs {
    fn peers(&self) -> &Peers {
        self.runners.peers()
    }

    fn client(&self, node: NodeId) -> Result<JobRunnerClient<Channel>, Error> {
        let channel = self.peers().mesh.channel(&node);
        let name = || self.peers().name(node);
        channel
            .map(JobRunnerClient::new)
            .ok_or_else(|| Error::Unavailable(format!("{} cannot be reached", name())))
    }

    fn failure(&self, node: NodeId, status: &Status) -> Error {
        let name = self.peers().name(node);
        let text = format!("{name}: {}", status.message());
        match status.code() {
            Code::ResourceExhausted => Error::TooMany(text),
            Code::Internal | Code::InvalidArgument => Error::Failed(text),
            Code::FailedPrecondition => Error::Unavailable(text),
            _ => Error::Unavailable(format!("{name} does not answer any more ({})", status.message())),
        }
    }
}

impl JobNodes for ClusterJobs {
    fn run(
        &self,
        node: NodeId,
        order: RunJob,
        reports: JobReports,
    ) -> BoxFuture<'static, Result<RunEnd, Error>> {
        let jobs = self.clone();
        async move {
            if node == jobs.own {
                let mut running = jobs.runners.run(order).await?;
                while let Some(report) = running.reports.recv().await {
                    reports.report(report);
                }
                let over = || Error::Failed("the job's runner ended without a word".into());
                return (&mut running.end).await.unwrap_or_else(|_| Err(over()));
            }
            let failure = |status: Status| jobs.failure(node, &status);
            let request = proto::RunJobRequest { order: json(&order)? };
            let mut told = jobs.client(node)?.run(request).await.map_err(failure)?.into_inner();
            while let Some(message) = told.message().await.map_err(failure)? {
                if !message.end.is_empty() {
                    return parsed(&message.end, "how a job ended");
                }
                reports.report(parsed(&message.report, "a job's report")?);
            }
            Err(Error::Unavailable(format!("{} let go of the job without a word", jobs.peers().name(node))))
        }
        .boxed()
    }

    fn stop(
        &self,
        node: NodeId,
        id: String,
        epoch: u64,
        saves: bool,
    ) -> BoxFuture<'static, Result<(), Error>> {
        let jobs = self.clone();
        async move {
            if node == jobs.own {
                jobs.runners.stop(&id, epoch, saves);
                return Ok(());
            }
            let request = proto::StopJobRequest { id, epoch, saves };
            let stopped = jobs.client(node)?.stop(request).await;
            stopped.map(drop).map_err(|status| jobs.failure(node, &status))
        }
        .boxed()
    }

    fn copy(
        &self,
        node: NodeId,
        spec: JobSpec,
        checkpoint: Checkpoint,
    ) -> BoxFuture<'static, Result<(), Error>> {
        let jobs = self.clone();
        async move {
            if node == jobs.own {
                return jobs.runners.copy(&spec, &checkpoint).await;
            }
            let request = proto::CopyCheckpointRequest {
                spec: json(&spec)?,
                step: checkpoint.step,
                hash: checkpoint.hash.as_bytes().to_vec().into(),
                bytes: checkpoint.bytes,
            };
            let copied = jobs.client(node)?.copy(request).await;
            copied.map(drop).map_err(|status| jobs.failure(node, &status))
        }
        .boxed()
    }

    fn tidy(&self, wanted: Vec<Wanted>) -> BoxFuture<'static, Tidied> {
        let jobs = self.clone();
        async move {
            let told = match json(&wanted) {
                Ok(told) => told,
                Err(error) => {
                    tracing::warn!(%error, "nodes are not told what of jobs is wanted");
                    return Tidied::default();
                }
            };
            let mut tidied = Tidied { members: jobs.peers().members(), ..Tidied::default() };
            match jobs.runners.tidy(wanted).await {
                Ok(held) => drop(tidied.held.insert(jobs.own, held)),
                Err(error) => tracing::warn!(%error, "what is not wanted of jobs stays"),
            }
            let peers = jobs.peers().mesh.peers();
            let alive = peers.iter().filter(|peer| peer.state == PeerState::Alive);
            let tells = alive.filter_map(|peer| {
                let mut client = jobs.client(peer.node_id).ok()?;
                let request = proto::TidyJobsRequest { wanted: told.clone() };
                Some(async move {
                    // One that does not hear it now does when something changes or it is back.
                    let answer = tokio::time::timeout(ANSWER, client.tidy(request)).await.ok()?.ok()?;
                    let held = answer.into_inner().held;
                    let held = held.iter().filter_map(|hash| ContentHash::try_from(&hash[..]).ok());
                    Some((peer.node_id, held.collect()))
                })
            });
            tidied.held.extend(futures::future::join_all(tells).await.into_iter().flatten());
            tidied
        }
        .boxed()
    }
}
