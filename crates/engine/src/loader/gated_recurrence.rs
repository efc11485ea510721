//! Griffin's recurrent block.

use super::{LoadError, Source, size};
use crate::mixers::{CausalConvolution, GatedRecurrence};
use mlxnode_checkpoint::GatedRecurrenceSpec;

impl Source<'_> {
    pub(super) fn gated_recurrence(
        &mut self,
        path: &str,
        spec: &GatedRecurrenceSpec,
    ) -> Result<GatedRecurrence, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let (device, width) = (self.device, size(spec.width));
        let weight = self.tensor(&within("conv_1d.weight"))?;
        let bias = self.tensor(&within("conv_1d.bias"))?;
        let convolution = CausalConvolution::new(device, weight, Some(bias))?;
        self.queue(convolution.arrays());
        let mut gates = |what: &str| -> Result<_, LoadError> {
            let of_input = self.tensor(&within(&format!("rg_lru.input_gate_{what}")))?;
            let of_recurrence = self.tensor(&within(&format!("rg_lru.recurrent_gate_{what}")))?;
            Ok(device.concatenate([&of_input, &of_recurrence], -1)?)
        };
        let weights = gates("weight")?;
        let gate_bias = device.expand(&gates("bias")?, 1)?;
        let rate = device.softplus(&self.tensor(&within("rg_lru.recurrent_param"))?)?;
        self.queue([&weights, &gate_bias, &rate]);
        Ok(GatedRecurrence {
            inputs: self.stacked(&[(within("linear_y"), width), (within("linear_x"), width)])?,
            convolution,
            gates: weights,
            gate_bias,
            rate,
            output: self.linear(&within("linear_out"))?,
            width,
            heads: size(spec.heads),
        })
    }
}
