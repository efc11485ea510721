//! One update after the other: gradients of micro-batches, their sum, the next parameters.
//!
//! The two halves, [`Trainer::gradients`] and [`Trainer::apply`], are separate, so that several processes can share the first. Sums are
//! formed along a fixed binary tree over the micro-batches, also in one process, so that who computes which of them changes no bit.

mod gradients;
mod stage;
mod state;
mod tree;
mod update;

pub use gradients::MicroGradients;
pub(crate) use stage::{Place, Returned, StageTrainer};
pub use state::StateError;
pub(crate) use tree::add;
pub use update::Applied;

use crate::optimizer::Optimizer;
use crate::parameters::Beginning;
use crate::{MicroBatch, OptimizerConfig, Preference, PreferenceLoss};
use gradients::{Gradients, Objective};
use mlxnode_engine::tuning::Tuner;
use mlxnode_mlx::{Array, Device, Dtype};
use update::Update;

/// How a trainer computes.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerOptions {
    /// The optimizer and its arguments.
    pub optimizer: OptimizerConfig,
    /// Gradients longer than this are cut to it.
    pub clip: Option<f64>,
    /// As mlx-lm does: a micro-batch weighs as much as another, however many tokens it has, and the loss has the logits' element type.
    /// Else each token weighs the same, in single precision.
    pub parity: bool,
    /// Learn from pairs of answers. Not in parity.
    pub preference: Option<Preference>,
    /// Of the random numbers of dropout.
    pub seed: u64,
    /// Compile the gradient and the update. On the CPU backend that needs a C++ compiler.
    pub compile: bool,
}

/// A training that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The loss or its gradient is infinite or no number. The parameters are those before.
    #[error(
        "the loss or its gradient is not finite ({detail}); take a smaller learning rate or look at these rows"
    )]
    NotFinite {
        /// Which rows, and what the loss was.
        detail: String,
    },
    /// A batch that the model cannot take.
    #[error(
        "row {row} of the data set has token {token}, but the model knows {vocabulary} tokens only; take the model's own tokenizer"
    )]
    Token {
        /// The row, from 0.
        row: u32,
        /// The token.
        token: u32,
        /// How many there are.
        vocabulary: usize,
    },
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] mlxnode_mlx::Error),
}

/// Parameters, what the optimizer remembers of them, and how to go on.
pub struct Trainer {
    tuner: Tuner,
    options: TrainerOptions,
    /// In the tuner's order.
    parameters: Vec<Array>,
    /// What the optimizer remembers of all of them, one parameter's after the other's.
    memories: Vec<Array>,
    /// Updates so far.
    updates: u64,
    gradients: Gradients,
    update: Update,
}

