//! Fine-tuning as a job: pieces of a few seconds, between which it can be saved and taken up again bit by bit the same.
//!
//! ```text
//!   validation? ─▶ micro-batches of one update ─▶ update ─▶ … ─▶ test? ─▶ finished
//! ```
//!
//! A piece is an update with all its micro-batches, or a measurement; so what is to be saved between two pieces is what is trained,
//! what the optimizer remembers, and how many iterations are done: rows, learning rates and random keys follow from that number.
//!
//! With a [group](FineTuning::with_group) of workers each computes some of an update's micro-batches. Sums go along the same tree with
//! one worker and with many, so that the adapter has the same bits.
//!
//! A model that is larger than one node is trained by a [line of stages](StagedFineTuning).

mod cursor;
mod group;
mod line;
mod passes;
mod progress;
mod replicas;
mod staged;

pub use cursor::CursorError;
pub use staged::StagedFineTuning;

use crate::parameters::{self, ParameterError, ShareError};
use crate::trainer::{MicroGradients, StateError, TrainError, Trainer, TrainerOptions, add};
use crate::{BatchError, BatchOptions, Batches, MicroBatch, Sets, TrainingConfig};
use cursor::{Cursor, Fingerprint};
use group::Together;
use mlxnode_checkpoint::WriteError;
use mlxnode_compute::{
    Advance, Job, JobError, LinkError, Reduce, StepReport, TreeNode, TreeSum, tells_parameters_after,
};
use mlxnode_engine::tuning::{TuneError, Tuning};
use mlxnode_mlx::{Array, Device, Dtype};
use progress::{Piece, Progress};
use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Instant;

/// The adapter's file, as mlx-lm calls it.
pub const ADAPTER_FILE: &str = "adapters.safetensors";
/// Its configuration.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// What is trained and what the optimizer remembers, in a saved job.
const STATE_FILE: &str = "state.safetensors";
/// How far the job is, in a saved job.
const CURSOR_FILE: &str = "cursor.json";

