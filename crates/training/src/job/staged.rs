//! Fine-tuning of a model whose layers are divided among processes: the job of one of them.
//!
//! ```text
//!  stage 0 ─ order ─▶ all: carry it out together ─ numbers of all ─▶ each: the same update, or the same error
//! ```
//! Each holds a range of layers and trains what the whole run would train of them, with the random numbers that one process draws. Stage 0
//! says what comes next, reports, and saves: what it writes is what one process writes, so that any number of stages goes on from it.
//! Nothing of an update counts before all stages have told their loss and the squares of their gradients: a number that is not
//! finite stops all of them in the same step, with the parameters before it.

use super::cursor::{Cursor, Fingerprint};
use super::line::{HandError, Line, Trouble, can_hand_on};
use super::passes::{Pass, passes};
use super::progress::{Piece, Progress};
use super::replicas::Replicas;
use super::{
    ADAPTER_CONFIG, ADAPTER_FILE, CURSOR_FILE, PrepareError, STATE_FILE, checked, clear_cache, io, options,
    single, told, written,
};
use crate::parameters::{self, Held, Share};
use crate::trainer::{MicroGradients, Place, Returned, StageTrainer, StateError, add};
use crate::{BatchOptions, Batches, MicroBatch, Sets, TrainingConfig};
use mlxnode_checkpoint::JoinError;
use mlxnode_compute::{
    Advance, Job, JobError, LayerRange, LinkError, Reduce, StageLink, StageOrder, StepReport, Tally,
    TreeNode, TreeSum, Way,
};
use mlxnode_engine::tuning::Tuning;
use mlxnode_mlx::{Array, Dtype, Error};
use std::collections::{BTreeMap, VecDeque};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What [`Job::advance`] of a stage behind the first says between two pieces.
const SAVED: &str = "gave its part of the state";
const PUBLISHED: &str = "gave its part of what is trained";

/// Fine-tuning of a model's layers, one stage of several.
pub struct StagedFineTuning {
    config: TrainingConfig,
    trainer: StageTrainer,
    batches: Batches,
    fingerprint: Fingerprint,
    progress: Progress,
    /// Tokens that counted so far.
    trained_tokens: u64,
    line: Line,
    /// The same stage of other lines that train the same adapter, where there are some.
    replicas: Option<Replicas>,
    whole: Whole,
    /// Nothing is left to do.
    is_done: bool,
}

/// What the whole model trains.
struct Whole {
    /// Modules or tensors.
    names: Vec<String>,
    /// For each array whose it is.
    owners: Vec<usize>,
    /// The most arrays that a stage has.
    most: usize,
}

/// A micro-batch on its way.
struct Waiting {
    /// What came in; none where ids did.
    input: Option<Array>,
    /// The same for the unchanged model, behind the last layers.
    unchanged: Option<Array>,
    /// Of what came out.
    dtype: Dtype,
}

