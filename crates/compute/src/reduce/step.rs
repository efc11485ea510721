//! One step by the protocol of [`Reduce`]: computes what is dealt, and again what is dealt anew, until the whole sum is there.

use super::{Deal, Partial, Reduce, ReduceError, Reduced, Sum, Tally, TreeNode, TreeSum, nodes_of};
use bytes::Bytes;

/// How the gradients of micro-batches are computed and added up.
pub trait MicroBatches {
    /// All gradients, wherever they are.
    type Value;
    /// Why there are none.
    type Error;

    /// Of micro-batch `index` of `step`. A pure function of both and of the parameters after `step` updates.
    ///
    /// # Errors
    ///
    /// Ends the step; the parameters are as they were.
    fn gradient(&mut self, step: u64, index: u32) -> Result<(Self::Value, Tally), Self::Error>;

    /// Element by element, in f32, the left one first.
    ///
    /// # Errors
    ///
    /// As [`Self::gradient`].
    fn add(&mut self, left: Self::Value, right: Self::Value) -> Result<Self::Value, Self::Error>;

    /// All values one after the other, f32 little-endian; always in the same order.
    ///
    /// # Errors
    ///
    /// As [`Self::gradient`].
    fn bytes(&mut self, value: &Self::Value) -> Result<Bytes, Self::Error>;
}

/// Why a step was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError<E> {
    /// The gradients.
    #[error("{0}")]
    Gradient(E),
    /// The group.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
}

/// Computes `deal` and returns the sum over the whole step, which the caller must apply before anything else; `None` when the caller
/// shall begin again, as [`Reduced::Begin`] says.
///
/// When the group changes on the way, what was computed of the step is kept as far as it is dealt to this worker again.
///
/// # Errors
///
/// [`StepError`]; nothing was applied.
pub fn sum_step<M: MicroBatches>(
    group: &mut dyn Reduce,
    mut deal: Deal,
    work: &mut M,
) -> Result<Option<Sum>, StepError<M::Error>> {
    let mut parts = TreeSum::<(M::Value, Tally)>::new(deal.micro_batches);
    loop {
        for index in deal.run.clone() {
            if group.is_over(&deal) {
                break; // what is missing is dealt anew below
            }
            if parts.has(index) {
                continue;
            }
            let leaf = work.gradient(deal.step, index).map_err(StepError::Gradient)?;
            let add = |left: (M::Value, Tally), right: (M::Value, Tally)| {
                Ok((work.add(left.0, right.0)?, left.1.plus(right.1)))
            };
            parts.insert(TreeNode::leaf(index), leaf, add).map_err(StepError::Gradient)?;
        }
        let complete = parts.parts().map(|(node, _)| node).eq(nodes_of(&deal.run, deal.micro_batches));
        let mut partials = Vec::new();
        if complete {
            for (node, (value, tally)) in parts.parts() {
                let values = work.bytes(value).map_err(StepError::Gradient)?;
                partials.push(Partial { node, values, tally: *tally });
            }
        }
        match group.reduce(&deal, partials)? {
            Reduced::Sum(sum) if sum.step == deal.step => return Ok(Some(sum)),
            Reduced::Begin => return Ok(None),
            Reduced::Sum(sum) => {
                let both = format!("the sum of step {} came in step {}", sum.step, deal.step);
                return Err(ReduceError::OutOfStep(both).into());
            }
            Reduced::Redeal(next) if next.step == deal.step && next.micro_batches == deal.micro_batches => {
                parts.keep_within(&next.run);
                deal = next;
            }
            Reduced::Redeal(next) => {
                let both = format!("step {} was dealt anew as step {}", deal.step, next.step);
                return Err(ReduceError::OutOfStep(both).into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Alone, Turn};
    use super::*;
    use std::convert::Infallible;
    use std::ops::Range;

    /// Writes down what is computed; a "gradient" is its own formula.
    #[derive(Default)]
    struct Formulas(Vec<u32>);

    impl MicroBatches for Formulas {
        type Value = String;
        type Error = Infallible;
        fn gradient(&mut self, _: u64, index: u32) -> Result<(String, Tally), Infallible> {
            self.0.push(index);
            Ok((index.to_string(), Tally { loss: 0.5, tokens: 1 }))
        }
        fn add(&mut self, left: String, right: String) -> Result<String, Infallible> {
            Ok(format!("({left}{right})"))
        }
        fn bytes(&mut self, value: &String) -> Result<Bytes, Infallible> {
            Ok(Bytes::copy_from_slice(value.as_bytes()))
        }
    }

    /// Changes its mind `deals.len()` times, after so many questions each.
    struct Fickle {
        deals: Vec<Deal>,
        given: Vec<Vec<Partial>>,
    }

    impl Reduce for Fickle {
        fn begin(&mut self, _: u64) -> Result<Turn, ReduceError> {
            Ok(Turn::Deal(self.deals.remove(0)))
        }
        fn is_over(&self, _: &Deal) -> bool {
            false
        }
        fn reduce(&mut self, deal: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError> {
            self.given.push(partials);
            Ok(if self.deals.is_empty() {
                Reduced::Sum(Sum { step: deal.step, values: Bytes::new(), tally: Tally::default() })
            } else {
                Reduced::Redeal(self.deals.remove(0))
            })
        }
    }

    fn deal(epoch: u64, run: Range<u32>) -> Deal {
        Deal { epoch, step: 3, micro_batches: 8, run }
    }

    #[test]
    fn one_worker_adds_along_the_tree() {
        let mut group = Alone::new(6);
        let Ok(Turn::Deal(deal)) = group.begin(4) else { panic!("a deal") };
        let sum = sum_step(&mut group, deal, &mut Formulas::default()).unwrap().unwrap();
        assert_eq!(sum.values, "(((01)(23))(45))".as_bytes());
        assert_eq!((sum.step, sum.tally), (4, Tally { loss: 3.0, tokens: 6 }));
    }

    #[test]
    fn what_was_computed_is_kept_when_it_is_dealt_again() {
        let deals = vec![deal(1, 2..5), deal(2, 0..5), deal(3, 4..8)];
        let mut group = Fickle { deals, given: vec![] };
        let mut work = Formulas::default();
        let Ok(Turn::Deal(first)) = group.begin(3) else { panic!("a deal") };
        sum_step(&mut group, first, &mut work).unwrap();
        assert_eq!(work.0, [2, 3, 4, 0, 1, 5, 6, 7]);
        let given: Vec<Vec<&[u8]>> =
            group.given.iter().map(|parts| parts.iter().map(|part| &part.values[..]).collect()).collect();
        assert_eq!(given[0], [&b"(23)"[..], b"4"]);
        assert_eq!(given[1], [&b"((01)(23))"[..], b"4"]);
        assert_eq!(given[2], [&b"((45)(67))"[..]]);
    }
}
