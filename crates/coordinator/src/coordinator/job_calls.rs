//! What the rest of the node asks of the coordinator about jobs.

use super::actor::Message;
use super::handle::{CoordinatorHandle, stopped};
use super::job_orders::{JobChange, JobMessage};
use crate::Error;
use crate::jobs::{JobSpec, JobView, LogLine, PublishWish};
use std::sync::Arc;
use tokio::sync::{oneshot, watch};

impl CoordinatorHandle {
    /// Wants a job; answers when it is durable. The same id with the same content is the same job.
    ///
    /// # Errors
    /// When it makes no sense, the id belongs to another job, there are too many, or the control log cannot be written.
    pub async fn submit_job(&self, spec: JobSpec) -> Result<Arc<JobView>, Error> {
        self.ask(|reply| JobMessage::Submit { spec: Box::new(spec), reply }).await
    }

    /// Ends a job.
    ///
    /// # Errors
    /// When there is none of this id, or it is finished.
    pub async fn cancel_job(&self, id: String) -> Result<Arc<JobView>, Error> {
        self.ask(|reply| JobMessage::Change { id, change: JobChange::Cancel, reply }).await
    }

    /// Has a job save and stand still.
    ///
    /// # Errors
    /// When there is none of this id, or it is over.
    pub async fn pause_job(&self, id: String, by: String) -> Result<Arc<JobView>, Error> {
        self.ask(|reply| JobMessage::Change { id, change: JobChange::Pause { by }, reply }).await
    }

    /// Has a job go on.
    ///
    /// # Errors
    /// When there is none of this id, or it is finished or cancelled.
    pub async fn resume_job(&self, id: String) -> Result<Arc<JobView>, Error> {
        self.ask(|reply| JobMessage::Change { id, change: JobChange::Resume, reply }).await
    }

    /// Serves what a job made, after `step` or by its newest checkpoint; answers with what requests write into `model`.
    ///
    /// # Errors
    /// When there is no such job, checkpoint or deployment, or the adapter does not fit it.
    pub async fn publish_job(
        &self,
        id: String,
        step: Option<u64>,
        wish: PublishWish,
    ) -> Result<String, Error> {
        self.ask(|reply| JobMessage::Publish { id, step, wish, reply }).await
    }

    /// What happened to a job, in order.
    ///
    /// # Errors
    /// When there is none of this id.
    pub async fn job_log(&self, id: String) -> Result<Vec<LogLine>, Error> {
        self.ask(|reply| JobMessage::Log { id, reply }).await
    }

    /// All jobs now and whenever one changes, the newest first. Closed when the coordinator has stopped.
    pub fn jobs(&self) -> watch::Receiver<Vec<Arc<JobView>>> {
        self.jobs.clone()
    }

    async fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> JobMessage,
    ) -> Result<T, Error> {
        let _permit = self.permit()?;
        let (reply, answer) = oneshot::channel();
        self.send(Message::Job(message(reply)))?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }
}
