//! The gradient of one micro-batch.

use crate::MicroBatch;
use crate::loss::{Precision, masked_sum};
use mlxnode_engine::tuning::Tuner;
use mlxnode_mlx::{Array, Device, Error, Function, Gradient, RandomKey, Result};
use std::rc::Rc;

/// What one or several micro-batches add to an update.
#[derive(Clone)]
pub struct MicroGradients {
    /// In the order of the parameters: of the sum of the losses; following mlx-lm of their means.
    pub gradients: Vec<Array>,
    /// The sum of the losses, following mlx-lm of the means.
    pub loss: f64,
    /// Tokens that counted.
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
    precision: Precision,
    of_mean: bool,
}

/// What of a batch goes to the device.
struct Inputs {
    /// `[rows, columns]`.
    ids: Array,
    /// `[rows, columns]`.
    targets: Array,
    /// `[rows, columns]`.
    mask: Array,
    /// Lengths of whole sequences in the rows, one after the other; None: each row is one.
    lengths: Option<Vec<i32>>,
}

impl Gradients {
    pub(super) fn new(tuner: &Tuner, precision: Precision, of_mean: bool, compile: bool) -> Result<Self> {
        let gradient = Rc::new(gradient(tuner, precision, of_mean, None)?);
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
        Ok(Self { gradient, compiled, precision, of_mean })
    }

    /// Of a batch whose tokens the model has.
    pub(super) fn of(
        &self,
        tuner: &Tuner,
        parameters: &[Array],
        batch: &MicroBatch,
        keys: Option<&Array>,
    ) -> Result<MicroGradients> {
        let device = tuner.device();
        let inputs = Inputs::of(batch)?;
        let mut all: Vec<&Array> = parameters.iter().collect();
        all.extend([&inputs.ids, &inputs.targets, &inputs.mask]);
        all.extend(keys);
        let (loss, gradients) = match (&self.compiled, inputs.lengths) {
            (Some(compiled), None) => {
                let mut made = compiled.apply(&all)?.into_iter();
                (made.next(), made.collect())
            }
            (None, None) => {
                let (made, gradients) = self.gradient.apply(&all)?;
                (made.into_iter().next(), gradients)
            }
            // Where sequences end in rows is not among the shapes.
            (_, Some(lengths)) => {
                let gradient = gradient(tuner, self.precision, self.of_mean, Some(lengths))?;
                let (made, gradients) = gradient.apply(&all)?;
                (made.into_iter().next(), gradients)
            }
        };
        let loss = loss.ok_or_else(|| Error::Mlx("a loss is missing".to_owned()))?;
        device.eval([&loss].into_iter().chain(&gradients))?;
        let loss = f64::from(loss.to_f32()?.first().copied().unwrap_or(f32::NAN));
        let (tokens, rows) = (batch.counted_tokens(), batch.row_numbers());
        Ok(MicroGradients { gradients, loss, tokens, rows })
    }

    /// The sum of the losses, and how many tokens counted.
    pub(super) fn loss(&self, tuner: &Tuner, parameters: &[Array], batch: &MicroBatch) -> Result<(f64, u64)> {
        let device = tuner.device();
        let inputs = Inputs::of(batch)?;
        let mut all: Vec<&Array> = parameters.iter().collect();
        all.extend([&inputs.ids, &inputs.targets, &inputs.mask]);
        let sum = loss(device, tuner, &all, self.precision, inputs.lengths.as_deref())?;
        Ok((f64::from(sum.to_f32()?.first().copied().unwrap_or(f32::NAN)), batch.counted_tokens()))
    }
}

impl Inputs {
    fn of(batch: &MicroBatch) -> Result<Self> {
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
            ids: Array::from_u32(&cut(0), &shape)?,
            targets: Array::from_u32(&cut(1), &shape)?,
            mask: Array::from_f32(&batch.mask(), &shape)?,
            lengths,
        })
    }
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

/// Of parameters, then ids, targets and mask `[rows, columns]`, then keys where there are some: the sum of the losses.
fn loss(
    device: &Device,
    tuner: &Tuner,
    inputs: &[&Array],
    precision: Precision,
    lengths: Option<&[i32]>,
) -> Result<Array> {
    let (parameters, rest) = inputs.split_at(tuner.trained().len().min(inputs.len()));
    let (ids, targets, mask, keys) = match rest {
        [ids, targets, mask] => (ids, targets, mask, None),
        [ids, targets, mask, keys] => (ids, targets, mask, Some(*keys)),
        _ => return Err(Error::Mlx("a batch has ids, targets and a mask".to_owned())),
    };
    let (rows, columns) = (ids.dim(0), ids.dim(1));
    let of_rows = vec![columns; usize::try_from(rows).unwrap_or(0)];
    let flat = device.reshape(ids, &[1, rows * columns])?;
    let logits = tuner.logits(parameters, &flat, lengths.unwrap_or(&of_rows), keys)?;
    let (targets, mask) = (device.reshape(targets, &[-1])?, device.reshape(mask, &[-1])?);
    masked_sum(device, &logits, &targets, &mask, precision)
}

fn gradient(
    tuner: &Tuner,
    precision: Precision,
    of_mean: bool,
    lengths: Option<Vec<i32>>,
) -> Result<Gradient> {
    let (tuner, count) = (tuner.clone(), tuner.trained().len());
    Gradient::new(count, move |device, inputs| {
        let sum = loss(device, &tuner, inputs, precision, lengths.as_deref())?;
        if !of_mean {
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
    let [high, low] = RandomKey::new(seed).split().1.words();
    let mut key = RandomKey::new(((u64::from(high) << 32) | u64::from(low)) ^ iteration);
    let mut words = Vec::with_capacity(2 * count);
    for _ in 0..count {
        let (chain, used) = key.split();
        key = chain;
        words.extend(used.words());
    }
    Array::from_u32(&words, &[i32::try_from(count).unwrap_or(i32::MAX), 2]).map(Some)
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
