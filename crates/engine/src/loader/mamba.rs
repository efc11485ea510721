//! Mamba.

use super::{LoadError, Source, size};
use crate::mixers::{CausalConvolution, Mamba, StateNorms};
use mlxnode_checkpoint::{MambaNorms, MambaSpec, ModelSpec};

impl Source<'_> {
    pub(super) fn mamba(
        &mut self,
        path: &str,
        spec: &MambaSpec,
        model: &ModelSpec,
    ) -> Result<Mamba, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let device = self.device;
        let weight = self.tensor(&within("conv1d.weight"))?;
        let bias = self.optional(&within("conv1d.bias"))?;
        let convolution = CausalConvolution::new(device, weight, bias)?;
        self.queue(convolution.arrays());
        let norms = match spec.norms {
            MambaNorms::Absent => StateNorms::Absent,
            MambaNorms::Unweighted { eps } => StateNorms::Unweighted { eps },
            MambaNorms::Weighted => {
                let [steps, b, c] =
                    MambaSpec::NORMS.map(|name| self.tensor(&format!("{path}.{name}.weight")));
                StateNorms::Weighted { weights: [steps?, b?, c?], eps: model.norm_eps }
            }
        };
        if let StateNorms::Weighted { weights, .. } = &norms {
            self.queue(weights);
        }
        // In the type in which it is stored, as in mlx-lm.
        let rate = device.negative(&device.exp(&self.tensor(&within("A_log"))?)?)?;
        let skip = self.tensor(&within("D"))?;
        self.queue([&rate, &skip]);
        Ok(Mamba {
            input: self.linear(&within("in_proj"))?,
            convolution,
            selection: self.linear(&within("x_proj"))?,
            norms,
            steps: self.linear(&within("dt_proj"))?,
            rate,
            skip,
            output: self.linear(&within("out_proj"))?,
            rounded: spec.rounded_states,
            width: size(spec.width),
            rank: size(spec.rank),
            state: size(spec.state),
        })
    }
}