impl StagedFineTuning {
    /// Puts a stage's layers and the data set together, with all other stages: each has the same model (`model` is the checkpoint's
    /// fingerprint), configuration and rows, and the layers behind those of the stage before. `folder` is for files of this stage alone.
    /// Waits for the others.
    ///
    /// # Errors
    ///
    /// When something does not fit, on any of the stages; then on all of them.
    pub fn new(
        tuning: Tuning,
        config: TrainingConfig,
        sets: Sets,
        model: [u8; 32],
        compile: bool,
        link: Box<dyn StageLink>,
        folder: &Path,
    ) -> Result<Self, PrepareError> {
        let mut line = Line::new(link, folder.to_owned());
        let (stage, layers) = (line.stage(), tuning.layers());
        let spec = tuning.spec().clone();
        let held = Held::new(&spec, &config);
        let fits = checked(&config, &sets).and_then(|()| divisible(&config, spec.activation_width()));
        let bits = fits.and_then(|()| Ok(held.bits(&tuning)?));
        let bits = of_one_mind(&mut line, bits)?;
        let fingerprint = Fingerprint::of(model, &sets).with(&config);
        let ranges = same(&mut line, &fingerprint, layers, spec.layer_count())?;
        let bits = line.exchange(&bits)?;
        // From the same numbers all stages conclude the same, an error too.
        let Share { plan, entries, names, owners, before } = held.share(&config, &bits, &ranges, stage)?;
        let place = Place { modules: entries, of_modules: names.len(), gives_gradient: before };
        let made = || {
            let tuner = tuning.tune_part(plan)?;
            let tuner = if config.grad_checkpoint { tuner.with_checkpointing()? } else { tuner };
            let beginning = parameters::begin_part(&tuner, u64::from(config.seed), &place.modules)?;
            let trainer = StageTrainer::new(tuner, beginning, options(&config, compile), place)?;
            Ok((trainer, Batches::new(BatchOptions::from(&config), sets)?))
        };
        let (trainer, batches) = of_one_mind(&mut line, made())?;
        let count = |stage| owners.iter().filter(|owner| **owner == stage).count();
        let most = (0..line.stages()).map(count).max().unwrap_or(0);
        let (progress, whole) = (Progress::new(&config), Whole { names, owners, most });
        let (trained_tokens, is_done) = (0, false);
        let replicas = None;
        Ok(Self {
            config,
            trainer,
            batches,
            fingerprint,
            progress,
            trained_tokens,
            line,
            replicas,
            whole,
            is_done,
        })
    }

    /// The same with the same stage of other lines, each with the same model, configuration and rows: they share the micro-batches of an
    /// update. Its steps have `grad_accumulation_steps` micro-batches, and [`Self::values`] numbers.
    ///
    /// # Errors
    ///
    /// [`PrepareError::Halves`]: the number of lines would show in the result.
    pub fn with_replicas(mut self, group: Box<dyn Reduce>) -> Result<Self, PrepareError> {
        single(self.trainer.parameters(), &self.config)?;
        let micro_batches = u32::try_from(self.config.grad_accumulation_steps.max(1));
        let micro_batches = micro_batches.map_err(|_| PrepareError::Stages {
            problem: "grad_accumulation_steps is too large for several replicas".to_owned(),
        })?;
        self.replicas = Some(Replicas::new(group, micro_batches));
        Ok(self)
    }

    /// How many numbers are trained here.
    pub fn values(&self) -> usize {
        self.trainer.parameters().iter().map(Array::len).sum()
    }

    /// Has all stages go on where [`Job::save`] left off in `directory`, with any number of stages. Stage 0 only: the others hear of it in
    /// their first piece.
    ///
    /// # Errors
    ///
    /// When what lies there is not whole, or another job's.
    pub fn resume(&mut self, directory: &Path) -> Result<(), PrepareError> {
        if self.line.stage() > 0 {
            let problem =
                "only the first stage goes on from a checkpoint; the others get their parts of it".to_owned();
            return Err(PrepareError::Stages { problem });
        }
        let cursor = Cursor::read(&directory.join(CURSOR_FILE))?;
        cursor.check(&self.fingerprint, &directory.join(STATE_FILE))?;
        self.line.lead(&StageOrder::Load)?;
        self.load(Some((directory, cursor)))
    }

    /// What was asked for.
    pub fn config(&self) -> &TrainingConfig {
        &self.config
    }

    /// Micro-batches done.
    pub fn iteration(&self) -> u64 {
        self.progress.iteration()
    }

    /// Takes a state over: the first stage's, which gives it to all.
    fn load(&mut self, given: Option<(&Path, Cursor)>) -> Result<(), PrepareError> {
        let place = given.as_ref().map_or([0; 5], |(_, cursor)| {
            let Cursor { iteration, updates, validated, trained_tokens, tested, .. } = *cursor;
            [iteration, updates, validated, trained_tokens, u64::from(tested)]
        });
        // Halves are exact in double precision.
        let halves: Vec<f64> = place
            .iter()
            .flat_map(|number| [number >> 32, number & 0xFFFF_FFFF])
            .map(|half| half as f64)
            .collect();
        let all = self.line.exchange(&halves)?;
        let numbers = all.first().map(Vec::as_slice).unwrap_or_default().chunks(2);
        let numbers: Vec<u64> =
            numbers.map(|halves| halves.iter().fold(0, |sum, half| (sum << 32) | *half as u64)).collect();
        let &[iteration, updates, validated, trained_tokens, tested] = numbers.as_slice() else {
            return Err(
                LinkError::OutOfStep("the first stage does not say how far the job is".to_owned()).into()
            );
        };
        let file = self.line.scatter(given.map(|(directory, _)| directory))?;
        let read = self.trainer.read_state(&file, updates, &self.whole.names);
        of_one_mind(&mut self.line, read.map_err(PrepareError::from))?;
        self.progress.go_to(iteration, validated, tested != 0);
        self.trained_tokens = trained_tokens;
        Ok(())
    }

