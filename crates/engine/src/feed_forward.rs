//! The gated feed-forward network: `down(silu(gate(x)) * up(x))`.

use crate::linear::{Linear, Stacked};
use mlxnode_mlx::{Array, Device, Result};

/// The feed-forward network of one layer.
pub(crate) struct FeedForward {
    /// gate and up, in this order.
    pub(crate) gate_up: Stacked,
    pub(crate) down: Linear,
    /// Width between the projections.
    pub(crate) intermediate: i32,
}

impl FeedForward {
    /// `[1, tokens, hidden]` to the same.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let (gate, up) = match (&self.gate_up.whole, self.gate_up.parts.as_slice()) {
            (Some(whole), _) if x.dim(1) == 1 => {
                let both = whole.forward(device, x)?;
                let cut = |from: i32, to: i32| device.slice(&both, &[0, 0, from], &[1, 1, to]);
                (cut(0, self.intermediate)?, cut(self.intermediate, 2 * self.intermediate)?)
            }
            (_, [gate, up]) => (gate.forward(device, x)?, up.forward(device, x)?),
            _ => return Err(mlxnode_mlx::Error::Mlx("a gated network needs two projections".to_owned())),
        };
        let activated = device.multiply(&gate, &device.sigmoid(&gate)?)?;
        self.down.forward(device, &device.multiply(&activated, &up)?)
    }
}
