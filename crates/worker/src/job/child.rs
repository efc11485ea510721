//! The process: carries out the node's orders on its only thread, which owns MLX.

use super::{Answer, GroupPlace, JobSetup, LinePlace, Order, Others, frames};
use crate::collective::{CollectiveEndpoint, CollectiveOptions};
use crate::run::RunError;
use crate::stages::{StageEndpoint, StageOptions};
use mlxnode_compute::{Job, JobError, StageLink};
use std::io;
use std::time::Duration;

/// Makes a job, one process of several when there are others. Called on the thread that then drives it.
pub type JobFactory = fn(&JobSetup, Others<'_>) -> Result<Box<dyn Job>, JobError>;

/// Runs the job of this process until the node lets go of it.
///
/// # Errors
/// When the node says what is not understood, or cannot be answered.
pub fn run_job(make: JobFactory) -> Result<(), RunError> {
    let (mut orders, mut answers) = (io::stdin().lock(), io::stdout().lock());
    let system = |what| move |source| RunError::System { what, source };
    let mut worker = Worker { job: None, endpoint: None, line: None, make };
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
    // Dropped after the job, which leaves its group or its line first.
    endpoint: Option<CollectiveEndpoint>,
    line: Option<StageEndpoint>,
    make: JobFactory,
}

impl Worker {
    fn carry_out(&mut self, order: Order) -> Result<Answer, JobError> {
        let order = match order {
            Order::Join(place) => return self.join(place),
            Order::JoinLine(place) => return self.join_line(place),
            Order::Begin(setup) => {
                let line = self.line.as_ref().map(|line| Box::new(line.link()) as Box<dyn StageLink>);
                self.job = Some((self.make)(&setup, Others { group: self.endpoint.as_ref(), line })?);
                return Ok(Answer::Done);
            }
            order => order,
        };
        let job = self.job.as_mut().ok_or_else(|| JobError::Failed("the job has not begun".into()))?;
        match order {
            Order::Join(_) | Order::JoinLine(_) | Order::Begin(_) => Ok(Answer::Done),
            Order::Advance => {
                let before = waited(&self.endpoint, &self.line);
                let advance = job.advance()?;
                Ok(Answer::Advanced {
                    advance,
                    waited: waited(&self.endpoint, &self.line).saturating_sub(before),
                })
            }
            Order::Save(folder) => job.save(&folder).map(|()| Answer::Done),
            Order::Publish(folder) => job.publish(&folder).map(|()| Answer::Done),
        }
    }

    /// A stage of one of several lines joins both.
    fn may_join(&self, has_joined: bool) -> Result<(), JobError> {
        match self.job.is_none() && !has_joined {
            true => Ok(()),
            false => Err(JobError::Failed("a worker joins others before its job begins, and once".into())),
        }
    }

    fn join_line(&mut self, place: LinePlace) -> Result<Answer, JobError> {
        self.may_join(self.line.is_some())?;
        let options = StageOptions::new(place.listen, place.folder);
        let line = StageEndpoint::start(options, place.stage, place.stages, place.conductor);
        let line = line.map_err(|error| JobError::Failed(told(&error)))?;
        let answer = Answer::Joined { address: line.address(), key_pin: line.key_pin() };
        self.line = Some(line);
        Ok(answer)
    }

    fn join(&mut self, place: GroupPlace) -> Result<Answer, JobError> {
        self.may_join(self.endpoint.is_some())?;
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

/// How long the job has waited for others so far.
fn waited(endpoint: &Option<CollectiveEndpoint>, line: &Option<StageEndpoint>) -> Duration {
    let of_group = endpoint.as_ref().map(CollectiveEndpoint::waited);
    of_group.into_iter().chain(line.as_ref().map(StageEndpoint::waited)).sum()
}