    /// Does what all stages do now.
    fn carry_out(&mut self, order: StageOrder) -> Result<Advance, JobError> {
        match order {
            StageOrder::Update(iterations) => self.update(iterations),
            StageOrder::Validate(iteration) => {
                let begun = Instant::now();
                let blocks = self.batches.validation(iteration);
                let batches = blocks.iter().map(|block| self.batches.valid_batch(block)).collect();
                let loss = self.measured(batches)?;
                self.progress.validated(iteration);
                let (step, seconds) = (iteration.saturating_sub(1), begun.elapsed().as_secs_f64());
                Ok(Advance::Validated { step, loss, seconds })
            }
            StageOrder::Test => {
                let blocks = self.batches.test(self.config.train);
                let batches = blocks.iter().map(|block| self.batches.test_batch(block)).collect();
                let loss = self.measured(batches)?;
                self.progress.tested();
                Ok(Advance::Tested { loss })
            }
            StageOrder::Load => {
                self.load(None).map_err(|error| match error {
                    PrepareError::Link(error) => error.into(),
                    error => JobError::Failed(error.to_string()),
                })?;
                Ok(Advance::Prepared(format!("goes on after {} updates", self.trainer.updates())))
            }
            StageOrder::Save => self.give_state().map(|_| Advance::Prepared(SAVED.to_owned())),
            StageOrder::Publish => self.give_parameters().map(|_| Advance::Prepared(PUBLISHED.to_owned())),
            StageOrder::Finish => Ok(Advance::Finished),
        }
    }

    /// What comes next by this stage's own count.
    fn next(&self) -> Option<StageOrder> {
        match self.progress.next(|iteration| self.batches.validates(iteration)) {
            Piece::Validation(iteration) => Some(StageOrder::Validate(iteration)),
            Piece::Update(iterations) => Some(StageOrder::Update(iterations)),
            Piece::Test => Some(StageOrder::Test),
            Piece::Nothing => None,
        }
    }

