//! What comes next in a run, as plain numbers.

use crate::TrainingConfig;
use std::ops::RangeInclusive;

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    trains: bool,
    tests: bool,
    iters: u64,
    /// Micro-batches of an update.
    group: u64,
    /// Micro-batches done.
    iteration: u64,
    /// The last iteration before which was measured.
    validated: u64,
    tested: bool,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// A measurement, due before this iteration.
    Validation(u64),
    /// These micro-batches, and the update they make.
    Update(RangeInclusive<u64>),
    /// The measurement at the end.
    Test,
    /// Nothing.
    Nothing,
}

impl Progress {
    pub(super) fn new(config: &TrainingConfig) -> Self {
        let (trains, tests) = (config.train, config.test);
        let group = config.grad_accumulation_steps.max(1);
        Self { trains, tests, iters: config.iters, group, iteration: 0, validated: 0, tested: false }
    }

    pub(super) fn iteration(&self) -> u64 {
        self.iteration
    }

    /// Iterations done, the last one before which was measured, and whether the test is done.
    pub(super) fn place(&self) -> (u64, u64, bool) {
        (self.iteration, self.validated, self.tested)
    }

    pub(super) fn go_to(&mut self, iteration: u64, validated: u64, tested: bool) {
        (self.iteration, self.validated, self.tested) = (iteration.min(self.iters), validated, tested);
    }

    /// The measurements that are due within the next update come before it: the parameters are the same then.
    pub(super) fn next(&self, validates: impl Fn(u64) -> bool) -> Piece {
        if self.trains && self.iteration < self.iters {
            let first = self.iteration + 1;
            let last = (self.iteration - self.iteration % self.group).saturating_add(self.group);
            let iterations = first..=last.min(self.iters);
            let due = |iteration: &u64| *iteration > self.validated && validates(*iteration);
            return match iterations.clone().find(due) {
                Some(iteration) => Piece::Validation(iteration),
                None => Piece::Update(iterations),
            };
        }
        if self.tests && !self.tested { Piece::Test } else { Piece::Nothing }
    }

    pub(super) fn done(&mut self, iteration: u64) {
        self.iteration = iteration;
    }

    pub(super) fn validated(&mut self, iteration: u64) {
        self.validated = iteration;
    }

    pub(super) fn tested(&mut self) {
        self.tested = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_come_before_the_update_in_which_they_are_due() {
        let mut progress = Progress {
            trains: true,
            tests: true,
            iters: 5,
            group: 2,
            iteration: 0,
            validated: 0,
            tested: false,
        };
        let mut seen = Vec::new();
        loop {
            let piece = progress.next(|iteration| iteration == 1 || iteration % 4 == 0 || iteration == 5);
            match &piece {
                Piece::Validation(iteration) => progress.validated(*iteration),
                Piece::Update(iterations) => progress.done(*iterations.end()),
                Piece::Test => progress.tested(),
                Piece::Nothing => break,
            }
            seen.push(piece);
        }
        let expected = [
            Piece::Validation(1),
            Piece::Update(1..=2),
            Piece::Validation(4),
            Piece::Update(3..=4),
            Piece::Validation(5),
            Piece::Update(5..=5),
            Piece::Test,
        ];
        assert_eq!(seen, expected);
    }
}
