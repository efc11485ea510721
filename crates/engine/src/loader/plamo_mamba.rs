//! PLaMo 2's Mamba.

use super::gated_delta::ByHead;
use super::{LoadError, Source, size};
use crate::mixers::{CausalConvolution, PlamoMamba, StateSpace};
use mlxnode_checkpoint::PlamoMambaSpec;
use mlxnode_mlx::Dtype;

impl Source<'_> {
    pub(super) fn plamo_mamba(&mut self, path: &str, spec: &PlamoMambaSpec) -> Result<PlamoMamba, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let device = self.device;
        let (heads, head_dim) = (size(spec.heads), size(spec.head_dim));
        let weight = self.tensor(&within("conv1d.weight"))?;
        let convolution = CausalConvolution::new(device, weight, None)?;
        self.queue(convolution.arrays());
        let [b, c, steps] = PlamoMambaSpec::NORMS.map(|name| self.tensor(&within(name)));
        let norms = [b?, c?, steps?];
        self.queue(&norms);
        // The exponential in the type in which it is stored, as in mlx-lm.
        let rate = device.negative(&device.exp(&self.tensor(&within("A_log"))?)?)?;
        let core = StateSpace {
            rate: device.cast(&rate, Dtype::F32)?,
            skip: self.tensor(&within("D"))?,
            step_bias: self.tensor(&within("dt_bias"))?,
            limits: spec.step_limits,
            kernel: StateSpace::kernel(device)?,
        };
        self.queue([&core.rate, &core.skip, &core.step_bias]);
        let order = ByHead { heads, widths: &[head_dim, head_dim] }.order(&[0, 1]);
        let input = self.stored(&within("in_proj"))?.reordered(device, &order)?;
        Ok(PlamoMamba {
            input: self.reordered_linear(input)?,
            convolution,
            selection: self.linear(&within("bcdt_proj"))?,
            norms,
            eps: spec.norm_eps,
            steps: self.linear(&within("dt_proj"))?,
            core,
            output: self.linear(&within("out_proj"))?,
            heads,
            head_dim,
            state: size(spec.state),
        })
    }
}
