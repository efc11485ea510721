//! How far a model's logits are from the tokens that follow.

use mlxnode_mlx::{Array, Device, Dtype, Result};

/// In which element type the loss is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// In that of the logits, as mlx-lm does.
    OfLogits,
    /// In single precision.
    Single,
}

/// The negative log-probability of each of `targets` `[tokens]`, ids below the vocabulary, by `logits` `[tokens, vocabulary]`:
/// `[tokens]`, in the order of operations of `mlx.nn.losses.cross_entropy`.
///
/// # Errors
///
/// MLX's.
pub fn cross_entropy(
    device: &Device,
    logits: &Array,
    targets: &Array,
    precision: Precision,
) -> Result<Array> {
    let logits = match precision {
        Precision::OfLogits => logits.clone(),
        Precision::Single => device.cast(logits, Dtype::F32)?,
    };
    let largest = device.stop_gradient(&device.max(&logits, -1, true)?)?;
    let logits = device.subtract(&logits, &largest)?;
    let score = device.take_along(&logits, &device.expand(targets, -1)?, -1)?;
    let score = device.reshape(&score, targets.shape())?;
    device.subtract(&device.logsumexp(&logits, -1, false)?, &score)
}

/// The sum of the cross entropy over the tokens where `mask` `[tokens]` is 1, in single precision and without dimensions.
///
/// # Errors
///
/// MLX's.
pub fn masked_sum(
    device: &Device,
    logits: &Array,
    targets: &Array,
    mask: &Array,
    precision: Precision,
) -> Result<Array> {
    let losses = cross_entropy(device, logits, targets, precision)?;
    let counted = device.multiply(&losses, &device.cast(mask, losses.dtype())?)?;
    device.sum(&device.cast(&counted, Dtype::F32)?, 0, false)
}

/// For each of `rows` rows of tokens, one behind the other, the log-probability of its counted targets together, `[rows]`, and how many
/// they are, `[rows]`. In single precision.
///
/// # Errors
///
/// MLX's.
pub fn of_rows(
    device: &Device,
    logits: &Array,
    targets: &Array,
    mask: &Array,
    rows: i32,
) -> Result<(Array, Array)> {
    let losses = cross_entropy(device, logits, targets, Precision::Single)?;
    let counted = device.reshape(&device.multiply(&losses, mask)?, &[rows, -1])?;
    let sums = device.negative(&device.sum(&counted, 1, false)?)?;
    Ok((sums, device.sum(&device.reshape(mask, &[rows, -1])?, 1, false)?))
}

/// The sum over pairs of the loss of direct preference optimization (Rafailov et al. 2023, equation 7). `of_rows` `[2 * pairs]` are
/// log-probabilities of the chosen answers, then of the rejected ones; `reference` the same by the unchanged model.
///
/// # Errors
///
/// MLX's.
pub fn direct_preference(device: &Device, of_rows: &Array, reference: &Array, beta: f64) -> Result<Array> {
    let [chosen, rejected] = halves(device, &device.subtract(of_rows, reference)?)?;
    let margin = device.subtract(&chosen, &rejected)?;
    let margin = device.multiply(&margin, &Array::scalar(beta as f32, Dtype::F32)?)?;
    // -log(sigmoid(x)) = softplus(-x)
    device.sum(&device.softplus(&device.negative(&margin)?)?, 0, false)
}

/// The sum over pairs of the loss of odds ratio preference optimization (Hong et al. 2024, equation 6): the mean loss of a chosen
/// answer's tokens, and `weight` times that of the ratio of odds. `of_rows` and `counts` `[2 * pairs]` as [`of_rows`] gives them, the
/// chosen answers first.
///
/// # Errors
///
/// MLX's.
pub fn odds_ratio(device: &Device, of_rows: &Array, counts: &Array, weight: f64) -> Result<Array> {
    let number = |value: f64| Array::scalar(value as f32, Dtype::F32);
    let means = device.divide(of_rows, &device.maximum(counts, &number(1.0)?)?)?;
    let [chosen, rejected] = halves(device, &means)?;
    let odds = |mean: &Array| {
        // A probability of one has no odds.
        let mean = device.minimum(mean, &number(-1e-6)?)?;
        let other = device.log(&device.negative(&device.expm1(&mean)?)?)?;
        device.subtract(&mean, &other)
    };
    let ratio = device.subtract(&odds(&chosen)?, &odds(&rejected)?)?;
    let preference = device.softplus(&device.negative(&ratio)?)?;
    let both = device.subtract(&device.multiply(&preference, &number(weight)?)?, &chosen)?;
    device.sum(&both, 0, false)
}

/// The chosen and the rejected ones.
fn halves(device: &Device, rows: &Array) -> Result<[Array; 2]> {
    device.split(rows, &[rows.dim(0) / 2], 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_tokens_do_not_count_and_equal_logits_cost_the_logarithm_of_their_number() {
        let device = Device::open().unwrap();
        let logits = Array::from_f32(&[1.0, 1.0, 1.0, 1.0, 9.0, 0.0, 0.0, 0.0], &[2, 4]).unwrap();
        let targets = Array::from_u32(&[2, 3], &[2]).unwrap();
        let of = |mask: &[f32]| {
            let mask = Array::from_f32(mask, &[2]).unwrap();
            let sum = masked_sum(&device, &logits, &targets, &mask, Precision::Single).unwrap();
            sum.to_f32().unwrap()[0]
        };
        assert!((of(&[1.0, 0.0]) - 4.0_f32.ln()).abs() < 1e-6);
        assert!((of(&[0.0, 1.0]) - (9.0_f32.exp() + 3.0).ln()).abs() < 1e-4);
        assert!(of(&[0.0, 0.0]).abs() < 1e-9);
    }
}
