//! Mixtures of experts: a router chooses a few networks for each token.

use crate::adapters::ExpertSlot;
use crate::feed_forward::{Network, activate, gated};
use crate::linear::Linear;
use crate::norm::{Norm, apply};
use crate::router::Router;
use mlxnode_checkpoint::{Activation, WeightPrecision};
use mlxnode_mlx::{Array, Device, Dtype, Quantized, Result};

/// From how many choices on rows are sorted by expert, so that each expert's weights are read once; mlx-lm's value.
const SORTED_FROM: i32 = 64;

/// The experts of one layer.
pub(crate) struct Experts {
    pub(crate) router: Router,
    /// Maps to and from what the experts see and give, when that is not the hidden vectors.
    pub(crate) latent: Option<[Linear; 2]>,
    /// On what goes through the second of them.
    pub(crate) latent_norm: Option<Norm>,
    pub(crate) networks: Networks,
    pub(crate) shared: Option<SharedExpert>,
}

/// The networks that a router chooses from.
pub(crate) struct Networks {
    /// On the gates, or between the projections.
    pub(crate) activation: Activation,
    /// Absent: plain networks.
    pub(crate) gate: Option<Matrices>,
    pub(crate) up: Matrices,
    pub(crate) down: Matrices,
}

/// One linear map for each expert.
pub(crate) struct Matrices {
    pub(crate) weights: MatrixStack,
    /// `[experts, outputs]`.
    pub(crate) biases: Option<Array>,
    /// What adapters add.
    pub(crate) changes: ExpertSlot,
}

/// One matrix for each expert.
pub(crate) enum MatrixStack {
    /// The transposed view `[experts, inputs, outputs]`, made once.
    Dense(Array),
    /// Packed `[experts, outputs, inputs]`.
    Quantized(Quantized),
}

/// The expert that works on every token.
pub(crate) struct SharedExpert {
    pub(crate) network: Network,
    /// To one number a token, whose logistic function is a factor on the result.
    pub(crate) gate: Option<Linear>,
    /// To two numbers a token, whose softmax weighs the chosen experts' result and this one's.
    pub(crate) balance: Option<Linear>,
}

/// Which expert works on which token.
struct Choices<'a> {
    /// `[1, tokens, per_token]`, or `[choices]` in the order of the experts.
    experts: &'a Array,
    /// In the order of the experts?
    sorted: bool,
    /// The tokens that the experts were chosen for, `[1, tokens, 1]` or `[choices]`; None when no adapter asks for them.
    tokens: Option<Array>,
    /// How many tokens there are.
    count: i32,
}

impl Matrices {
    /// `places` as [`Choices`] has them.
    fn forward(&self, device: &Device, x: &Array, choices: &Choices<'_>) -> Result<Array> {
        let results = self.unchanged(device, x, choices.experts, choices.sorted)?;
        if let Some(trained) = self.changes.trained() {
            return trained.apply(device, x, &results, choices.experts, choices.sorted);
        }
        match &choices.tokens {
            Some(tokens) if !self.changes.is_idle() => {
                let places = device.take(&self.changes.places(choices.count)?, tokens, 0)?;
                self.changes.apply(device, x, results, choices.experts, &places)
            }
            _ => Ok(results),
        }
    }

    fn unchanged(&self, device: &Device, x: &Array, indices: &Array, sorted: bool) -> Result<Array> {
        let results = match &self.weights {
            MatrixStack::Dense(matrices) => device.gather_mm(x, matrices, indices, sorted)?,
            MatrixStack::Quantized(matrices) => device.gather_qmm(x, matrices, indices, sorted)?,
        };
        let Some(biases) = &self.biases else { return Ok(results) };
        let biases = device.take(biases, indices, 0)?;
        device.add(&results, &device.expand(&biases, -2)?)
    }
}

