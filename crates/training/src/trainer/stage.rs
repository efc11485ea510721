//! The trainer of a range of layers, one stage of several.
//!
//! What goes through is recomputed for its gradient ([`Tuner::backward`]), so that of a micro-batch on its way only the hidden vectors
//! that came in are kept. Everything that decides about numbers follows the whole model: random keys are those that one process draws for the
//! same modules, and the length of the gradient is added up in the same order.

use super::gradients::{self, Gradients, Inputs, Objective};
use super::state::StateError;
use super::update::{Applied, Update, squares_of_means};
use super::{MicroGradients, TrainError, Trainer, TrainerOptions, check};
use crate::MicroBatch;
use crate::optimizer::Optimizer;
use crate::parameters::Beginning;
use mlxnode_engine::tuning::Tuner;
use mlxnode_mlx::{Array, Device, Error, Result};
use std::path::Path;

/// A stage among the others, as its trainer sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    /// Which of the whole model's trained modules its own are.
    pub(crate) modules: Vec<usize>,
    /// How many modules the whole model has that are trained.
    pub(crate) of_modules: usize,
    /// Something before it is trained, so that gradients go on there.
    pub(crate) gives_gradient: bool,
}

/// A trainer that has a part of the model's layers.
pub(crate) struct StageTrainer {
    trainer: Trainer,
    place: Place,
    /// The unchanged parameters, where answers are compared by them.
    reference: Option<Vec<Array>>,
    /// Rows are not filled up, as in one process.
    is_tight: bool,
}

/// What comes of a micro-batch on its way back.
pub(crate) struct Returned {
    /// For the sum; the loss is known behind the last layer only.
    pub(crate) own: MicroGradients,
    /// For the stage before, where it needs it.
    pub(crate) of_input: Option<Array>,
}

impl StageTrainer {
    /// Begins with these parameters.
    pub(crate) fn new(
        tuner: Tuner,
        beginning: Beginning,
        options: TrainerOptions,
        place: Place,
    ) -> Result<Self> {
        let compile = options.compile;
        let reference = options.compares().then(|| beginning.reference.clone());
        let optimizer = Optimizer::new(options.optimizer);
        let is_last = tuner.is_last();
        let (objective, clip, of_input) = (options.objective(), options.clip, place.gives_gradient);
        let is_tight = objective.is_tight(compile);
        // Before the last layers there is no loss: nothing of it is ever compiled.
        let mut trainer = Trainer::new(tuner, beginning, TrainerOptions { compile: false, ..options })?;
        if is_last {
            let reference = reference.clone();
            trainer.gradients = Gradients::new(&trainer.tuner, objective, reference, compile, of_input)?;
        }
        trainer.update = Update::of_part(optimizer, trainer.parameters.len(), clip, compile)?;
        Ok(Self { trainer, place, reference, is_tight })
    }

    pub(crate) fn device(&self) -> &Device {
        self.trainer.device()
    }

    pub(crate) fn tuner(&self) -> &Tuner {
        &self.trainer.tuner
    }

    /// What is trained here.
    pub(crate) fn parameters(&self) -> &[Array] {
        &self.trainer.parameters
    }

    /// As [`Trainer::hash_parameters`], of what is trained here.
    pub(crate) fn hash_parameters(&self) -> Result<[u8; 32]> {
        self.trainer.hash_parameters()
    }

    pub(crate) fn updates(&self) -> u64 {
        self.trainer.updates
    }

    /// Is a second pass, of the unchanged model, needed?
    pub(crate) fn compares(&self) -> bool {
        self.reference.is_some()
    }

    /// Does the next stage's gradient come back here?
    pub(crate) fn takes_gradient(&self) -> bool {
        self.place.gives_gradient || !self.trainer.parameters.is_empty()
    }

    /// Does one go on from here to the stage before?
    pub(crate) fn gives_gradient(&self) -> bool {
        self.place.gives_gradient
    }

