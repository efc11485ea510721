//! The process: carries out the node's orders on its only thread, which owns MLX.

use super::{Answer, GroupPlace, JobSetup, Order, frames};
use crate::collective::{CollectiveEndpoint, CollectiveOptions};
use crate::run::RunError;
use mlxnode_compute::{Job, JobError};
use std::io;

/// Makes a job, one worker of several when there is an endpoint. Called on the thread that then drives it.
pub type JobFactory = fn(&JobSetup, Option<&CollectiveEndpoint>) -> Result<Box<dyn Job>, JobError>;

/// Runs the job of this process until the node lets go of it.
///
/// # Errors
/// When the node says what is not understood, or cannot be answered.
pub fn run_job(make: JobFactory) -> Result<(), RunError> {
    let (mut orders, mut answers) = (io::stdin().lock(), io::stdout().lock());
    let system = |what| move |source| RunError::System { what, source };
    let mut worker = Worker { job: None, endpoint: None, make };
    while let Some(order) = frames::read(&mut orders).map_err(system("read the node's order"))? {
        let answer = match worker.carry_out(order) {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(error),
        };
        frames::write(&mut answers, &answer).map_err(system("answer the node"))?;
    }
    Ok(())
}

/// The job, and what it shares with the job's other workers.
struct Worker {
    job: Option<Box<dyn Job>>,
    // Dropped after the job, which leaves its group first.
    endpoint: Option<CollectiveEndpoint>,
    make: JobFactory,
}

impl Worker {
    fn carry_out(&mut self, order: Order) -> Result<Answer, JobError> {
        let order = match order {
            Order::Join(place) => return self.join(place),
            Order::Begin(setup) => {
                self.job = Some((self.make)(&setup, self.endpoint.as_ref())?);
                return Ok(Answer::Done);
            }
            order => order,
        };
        let job = self.job.as_mut().ok_or_else(|| JobError::Failed("the job has not begun".into()))?;
        match order {
            Order::Join(_) | Order::Begin(_) => Ok(Answer::Done),
            Order::Advance => job.advance().map(Answer::Advanced),
            Order::Save(folder) => job.save(&folder).map(|()| Answer::Done),
            Order::Publish(folder) => job.publish(&folder).map(|()| Answer::Done),
        }
    }

    fn join(&mut self, place: GroupPlace) -> Result<Answer, JobError> {
        if self.job.is_some() || self.endpoint.is_some() {
            return Err(JobError::Failed("a worker joins its group before its job begins, and once".into()));
        }
        let options = CollectiveOptions::new(place.listen, place.folder);
        let endpoint = CollectiveEndpoint::start(options, place.member, place.conductor);
        let endpoint = endpoint.map_err(|error| JobError::Failed(told(&error)))?;
        let answer = Answer::Joined { address: endpoint.address(), key_pin: endpoint.key_pin() };
        self.endpoint = Some(endpoint);
        Ok(answer)
    }
}

/// An error with its cause.
fn told(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}
