//! The same stage of a model's other replicas: several lines of stages train one adapter, and each computes some of an update's micro-batches.
//!
//! ```text
//! line 0   stage 0 ══ stage 1      micro-batches 0..2
//!             ║           ║        the sums of a stage's gradients, along the tree of all micro-batches
//! line 1   stage 0 ══ stage 1      micro-batches 2..4
//! ```
//! What a line adds up are whole subtrees ([`mlxnode_compute::Reduce`]), so the sums have the bits of one line. Unlike single workers,
//! which are replaced on the way, the lines stay what they were at the beginning: when a process of one is lost, the attempt is over. Whatever deals a line
//! other micro-batches than at first is the sign of that, and ends this stage before anything counts.

use bytes::Bytes;
use mlxnode_compute::{
    Deal, JobError, Partial, Reduce, ReduceError, Reduced, Sum, Tally, TreeNode, Turn, tells_parameters_after,
};
use std::ops::Range;

/// What one replica's stage adds up, and how it hears of the others.
pub(super) struct Replicas {
    group: Box<dyn Reduce>,
    /// Of every update, also where the last one has fewer.
    micro_batches: u32,
    /// Those that are computed here; once that is known.
    run: Option<Range<u32>>,
}

impl Replicas {
    /// With updates of so many micro-batches.
    pub(super) fn new(group: Box<dyn Reduce>, micro_batches: u32) -> Self {
        Self { group, micro_batches, run: None }
    }

    /// Waits until all replicas have come together: what is computed here of the update after `applied` others.
    pub(super) fn begin(&mut self, applied: u64) -> Result<Deal, JobError> {
        match self.group.begin(applied).map_err(parted)? {
            Turn::Deal(deal) => self.checked(deal, applied),
            // All begin from one checkpoint, and none comes later.
            Turn::Save(_) | Turn::Load(_) => {
                Err(JobError::Lost("the replicas of the model are not at the same update".to_owned()))
            }
        }
    }

    fn checked(&mut self, deal: Deal, applied: u64) -> Result<Deal, JobError> {
        if deal.step != applied || deal.micro_batches != self.micro_batches {
            let Deal { step, micro_batches, .. } = deal;
            return Err(JobError::Failed(format!(
                "the replicas of the model do not agree: update {step} of {micro_batches} micro-batches is dealt where update \
                 {applied} of {} is due",
                self.micro_batches
            )));
        }
        // An empty run leads straight to a sum that is there already.
        let run = self.run.get_or_insert_with(|| deal.run.clone());
        if *run != deal.run && !deal.run.is_empty() {
            return Err(JobError::Lost("a replica of the model is lost".to_owned()));
        }
        Ok(deal)
    }

    /// The sum over all replicas, of what was computed here for `deal`: subtrees in order, each with all gradients one after the other.
    pub(super) fn sum(
        &mut self,
        mut deal: Deal,
        parts: Vec<(TreeNode, Bytes, Tally)>,
    ) -> Result<Sum, JobError> {
        let own = deal.run.clone();
        let partials: Vec<Partial> =
            parts.into_iter().map(|(node, values, tally)| Partial { node, values, tally }).collect();
        loop {
            let given = if deal.run == own { partials.clone() } else { Vec::new() };
            match self.group.reduce(&deal, given).map_err(parted)? {
                Reduced::Sum(sum) if sum.step == deal.step => return Ok(sum),
                Reduced::Sum(sum) => {
                    let both = format!("the sum of update {} came in update {}", sum.step, deal.step);
                    return Err(JobError::Failed(format!("the replicas of the model do not agree: {both}")));
                }
                // The same lines have come together anew, as after a connection that broke.
                Reduced::Redeal(next) => deal = self.checked(next, deal.step)?,
                Reduced::Begin => deal = self.begin(deal.step)?,
            }
        }
    }

    /// Tells the others what came of an update, when it is time to: all must have the same. `parameters` hashes them.
    pub(super) fn compare(
        &mut self,
        updates: u64,
        parameters: impl FnOnce() -> Result<[u8; 32], mlxnode_mlx::Error>,
    ) -> Result<(), JobError> {
        if tells_parameters_after(updates) {
            let hash = parameters().map_err(|error| JobError::Failed(error.to_string()))?;
            self.group.applied(updates, hash);
        }
        Ok(())
    }
}

