//! Which rows go through the model together, and when.
//!
//! Two orders: ours (`dealt`: like lengths together, nothing lost, a pure function of the iteration), and mlx-lm's (`parity`: numpy's
//! generator, remainders dropped). Both make [`MicroBatch`]es.

mod dealt;
mod micro_batch;
mod numpy;
mod parity;

pub use micro_batch::{BatchRow, Block, MicroBatch};
pub use numpy::Numpy;

use crate::config::{Count, TrainingConfig};
use crate::data::Dataset;
use dealt::Dealer;
use std::sync::Arc;

/// What decides how rows are put into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Rows (or packed groups of rows, or pairs) of a batch.
    pub batch_size: usize,
    /// The longest row, in tokens.
    pub max_seq_length: usize,
    /// Of the order.
    pub seed: u32,
    /// Put short rows together.
    pub packing: bool,
    /// mlx-lm's order.
    pub parity: bool,
    /// Iterations of the run.
    pub iters: u64,
    /// Iterations between validations.
    pub steps_per_eval: u64,
    /// Batches of a validation.
    pub val_batches: Count,
    /// Batches of the test.
    pub test_batches: Count,
}

impl From<&TrainingConfig> for BatchOptions {
    fn from(config: &TrainingConfig) -> Self {
        Self {
            batch_size: config.batch_size,
            max_seq_length: config.max_seq_length,
            seed: config.seed,
            packing: config.packing,
            parity: config.parity,
            iters: config.iters,
            steps_per_eval: config.steps_per_eval,
            val_batches: config.val_batches,
            test_batches: config.test_batches,
        }
    }
}

/// The rows of a run: what is learned from, what is measured on while training, and at the end.
#[derive(Clone, Debug, Default)]
pub struct Sets {
    /// Learned from.
    pub train: Arc<Dataset>,
    /// Measured on while training; may be empty.
    pub valid: Arc<Dataset>,
    /// Measured on at the end; may be empty.
    pub test: Arc<Dataset>,
}

/// Too few rows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// mlx-lm drops what does not fill a batch.
    #[error(
        "the {set} set has {rows} rows, less than batch_size {batch_size}; take a smaller batch_size, or leave parity out"
    )]
    TooFew {
        /// "training", "validation" or "test".
        set: &'static str,
        /// How many it has.
        rows: usize,
        /// How many a batch needs.
        batch_size: usize,
    },
    /// More than can be numbered.
    #[error("the {set} set has {rows} rows, more than can be trained on at once")]
    TooMany {
        /// "training", "validation" or "test".
        set: &'static str,
        /// How many it has.
        rows: usize,
    },
}

/// All batches of a run.
pub struct Batches {
    options: BatchOptions,
    sets: Sets,
    order: Order,
}

enum Order {
    Dealt { training: Dealer, valid: Vec<Block>, test: Vec<Block> },
    Parity { order: Box<parity::Order>, training: Vec<Block>, valid: Vec<Block>, test: Vec<Block> },
}

impl Batches {
    /// The batches of these sets.
    ///
    /// # Errors
    /// [`BatchError`]
    pub fn new(options: BatchOptions, sets: Sets) -> Result<Self, BatchError> {
        for (set, dataset) in named(&sets) {
            let rows = dataset.len();
            if u32::try_from(rows).is_err() {
                return Err(BatchError::TooMany { set, rows });
            }
            if options.parity && (1..options.batch_size).contains(&rows) {
                return Err(BatchError::TooFew { set, rows, batch_size: options.batch_size });
            }
        }
        let order = if options.parity { in_parity(options, &sets) } else { dealt(options, &sets) };
        Ok(Self { options, sets, order })
    }

    /// The rows of an iteration, from 1 on.
    pub fn training_block(&mut self, iteration: u64) -> Block {
        match &mut self.order {
            Order::Dealt { training, .. } => training.block(iteration.saturating_sub(1)),
            Order::Parity { order, training, .. } => {
                let block = order.training(iteration).and_then(|block| training.get(block as usize));
                block.cloned().unwrap_or_default()
            }
        }
    }

    /// The batch of an iteration, from 1 on.
    pub fn training(&mut self, iteration: u64) -> MicroBatch {
        let block = self.training_block(iteration);
        self.training_batch(&block)
    }

    /// A batch of these rows of the training set, of which a worker may take some only.
    pub fn training_batch(&self, block: &Block) -> MicroBatch {
        self.batch(&self.sets.train, block)
    }

