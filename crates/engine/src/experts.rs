//! Mixtures of experts: a router chooses a few gated networks for each token.

use crate::feed_forward::{Network, activate};
use crate::linear::Linear;
use mlxnode_checkpoint::{Activation, Routing};
use mlxnode_mlx::{Array, Device, Dtype, Quantized, Result};

/// From how many choices on rows are sorted by expert, so that each expert's weights are read once; mlx-lm's value.
const SORTED_FROM: i32 = 64;

/// The experts of one layer.
pub(crate) struct Experts {
    pub(crate) router: Linear,
    pub(crate) routing: Routing,
    pub(crate) per_token: i32,
    pub(crate) activation: Activation,
    pub(crate) gate: Matrices,
    pub(crate) up: Matrices,
    pub(crate) down: Matrices,
    pub(crate) shared: Option<SharedExpert>,
}

/// One matrix for each expert.
pub(crate) enum Matrices {
    /// The transposed view `[experts, inputs, outputs]`, made once.
    Dense(Array),
    /// Packed `[experts, outputs, inputs]`.
    Quantized(Quantized),
}

/// The expert that works on every token.
pub(crate) struct SharedExpert {
    pub(crate) network: Network,
    /// To one number a token.
    pub(crate) gate: Linear,
}

impl Matrices {
    fn forward(&self, device: &Device, x: &Array, indices: &Array, sorted: bool) -> Result<Array> {
        match self {
            Self::Dense(matrices) => device.gather_mm(x, matrices, indices, sorted),
            Self::Quantized(matrices) => device.gather_qmm(x, matrices, indices, sorted),
        }
    }
}

impl Experts {
    /// `[1, tokens, hidden]` to the same.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let tokens = x.dim(1);
        let (chosen, weights) = self.route(device, x)?;
        let results = self.networks(device, x, &chosen)?;
        let weights = device.reshape(&weights, &[1, tokens, self.per_token, 1])?;
        let mixed = device.sum(&device.multiply(&results, &weights)?, -2, false)?;
        let Some(shared) = &self.shared else { return device.cast(&mixed, results.dtype()) };
        let open = device.sigmoid(&shared.gate.forward(device, x)?)?;
        device.add(&mixed, &device.multiply(&open, &shared.network.forward(device, x)?)?)
    }

    /// The chosen experts and their weights, `[1, tokens, per_token]`.
    fn route(&self, device: &Device, x: &Array) -> Result<(Array, Array)> {
        let scores = self.router.forward(device, x)?;
        let (tokens, experts, chosen) = (scores.dim(1), scores.dim(2), self.per_token);
        let scores = match self.routing {
            Routing::All { .. } => device.softmax(&scores, -1, true)?,
            Routing::Chosen => scores,
        };
        let order = match self.routing {
            Routing::All { from_end: true, .. } => {
                let order = device.argpartition(&scores, experts - chosen, -1)?;
                device.slice(&order, &[0, 0, experts - chosen], &[1, tokens, experts])?
            }
            Routing::All { .. } | Routing::Chosen => {
                let order = device.argpartition(&device.negative(&scores)?, chosen - 1, -1)?;
                device.slice(&order, &[0, 0, 0], &[1, tokens, chosen])?
            }
        };
        let weights = device.take_along(&scores, &order, -1)?;
        let weights = match self.routing {
            Routing::All { normalized: false, .. } => weights,
            Routing::All { normalized: true, .. } => {
                device.divide(&weights, &device.sum(&weights, -1, true)?)?
            }
            Routing::Chosen => device.softmax(&weights, -1, true)?,
        };
        Ok((order, weights))
    }

    /// The chosen experts' results, `[1, tokens, per_token, hidden]`.
    fn networks(&self, device: &Device, x: &Array, chosen: &Array) -> Result<Array> {
        let (tokens, hidden, per_token) = (x.dim(1), x.dim(2), self.per_token);
        let choices = tokens * per_token;
        if choices < SORTED_FROM {
            let rows = device.reshape(x, &[1, tokens, 1, 1, hidden])?;
            let results = self.networks_of(device, &rows, chosen, false)?;
            return device.reshape(&results, &[1, tokens, per_token, hidden]);
        }
        let chosen = device.reshape(chosen, &[choices])?;
        let order = device.argsort(&chosen, 0)?;
        let back = device.argsort(&order, 0)?;
        let token = device.floor_divide(&order, &Array::scalar(per_token as f32, Dtype::U32)?)?;
        let rows = device.take(&device.reshape(x, &[tokens, 1, hidden])?, &token, 0)?;
        let results = self.networks_of(device, &rows, &device.take(&chosen, &order, 0)?, true)?;
        device.reshape(&device.take(&results, &back, 0)?, &[1, tokens, per_token, hidden])
    }

    fn networks_of(&self, device: &Device, rows: &Array, chosen: &Array, sorted: bool) -> Result<Array> {
        let up = self.up.forward(device, rows, chosen, sorted)?;
        let gate = self.gate.forward(device, rows, chosen, sorted)?;
        let inner = device.multiply(&activate(device, self.activation, &gate)?, &up)?;
        self.down.forward(device, &inner, chosen, sorted)
    }
}