/// A training that cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// What is to be trained.
    #[error(transparent)]
    Parameters(#[from] ParameterError),
    /// The data.
    #[error(transparent)]
    Batches(#[from] BatchError),
    /// Nothing to learn from.
    #[error("the training set has no rows; check the data set's train split")]
    NoRows,
    /// Pairs without a loss on them, or the other way round.
    #[error(
        "training on pairs of answers needs both \"preference\" (dpo or orpo) and rows with \"chosen\" and \"rejected\""
    )]
    Preference,
    /// Sums that would have other bits with other numbers of workers.
    #[error(
        "with \"parity\" an update is added up as mlx-lm does, in the element type of what is trained ({dtype}), but several workers \
         add up in single precision; take one worker, or leave parity out"
    )]
    Halves {
        /// The element type.
        dtype: String,
    },
    /// The model.
    #[error(transparent)]
    Tune(#[from] TuneError),
    /// A saved job that is not this one.
    #[error(transparent)]
    Cursor(#[from] CursorError),
    /// A saved job whose state cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// It cannot be divided into stages, or another stage cannot begin.
    #[error("{problem}")]
    Stages {
        /// What is in the way.
        problem: String,
    },
    /// The other stages are not there.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] mlxnode_mlx::Error),
}

impl From<ShareError> for PrepareError {
    fn from(error: ShareError) -> Self {
        match error {
            ShareError::Parameters(error) => Self::Parameters(error),
            other => Self::Stages { problem: other.to_string() },
        }
    }
}

/// Fine-tuning of a model on a data set.
pub struct FineTuning {
    config: TrainingConfig,
    trainer: Trainer,
    batches: Batches,
    fingerprint: Fingerprint,
    progress: Progress,
    /// Tokens that counted so far.
    trained_tokens: u64,
    /// The other workers of the job, where there may be some.
    group: Option<Box<dyn Reduce>>,
}

impl FineTuning {
    /// Puts a model and a data set together. `model` is the checkpoint's fingerprint: a saved job is not taken up with another one.
    /// `compile` as in [`TrainerOptions`].
    ///
    /// # Errors
    ///
    /// When they do not fit each other or the configuration.
    pub fn new(
        tuning: Tuning,
        config: TrainingConfig,
        sets: Sets,
        model: [u8; 32],
        compile: bool,
    ) -> Result<Self, PrepareError> {
        checked(&config, &sets)?;
        let plan = parameters::plan(&tuning, &config)?;
        let tuner = tuning.tune(plan)?;
        let tuner = if config.grad_checkpoint { tuner.with_checkpointing()? } else { tuner };
        let mut beginning = parameters::begin(&tuner, u64::from(config.seed))?;
        if let Some(file) = &config.resume_adapter_file {
            beginning = parameters::resume(&tuner, beginning, file)?;
        }
        let trainer = Trainer::new(tuner, beginning, options(&config, compile))?;
        let fingerprint = Fingerprint::of(model, &sets).with(&config);
        let batches = Batches::new(BatchOptions::from(&config), sets)?;
        let progress = Progress::new(&config);
        Ok(Self { config, trainer, batches, fingerprint, progress, trained_tokens: 0, group: None })
    }

    /// The same with other workers, each of which has the same model, configuration and data. The group's steps have
    /// `grad_accumulation_steps` micro-batches.
    ///
    /// # Errors
    ///
    /// [`PrepareError::Halves`]: the number of workers would show in the result.
    pub fn with_group(mut self, group: Box<dyn Reduce>) -> Result<Self, PrepareError> {
        single(self.trainer.parameters(), &self.config)?;
        self.group = Some(group);
        Ok(self)
    }

    /// Goes on where [`Job::save`] left off in `directory`.
    ///
    /// # Errors
    ///
    /// When what lies there is not whole, or another job's.
    pub fn resume(&mut self, directory: &Path) -> Result<(), PrepareError> {
        let cursor = Cursor::read(&directory.join(CURSOR_FILE))?;
        let state = directory.join(STATE_FILE);
        cursor.check(&self.fingerprint, &state)?;
        self.trainer.read_state(&state, cursor.updates)?;
        self.progress.go_to(cursor.iteration, cursor.validated, cursor.tested);
        self.trained_tokens = cursor.trained_tokens;
        Ok(())
    }

    /// The trainer.
    pub fn trainer(&self) -> &Trainer {
        &self.trainer
    }

    /// What was asked for.
    pub fn config(&self) -> &TrainingConfig {
        &self.config
    }

    /// Micro-batches done.
    pub fn iteration(&self) -> u64 {
        self.progress.iteration()
    }

    /// Tokens that counted so far.
    pub fn trained_tokens(&self) -> u64 {
        self.trained_tokens
    }

    /// Mean loss on held-back rows over their tokens.
    fn measured(&self, batches: impl Iterator<Item = MicroBatch>) -> Result<f64, TrainError> {
        let (mut sum, mut tokens) = (0.0, 0);
        for batch in batches {
            let (loss, counted) = self.trainer.loss(&batch)?;
            sum += loss;
            tokens += counted;
            clear_cache(self.trainer.device(), &self.config)?;
        }
        Ok(sum / tokens.max(1) as f64)
    }

    fn update(&mut self, iterations: RangeInclusive<u64>) -> Result<Advance, JobError> {
        let begun = Instant::now();
        let (first, last) = (*iterations.start(), *iterations.end());
        let micro_batches = last + 1 - first;
        let step = self.progress.iteration() + 1;
        // mlx-lm's last gradients go nowhere when they are too few for an update.
        let is_lost = self.config.parity && micro_batches < self.config.grad_accumulation_steps;
        let group = if is_lost { None } else { self.group.take() };
        let sum = match group {
            None => self.alone(iterations).map_err(|error| told(step, error))?,
            Some(mut group) => {
                let made = self.together(&mut *group);
                self.group = Some(group);
                match made? {
                    Together::Sum(sum) => sum,
                    Together::Other(words) => return Ok(Advance::Prepared(words)),
                }
            }
        };
        let learning_rate = self.config.schedule.at(self.trainer.updates());
        let (loss, norm) = match is_lost {
            true => (sum.mean(micro_batches, true), None),
            false => {
                let applied = self.trainer.apply(&sum, micro_batches, learning_rate);
                let applied = applied.map_err(|error| told(step, error))?;
                self.compare()?;
                (applied.loss, Some(applied.gradient_norm))
            }
        };
        let device = self.trainer.device();
        let memory = clear_cache(device, &self.config).and_then(|()| device.memory());
        let peak_memory = memory.map_err(|error| JobError::Failed(error.to_string()))?.peak as u64;
        self.progress.done(last);
        self.trained_tokens += sum.tokens;
        Ok(Advance::Step(StepReport {
            step: last,
            steps: self.config.iters,
            loss,
            tokens: sum.tokens,
            learning_rate,
            gradient_norm: norm,
            seconds: begun.elapsed().as_secs_f64(),
            peak_memory,
        }))
    }

    /// Tells the other workers what came of the update, when it is time to.
    fn compare(&mut self) -> Result<(), JobError> {
        let updates = self.trainer.updates();
        let Some(group) = self.group.as_mut().filter(|_| tells_parameters_after(updates)) else {
            return Ok(());
        };
        let hash = self.trainer.hash_parameters().map_err(|error| JobError::Failed(error.to_string()))?;
        group.applied(updates, hash);
        Ok(())
    }

    /// The sum of these iterations' gradients, all computed here.
    fn alone(&mut self, iterations: RangeInclusive<u64>) -> Result<MicroGradients, TrainError> {
        let none = || mlxnode_mlx::Error::Mlx("an update without micro-batches".to_owned());
        let count = (iterations.end() + 1).saturating_sub(*iterations.start());
        let mut sum = TreeSum::new(u32::try_from(count).map_err(|_| none())?);
        for (index, iteration) in (0..).zip(iterations) {
            let batch = self.batches.training(iteration);
            let made = self.trainer.gradients(&batch, iteration)?;
            let device = self.trainer.device();
            // Halves of the tree are added as soon as they are there: never more than log2 of them wait.
            sum.insert(TreeNode::leaf(index), made, |left, right| add(device, left, &right))?;
        }
        sum.into_parts().next().map(|(_, sum)| sum).ok_or_else(|| none().into())
    }

    fn piece(&mut self) -> Result<Advance, JobError> {
        let step = self.progress.iteration() + 1;
        let told = |error| told(step, error);
        let validates = |iteration: u64| self.batches.validates(iteration);
        match self.progress.next(validates) {
            Piece::Validation(iteration) => {
                let begun = Instant::now();
                let blocks = self.batches.validation(iteration);
                let batches = blocks.iter().map(|block| self.batches.valid_batch(block));
                let loss = self.measured(batches).map_err(told)?;
                self.progress.validated(iteration);
                Ok(Advance::Validated {
                    step: iteration.saturating_sub(1),
                    loss,
                    seconds: begun.elapsed().as_secs_f64(),
                })
            }
            Piece::Update(iterations) => self.update(iterations),
            Piece::Test => {
                let blocks = self.batches.test(self.config.train);
                let batches = blocks.iter().map(|block| self.batches.test_batch(block));
                let loss = self.measured(batches).map_err(told)?;
                self.progress.tested();
                Ok(Advance::Tested { loss })
            }
            Piece::Nothing => Ok(Advance::Finished),
        }
    }
}

/// Do the rows fit what is asked for?
fn checked(config: &TrainingConfig, sets: &Sets) -> Result<(), PrepareError> {
    if config.train && sets.train.is_empty() {
        return Err(PrepareError::NoRows);
    }
    for set in [&sets.train, &sets.valid, &sets.test].into_iter().filter(|set| !set.is_empty()) {
        if set.is_preference() != config.preference.is_some() {
            return Err(PrepareError::Preference);
        }
    }
    Ok(())
}

/// Is everything added up in single precision, as it is between processes?
fn single(parameters: &[Array], config: &TrainingConfig) -> Result<(), PrepareError> {
    let halves = parameters.iter().map(Array::dtype).find(|dtype| *dtype != Dtype::F32);
    match halves.filter(|_| config.parity) {
        Some(dtype) => Err(PrepareError::Halves { dtype: format!("{dtype:?}").to_lowercase() }),
        None => Ok(()),
    }
}

fn options(config: &TrainingConfig, compile: bool) -> TrainerOptions {
    TrainerOptions {
        optimizer: config.optimizer,
        clip: config.clip_grad_norm,
        parity: config.parity,
        preference: config.preference,
        seed: u64::from(config.seed),
        compile,
    }
}

/// As `clear_cache_threshold` asks for it.
fn clear_cache(device: &Device, config: &TrainingConfig) -> Result<(), mlxnode_mlx::Error> {
    let threshold = config.clear_cache_threshold;
    if threshold > 0 && device.memory()?.cache as u64 > threshold {
        device.clear_cache()?;
    }
    Ok(())
}

/// What went wrong in an update or a measurement, as the job says it.
fn told(step: u64, error: TrainError) -> JobError {
    match error {
        TrainError::NotFinite { detail } => JobError::NotFinite { step, detail },
        TrainError::Token { .. } => JobError::Refused(error.to_string()),
        TrainError::Device(_) => JobError::Failed(error.to_string()),
    }
}

impl Job for FineTuning {
    fn advance(&mut self) -> Result<Advance, JobError> {
        self.piece()
    }

    fn save(&mut self, directory: &Path) -> Result<(), JobError> {
        let state = directory.join(STATE_FILE);
        self.trainer.write_state(&state).map_err(written)?;
        let (updates, tokens) = (self.trainer.updates(), self.trained_tokens);
        Cursor::write(directory, &self.progress, updates, tokens, &self.fingerprint).map_err(io)
    }

    fn publish(&mut self, directory: &Path) -> Result<(), JobError> {
        self.trainer.write_parameters(&directory.join(ADAPTER_FILE)).map_err(written)?;
        std::fs::write(directory.join(ADAPTER_CONFIG), self.config.adapter_config()).map_err(io)
    }
}

fn io(error: std::io::Error) -> JobError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => JobError::NoRoom(error.to_string()),
        _ => JobError::Failed(error.to_string()),
    }
}

fn written(error: StateError) -> JobError {
    let StateError::Write(WriteError::Write { source, .. }) = &error else {
        return JobError::Failed(error.to_string());
    };
    let mut cause: Option<&dyn std::error::Error> = Some(source);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<std::io::Error>()
            && matches!(found.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
        {
            return JobError::NoRoom(found.to_string());
        }
        cause = error.source();
    }
    // The path is one of this machine, and says nothing to who asked for the job.
    JobError::Failed(format!("what is trained cannot be written: {source}"))
}