    /// Is this a batch that the model can take? All stages say the same.
    pub(crate) fn check(&self, batch: &MicroBatch) -> std::result::Result<(), TrainError> {
        check(batch, self.trainer.tuner.vocabulary())
    }

    /// How many tokens of a batch go through the layers.
    pub(crate) fn tokens(&self, batch: &MicroBatch) -> Result<usize> {
        Ok(self.inputs(batch)?.tokens())
    }

    /// What comes out of the layers for what went in; ids where there is nothing before them. Waits for it.
    pub(crate) fn forward(
        &self,
        batch: &MicroBatch,
        iteration: Option<u64>,
        input: Option<&Array>,
        unchanged: bool,
    ) -> Result<Array> {
        let inputs = self.inputs(batch)?;
        let keys = self.keys(iteration)?;
        let input = self.input(&inputs, input)?;
        let parameters = match &self.reference {
            Some(reference) if unchanged => reference,
            _ => &self.trainer.parameters,
        };
        let parameters: Vec<&Array> = parameters.iter().collect();
        let lengths = inputs.lengths(self.objective());
        let made = self.trainer.tuner.forward(&parameters, &input, &lengths, keys.as_ref())?;
        made.eval()?;
        Ok(made)
    }

    /// The gradients behind the last layers. `unchanged` is what came out of the layers before for the unchanged model. Waits for them.
    pub(crate) fn end(
        &self,
        batch: &MicroBatch,
        iteration: u64,
        input: Array,
        unchanged: Option<Array>,
    ) -> Result<Returned> {
        let inputs = self.compared(batch, input, unchanged)?;
        let keys = self.keys(Some(iteration))?;
        let trainer = &self.trainer;
        let made =
            trainer.gradients.of_inputs(&trainer.tuner, &trainer.parameters, &inputs, keys.as_ref())?;
        let own =
            MicroGradients { gradients: made.gradients, loss: made.value, ..self.without_gradients(batch) };
        Ok(Returned { own, of_input: made.of_input })
    }

    /// The sum of the losses behind the last layers, without dropout.
    pub(crate) fn loss(&self, batch: &MicroBatch, input: Array, unchanged: Option<Array>) -> Result<f64> {
        let inputs = self.compared(batch, input, unchanged)?;
        let trainer = &self.trainer;
        trainer.gradients.loss_of_inputs(&trainer.tuner, &trainer.parameters, &inputs)
    }

    /// The gradients of the layers, of what went in and the gradient of what came out. Waits for them.
    pub(crate) fn backward(
        &self,
        batch: &MicroBatch,
        iteration: u64,
        input: Option<&Array>,
        cotangent: &Array,
    ) -> Result<Returned> {
        let inputs = self.inputs(batch)?;
        let keys = self.keys(Some(iteration))?;
        let input = self.input(&inputs, input)?;
        let parameters: Vec<&Array> = self.trainer.parameters.iter().collect();
        let lengths = inputs.lengths(self.objective());
        let tuner = &self.trainer.tuner;
        let of_input = self.place.gives_gradient;
        let made = tuner.backward(&parameters, &input, &lengths, keys.as_ref(), cotangent, of_input)?;
        let gradients = self.objective().summable(self.device(), made.trained)?;
        self.device().eval(gradients.iter().chain(&made.input))?;
        Ok(Returned {
            own: MicroGradients { gradients, ..self.without_gradients(batch) },
            of_input: made.input,
        })
    }

    /// A batch as it counts where nothing is trained.
    pub(crate) fn without_gradients(&self, batch: &MicroBatch) -> MicroGradients {
        let (tokens, rows) = (self.objective().count(batch), batch.row_numbers());
        MicroGradients { gradients: Vec::new(), loss: 0.0, tokens, rows }
    }

    /// What counts in a batch: tokens or pairs.
    pub(crate) fn count(&self, batch: &MicroBatch) -> u64 {
        self.objective().count(batch)
    }

    /// The squares of the lengths of the mean gradients, array by array.
    pub(crate) fn squares(&self, sum: &MicroGradients, micro_batches: u64) -> Result<Vec<f32>> {
        let divisor = self.trainer.options.divisor(sum, micro_batches);
        squares_of_means(self.device(), &self.trainer.parameters, &sum.gradients, divisor)
    }

