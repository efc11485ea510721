//! Gear's local mixer.

use super::{LoadError, Source, size};
use crate::mixers::{CausalConvolution, ConvolvedKeys};
use mlxnode_checkpoint::{ConvolvedKeysSpec, ModelSpec};

impl Source<'_> {
    pub(super) fn convolved_keys(
        &mut self,
        path: &str,
        mixer: &ConvolvedKeysSpec,
        spec: &ModelSpec,
    ) -> Result<ConvolvedKeys, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        let (queries, keys) = (size(mixer.heads * mixer.head_dim), size(mixer.keys()));
        let projections = [(within("q_proj"), queries), (within("k_proj"), keys), (within("v_proj"), keys)];
        Ok(ConvolvedKeys {
            projections: self.stacked(&projections)?,
            query_norm: self.read_norm(&within("q_norm"), spec)?,
            key_norm: self.read_norm(&within("k_norm"), spec)?,
            key_convolution: self.convolution(&within("key_conv"))?,
            value_convolution: self.convolution(&within("value_conv"))?,
            output: self.linear(&within("o_proj"))?,
            heads: size(mixer.heads),
            kv_heads: size(mixer.kv_heads),
            head_dim: size(mixer.head_dim),
        })
    }

    /// A causal convolution of channels, read.
    pub(super) fn convolution(&mut self, path: &str) -> Result<CausalConvolution, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        let bias = self.optional(&format!("{path}.bias"))?;
        let convolution = CausalConvolution::new(self.device, weight, bias)?;
        self.queue(convolution.arrays());
        Ok(convolution)
    }
}