fn parted(error: ReduceError) -> JobError {
    match error {
        ReduceError::Left(_) | ReduceError::TimedOut { .. } => JobError::Lost(error.to_string()),
        ReduceError::OutOfStep(_) => JobError::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    enum Said {
        Turn(Turn),
        Reduced(Reduced),
    }

    /// A group that answers as it was told to, and notes what it was given.
    struct Scripted {
        answers: VecDeque<Said>,
        given: std::sync::Arc<std::sync::Mutex<Vec<usize>>>,
    }

    impl Reduce for Scripted {
        fn begin(&mut self, _: u64) -> Result<Turn, ReduceError> {
            match self.answers.pop_front() {
                Some(Said::Turn(turn)) => Ok(turn),
                _ => Err(ReduceError::Left("over".to_owned())),
            }
        }

        fn is_over(&self, _: &Deal) -> bool {
            false
        }

        fn reduce(&mut self, _: &Deal, partials: Vec<Partial>) -> Result<Reduced, ReduceError> {
            self.given.lock().unwrap().push(partials.len());
            match self.answers.pop_front() {
                Some(Said::Reduced(reduced)) => Ok(reduced),
                _ => Err(ReduceError::Left("over".to_owned())),
            }
        }
    }

    fn deal(epoch: u64, run: Range<u32>) -> Deal {
        Deal { epoch, step: 5, micro_batches: 4, run }
    }

    fn sum() -> Sum {
        Sum { step: 5, values: Bytes::new(), tally: Tally::default() }
    }

    /// What comes of an update with these answers, and how many parts each question gave.
    fn update(answers: Vec<Said>) -> (Result<Sum, JobError>, Vec<usize>) {
        let given = std::sync::Arc::default();
        let group = Scripted { answers: answers.into(), given: std::sync::Arc::clone(&given) };
        let mut replicas = Replicas::new(Box::new(group), 4);
        let made = replicas.begin(5).and_then(|deal| {
            let node = TreeNode { start: deal.run.start, end: deal.run.end };
            replicas.sum(deal, vec![(node, Bytes::new(), Tally::default())])
        });
        let given = given.lock().unwrap().clone();
        (made, given)
    }

    #[test]
    fn lines_that_come_together_anew_go_on_and_a_lost_one_ends_the_others() {
        use Said::{Reduced as R, Turn as T};
        let dealt = |epoch, run| T(Turn::Deal(deal(epoch, run)));
        assert_eq!(update(vec![dealt(1, 0..2), R(Reduced::Sum(sum()))]), (Ok(sum()), vec![1]));
        let again = R(Reduced::Redeal(deal(2, 0..2)));
        let (made, given) = update(vec![dealt(1, 0..2), again, R(Reduced::Sum(sum()))]);
        assert_eq!((made, given), (Ok(sum()), vec![1, 1]), "what was computed is given again");
        // The sum came while the group was formed anew: nothing is given twice.
        let answers = vec![dealt(1, 0..2), R(Reduced::Begin), dealt(2, 0..0), R(Reduced::Sum(sum()))];
        assert_eq!(update(answers), (Ok(sum()), vec![1, 0]));
        for lost in [
            vec![dealt(1, 0..2), R(Reduced::Redeal(deal(2, 0..4)))],
            vec![dealt(1, 0..2), R(Reduced::Begin), dealt(2, 0..4)],
            vec![T(Turn::Load("state".into()))],
            vec![dealt(1, 0..2)],
            vec![],
        ] {
            assert!(matches!(update(lost).0, Err(JobError::Lost(_))));
        }
        let other = Deal { micro_batches: 6, ..deal(1, 0..3) };
        assert!(matches!(update(vec![T(Turn::Deal(other))]).0, Err(JobError::Failed(_))));
        let late = Sum { step: 4, ..sum() };
        let (made, _) = update(vec![dealt(1, 0..2), R(Reduced::Sum(late))]);
        assert!(matches!(made, Err(JobError::Failed(_))));
    }
}