    /// Goes on by the sum of the gradients, which have this length with those of all other stages; `sum` has the loss of the whole. Waits
    /// for it. When something is not finite the parameters stay.
    ///
    /// # Errors
    ///
    /// When the gradient or the loss is not finite, and MLX's.
    pub(crate) fn apply(
        &mut self,
        sum: &MicroGradients,
        micro_batches: u64,
        norm: f32,
        learning_rate: f64,
    ) -> std::result::Result<Applied, TrainError> {
        let trainer = &mut self.trainer;
        let gradient_norm = f64::from(norm);
        trainer.options.check(sum, micro_batches, gradient_norm)?;
        if !trainer.parameters.is_empty() {
            let mut made = trainer.update.apply(
                trainer.tuner.device(),
                &trainer.parameters,
                &trainer.memories,
                sum,
                trainer.options.divisor(sum, micro_batches),
                learning_rate,
                trainer.updates + 1,
                Some(norm),
            )?;
            trainer.memories = made.arrays.split_off(trainer.parameters.len());
            trainer.parameters = made.arrays;
        }
        trainer.updates += 1;
        let loss = sum.mean(micro_batches, trainer.options.parity);
        Ok(Applied { loss, tokens: sum.tokens, gradient_norm })
    }

    /// Writes its part of what [`Trainer::write_parameters`] writes.
    pub(crate) fn write_parameters(&self, file: &Path) -> std::result::Result<(), StateError> {
        self.trainer.write_parameters(file)
    }

    /// Writes its part of what [`Trainer::write_state`] writes.
    pub(crate) fn write_state(&self, file: &Path) -> std::result::Result<(), StateError> {
        self.trainer.write_state(file)
    }

    /// The notes of a file with the whole state.
    pub(crate) fn notes(&self) -> std::collections::BTreeMap<String, String> {
        self.trainer.notes()
    }

    /// Takes its part of a whole state over, as it was after so many updates. What others train has these names, or begins with them.
    pub(crate) fn read_state(
        &mut self,
        file: &Path,
        updates: u64,
        whole: &[String],
    ) -> std::result::Result<(), StateError> {
        let is_of = |name: &str, of: &String| {
            name.strip_prefix(of.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.trainer.read_own_state(file, updates, |name| whole.iter().any(|of| is_of(name, of)))
    }

    fn inputs(&self, batch: &MicroBatch) -> Result<Inputs> {
        Inputs::new(batch, self.is_tight)
    }

    fn objective(&self) -> Objective {
        self.trainer.options.objective()
    }

    /// The batch with what came out of the layers before.
    fn compared(&self, batch: &MicroBatch, input: Array, unchanged: Option<Array>) -> Result<Inputs> {
        let trainer = &self.trainer;
        let sums = match unchanged {
            Some(unchanged) => {
                let inputs = self.inputs(batch)?.behind(unchanged, None);
                trainer.gradients.compared(&trainer.tuner, &inputs)?
            }
            None => None,
        };
        Ok(self.inputs(batch)?.behind(input, sums))
    }

    fn input(&self, inputs: &Inputs, hidden: Option<&Array>) -> Result<Array> {
        match (hidden, self.trainer.tuner.layers().is_first()) {
            (Some(hidden), false) => Ok(hidden.clone()),
            (None, true) => self.device().reshape(&inputs.input, &[1, -1]),
            _ => Err(Error::Mlx("only the first layers begin with ids".to_owned())),
        }
    }

    /// The stage's random keys of a micro-batch, out of those that one process draws for the whole model; None: nothing is dropped.
    fn keys(&self, iteration: Option<u64>) -> Result<Option<Array>> {
        let Some(iteration) = iteration.filter(|_| self.trainer.tuner.keys() > 0) else { return Ok(None) };
        gradients::keys_of(&self.place.modules, self.place.of_modules, self.trainer.options.seed, iteration)
    }
}
