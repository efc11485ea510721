//! A group of one worker: everything is computed here, and nothing travels.

use super::{Deal, Partial, Reduce, ReduceError, Reduced, Sum, Turn};

/// The group of a job that runs in one process.
#[derive(Clone, Copy, Debug)]
pub struct Alone {
    micro_batches: u32,
}

impl Alone {
    /// For steps of so many micro-batches.
    pub fn new(micro_batches: u32) -> Self {
        Self { micro_batches }
    }
}

impl Reduce for Alone {
    fn begin(&mut self, applied: u64) -> Result<Turn, ReduceError> {
        let micro_batches = self.micro_batches;
        Ok(Turn::Deal(Deal { epoch: 0, step: applied, micro_batches, run: 0..micro_batches }))
    }

    fn is_over(&self, _: &Deal) -> bool {
        false
    }

    fn reduce(&mut self, deal: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError> {
        let count = partials.len();
        match <[Partial; 1]>::try_from(partials) {
            Ok([Partial { node, values, tally }]) if node.start == 0 && node.end == self.micro_batches => {
                Ok(Reduced::Sum(Sum { step: deal.step, values, tally }))
            }
            _ => Err(ReduceError::OutOfStep(format!(
                "one sum over {} micro-batches was expected, not {count} parts",
                self.micro_batches
            ))),
        }
    }
}
