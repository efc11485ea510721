//! The gradient of one micro-batch.

use crate::loss::{Precision, direct_preference, masked_sum, odds_ratio, of_rows};
use crate::{MicroBatch, Preference, PreferenceLoss};
use mlxnode_compute::Tally;
use mlxnode_engine::tuning::{Trained, Tuner};
use mlxnode_mlx::{Array, Device, Dtype, Error, Function, Gradient, RandomKey, Result};
use std::rc::Rc;

/// What one or several micro-batches add to an update.
#[derive(Clone)]
pub struct MicroGradients {
    /// In the order of the parameters: of the sum of the losses; following mlx-lm of their means.
    pub gradients: Vec<Array>,
    /// The sum of the losses, following mlx-lm of the means.
    pub loss: f64,
    /// Tokens that counted; pairs of answers where these are compared.
    pub tokens: u64,
    /// The rows of the data set, for messages.
    pub rows: Vec<u32>,
}

impl MicroGradients {
    /// The mean loss over the tokens, following mlx-lm over the micro-batches.
    pub fn mean(&self, micro_batches: u64, parity: bool) -> f64 {
        let count = if parity { micro_batches } else { self.tokens };
        self.loss / count.max(1) as f64
    }

    /// Of no micro-batch.
    pub(crate) fn zero(tuner: &Tuner) -> Result<Self> {
        let zeros = tuner.trained().iter().map(|trained| tuner.device().zeros(&sizes(trained), Dtype::F32));
        let gradients = zeros.collect::<Result<Vec<_>>>()?;
        Ok(Self { gradients, loss: 0.0, tokens: 0, rows: Vec::new() })
    }

    /// All gradients one after the other, in single precision, little-endian.
    pub(crate) fn to_bytes(&self, device: &Device) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for gradient in &self.gradients {
            let gradient = device.contiguous(&device.cast(gradient, Dtype::F32)?)?;
            bytes.extend(gradient.to_bytes()?);
        }
        Ok(bytes)
    }

    /// The other way round.
    pub(crate) fn from_bytes(tuner: &Tuner, bytes: &[u8], tally: Tally, rows: Vec<u32>) -> Result<Self> {
        let (mut left, mut gradients) = (bytes, Vec::new());
        for trained in tuner.trained() {
            let length = trained.shape.iter().product::<usize>().saturating_mul(Dtype::F32.size());
            let Some((own, rest)) = left.split_at_checked(length) else {
                return Err(Error::Mlx("the sum of the gradients is too short".to_owned()));
            };
            gradients.push(Array::from_bytes(own, &sizes(trained), Dtype::F32)?);
            left = rest;
        }
        match left.is_empty() {
            true => Ok(Self { gradients, loss: tally.loss, tokens: tally.tokens, rows }),
            false => Err(Error::Mlx("the sum of the gradients is too long".to_owned())),
        }
    }

    /// The rows, for people.
    pub(super) fn rows(&self) -> String {
        const MOST: usize = 16;
        let mut text = self.rows.iter().take(MOST).map(u32::to_string).collect::<Vec<_>>().join(", ");
        if self.rows.len() > MOST {
            text += &format!(" and {} more", self.rows.len() - MOST);
        }
        text
    }
}

/// The loss as a function of parameters and batch, and its gradient.
pub(super) struct Gradients {
    gradient: Rc<Gradient>,
    /// The same in one operation for each shape.
    compiled: Option<Function>,
    objective: Objective,
    /// The unchanged model's parameters, where answers are compared by it.
    reference: Option<Vec<Array>>,
    /// As [`Objective::is_tight`].
    is_tight: bool,
    /// The gradient of what came out of the layers before is asked for, too.
    of_input: bool,
}

/// What is minimized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Objective {
    /// The loss of the counted tokens: their sum in single precision, or as mlx-lm has it, their mean in the logits' element type.
    Tokens { as_mlx_lm: bool },
    /// Of pairs of answers.
    Pairs(Preference),
}

impl Objective {
    /// Are rows left unfilled? Each length is then computed as it is, which a compiled function could not.
    pub(super) fn is_tight(self, compile: bool) -> bool {
        !compile && self == Self::Tokens { as_mlx_lm: false }
    }

