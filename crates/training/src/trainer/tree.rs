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

/// The same sum, of micro-batches that come one after the other: no more parts are kept than the tree is deep.
#[derive(Default)]
pub(crate) struct Tree {
    /// Sums of a power of two of micro-batches each, and how many; each has fewer than the one before.
    sums: Vec<(u64, MicroGradients)>,
}

impl Tree {
    /// Adds the next one.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub(crate) fn push(&mut self, device: &Device, part: MicroGradients) -> Result<()> {
        let (mut count, mut sum) = (1, part);
        while let Some((_, before)) = self.sums.pop_if(|(before, _)| *before == count) {
            sum = add(device, before, &sum)?;
            count *= 2;
        }
        self.sums.push((count, sum));
        Ok(())
    }

    /// The sum; None of none.
    ///
    /// # Errors
    ///
    /// MLX's.
    pub(crate) fn finish(mut self, device: &Device) -> Result<Option<MicroGradients>> {
        let Some((_, mut sum)) = self.sums.pop() else { return Ok(None) };
        while let Some((_, before)) = self.sums.pop() {
            sum = add(device, before, &sum)?;
        }
        Ok(Some(sum))
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

    #[test]
    fn what_comes_one_by_one_has_the_sum_of_all_at_once() {
        let device = Device::open().unwrap();
        for count in 0..20_u32 {
            let parts = (0..count).map(|index| {
                let value = (index as f32 * 1.7).sin() * 10_f32.powi(index as i32 % 9);
                let gradients = vec![Array::from_f32(&[value], &[1]).unwrap()];
                MicroGradients { gradients, loss: f64::from(value), tokens: 1, rows: vec![index] }
            });
            let mut tree = Tree::default();
            for part in parts.clone() {
                tree.push(&device, part).unwrap();
                assert!(tree.sums.len() <= 1 + count.ilog2() as usize);
            }
            let values = |sum: Option<MicroGradients>| {
                sum.map(|sum| (sum.gradients[0].to_f32().unwrap(), sum.loss.to_bits(), sum.tokens, sum.rows))
            };
            let made = tree.finish(&device).unwrap();
            assert_eq!(values(made), values(combine(&device, parts.collect()).unwrap()), "{count}");
        }
    }
}
