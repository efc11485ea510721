//! Mamba, and PLaMo 2's form of Mamba 2.

use super::{LoadError, Source, size};
use crate::mixers::{CausalConvolution, Mamba, PlamoMamba, SelectionNorms, StateSpace};
use mlxnode_checkpoint::{MambaNorms, MambaSpec, ModelSpec, PlamoMambaSpec};
use mlxnode_mlx::{Array, Dtype};

impl Source<'_> {
    pub(super) fn mamba(
        &mut self,
        path: &str,
        spec: &MambaSpec,
        model: &ModelSpec,
    ) -> Result<Mamba, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let device = self.device;
        let convolution = self.channel_convolution(&within("conv1d"))?;
        let norms = match spec.norms {
            MambaNorms::Absent => SelectionNorms::Absent,
            MambaNorms::Unweighted { eps } => SelectionNorms::Unweighted { eps },
            MambaNorms::Weighted => {
                let names = MambaSpec::NORMS.map(|name| within(&format!("{name}.weight")));
                self.selection_norms(&names, model)?
            }
        };
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
            width: size(spec.width),
            state: size(spec.state),
            rank: size(spec.rank),
            rounded_states: spec.rounded_states,
        })
    }

    pub(super) fn plamo_mamba(
        &mut self,
        path: &str,
        spec: &PlamoMambaSpec,
        model: &ModelSpec,
    ) -> Result<PlamoMamba, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let device = self.device;
        let (heads, head_dim, width) = (size(spec.heads), size(spec.head_dim), size(spec.width()));
        // Each head's gate is stored before its input; here all gates come first.
        let rows = |part: i32| {
            (0..heads).flat_map(move |head| {
                let first = (2 * head + part) * head_dim;
                first..first + head_dim
            })
        };
        let order: Vec<i32> = rows(0).chain(rows(1)).collect();
        let [gate, input] =
            self.stored(&within("in_proj"))?.reordered(device, &order)?.split(device, width)?;
        let convolution = self.channel_convolution(&within("conv1d"))?;
        let norms = self.selection_norms(&PlamoMambaSpec::NORMS.map(within), model)?;
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
        Ok(PlamoMamba {
            input: self.stacked_of(vec![(gate, width), (input, width)])?,
            convolution,
            selection: self.linear(&within("bcdt_proj"))?,
            norms,
            steps: self.linear(&within("dt_proj"))?,
            core,
            output: self.linear(&within("out_proj"))?,
            heads,
            head_dim,
            state: size(spec.state),
            rank: size(spec.rank),
        })
    }

    /// A convolution of channels at `path`, read.
    pub(super) fn channel_convolution(&mut self, path: &str) -> Result<CausalConvolution, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        let bias = self.optional(&format!("{path}.bias"))?;
        let convolution = CausalConvolution::new(self.device, weight, bias)?;
        self.queue(convolution.arrays());
        Ok(convolution)
    }

    fn selection_norms(
        &mut self,
        names: &[String; 3],
        model: &ModelSpec,
    ) -> Result<SelectionNorms, LoadError> {
        let [steps, b, c] = names;
        let weights: [Array; 3] = [self.tensor(steps)?, self.tensor(b)?, self.tensor(c)?];
        self.queue(&weights);
        Ok(SelectionNorms::Weighted { weights, eps: model.norm_eps })
    }
}
