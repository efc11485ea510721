//! What the node asks of the compute thread besides the pipeline's work: adapters that come and go.
//!
//! Errands have a channel of their own, because they come from the node and not from the stage before, and are done between two
//! batches. Whoever gave one waits for its answer.

use crate::error::{Fault, shortened};
use mlxnode_compute::{Stage, StageError};
use std::path::PathBuf;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// Errands that may wait.
const WAITING: usize = 4;

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Order {
    /// See [`Stage::load_adapter`].
    LoadAdapter { name: String, folder: PathBuf },
    /// See [`Stage::unload_adapter`].
    UnloadAdapter { name: String },
}

/// An order, and where its answer goes.
#[derive(Debug)]
pub(crate) struct Errand {
    order: Order,
    reply: oneshot::Sender<Result<(), String>>,
}

/// The way to the compute thread. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Errands(mpsc::Sender<Errand>);

impl Errands {
    pub(crate) fn channel() -> (Self, mpsc::Receiver<Errand>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    /// Has it done, and waits for the answer.
    pub(crate) async fn run(&self, order: Order) -> Result<(), Status> {
        let ended = || Status::unavailable("the compute thread has ended");
        let (reply, answer) = oneshot::channel();
        self.0.send(Errand { order, reply }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?.map_err(Status::failed_precondition)
    }
}

impl Errand {
    /// Does it, on the compute thread.
    pub(crate) fn run(self, stage: &mut dyn Stage) -> Result<(), Fault> {
        let Self { order, reply } = self;
        let result = match order {
            Order::LoadAdapter { name, folder } => stage.load_adapter(&name, &folder),
            Order::UnloadAdapter { name } => {
                stage.unload_adapter(&name);
                Ok(())
            }
        };
        let told = result.as_ref().map(|_| ()).map_err(|error| shortened(&error.to_string()));
        let _ = reply.send(told); // who asked may have gone
        match result {
            Err(StageError::Device(reason)) => Err(Fault::Device(reason)),
            _ => Ok(()),
        }
    }
}
