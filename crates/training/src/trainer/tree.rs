//! Sums of gradients, which [`mlxnode_compute::TreeSum`] takes along a fixed tree.

use super::MicroGradients;
use mlxnode_mlx::{Device, Result};

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
    use mlxnode_compute::{TreeNode, TreeSum};
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
        let mut sum = TreeSum::new(5);
        for (index, value) in (0..).zip(values) {
            let added = |left, right| add(&device, left, &right);
            assert!(sum.insert(TreeNode::leaf(index), part(value), added).unwrap());
        }
        let sum = sum.whole().unwrap();
        let expected = ((values[0] + values[1]) + (values[2] + values[3])) + values[4];
        assert_eq!(sum.gradients[0].to_f32().unwrap(), [expected]);
        assert_eq!((sum.tokens, sum.rows.len()), (10, 5));
    }
}