    /// Is it of means over a batch, of which means are formed over batches?
    fn is_mean(self) -> bool {
        self == Self::Tokens { as_mlx_lm: true }
    }

    /// As they are added up: many small numbers are, which mlx-lm does in the parameters' element type.
    pub(super) fn summable(self, device: &Device, gradients: Vec<Array>) -> Result<Vec<Array>> {
        match self.is_mean() {
            true => Ok(gradients),
            false => gradients.iter().map(|gradient| device.cast(gradient, Dtype::F32)).collect(),
        }
    }

    /// What counts in a batch: tokens or pairs.
    pub(super) fn count(self, batch: &MicroBatch) -> u64 {
        match self {
            Self::Tokens { .. } => batch.counted_tokens(),
            Self::Pairs(_) => (batch.rows.len() / 2) as u64,
        }
    }
}

/// What of a batch goes to the device.
pub(super) struct Inputs {
    /// `[rows, columns]`; behind other layers what came out of them, `[1, rows * columns, width]`.
    pub(super) input: Array,
    /// `[rows, columns]`.
    targets: Array,
    /// `[rows, columns]`.
    mask: Array,
    /// Log-probabilities by the unchanged model, `[rows]`.
    reference: Option<Array>,
    /// What is in the rows; None: each row is one sequence, with what fills it up.
    sequences: Option<Sequences>,
}

/// Whole sequences, one after the other.
#[derive(Clone)]
struct Sequences {
    /// In tokens.
    lengths: Vec<i32>,
    /// The tokens whose targets count: `targets` and `mask` are of these only. None: of all.
    counted: Option<Array>,
}

/// What comes of a batch.
pub(super) struct Loss {
    pub(super) value: f64,
    /// Of what is trained.
    pub(super) gradients: Vec<Array>,
    /// Of what came out of the layers before, where it is asked for.
    pub(super) of_input: Option<Array>,
}

impl Gradients {
    pub(super) fn new(
        tuner: &Tuner,
        objective: Objective,
        reference: Option<Vec<Array>>,
        compile: bool,
        of_input: bool,
    ) -> Result<Self> {
        let gradient = Rc::new(gradient(tuner, objective, None, of_input)?);
        let compiled = match compile {
            false => None,
            true => {
                let gradient = Rc::clone(&gradient);
                Some(Function::new(move |_, inputs| {
                    let (mut made, gradients) = gradient.apply(inputs)?;
                    made.extend(gradients);
                    Ok(made)
                })?)
            }
        };
        let is_tight = objective.is_tight(compile);
        Ok(Self { gradient, compiled, objective, reference, is_tight, of_input })
    }

    /// Of a batch whose tokens the model has.
    pub(super) fn of(
        &self,
        tuner: &Tuner,
        parameters: &[Array],
        batch: &MicroBatch,
        keys: Option<&Array>,
    ) -> Result<MicroGradients> {
        let mut inputs = Inputs::new(batch, self.is_tight)?;
        inputs.reference = self.compared(tuner, &inputs)?;
        let Loss { value: loss, gradients, .. } = self.of_inputs(tuner, parameters, &inputs, keys)?;
        let (tokens, rows) = (self.objective.count(batch), batch.row_numbers());
        Ok(MicroGradients { gradients, loss, tokens, rows })
    }

    /// The same of what goes to the device.
    pub(super) fn of_inputs(
        &self,
        tuner: &Tuner,
        parameters: &[Array],
        inputs: &Inputs,
        keys: Option<&Array>,
    ) -> Result<Loss> {
        let device = tuner.device();
        let mut all: Vec<&Array> = parameters.iter().collect();
        all.extend(inputs.arrays());
        all.extend(keys);
        let (loss, gradients) = match (&self.compiled, &inputs.sequences) {
            (Some(compiled), None) => {
                let mut made = compiled.apply(&all)?.into_iter();
                (made.next(), made.collect::<Vec<_>>())
            }
            (None, None) => {
                let (made, gradients) = self.gradient.apply(&all)?;
                (made.into_iter().next(), gradients)
            }
            // Where sequences end in rows is not among the shapes.
            (_, Some(sequences)) => {
                let gradient = gradient(tuner, self.objective, Some(sequences.clone()), self.of_input)?;
                let (made, gradients) = gradient.apply(&all)?;
                (made.into_iter().next(), gradients)
            }
        };
        let loss = loss.ok_or_else(|| Error::Mlx("a loss is missing".to_owned()))?;
        let mut gradients = gradients;
        let of_input = if self.of_input { gradients.pop() } else { None };
        let gradients = self.objective.summable(device, gradients)?;
        device.eval([&loss].into_iter().chain(&gradients).chain(&of_input))?;
        let value = f64::from(loss.to_f32()?.first().copied().unwrap_or(f32::NAN));
        Ok(Loss { value, gradients, of_input })
    }

