//! mlx-lm's order of rows: numpy's global generator, drawn from by training and validation in turn.
//!
//! Each epoch of training and each validation draws one permutation of its blocks, when its first batch is asked for: the
//! training batch of an iteration before that iteration's validation. What an iteration gets is therefore found by drawing all that was
//! drawn before it; going back begins again from the seed.

use super::Numpy;

/// What decides which permutations are drawn when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) seed: u32,
    /// Blocks of an epoch of training.
    pub(super) training: u32,
    /// Blocks of a validation; None: there is none.
    pub(super) validation: Option<u32>,
    pub(super) test: u32,
    pub(super) iters: u64,
    pub(super) steps_per_eval: u64,
}

/// The draws so far.
pub(super) struct Order {
    plan: Plan,
    numpy: Numpy,
    /// Of the epoch that `iteration` is in.
    training: Vec<u32>,
    /// The last one that was drawn.
    validation: Vec<u32>,
    /// All up to this iteration was drawn, its validation included.
    iteration: u64,
}

impl Order {
    pub(super) fn new(plan: Plan) -> Self {
        let numpy = Numpy::new(plan.seed);
        Self { plan, numpy, training: Vec::new(), validation: Vec::new(), iteration: 0 }
    }

    /// The block of an iteration, from 1 on.
    pub(super) fn training(&mut self, iteration: u64) -> Option<u32> {
        self.go_to(iteration);
        let place = iteration.checked_sub(1)?.checked_rem(u64::from(self.plan.training))?;
        self.training.get(place as usize).copied()
    }

    /// The blocks of an iteration's validation, in order; empty when there is none then.
    pub(super) fn validation(&mut self, iteration: u64) -> &[u32] {
        self.go_to(iteration);
        if self.validates(iteration) { &self.validation } else { &[] }
    }

    /// The test's, drawn behind everything that training draws, or first when nothing is trained.
    pub(super) fn test(&mut self, is_behind_training: bool) -> Vec<u32> {
        let mut order = Self::new(self.plan);
        if is_behind_training {
            order.go_to(self.plan.iters);
        }
        order.numpy.permutation(self.plan.test)
    }

    fn validates(&self, iteration: u64) -> bool {
        let by_count = iteration.checked_rem(self.plan.steps_per_eval) == Some(0);
        self.plan.validation.is_some() && (iteration == 1 || by_count || iteration == self.plan.iters)
    }

    fn go_to(&mut self, iteration: u64) {
        if iteration < self.iteration {
            *self = Self::new(self.plan);
        }
        while self.iteration < iteration {
            if self.iteration.checked_rem(u64::from(self.plan.training)) == Some(0) {
                self.training = self.numpy.permutation(self.plan.training);
            }
            self.iteration += 1;
            if let Some(blocks) = self.plan.validation.filter(|_| self.validates(self.iteration)) {
                self.validation = self.numpy.permutation(blocks);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_back_gives_the_same() {
        let plan = Plan { seed: 7, training: 5, validation: Some(3), test: 4, iters: 23, steps_per_eval: 4 };
        let mut order = Order::new(plan);
        let forth: Vec<_> = (1..=23).map(|it| (order.training(it), order.validation(it).to_vec())).collect();
        for it in [23, 1, 12, 11, 5, 6, 23] {
            let mut fresh = Order::new(plan);
            assert_eq!((order.training(it), order.validation(it).to_vec()), forth[it as usize - 1], "{it}");
            assert_eq!(fresh.training(it), forth[it as usize - 1].0, "{it}");
        }
        assert_eq!(order.test(true), Order::new(plan).test(true));
        assert_ne!(order.test(true), order.test(false));
    }
}
