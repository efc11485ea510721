//! What the coordinator asks of the nodes for jobs. The node crate carries it out.

use super::actor::Message;
use super::job_orders::JobMessage;
use crate::jobs::{Checkpoint, Event, JobSpec, Report, RunEnd, RunJob, Tidied, Wanted};
use crate::{Error, NodeId};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use ractor::ActorRef;

/// The nodes of the cluster, as they run jobs. Orders may be given up by dropping their future.
pub trait JobNodes: Send + Sync + 'static {
    /// Runs an attempt to its end. Dropped: the job saves a checkpoint and ends.
    fn run(
        &self,
        node: NodeId,
        order: RunJob,
        reports: JobReports,
    ) -> BoxFuture<'static, Result<RunEnd, Error>>;

    /// Has an attempt end, after a checkpoint or at once; its [`JobNodes::run`] then answers.
    fn stop(
        &self,
        node: NodeId,
        id: String,
        epoch: u64,
        saves: bool,
    ) -> BoxFuture<'static, Result<(), Error>>;

    /// Gets a checkpoint, and what its job reads, onto a node, from wherever it is.
    fn copy(
        &self,
        node: NodeId,
        spec: JobSpec,
        checkpoint: Checkpoint,
    ) -> BoxFuture<'static, Result<(), Error>>;

    /// Tells all nodes what is wanted still, and what they have of it comes back. Those that are not there hear of it when they are back.
    fn tidy(&self, wanted: Vec<Wanted>) -> BoxFuture<'static, Tidied>;
}

/// For clusters whose nodes run no jobs.
#[derive(Clone, Copy, Debug)]
pub struct NoJobNodes;

fn none() -> Error {
    Error::Unavailable("no node of this cluster runs jobs".into())
}

impl JobNodes for NoJobNodes {
    fn run(&self, _: NodeId, _: RunJob, _: JobReports) -> BoxFuture<'static, Result<RunEnd, Error>> {
        async { Err(none()) }.boxed()
    }

    fn stop(&self, _: NodeId, _: String, _: u64, _: bool) -> BoxFuture<'static, Result<(), Error>> {
        async { Err(none()) }.boxed()
    }

    fn copy(&self, _: NodeId, _: JobSpec, _: Checkpoint) -> BoxFuture<'static, Result<(), Error>> {
        async { Err(none()) }.boxed()
    }

    fn tidy(&self, _: Vec<Wanted>) -> BoxFuture<'static, Tidied> {
        async { Tidied::default() }.boxed()
    }
}

/// Where an attempt's reports go. Who reports bounds how often: a few times a second.
#[derive(Clone)]
pub struct JobReports {
    pub(super) actor: ActorRef<Message>,
    pub(super) id: String,
    pub(super) epoch: u64,
}

impl JobReports {
    /// The coordinator hears of this. One that has stopped needs no news.
    pub fn report(&self, report: Report) {
        let event = Event::Reported { id: self.id.clone(), epoch: self.epoch, report };
        let _ = self.actor.cast(Message::Job(JobMessage::Happened(event)));
    }
}
