//! Lightning attention.

use super::{LoadError, Source, dtype_of_model, size};
use crate::mixers::{Fading, Lightning};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::{LightningSpec, ModelSpec};

impl Source<'_> {
    pub(super) fn lightning(
        &mut self,
        path: &str,
        spec: &LightningSpec,
        model: &ModelSpec,
    ) -> Result<Lightning, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let width = size(spec.width());
        let norms = match spec.qk_norm {
            true => {
                let norms = ["query_layernorm", "key_layernorm"]
                    .map(|name| self.tensor(&within(&format!("{name}.weight"))));
                let [queries, keys] = norms;
                Some([queries?, keys?])
            }
            false => None,
        };
        let norm = self.tensor(&within("g_norm.weight"))?;
        let scale = (spec.head_dim as f64).powf(-0.5) as f32;
        let rounded = spec.rounded.then(|| dtype_of_model(model));
        let core = Fading::new(self.device, &spec.log_decay, scale, rounded)?;
        self.queue(norms.iter().flatten().chain([&norm]).chain(core.arrays()));
        Ok(Lightning {
            projections: self.fused(&within("qkv_proj"), &[width; 3])?,
            norms,
            rope: RotaryEmbedding::new(self.device, &spec.rope)?,
            core,
            gate: self.linear(&within("g_proj"))?,
            norm,
            groups: size(spec.groups),
            eps: model.norm_eps,
            output: self.linear(&within("o_proj"))?,
            heads: size(spec.heads),
            head_dim: size(spec.head_dim),
        })
    }
}