    /// The sum of the losses, and how many tokens or pairs counted.
    pub(super) fn loss(&self, tuner: &Tuner, parameters: &[Array], batch: &MicroBatch) -> Result<(f64, u64)> {
        let mut inputs = Inputs::new(batch, self.is_tight)?;
        inputs.reference = self.compared(tuner, &inputs)?;
        Ok((self.loss_of_inputs(tuner, parameters, &inputs)?, self.objective.count(batch)))
    }

    /// The same of what goes to the device.
    pub(super) fn loss_of_inputs(&self, tuner: &Tuner, parameters: &[Array], inputs: &Inputs) -> Result<f64> {
        let mut all: Vec<&Array> = parameters.iter().collect();
        all.extend(inputs.arrays());
        let sum = loss(tuner.device(), tuner, &all, self.objective, inputs.sequences.as_ref())?;
        Ok(f64::from(sum.to_f32()?.first().copied().unwrap_or(f32::NAN)))
    }

    /// The log-probabilities of the rows' answers by the unchanged model, where they are compared with them.
    pub(super) fn compared(&self, tuner: &Tuner, inputs: &Inputs) -> Result<Option<Array>> {
        let Some(reference) = &self.reference else { return Ok(None) };
        let reference: Vec<&Array> = reference.iter().collect();
        let (sums, _) = rows(tuner.device(), tuner, &reference, &inputs.arrays(), None)?;
        sums.eval()?;
        Ok(Some(sums))
    }
}

impl Inputs {
    /// Of a batch, whose rows are filled up or not.
    pub(super) fn new(batch: &MicroBatch, is_tight: bool) -> Result<Self> {
        if is_tight { Self::tight(batch) } else { Self::filled(batch) }
    }

