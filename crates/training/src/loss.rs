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
