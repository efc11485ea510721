//! Residuals that attend over depth (Kimi K3): what blocks of layers added is kept apart, and the input of each part of a layer is a
//! mixture of those and of what the layer's own block has added so far.
//!
//! The weights of a mixture are a softmax over depth of products with one learned vector, each divided by its vector's root mean
//! square; all in single precision, in the order of operations of mlx-lm 0.32.2's arrays.

use mlxnode_mlx::{Array, Device, Dtype, Result};

/// What blocks before added, and what mixing needs of it.
#[derive(Default)]
pub(crate) struct ResidualBlocks {
    /// `[blocks, 1, tokens, hidden]`, and one over their root mean squares, `[blocks, 1, tokens]`; None before the first.
    kept: Option<(Array, Array)>,
}

/// The learned vector of one mixture.
pub(crate) struct Mixture {
    /// `[hidden]`, single precision.
    pub(crate) weights: Array,
    pub(crate) eps: f32,
}

impl ResidualBlocks {
    /// Of blocks that came from the stage before, `[1, tokens, blocks * hidden]`.
    pub(crate) fn arrived(device: &Device, all: &Array, blocks: i32, eps: f32) -> Result<Self> {
        if blocks == 0 {
            return Ok(Self::default());
        }
        let (tokens, hidden) = (all.dim(1), all.dim(2) / blocks);
        let apart = device.reshape(all, &[1, tokens, blocks, hidden])?;
        let apart = device.transpose(&apart, &[2, 0, 1, 3])?;
        let inverse = inverse_magnitude(device, &device.cast(&apart, Dtype::F32)?, eps)?;
        Ok(Self { kept: Some((apart, inverse)) })
    }

    /// One token vector after the other, `[1, tokens, blocks * hidden]`; None when there are none.
    pub(crate) fn leaving(&self, device: &Device) -> Result<Option<Array>> {
        let Some((blocks, _)) = &self.kept else { return Ok(None) };
        let turned = device.transpose(blocks, &[1, 2, 0, 3])?;
        device.reshape(&turned, &[1, blocks.dim(2), blocks.dim(0) * blocks.dim(3)]).map(Some)
    }

    /// Keeps what a block added, `[1, tokens, hidden]`.
    pub(crate) fn append(&mut self, device: &Device, added: &Array, eps: f32) -> Result<()> {
        let inverse = inverse_magnitude(device, &device.cast(added, Dtype::F32)?, eps)?;
        let (added, inverse) = (device.expand(added, 0)?, device.expand(&inverse, 0)?);
        self.kept = Some(match self.kept.take() {
            None => (added, inverse),
            Some((blocks, inverses)) => {
                (device.concatenate([&blocks, &added], 0)?, device.concatenate([&inverses, &inverse], 0)?)
            }
        });
        Ok(())
    }
}

impl Mixture {
    /// Of all blocks and of `own` `[1, tokens, hidden]`, what its block has added so far.
    pub(crate) fn of(&self, device: &Device, blocks: &ResidualBlocks, own: &Array) -> Result<Array> {
        let Some((blocks, inverses)) = &blocks.kept else { return Ok(own.clone()) };
        let count = blocks.dim(0);
        let single = device.cast(own, Dtype::F32)?;
        let own_score = device.multiply(
            &device.matmul(&single, &self.weights)?,
            &inverse_magnitude(device, &single, self.eps)?,
        )?;
        let scores = device.matmul(&device.cast(blocks, Dtype::F32)?, &self.weights)?;
        let scores = device.multiply(&scores, inverses)?;
        let scores = device.concatenate([&scores, &device.expand(&own_score, 0)?], 0)?;
        let parts = device.softmax(&scores, 0, true)?;
        let parts = device.expand(&parts, -1)?;
        let of_blocks = device.slice_axis(&parts, 0, 0, count, 1)?;
        let sum = device.sum(&device.multiply(&of_blocks, blocks)?, 0, false)?;
        let of_own = device.slice_axis(&parts, 0, count, count + 1, 1)?;
        let of_own = device.reshape(&of_own, &[1, own.dim(1), 1])?;
        device.cast(&device.add(&sum, &device.multiply(&of_own, own)?)?, own.dtype())
    }
}

/// One over the root of the mean of squares over the last axis, which goes away, of single-precision vectors.
fn inverse_magnitude(device: &Device, x: &Array, eps: f32) -> Result<Array> {
    let mean = device.mean(&device.multiply(x, x)?, -1)?;
    let mean = device.reshape(&mean, x.shape().split_last().map_or(&[], |(_, before)| before))?;
    device.rsqrt(&device.add(&mean, &Array::scalar(eps, Dtype::F32)?)?)
}