    fn update(&mut self, iterations: RangeInclusive<u64>) -> Result<Advance, JobError> {
        let begun = Instant::now();
        let (first, last) = (*iterations.start(), *iterations.end());
        let micro_batches = last + 1 - first;
        let step = self.progress.iteration() + 1;
        // mlx-lm's last gradients go nowhere when they are too few for an update.
        let is_lost = self.config.parity && micro_batches < self.config.grad_accumulation_steps;
        let batches: Vec<MicroBatch> = iterations.map(|iteration| self.batches.training(iteration)).collect();
        self.check(&batches)?;
        let mut sum = if is_lost { self.alone(first, &batches)? } else { self.together(first, &batches)? };
        let (loss, norm, peak) = self.tell(&sum, micro_batches, is_lost).map_err(over)?;
        sum.loss = loss;
        let learning_rate = self.config.schedule.at(self.trainer.updates());
        let (loss, norm) = match is_lost {
            true => (sum.mean(micro_batches, true), None),
            false => {
                let applied = self.trainer.apply(&sum, micro_batches, norm, learning_rate);
                let applied = applied.map_err(|error| told(step, error))?;
                if let Some(replicas) = &mut self.replicas {
                    replicas.compare(self.trainer.updates(), || self.trainer.hash_parameters())?;
                }
                (applied.loss, Some(applied.gradient_norm))
            }
        };
        let device = self.trainer.device();
        let memory = clear_cache(device, &self.config).and_then(|()| device.memory());
        let memory = memory.map_err(|error| JobError::Failed(error.to_string()))?;
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
            peak_memory: peak.max(memory.peak as u64),
        }))
    }

    /// The sum of the gradients of these micro-batches, of which the first is number `first` of the run.
    fn alone(&mut self, first: u64, batches: &[MicroBatch]) -> Result<MicroGradients, JobError> {
        let leaves = u32::try_from(batches.len()).map_err(|_| over(none().into()))?;
        let sum = self.sums(first, batches, 0..leaves, leaves).map_err(over)?;
        sum.into_parts().next().map(|(_, sum)| sum).ok_or_else(|| over(none().into()))
    }

    /// The same, of which the other replicas compute some.
    fn together(&mut self, first: u64, batches: &[MicroBatch]) -> Result<MicroGradients, JobError> {
        let Some(replicas) = &mut self.replicas else { return self.alone(first, batches) };
        let deal = replicas.begin(self.trainer.updates())?;
        let sums = self.sums(first, batches, deal.run.clone(), deal.micro_batches).map_err(over)?;
        let (mut parts, mut rows) = (Vec::new(), Vec::new());
        for (node, part) in sums.into_parts() {
            let values = part.to_bytes(self.trainer.device()).map_err(|error| over(error.into()))?;
            parts.push((node, values.into(), Tally { loss: part.loss, tokens: part.tokens }));
            rows.extend(part.rows);
        }
        let Some(replicas) = &mut self.replicas else { return Err(over(none().into())) };
        let sum = replicas.sum(deal, parts)?;
        let made = MicroGradients::from_bytes(self.trainer.tuner(), &sum.values, sum.tally, rows);
        made.map_err(|error| over(error.into()))
    }

    /// The sums of the gradients of those micro-batches that lie in `run`, which are all of an update or some of its `leaves`; `batches` are all there
    /// are of it. What lies behind the end of the run of the training adds nothing.
    fn sums(
        &mut self,
        first: u64,
        batches: &[MicroBatch],
        run: Range<u32>,
        leaves: u32,
    ) -> Result<TreeSum<MicroGradients>, HandError> {
        let (stage, stages) = (self.line.stage(), self.line.stages());
        let there = u32::try_from(batches.len()).unwrap_or(u32::MAX);
        let (start, end) = (run.start.min(there), run.end.min(there));
        let (mut waiting, mut sum, mut done) = (VecDeque::new(), TreeSum::new(leaves), start);
        for pass in passes(stage, stages, u64::from(end - start)) {
            let missing = || Error::Mlx("a micro-batch is not there".to_owned());
            let (Pass::Forward(number) | Pass::Backward(number)) = pass;
            let number = u64::from(start) + number;
            let batch =
                usize::try_from(number).ok().and_then(|number| batches.get(number)).ok_or_else(missing)?;
            let iteration = first + number;
            if let Pass::Forward(_) = pass {
                waiting.push_back(self.there(batch, iteration, Some(iteration))?);
                continue;
            }
            let there = waiting.pop_front().ok_or_else(missing)?;
            let own = self.back(batch, iteration, there)?;
            // They come back in their order.
            self.add(&mut sum, done, own)?;
            done += 1;
            clear_cache(self.trainer.device(), &self.config)?;
        }
        for leaf in end.max(run.start)..run.end {
            let zero = MicroGradients::zero(self.trainer.tuner())?;
            self.add(&mut sum, leaf, zero)?;
        }
        Ok(sum)
    }

    fn add(&self, sum: &mut TreeSum<MicroGradients>, leaf: u32, own: MicroGradients) -> Result<(), Error> {
        let device = self.trainer.device();
        sum.insert(TreeNode::leaf(leaf), own, |left, right| add(device, left, &right)).map(drop)
    }

    /// Through the layers, and on to the next stage. `number` is the hand-over's, `iteration` seeds dropout.
    fn there(
        &mut self,
        batch: &MicroBatch,
        number: u64,
        iteration: Option<u64>,
    ) -> Result<Waiting, HandError> {
        let size = [self.trainer.tokens(batch)?, self.trainer.tuner().width()];
        let (is_first, compares) = (self.line.stage() == 0, self.trainer.compares());
        let mut receive = |is_due: bool| match is_due {
            true => self.line.receive(Way::Forward, number, size, None).map(Some),
            false => Ok(None),
        };
        let input = receive(!is_first)?;
        let unchanged = receive(!is_first && compares)?;
        if self.is_last() {
            let dtype = input.as_ref().map_or(Dtype::F32, Array::dtype);
            return Ok(Waiting { input, unchanged, dtype });
        }
        let device = self.trainer.device().clone();
        let made = self.trainer.forward(batch, iteration, input.as_ref(), false)?;
        let dtype = made.dtype();
        self.line.send(&device, Way::Forward, number, &made)?;
        drop(made);
        if compares {
            let made = self.trainer.forward(batch, None, unchanged.as_ref(), true)?;
            self.line.send(&device, Way::Forward, number, &made)?;
        }
        Ok(Waiting { input: input.filter(|_| self.trainer.takes_gradient()), unchanged: None, dtype })
    }

    /// The gradient, and on to the stage before.
    fn back(
        &mut self,
        batch: &MicroBatch,
        iteration: u64,
        there: Waiting,
    ) -> Result<MicroGradients, HandError> {
        let Waiting { input, unchanged, dtype } = there;
        let Returned { own, of_input } = if self.is_last() {
            let input = input.ok_or_else(|| Error::Mlx("the last layers need hidden vectors".to_owned()))?;
            self.trainer.end(batch, iteration, input, unchanged)?
        } else if self.trainer.takes_gradient() {
            let size = [self.trainer.tokens(batch)?, self.trainer.tuner().width()];
            let cotangent = self.line.receive(Way::Backward, iteration, size, Some(dtype))?;
            self.trainer.backward(batch, iteration, input.as_ref(), &cotangent)?
        } else {
            Returned { own: self.trainer.without_gradients(batch), of_input: None }
        };
        if self.trainer.gives_gradient() {
            let gradient = of_input.ok_or_else(|| Error::Mlx("a gradient is missing".to_owned()))?;
            let device = self.trainer.device().clone();
            self.line.send(&device, Way::Backward, iteration, &gradient)?;
        }
        Ok(own)
    }

    /// The loss, the length of the whole gradient, and the most memory of a stage, which all stages tell each other. The squares are added up
    /// in the order in which one process does it, so that the length has the same bits.
    fn tell(
        &mut self,
        sum: &MicroGradients,
        micro_batches: u64,
        is_lost: bool,
    ) -> Result<(f64, f32, u64), HandError> {
        let peak = self.trainer.device().memory()?.peak as f64;
        let mut numbers = vec![sum.loss, peak];
        if !is_lost {
            numbers.extend(self.trainer.squares(sum, micro_batches)?.into_iter().map(f64::from));
            numbers.resize(2 + self.whole.most, 0.0);
        }
        let all = self.line.exchange(&numbers)?;
        let loss = all.last().and_then(|numbers| numbers.first()).copied().unwrap_or(f64::NAN);
        let peak =
            all.iter().filter_map(|numbers| numbers.get(1)).fold(0.0_f64, |most, peak| most.max(*peak));
        let mut squares: Vec<_> = all.iter().map(|numbers| numbers.iter().skip(2)).collect();
        let mut length = 0.0_f32;
        for owner in self.whole.owners.iter().filter(|_| !is_lost) {
            let square = squares.get_mut(*owner).and_then(Iterator::next).copied().unwrap_or(f64::NAN);
            length += square as f32;
        }
        Ok((loss, length.sqrt(), peak as u64))
    }

    /// Mean loss on held-back rows over their tokens.
    fn measured(&mut self, batches: Vec<MicroBatch>) -> Result<f64, JobError> {
        self.check(&batches)?;
        let mut measure = || -> Result<f64, HandError> {
            let mut sum = 0.0;
            for (number, batch) in (1..).zip(&batches) {
                let there = self.there(batch, number, None)?;
                if let (true, Some(input)) = (self.is_last(), there.input) {
                    sum += self.trainer.loss(batch, input, there.unchanged)?;
                }
                clear_cache(self.trainer.device(), &self.config)?;
            }
            let all = self.line.exchange(&[sum])?;
            Ok(all.last().and_then(|numbers| numbers.first()).copied().unwrap_or(f64::NAN))
        };
        let sum = measure().map_err(over)?;
        let tokens: u64 = batches.iter().map(|batch| self.trainer.count(batch)).sum();
        Ok(sum / tokens.max(1) as f64)
    }

    /// All stages refuse the same batches before one of them computes.
    fn check(&self, batches: &[MicroBatch]) -> Result<(), JobError> {
        let step = self.progress.iteration() + 1;
        batches.iter().try_for_each(|batch| self.trainer.check(batch)).map_err(|error| told(step, error))
    }

    fn is_last(&self) -> bool {
        self.line.stage() + 1 == self.line.stages()
    }

    /// Brings the parts of the state to stage 0. That another stage has no room for its part is stage 0's to say.
    fn give_state(&mut self) -> Result<Vec<PathBuf>, JobError> {
        let Self { line, trainer, .. } = self;
        given(line, |file| trainer.write_state(file).map_err(written))
    }

    fn give_parameters(&mut self) -> Result<Vec<PathBuf>, JobError> {
        let Self { line, trainer, .. } = self;
        given(line, |file| trainer.write_parameters(file).map_err(written))
    }

    /// Only stage 0 saves and publishes, and what it has all others give.
    fn lead(&mut self, order: &StageOrder) -> Result<(), JobError> {
        if self.line.stage() > 0 {
            return Err(JobError::Failed("only the first stage of a job saves and publishes".to_owned()));
        }
        self.line.lead(order).map_err(|error| over(error.into()))
    }

    /// Parts that came here as one file.
    fn join(
        &self,
        parts: &[PathBuf],
        notes: Option<BTreeMap<String, String>>,
        file: &Path,
    ) -> Result<(), JobError> {
        let joined = mlxnode_checkpoint::join(parts, notes, file);
        self.line.tidy();
        joined.map_err(|error| match error {
            JoinError::Write(error) => written(StateError::from(error)),
            other => JobError::Failed(other.to_string()),
        })
    }
}

