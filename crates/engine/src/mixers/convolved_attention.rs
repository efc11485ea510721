//! Attention whose keys and values are mixed with those of the token before, as baichuan_m1 has it.

use super::by_row::by_row;
use super::{Keeps, SoftmaxAttention};
use crate::batch::Batch;
use crate::linear::{Linear, Stacked};
use crate::rope::RotaryEmbedding;
use mlxnode_mlx::{Array, Device, Error, Result};

/// The attention of one layer. States: the last key and value before they were mixed, `[1, kv_heads, 1, head_dim]`.
pub(crate) struct ConvolvedAttention {
    /// To queries, keys and values.
    pub(crate) projections: Stacked,
    pub(crate) key_taps: Taps,
    pub(crate) value_taps: Taps,
    pub(crate) rope: Option<RotaryEmbedding>,
    pub(crate) output: Linear,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) core: SoftmaxAttention,
}

/// What of the token before and of the token itself goes in, `[1, kv_heads, 1, 1]` each.
pub(crate) struct Taps {
    pub(crate) before: Array,
    pub(crate) own: Array,
}

impl ConvolvedAttention {
    /// Keys, values and the last of them as projected.
    pub(crate) fn keeps(&self) -> Keeps {
        Keeps {
            kv: true,
            heads: Some((self.kv_heads, self.head_dim)),
            window: self.core.window,
            states: true,
            ..Keeps::default()
        }
    }

    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let projected = self.project(device, x)?;
        let offsets: Vec<i32> = batch.rows.iter().map(|row| row.cache.tokens()).collect();
        let mut offsets = offsets.into_iter();
        let mixed = by_row(device, projected, layer, batch, |[q, k, v], cache| {
            let offset =
                offsets.next().ok_or_else(|| Error::Mlx("there are more rows than offsets".to_owned()))?;
            let count = q.dim(1);
            let (last_key, last_value) = (cache.states.arrays().first(), cache.states.arrays().get(1));
            let (keys, last_key) =
                self.key_taps.apply(device, &self.turned(device, &k, self.kv_heads)?, last_key)?;
            let (values, last_value) =
                self.value_taps.apply(device, &self.turned(device, &v, self.kv_heads)?, last_value)?;
            let queries = self.rotated(device, self.turned(device, &q, self.heads)?, offset)?;
            let keys = self.rotated(device, keys, offset)?;
            let seen = self.core.forward(device, &queries, &keys, &values, &mut cache.kv)?;
            cache.states.replace(vec![last_key, last_value], count);
            device.reshape(&device.transpose(&seen, &[0, 2, 1, 3])?, &[1, count, self.heads * self.head_dim])
        })?;
        self.output.forward(device, &mixed)
    }

    fn project(&self, device: &Device, x: &Array) -> Result<[Array; 3]> {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match (&self.projections.whole, self.projections.parts.as_slice()) {
            (Some(whole), _) if x.dim(1) == 1 => {
                device.split(&whole.forward(device, x)?, &[queries, queries + keys], 2)
            }
            (_, [queries, keys, values]) => {
                Ok([queries.forward(device, x)?, keys.forward(device, x)?, values.forward(device, x)?])
            }
            _ => Err(Error::Mlx("attention needs three projections".to_owned())),
        }
    }

    /// `[1, tokens, heads * head_dim]` to `[1, heads, tokens, head_dim]`.
    fn turned(&self, device: &Device, x: &Array, heads: i32) -> Result<Array> {
        let count = x.dim(1);
        if count == 1 {
            return device.reshape(x, &[1, heads, 1, self.head_dim]);
        }
        device.transpose(&device.reshape(x, &[1, count, heads, self.head_dim])?, &[0, 2, 1, 3])
    }

    fn rotated(&self, device: &Device, x: Array, offset: i32) -> Result<Array> {
        match &self.rope {
            Some(rope) => rope.apply(device, &x, offset),
            None => Ok(x),
        }
    }
}

impl Taps {
    /// `[1, kv_heads, tokens, head_dim]` mixed, and the last token's as it was. `before` is that of the token before the first; without it
    /// there are zeros.
    fn apply(&self, device: &Device, x: &Array, before: Option<&Array>) -> Result<(Array, Array)> {
        let count = x.dim(2);
        let before = match before {
            Some(before) => before.clone(),
            None => device.zeros(&[1, x.dim(1), 1, x.dim(3)], x.dtype())?,
        };
        let cut = |from: i32, to: i32| device.slice_axis(x, 2, from, to, 1);
        let (previous, last) = match count {
            1 => (before, x.clone()),
            // A view of a prompt would keep all of it in memory.
            _ => (
                device.concatenate([&before, &cut(0, count - 1)?], 2)?,
                device.contiguous(&cut(count - 1, count)?)?,
            ),
        };
        let mixed =
            device.add(&device.multiply(&previous, &self.before)?, &device.multiply(x, &self.own)?)?;
        Ok((mixed, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_one_by_one_are_mixed_as_together() {
        let device = Device::open().unwrap();
        let values: Vec<f32> = (0..2 * 5 * 3).map(|index| (index as f32 * 0.7).sin()).collect();
        let x = Array::from_f32(&values, &[1, 2, 5, 3]).unwrap();
        let taps = Taps {
            before: Array::from_f32(&[0.5, -2.0], &[1, 2, 1, 1]).unwrap(),
            own: Array::from_f32(&[1.5, 0.25], &[1, 2, 1, 1]).unwrap(),
        };
        let (together, last) = taps.apply(&device, &x, None).unwrap();
        let (mut before, mut single) = (None, Vec::new());
        for token in 0..5 {
            let part = device.slice_axis(&x, 2, token, token + 1, 1).unwrap();
            let (mixed, last) = taps.apply(&device, &part, before.as_ref()).unwrap();
            single.push(mixed);
            before = Some(last);
        }
        let numbers = |array: &Array| device.contiguous(array).unwrap().to_f32().unwrap();
        assert_eq!(numbers(&together), numbers(&device.concatenate(&single, 2).unwrap()));
        assert_eq!(numbers(&last), numbers(&before.unwrap()));
        // The first value of the second token: half of the first one's and one and a half of its own.
        assert!((numbers(&together)[3] - (0.5 * values[0] + 1.5 * values[3])).abs() < 1e-6);
    }
}
