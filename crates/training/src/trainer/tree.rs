//! Sums along a fixed tree.

use super::MicroGradients;
use mlxnode_mlx::{Device, Result};

/// The sum of the gradients of consecutive micro-batches; None of none. Of `n` the first `k` are summed apart from the others, where
/// `k` is the largest power of two below `n` (the tree of RFC 6962): who sums which part changes no bit.
///
/// # Errors
///
/// MLX's.
pub fn combine(device: &Device, parts: Vec<MicroGradients>) -> Result<Option<MicroGradients>> {
    let mut parts = parts;
    if parts.len() < 2 {
        return Ok(parts.pop());
    }
    let first = parts.len().next_power_of_two() / 2;
    let behind = parts.split_off(first);
    match (combine(device, parts)?, combine(device, behind)?) {
        (Some(one), Some(other)) => add(device, one, &other).map(Some),
        (one, other) => Ok(one.or(other)),
    }
}

/// The sum of two neighbours.
///
/// # Errors
///
/// MLX's.
pub(crate) fn add(device: &Device, one: MicroGradients, other: &MicroGradients) -> Result<MicroGradients> {
    let pairs = one.gradients.iter().zip(&other.gradients);
    let gradients = pairs.map(|(one, other)| device.add(one, other)).collect::<Result<Vec<_>>>()?;
    device.eval(&gradients)?;
    let mut rows = one.rows;
    rows.extend(&other.rows);
    Ok(MicroGradients { gradients, loss: one.loss + other.loss, tokens: one.tokens + other.tokens, rows })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_mlx::Array;

    #[test]
    fn five_are_four_and_one() {
        let device = Device::open().unwrap();
        // Large and small numbers: the order of the sums shows.
        let values = [1e8_f32, 3.0, -1e8, 5.0, 7.0];
        let part = |value: f32| MicroGradients {
            gradients: vec![Array::from_f32(&[value], &[1]).unwrap()],
            loss: f64::from(value),
            tokens: 2,
            rows: vec![1],
        };
        let sum = combine(&device, values.map(part).into()).unwrap().unwrap();
        let expected = ((values[0] + values[1]) + (values[2] + values[3])) + values[4];
        assert_eq!(sum.gradients[0].to_f32().unwrap(), [expected]);
        assert_eq!((sum.tokens, sum.rows.len()), (10, 5));
        assert!(combine(&device, Vec::new()).unwrap().is_none());
    }
}