fn given(
    line: &mut Line,
    write: impl FnOnce(&Path) -> Result<(), JobError>,
) -> Result<Vec<PathBuf>, JobError> {
    match line.collect(write).map_err(|error| over(error.into()))? {
        Ok(files) => Ok(files),
        // The first stage says it; the others wait for what it does next.
        Err(trouble) if line.stage() == 0 => Err(trouble.into()),
        Err(_) => Ok(Vec::new()),
    }
}

impl Job for StagedFineTuning {
    fn advance(&mut self) -> Result<Advance, JobError> {
        let next = self.next();
        if self.line.stage() == 0 {
            let Some(order) = next else {
                self.is_done = true;
                return Ok(Advance::Finished);
            };
            self.lead(&order)?;
            return self.carry_out(order);
        }
        let order = match self.line.follow() {
            Ok(order) => order,
            // All is done, and whoever led has left.
            Err(LinkError::Over(_)) if next.is_none() => StageOrder::Finish,
            Err(error) => return Err(over(error.into())),
        };
        let is_piece = matches!(order, StageOrder::Update(_) | StageOrder::Validate(_) | StageOrder::Test);
        if is_piece && Some(&order) != next.as_ref() {
            let problem = format!("stage 0 wants {order:?} where stage {} has {next:?}", self.line.stage());
            return Err(over(LinkError::OutOfStep(problem).into()));
        }
        self.carry_out(order)
    }