    /// Is there a validation before the update of this iteration? At the first, the last, and each `steps_per_eval`.
    pub fn validates(&self, iteration: u64) -> bool {
        let by_count = iteration.checked_rem(self.options.steps_per_eval) == Some(0);
        let is_due = iteration == 1 || iteration == self.options.iters || by_count;
        is_due && !self.sets.valid.is_empty() && self.options.val_batches != Count::Of(0)
    }

    /// The blocks that an iteration's validation measures on; empty when there is none then. Ours are the same each time.
    pub fn validation(&mut self, iteration: u64) -> Vec<Block> {
        if !self.validates(iteration) {
            return Vec::new();
        }
        let most = most(self.options.val_batches);
        match &mut self.order {
            Order::Dealt { valid, .. } => valid.iter().take(most).cloned().collect(),
            Order::Parity { order, valid, .. } => chosen(order.validation(iteration), valid, most),
        }
    }

    /// A batch of the validation set.
    pub fn valid_batch(&self, block: &Block) -> MicroBatch {
        self.batch(&self.sets.valid, block)
    }

    /// The blocks that the test measures on, behind training or without it.
    pub fn test(&mut self, is_behind_training: bool) -> Vec<Block> {
        let most = most(self.options.test_batches);
        match &mut self.order {
            Order::Dealt { test, .. } => test.iter().take(most).cloned().collect(),
            Order::Parity { order, test, .. } => chosen(&order.test(is_behind_training), test, most),
        }
    }

    /// A batch of the test set.
    pub fn test_batch(&self, block: &Block) -> MicroBatch {
        self.batch(&self.sets.test, block)
    }

    /// Batches of the first epoch.
    pub fn epoch_len(&mut self) -> u64 {
        match &mut self.order {
            Order::Dealt { training, .. } => training.blocks(0).len() as u64,
            Order::Parity { training, .. } => training.len() as u64,
        }
    }

    /// The sets.
    pub fn sets(&self) -> &Sets {
        &self.sets
    }

    fn batch(&self, dataset: &Dataset, block: &Block) -> MicroBatch {
        MicroBatch::of(dataset, block, self.options.max_seq_length, self.options.parity)
    }
}

fn named(sets: &Sets) -> [(&'static str, &Dataset); 3] {
    [("training", &sets.train), ("validation", &sets.valid), ("test", &sets.test)]
}

fn most(count: Count) -> usize {
    match count {
        Count::All => usize::MAX,
        Count::Of(count) => usize::try_from(count).unwrap_or(usize::MAX),
    }
}

fn chosen(order: &[u32], blocks: &[Block], most: usize) -> Vec<Block> {
    order.iter().take(most).filter_map(|block| blocks.get(*block as usize).cloned()).collect()
}

fn dealt(options: BatchOptions, sets: &Sets) -> Order {
    let room = u32::try_from(options.max_seq_length).unwrap_or(u32::MAX);
    let dealer = |dataset: &Dataset| {
        Dealer::new(options.seed, options.batch_size, dataset.lengths(), options.packing.then_some(room))
    };
    let once = |dataset: &Dataset| dealer(dataset).blocks(0).to_vec();
    Order::Dealt { training: dealer(&sets.train), valid: once(&sets.valid), test: once(&sets.test) }
}

/// mlx-lm's blocks: rows in order of how many fields they have (it means to sort by length, but asks a row for its own), in blocks
/// that are full.
fn in_parity(options: BatchOptions, sets: &Sets) -> Order {
    let blocks = |dataset: &Dataset| -> Vec<Block> {
        let mut rows: Vec<u32> = (0..dataset.len() as u32).collect();
        rows.sort_by_key(|row| dataset.fields(*row));
        let full = rows.chunks_exact(options.batch_size);
        full.map(|block| block.iter().map(|row| vec![*row]).collect()).collect()
    };
    let (training, valid, test) = (blocks(&sets.train), blocks(&sets.valid), blocks(&sets.test));
    let has_validation = !valid.is_empty() && options.val_batches != Count::Of(0);
    let plan = parity::Plan {
        seed: options.seed,
        training: training.len() as u32,
        validation: has_validation.then_some(valid.len() as u32),
        test: test.len() as u32,
        iters: options.iters,
        steps_per_eval: options.steps_per_eval,
    };
    Order::Parity { order: Box::new(parity::Order::new(plan)), training, valid, test }
}