    /// How many tokens go through the layers, while they are ids.
    pub(super) fn tokens(&self) -> usize {
        self.input.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).product()
    }

    /// The rows as they are, one behind the other, and of their targets those that count.
    fn tight(batch: &MicroBatch) -> Result<Self> {
        let (mut ids, mut targets, mut counted, mut lengths) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for row in &batch.rows {
            let tokens = row.tokens.get(..batch.width).unwrap_or(&row.tokens);
            let [inputs @ .., _] = tokens else { continue };
            lengths.extend(sequences(&row.segments, inputs.len()));
            let begin = ids.len();
            ids.extend_from_slice(inputs);
            for range in &row.counted {
                let (first, end) = (range.start.max(1) as usize, (range.end as usize).min(tokens.len()));
                targets.extend(tokens.get(first..end).into_iter().flatten());
                counted.extend((first..end).map(|place| (begin + place - 1) as u32));
            }
        }
        if ids.is_empty() {
            return Self::filled(batch); // rows of one token: nothing follows from anything
        }
        let of = |words: &[u32]| Array::from_u32(words, &[1, i32::try_from(words.len()).unwrap_or(i32::MAX)]);
        // Answers that were cut off: something has to go through the model, and counts nothing.
        let weight = if counted.is_empty() { 0.0 } else { 1.0 };
        if counted.is_empty() {
            (targets, counted) = (vec![0], vec![0]);
        }
        let mask = Array::from_f32(&vec![weight; targets.len()], &[1, targets.len() as i32])?;
        let counted = (counted.len() < ids.len()).then(|| of(&counted)).transpose()?;
        let sequences = Some(Sequences { lengths, counted });
        Ok(Self { input: of(&ids)?, targets: of(&targets)?, mask, reference: None, sequences })
    }

    /// `[rows, columns]`, filled up.
    fn filled(batch: &MicroBatch) -> Result<Self> {
        let (rows, width) = (batch.rows.len(), batch.width);
        let columns = width.saturating_sub(1);
        if rows == 0 || columns == 0 {
            return Err(Error::Mlx("a batch without tokens".to_owned()));
        }
        let all: Vec<u32> = batch.ids().into_iter().map(i32::cast_unsigned).collect();
        let cut = |from: usize| -> Vec<u32> {
            all.chunks(width).flat_map(|row| row[from..from + columns].iter().copied()).collect()
        };
        let shape = [rows, columns].map(|size| i32::try_from(size).unwrap_or(i32::MAX));
        let is_packed = batch.rows.iter().any(|row| row.segments.len() > 1);
        let lengths = is_packed
            .then(|| batch.rows.iter().flat_map(|row| sequences(&row.segments, columns)).collect::<Vec<_>>());
        Ok(Self {
            input: Array::from_u32(&cut(0), &shape)?,
            targets: Array::from_u32(&cut(1), &shape)?,
            mask: Array::from_f32(&batch.mask(), &shape)?,
            reference: None,
            sequences: lengths.map(|lengths| Sequences { lengths, counted: None }),
        })
    }

    fn arrays(&self) -> Vec<&Array> {
        [&self.input, &self.targets, &self.mask].into_iter().chain(&self.reference).collect()
    }

    /// What came out of the layers before instead of ids, and the log-probabilities of the rows' answers by the unchanged model.
    pub(super) fn behind(self, input: Array, reference: Option<Array>) -> Self {
        Self { input, reference, ..self }
    }

    /// Where whole sequences end among them.
    pub(super) fn lengths(&self, objective: Objective) -> Vec<i32> {
        let of_rows = || vec![self.targets.dim(1); usize::try_from(self.targets.dim(0)).unwrap_or(0)];
        match (objective, &self.sequences) {
            (Objective::Tokens { .. }, Some(sequences)) => sequences.lengths.clone(),
            _ => of_rows(),
        }
    }
}

fn sizes(trained: &Trained) -> Vec<i32> {
    trained.shape.iter().map(|size| i32::try_from(*size).unwrap_or(i32::MAX)).collect()
}

/// The lengths of a row's sequences, cut to so many columns, and of what fills it up.
fn sequences(segments: &[u32], columns: usize) -> Vec<i32> {
    let (mut lengths, mut left) = (Vec::new(), columns);
    for segment in segments {
        let length = (*segment as usize).min(left);
        if length > 0 {
            lengths.push(length as i32);
        }
        left -= length;
    }
    if left > 0 {
        lengths.push(left as i32);
    }
    lengths
}

/// Of parameters, then input (ids or hidden vectors), targets and mask `[rows, columns]`, then the reference's log-probabilities where answers are compared with
/// it, then keys where there are some: the sum of the losses.
fn loss(
    device: &Device,
    tuner: &Tuner,
    inputs: &[&Array],
    objective: Objective,
    sequences: Option<&Sequences>,
) -> Result<Array> {
    let (parameters, batch) = inputs.split_at(tuner.trained().len().min(inputs.len()));
    let missing = || Error::Mlx("a batch has inputs, targets and a mask".to_owned());
    match objective {
        Objective::Tokens { as_mlx_lm } => {
            let (_, targets, mask) = first_three(batch)?;
            let logits = logits(device, tuner, parameters, batch, batch.get(3).copied(), sequences)?;
            let (targets, mask) = (device.reshape(targets, &[-1])?, device.reshape(mask, &[-1])?);
            let precision = if as_mlx_lm { Precision::OfLogits } else { Precision::Single };
            masked_sum(device, &logits, &targets, &mask, precision)
        }
        Objective::Pairs(Preference { loss: PreferenceLoss::Dpo, beta }) => {
            let reference = batch.get(3).ok_or_else(missing)?;
            let (sums, _) = rows(device, tuner, parameters, batch, batch.get(4).copied())?;
            direct_preference(device, &sums, reference, beta)
        }
        Objective::Pairs(Preference { loss: PreferenceLoss::Orpo, beta }) => {
            let (sums, counts) = rows(device, tuner, parameters, batch, batch.get(3).copied())?;
            odds_ratio(device, &sums, &counts, beta)
        }
    }
}