impl Trainer {
    /// Begins with these parameters.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub fn new(
        tuner: Tuner,
        beginning: Beginning,
        options: TrainerOptions,
    ) -> Result<Self, mlxnode_mlx::Error> {
        let device = tuner.device().clone();
        let optimizer = Optimizer::new(options.optimizer);
        let parameters = beginning.arrays;
        let mut memories = Vec::new();
        for parameter in &parameters {
            for memory in optimizer.memories(parameter.shape()) {
                memories.push(device.zeros(&memory.shape, parameter.dtype())?);
            }
        }
        device.eval(&memories)?;
        let reference = options.compares().then_some(beginning.reference);
        let gradients = Gradients::new(&tuner, options.objective(), reference, options.compile, false)?;
        let update = Update::new(optimizer, parameters.len(), options.clip, options.compile)?;
        Ok(Self { tuner, options, parameters, memories, updates: 0, gradients, update })
    }

    /// What is trained.
    pub fn tuner(&self) -> &Tuner {
        &self.tuner
    }

    /// The parameters, in the tuner's order.
    pub fn parameters(&self) -> &[Array] {
        &self.parameters
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.tuner.device()
    }

    /// The gradient of the loss of micro-batch `iteration` of the run, which seeds its dropout. Waits for it.
    ///
    /// # Errors
    ///
    /// When the batch has tokens that the model does not have, and MLX's.
    pub fn gradients(&mut self, batch: &MicroBatch, iteration: u64) -> Result<MicroGradients, TrainError> {
        self.check(batch)?;
        let keys = gradients::keys(self.tuner.keys(), self.options.seed, iteration)?;
        let made = self.gradients.of(&self.tuner, &self.parameters, batch, keys.as_ref())?;
        Ok(made)
    }

    /// The sum of the losses of a batch's counted tokens as the parameters are now, without dropout, and how many tokens these are.
    /// Waits for it.
    ///
    /// # Errors
    ///
    /// As [`Self::gradients`].
    pub fn loss(&self, batch: &MicroBatch) -> Result<(f64, u64), TrainError> {
        self.check(batch)?;
        Ok(self.gradients.loss(&self.tuner, &self.parameters, batch)?)
    }

    /// Goes on by the sum of the gradients of `micro_batches` micro-batches, at this learning rate. Waits for it. When something is not
    /// finite the parameters stay.
    ///
    /// # Errors
    ///
    /// When the gradient is not finite, and MLX's.
    pub fn apply(
        &mut self,
        sum: &MicroGradients,
        micro_batches: u64,
        learning_rate: f64,
    ) -> Result<Applied, TrainError> {
        let divisor = self.options.divisor(sum, micro_batches);
        let mut made = self.update.apply(
            self.device(),
            &self.parameters,
            &self.memories,
            sum,
            divisor,
            learning_rate,
            self.updates + 1,
            None,
        )?;
        let norm = made.norm;
        self.options.check(sum, micro_batches, norm)?;
        self.memories = made.arrays.split_off(self.parameters.len());
        self.parameters = made.arrays;
        self.updates += 1;
        Ok(Applied {
            loss: sum.mean(micro_batches, self.options.parity),
            tokens: sum.tokens,
            gradient_norm: norm,
        })
    }

    /// Ids beyond the vocabulary would read foreign memory.
    fn check(&self, batch: &MicroBatch) -> Result<(), TrainError> {
        check(batch, self.tuner.vocabulary())
    }
}

impl TrainerOptions {
    fn objective(&self) -> Objective {
        match self.preference {
            Some(preference) => Objective::Pairs(preference),
            None => Objective::Tokens { as_mlx_lm: self.parity },
        }
    }

    /// Is what the model says compared with what it said before any training?
    fn compares(&self) -> bool {
        matches!(self.preference, Some(Preference { loss: PreferenceLoss::Dpo, .. }))
    }

    /// What a sum of gradients is divided by.
    fn divisor(&self, sum: &MicroGradients, micro_batches: u64) -> f64 {
        match self.parity {
            true => micro_batches as f64,
            false => sum.tokens as f64,
        }
    }

    /// Can an update be made of it?
    fn check(&self, sum: &MicroGradients, micro_batches: u64, norm: f64) -> Result<(), TrainError> {
        if norm.is_finite() && sum.loss.is_finite() {
            return Ok(());
        }
        let loss = sum.mean(micro_batches, self.parity);
        Err(TrainError::NotFinite { detail: format!("rows {}; loss {loss}, gradient {norm}", sum.rows()) })
    }
}

fn check(batch: &MicroBatch, vocabulary: usize) -> Result<(), TrainError> {
    for row in &batch.rows {
        if let Some(token) = row.tokens.iter().find(|token| **token as usize >= vocabulary) {
            let number = row.numbers.first().copied().unwrap_or(0);
            return Err(TrainError::Token { row: number, token: *token, vocabulary });
        }
    }
    Ok(())
}

/// A number without dimensions in single precision.
fn number(value: f64) -> Result<Array, mlxnode_mlx::Error> {
    Array::scalar(value as f32, Dtype::F32)
}
