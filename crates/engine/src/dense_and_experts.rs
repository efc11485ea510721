//! A dense network and experts side by side, each with norms of its own.

use crate::experts::{Networks, weighted_sum};
use crate::feed_forward::Network;
use crate::linear::Linear;
use crate::norm::Norm;
use mlxnode_mlx::{Array, Device, Result};

/// The sum of both.
pub(crate) struct DenseAndExperts {
    pub(crate) dense: Network,
    pub(crate) networks: Networks,
    pub(crate) router: Linear,
    /// `[hidden]`, the weight of the norm before the router.
    pub(crate) router_norm: Array,
    pub(crate) eps: f32,
    /// `[experts]`.
    pub(crate) expert_scale: Array,
    pub(crate) per_token: i32,
    /// Before and after the dense network, before and after the experts.
    pub(crate) norms: [Norm; 4],
}

impl DenseAndExperts {
    /// `[1, tokens, hidden]` to the same.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let [before_dense, after_dense, before_experts, after_experts] = &self.norms;
        let dense = self.dense.forward(device, &before_dense.forward(device, x)?)?;
        let dense = after_dense.forward(device, &dense)?;
        let (chosen, weights) = self.choose(device, x)?;
        let results = self.networks.forward(device, &before_experts.forward(device, x)?, &chosen)?;
        let mixed = after_experts.forward(device, &weighted_sum(device, &results, &weights)?)?;
        device.add(&dense, &mixed)
    }

    /// The chosen experts and their weights, both `[1, tokens, per_token]`. The softmax is in the scores' own precision.
    fn choose(&self, device: &Device, x: &Array) -> Result<(Array, Array)> {
        let x = device.rms_norm(x, &self.router_norm, self.eps)?;
        let scores = self.router.forward(device, &x)?;
        let (tokens, experts) = (scores.dim(1), scores.dim(2));
        let order = device.argpartition(&scores, experts - self.per_token, -1)?;
        let chosen = device.slice(&order, &[0, 0, experts - self.per_token], &[1, tokens, experts])?;
        let weights = device.softmax(&device.take_along(&scores, &chosen, -1)?, -1, false)?;
        let scales = device.take(&self.expert_scale, &chosen, 0)?;
        Ok((chosen, device.multiply(&weights, &scales)?))
    }
}
