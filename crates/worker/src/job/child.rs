//! The process: carries out the node's orders on its only thread, which owns MLX.

use super::{Answer, JobSetup, Order, frames};
use crate::run::RunError;
use mlxnode_compute::{Job, JobError};
use std::io;

/// Makes a job. Called on the thread that then drives it.
pub type JobFactory = fn(&JobSetup) -> Result<Box<dyn Job>, JobError>;

/// Runs the job of this process until the node lets go of it.
///
/// # Errors
/// When the node says what is not understood, or cannot be answered.
pub fn run_job(make: JobFactory) -> Result<(), RunError> {
    let (mut orders, mut answers) = (io::stdin().lock(), io::stdout().lock());
    let system = |what| move |source| RunError::System { what, source };
    let mut job: Option<Box<dyn Job>> = None;
    while let Some(order) = frames::read(&mut orders).map_err(system("read the node's order"))? {
        let answer = match carry_out(order, &mut job, make) {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(error),
        };
        frames::write(&mut answers, &answer).map_err(system("answer the node"))?;
    }
    Ok(())
}

fn carry_out(order: Order, job: &mut Option<Box<dyn Job>>, make: JobFactory) -> Result<Answer, JobError> {
    if let Order::Begin(setup) = &order {
        *job = Some(make(setup)?);
        return Ok(Answer::Done);
    }
    let job = job.as_mut().ok_or_else(|| JobError::Failed("the job has not begun".into()))?;
    match order {
        Order::Begin(_) => Ok(Answer::Done),
        Order::Advance => job.advance().map(Answer::Advanced),
        Order::Save(folder) => job.save(&folder).map(|()| Answer::Done),
        Order::Publish(folder) => job.publish(&folder).map(|()| Answer::Done),
    }
}