    fn save(&mut self, directory: &Path) -> Result<(), JobError> {
        self.lead(&StageOrder::Save)?;
        let parts = self.give_state()?;
        let state = directory.join(STATE_FILE);
        self.join(&parts, Some(self.trainer.notes()), &state)?;
        let (updates, tokens) = (self.trainer.updates(), self.trained_tokens);
        Cursor::write(directory, &self.progress, updates, tokens, &self.fingerprint).map_err(io)
    }

    fn publish(&mut self, directory: &Path) -> Result<(), JobError> {
        self.lead(&StageOrder::Publish)?;
        let parts = self.give_parameters()?;
        self.join(&parts, None, &directory.join(ADAPTER_FILE))?;
        std::fs::write(directory.join(ADAPTER_CONFIG), self.config.adapter_config()).map_err(io)
    }
}

impl Drop for StagedFineTuning {
    /// After the last piece the first stage may still save and publish; then all is done.
    fn drop(&mut self) {
        if self.is_done {
            let _ = self.line.lead(&StageOrder::Finish);
        }
    }
}

/// The own result when all stages have one.
fn of_one_mind<T>(line: &mut Line, own: Result<T, PrepareError>) -> Result<T, PrepareError> {
    let trouble = own.as_ref().err().map(|error| Trouble::Refused(error.to_string()));
    match (line.agree(trouble)?, own) {
        (_, Err(error)) => Err(error),
        (Some(trouble), Ok(_)) => Err(trouble.into()),
        (None, Ok(own)) => Ok(own),
    }
}

