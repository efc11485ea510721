//! An update whose micro-batches several workers compute.

use super::{FineTuning, told};
use crate::Batches;
use crate::trainer::{MicroGradients, TrainError, Trainer, add};
use bytes::Bytes;
use mlxnode_compute::{
    Job as _, JobError, MicroBatches, Reduce, ReduceError, StepError, Tally, Turn, sum_step,
};

/// What the group had us do.
pub(super) enum Together {
    /// The sum over all micro-batches of the update.
    Sum(MicroGradients),
    /// Something else than an update.
    Other(String),
}

/// Gradients as the group asks for them.
struct Work<'a> {
    trainer: &'a mut Trainer,
    batches: &'a mut Batches,
    /// Micro-batches of an update.
    group: u64,
    /// Those of the whole run: what lies behind adds nothing.
    iters: u64,
    /// The rows that were computed here, for messages.
    rows: Vec<u32>,
}

impl FineTuning {
    /// Does what the group wants next.
    pub(super) fn together(&mut self, group: &mut dyn Reduce) -> Result<Together, JobError> {
        let step = self.progress.iteration() + 1;
        let deal = match group.begin(self.trainer.updates()).map_err(left)? {
            Turn::Deal(deal) => deal,
            Turn::Save(directory) => {
                self.save(&directory)?;
                return Ok(Together::Other("saved for a worker that joins".to_owned()));
            }
            Turn::Load(directory) => {
                self.resume(&directory).map_err(|error| JobError::Failed(error.to_string()))?;
                return Ok(Together::Other(format!("joined after {} updates", self.trainer.updates())));
            }
        };
        let needed = self.config.grad_accumulation_steps.max(1);
        if u64::from(deal.micro_batches) != needed {
            let found = deal.micro_batches;
            return Err(JobError::Failed(format!(
                "the group has {found} micro-batches in a step, but grad_accumulation_steps is {needed}"
            )));
        }
        let mut work = Work {
            trainer: &mut self.trainer,
            batches: &mut self.batches,
            group: needed,
            iters: self.config.iters,
            rows: Vec::new(),
        };
        let sum = sum_step(group, deal, &mut work).map_err(|error| match error {
            StepError::Gradient(error) => told(step, error),
            StepError::Reduce(error) => left(error),
        })?;
        let rows = work.rows;
        let Some(sum) = sum else { return Ok(Together::Other("the workers come together anew".to_owned())) };
        let made = MicroGradients::from_bytes(self.trainer.tuner(), &sum.values, sum.tally, rows);
        made.map(Together::Sum).map_err(|error| JobError::Failed(error.to_string()))
    }
}

impl MicroBatches for Work<'_> {
    type Value = MicroGradients;
    type Error = TrainError;

    fn gradient(&mut self, step: u64, index: u32) -> Result<(MicroGradients, Tally), TrainError> {
        let iteration = step.saturating_mul(self.group).saturating_add(u64::from(index)).saturating_add(1);
        let made = match iteration <= self.iters {
            true => {
                let batch = self.batches.training(iteration);
                self.trainer.gradients(&batch, iteration)?
            }
            // The last update may have fewer.
            false => MicroGradients::zero(self.trainer.tuner())?,
        };
        self.rows.extend(&made.rows);
        let tally = Tally { loss: made.loss, tokens: made.tokens };
        Ok((made, tally))
    }

    fn add(&mut self, left: MicroGradients, right: MicroGradients) -> Result<MicroGradients, TrainError> {
        Ok(add(self.trainer.device(), left, &right)?)
    }

    fn bytes(&mut self, value: &MicroGradients) -> Result<Bytes, TrainError> {
        Ok(value.to_bytes(self.trainer.device())?.into())
    }
}

fn left(error: ReduceError) -> JobError {
    JobError::Failed(error.to_string())
}