impl Experts {
    /// `[1, tokens, hidden]` to the same.
    pub(crate) fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        let (chosen, weights) = self.router.choose(device, x)?;
        if self.router.choice.routing.on_inputs {
            let results = self.networks.forward(device, &device.multiply(x, &weights)?, &chosen)?;
            let result = device.reshape(&results, x.shape())?;
            let Some(shared) = &self.shared else { return Ok(result) };
            return device.add(&result, &shared.network.forward(device, x)?);
        }
        if self.router.choice.routing.identities > 0 {
            return self.forward_with_identities(device, x, &chosen, &weights);
        }
        let results = match &self.latent {
            Some([narrow, _]) => self.networks.forward(device, &narrow.forward(device, x)?, &chosen)?,
            None => self.networks.forward(device, x, &chosen)?,
        };
        let mixed = weighted_sum(device, &results, &weights)?;
        let mixed = match self.router.choice.routing.precision {
            WeightPrecision::SumRounded | WeightPrecision::SumInSingle => {
                device.cast(&mixed, results.dtype())?
            }
            WeightPrecision::SumAsIs | WeightPrecision::WeightsRounded => mixed,
        };
        let mixed = match self.router.choice.routing.result_scale {
            Some(scale) => device.multiply(&mixed, &Array::scalar(scale, mixed.dtype())?)?,
            None => mixed,
        };
        let mixed = match &self.latent {
            Some([_, widen]) => widen.forward(device, &apply(device, self.latent_norm.as_ref(), mixed)?)?,
            None => mixed,
        };
        let Some(shared) = &self.shared else { return Ok(mixed) };
        let shared_result = shared.network.forward(device, x)?;
        if let Some(balance) = &shared.balance {
            let parts = device.softmax(&balance.forward(device, x)?, -1, true)?;
            let part = |of: &Array, index: i32| {
                let weight = device.slice(&parts, &[0, 0, index], &[1, x.dim(1), index + 1])?;
                device.multiply(of, &weight)
            };
            return device.add(&part(&mixed, 0)?, &part(&shared_result, 1)?);
        }
        let Some(gate) = &shared.gate else { return device.add(&mixed, &shared_result) };
        let open = device.sigmoid(&gate.forward(device, x)?)?;
        device.add(&mixed, &device.multiply(&open, &shared_result)?)
    }
}

impl Experts {
    /// Some of the chosen have no network: first expert in their place, with weight 0, and the input itself with theirs.
    fn forward_with_identities(
        &self,
        device: &Device,
        x: &Array,
        chosen: &Array,
        weights: &Array,
    ) -> Result<Array> {
        let nothing = Array::scalar(0.0, weights.dtype())?;
        let experts = Array::scalar(self.router.experts as f32, chosen.dtype())?;
        let passes = device.greater_equal(chosen, &experts)?;
        let chosen = device.select(&passes, &Array::scalar(0.0, chosen.dtype())?, chosen)?;
        let results = self.networks.forward(device, x, &chosen)?;
        let mixed = weighted_sum(device, &results, &device.select(&passes, &nothing, weights)?)?;
        let passed = device.sum(&device.select(&passes, weights, &nothing)?, -1, true)?;
        device.add(&mixed, &device.multiply(x, &passed)?)
    }
}

/// Of results `[1, tokens, per_token, 1, hidden]` and their weights `[1, tokens, per_token]`: `[1, tokens, hidden]`.
pub(crate) fn weighted_sum(device: &Device, results: &Array, weights: &Array) -> Result<Array> {
    let weights = device.reshape(weights, &[1, weights.dim(1), weights.dim(2), 1, 1])?;
    device.sum_over(&device.multiply(results, &weights)?, &[2, 3])
}

impl Networks {
    /// The chosen experts' results, `[1, tokens, per_token, 1, hidden]`.
    pub(crate) fn forward(&self, device: &Device, x: &Array, chosen: &Array) -> Result<Array> {
        let (tokens, hidden, per_token) = (x.dim(1), x.dim(2), chosen.dim(2));
        let choices = tokens * per_token;
        if choices < SORTED_FROM {
            let rows = match tokens {
                // [1, 1, hidden] is a matrix for all of the choices.
                1 if !self.up.changes.is_active() => x.clone(),
                _ => device.reshape(x, &[1, tokens, 1, 1, hidden])?,
            };
            let order = match self.up.changes.is_active() {
                true => {
                    let all: Vec<u32> = (0..tokens.unsigned_abs()).collect();
                    Some(Array::from_u32(&all, &[1, tokens, 1])?)
                }
                false => None,
            };
            let choices = Choices { experts: chosen, sorted: false, tokens: order, count: tokens };
            return self.of(device, &rows, &choices);
        }
        let chosen = device.reshape(chosen, &[choices])?;
        let order = device.argsort(&chosen, 0)?;
        let back = device.argsort(&order, 0)?;
        let token = device.floor_divide(&order, &Array::scalar(per_token as f32, Dtype::U32)?)?;
        let rows = device.take(&device.reshape(x, &[tokens, 1, hidden])?, &token, 0)?;
        let experts = device.take(&chosen, &order, 0)?;
        let choices = Choices { experts: &experts, sorted: true, tokens: Some(token), count: tokens };
        let results = self.of(device, &rows, &choices)?;
        device.reshape(&device.take(&results, &back, 0)?, &[1, tokens, per_token, 1, hidden])
    }

    fn of(&self, device: &Device, rows: &Array, choices: &Choices<'_>) -> Result<Array> {
        let up = self.up.forward(device, rows, choices)?;
        let inner = match &self.gate {
            Some(gate) => gated(device, self.activation, &gate.forward(device, rows, choices)?, &up)?,
            None => activate(device, self.activation, &up)?,
        };
        self.down.forward(device, &inner, choices)
    }
}
