//! Gated delta networks.

use super::{LoadError, Source, dtype_of_model, size};
use crate::linear::Stacked;
use crate::mixers::{CausalConvolution, Decay, DeltaRule, GatedDeltaNet};
use mlxnode_checkpoint::{DeltaForm, GatedDeltaSpec, ModelSpec};
use mlxnode_mlx::{Array, Dtype};

/// Outputs of a projection that are taken in another order: for each head of keys so many of one thing and so many of another.
pub(super) struct ByHead<'a> {
    pub(super) heads: i32,
    /// How many neighbouring outputs of a head belong to each thing.
    pub(super) widths: &'a [i32],
}

impl ByHead<'_> {
    /// All of the first thing, then all of the second, and so on; `things` names them.
    pub(super) fn order(&self, things: &[usize]) -> Vec<i32> {
        let all: i32 = self.widths.iter().sum();
        let mut order = Vec::new();
        for thing in things {
            let before: i32 = self.widths.iter().take(*thing).sum();
            let width = self.widths.get(*thing).copied().unwrap_or(0);
            for head in 0..self.heads {
                let first = head * all + before;
                order.extend(first..first + width);
            }
        }
        order
    }
}

impl Source<'_> {
    pub(super) fn gated_delta(
        &mut self,
        path: &str,
        spec: &GatedDeltaSpec,
        model: &ModelSpec,
    ) -> Result<GatedDeltaNet, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let (key_heads, value_heads) = (size(spec.key_heads), size(spec.value_heads));
        let (key_dim, value_dim) = (size(spec.key_dim), size(spec.value_dim));
        let (inputs, widths) = self.delta_inputs(path, spec)?;
        let apart = matches!(spec.form, DeltaForm::Apart | DeltaForm::Channels | DeltaForm::BoundedChannels);
        let (norm, output) = if apart { ("o_norm", "o_proj") } else { ("norm", "out_proj") };
        let by_channel = matches!(spec.form, DeltaForm::Channels | DeltaForm::BoundedChannels);
        let widened_gate = match spec.form == DeltaForm::Channels && !spec.full_gate {
            true => Some(self.linear(&within("g_b_proj"))?),
            false => None,
        };
        let widened_decay = match spec.form == DeltaForm::Channels {
            true => Some(self.linear(&within("f_b_proj"))?),
            false => None,
        };
        let norm = self.tensor(&within(&format!("{norm}.weight")))?;
        let device = self.device;
        let scales = GatedDeltaNet::scales(key_heads, key_dim, dtype_of_model(model), device)?;
        let mut decay = Decay {
            rate: self.tensor(&within("A_log"))?,
            bias: self.tensor(&within("dt_bias"))?,
            bound: spec.decay_bound,
        };
        decay.rate = device.exp(&device.cast(&decay.rate, Dtype::F32)?)?;
        if decay.bound.is_none() {
            decay.rate = device.negative(&decay.rate)?;
        }
        if by_channel {
            decay.rate = device.reshape(&decay.rate, &[value_heads, 1])?;
            decay.bias = device.reshape(&decay.bias, &[value_heads, key_dim])?;
        }
        let convolution = CausalConvolution::new(device, self.delta_convolution(path, spec)?, None)?;
        self.queue([&norm, &scales, &decay.rate, &decay.bias].into_iter().chain(convolution.arrays()));
        Ok(GatedDeltaNet {
            inputs,
            widths,
            widened_gate,
            widened_decay,
            convolution,
            convolutions: (apart && !spec.inputs_together)
                .then(|| [size(spec.keys()), size(spec.keys()), size(spec.values())]),
            scales,
            decay,
            precise: spec.form == DeltaForm::BoundedChannels,
            doubled: spec.negative_eigenvalues,
            rule: DeltaRule::new(device)?,
            norm,
            eps: spec.norm_eps,
            logistic: by_channel,
            output: self.linear(&within(output))?,
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        })
    }

    /// The projections of the hidden vectors and their widths, in the mixer's order.
    fn delta_inputs(&mut self, path: &str, spec: &GatedDeltaSpec) -> Result<(Stacked, Vec<i32>), LoadError> {
        let (keys, values, heads) = (size(spec.keys()), size(spec.values()), size(spec.value_heads));
        let key_heads = size(spec.key_heads);
        let parts: &[(&str, i32)] = match spec.form {
            DeltaForm::Grouped => {
                let width = values / key_heads;
                let widths = [size(spec.key_dim), size(spec.key_dim), width, width];
                let order = ByHead { heads: key_heads, widths: &widths }.order(&[0, 1, 2, 3]);
                let wide = self.stored(&format!("{path}.in_proj_qkvz"))?.reordered(self.device, &order)?;
                let [mixed, gate] = wide.split(self.device, 2 * keys + values)?;
                let shared = heads / key_heads;
                let order = ByHead { heads: key_heads, widths: &[shared, shared] }.order(&[0, 1]);
                let narrow = self.stored(&format!("{path}.in_proj_ba"))?.reordered(self.device, &order)?;
                let [strength, decay] = narrow.split(self.device, heads)?;
                let widths = vec![2 * keys + values, values, heads, heads];
                let stored = [mixed, gate, strength, decay].into_iter().zip(widths.iter().copied()).collect();
                return Ok((self.stacked_of(stored)?, widths));
            }
            DeltaForm::Flat => &[
                ("in_proj_qkv", 2 * keys + values),
                ("in_proj_z", values),
                ("in_proj_b", heads),
                ("in_proj_a", heads),
            ],
            DeltaForm::Apart => &[
                ("q_proj", keys),
                ("k_proj", keys),
                ("v_proj", values),
                ("g_proj", values),
                ("b_proj", heads),
                ("a_proj", heads),
            ],
            DeltaForm::Channels if spec.full_gate => &[
                ("q_proj", keys),
                ("k_proj", keys),
                ("v_proj", values),
                ("g_proj", values),
                ("b_proj", heads),
                ("f_a_proj", size(spec.key_dim)),
            ],
            DeltaForm::BoundedChannels => &[
                ("q_proj", keys),
                ("k_proj", keys),
                ("v_proj", values),
                ("g_proj", values),
                ("b_proj", heads),
                ("f_proj", keys),
            ],
            DeltaForm::Channels => &[
                ("q_proj", keys),
                ("k_proj", keys),
                ("v_proj", values),
                ("g_a_proj", size(spec.key_dim)),
                ("b_proj", heads),
                ("f_a_proj", size(spec.key_dim)),
            ],
        };
        let named: Vec<_> = parts.iter().map(|(name, width)| (format!("{path}.{name}"), *width)).collect();
        Ok((self.stacked(&named)?, parts.iter().map(|(_, width)| *width).collect()))
    }

    /// The weights of the convolution over queries, keys and values.
    fn delta_convolution(&mut self, path: &str, spec: &GatedDeltaSpec) -> Result<Array, LoadError> {
        let names = match spec.form {
            DeltaForm::Grouped | DeltaForm::Flat => return self.tensor(&format!("{path}.conv1d.weight")),
            DeltaForm::Apart | DeltaForm::BoundedChannels => ["q_conv1d", "k_conv1d", "v_conv1d"],
            DeltaForm::Channels => ["q_conv.conv", "k_conv.conv", "v_conv.conv"],
        };
        let mut parts = Vec::new();
        for name in names {
            parts.push(self.tensor(&format!("{path}.{name}.weight"))?);
        }
        Ok(self.device.concatenate(&parts, 0)?)
    }
}