fn first_three<'a>(batch: &[&'a Array]) -> Result<(&'a Array, &'a Array, &'a Array)> {
    match batch {
        [input, targets, mask, ..] => Ok((input, targets, mask)),
        _ => Err(Error::Mlx("a batch has inputs, targets and a mask".to_owned())),
    }
}

/// Of a batch `[rows, columns]`: `[rows * columns, vocabulary]`, or of the tokens that count.
fn logits(
    device: &Device,
    tuner: &Tuner,
    parameters: &[&Array],
    batch: &[&Array],
    keys: Option<&Array>,
    sequences: Option<&Sequences>,
) -> Result<Array> {
    let (input, targets, _) = first_three(batch)?;
    let (rows, columns) = (targets.dim(0), targets.dim(1));
    let of_rows = vec![columns; usize::try_from(rows).unwrap_or(0)];
    let (lengths, counted) = match sequences {
        Some(sequences) => (&sequences.lengths, sequences.counted.as_ref()),
        None => (&of_rows, None),
    };
    let input = match tuner.layers().is_first() {
        true => device.reshape(input, &[1, -1])?,
        false => input.clone(),
    };
    tuner.logits(parameters, &input, lengths, keys, counted)
}

/// Of each row the log-probability of its counted tokens, and how many they are.
fn rows(
    device: &Device,
    tuner: &Tuner,
    parameters: &[&Array],
    batch: &[&Array],
    keys: Option<&Array>,
) -> Result<(Array, Array)> {
    let (_, targets, mask) = first_three(batch)?;
    let logits = logits(device, tuner, parameters, batch, keys, None)?;
    let (flat, mask) = (device.reshape(targets, &[-1])?, device.reshape(mask, &[-1])?);
    of_rows(device, &logits, &flat, &mask, targets.dim(0))
}

fn gradient(
    tuner: &Tuner,
    objective: Objective,
    sequences: Option<Sequences>,
    of_input: bool,
) -> Result<Gradient> {
    let (tuner, count) = (tuner.clone(), tuner.trained().len());
    // What goes in comes right behind what is trained. Where nothing is asked for, nobody asks.
    Gradient::new((count + usize::from(of_input)).max(1), move |device, inputs| {
        let sum = loss(device, &tuner, inputs, objective, sequences.as_ref())?;
        if !objective.is_mean() {
            return Ok(vec![sum]);
        }
        let mask = inputs.get(count + 2).ok_or_else(|| Error::Mlx("a mask is missing".to_owned()))?;
        let tokens = device.sum_over(mask, &[0, 1])?;
        Ok(vec![device.divide(&sum, &tokens)?])
    })
}

/// The random keys `[count, 2]` of micro-batch `iteration`; None for no keys. They depend on nothing else, so that any process draws
/// the same.
pub(super) fn keys(count: usize, seed: u64, iteration: u64) -> Result<Option<Array>> {
    if count == 0 {
        return Ok(None);
    }
    keys_of(&(0..count).collect::<Vec<_>>(), count, seed, iteration)
}

/// Those at `places` of so many.
pub(super) fn keys_of(places: &[usize], count: usize, seed: u64, iteration: u64) -> Result<Option<Array>> {
    let [high, low] = RandomKey::new(seed).split().1.words();
    let mut key = RandomKey::new(((u64::from(high) << 32) | u64::from(low)) ^ iteration);
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let (chain, used) = key.split();
        key = chain;
        all.push(used.words());
    }
    let words: Vec<u32> = places.iter().filter_map(|place| all.get(*place)).flatten().copied().collect();
    Array::from_u32(&words, &[i32::try_from(places.len()).unwrap_or(i32::MAX), 2]).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rows_sequences_fill_it() {
        assert_eq!(sequences(&[3, 4], 10), [3, 4, 3]);
        assert_eq!(sequences(&[3, 4], 6), [3, 3], "the last token is a target only");
        assert_eq!(sequences(&[9], 8), [8]);
    }
}