/// Are all of one job, with layers that follow each other? Then the layers of each.
fn same(
    line: &mut Line,
    of: &Fingerprint,
    layers: LayerRange,
    count: usize,
) -> Result<Vec<LayerRange>, PrepareError> {
    let digest = of.digest();
    let words =
        digest.chunks(4).map(|word| word.iter().fold(0_u32, |sum, byte| (sum << 8) | u32::from(*byte)));
    let numbers: Vec<f64> = words.map(f64::from).chain([layers.start as f64, layers.end as f64]).collect();
    let all = line.exchange(&numbers)?;
    let refused = |problem: String| Err(PrepareError::Stages { problem });
    let (own, ranges): (Vec<_>, Vec<_>) =
        all.iter().map(|numbers| numbers.split_at(numbers.len() - 2)).unzip();
    if let Some(stage) = own.iter().position(|words| Some(words) != own.first()) {
        return refused(format!(
            "stage {stage} has another model, configuration or data set than stage 0; give all nodes the same files"
        ));
    }
    let ranges: Vec<LayerRange> =
        ranges.iter().map(|range| LayerRange::new(range[0] as usize, range[1] as usize)).collect();
    let starts = ranges.iter().map(|range| range.start);
    let ends = std::iter::once(0).chain(ranges.iter().map(|range| range.end));
    let follow = starts.zip(ends).all(|(start, end)| start == end);
    match follow && ranges.last().is_some_and(|range| range.end == count) {
        true => Ok(ranges),
        false => {
            let shown = ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            refused(format!(
                "the stages have layers {shown}, which are not the {count} layers of the model one after the other"
            ))
        }
    }
}

/// Can the run be divided at all?
fn divisible(config: &TrainingConfig, width: usize) -> Result<(), PrepareError> {
    let refused = |problem: String| Err(PrepareError::Stages { problem });
    if config.resume_adapter_file.is_some() {
        return refused(
            "resume_adapter_file: a training in stages cannot begin with an adapter; leave it out".to_owned(),
        );
    }
    let rows = config.batch_size.saturating_mul(if config.preference.is_some() { 2 } else { 1 });
    let tokens = rows.saturating_mul(config.max_seq_length);
    if !can_hand_on(tokens, width) {
        return refused(format!(
            "batch_size and max_seq_length make {tokens} tokens of {width} numbers at once, more than goes from stage to stage; take a smaller batch_size and more grad_accumulation_steps"
        ));
    }
    Ok(())
}

fn none() -> Error {
    Error::Mlx("an update without micro-batches".to_owned())
}

/// The line is no more: the job goes on from its last checkpoint.
fn over(error: HandError) -> JobError {
    match error {
        HandError::Link(error) => error.into(),
        HandError::Device(error) => JobError::Failed(error.to_string()),
    }
}
