//! RWKV-7's layer.

use super::{LoadError, Source, size};
use crate::mixers::{ChannelMix, LowRank, Rwkv7, TimeMix, Wkv};
use mlxnode_checkpoint::{ModelSpec, Rwkv7Spec};

impl Source<'_> {
    /// `path` gives the full path of a name in the layer.
    pub(super) fn rwkv7(
        &mut self,
        path: &dyn Fn(&str) -> String,
        layer: &Rwkv7Spec,
        spec: &ModelSpec,
    ) -> Result<Rwkv7, LoadError> {
        let before = layer.is_first.then(|| self.read_norm(&path("pre_norm"), spec)).transpose()?;
        let mix = self.tensor(&path("ffn.x_k"))?;
        self.queue([&mix]);
        Ok(Rwkv7 {
            before,
            before_memory: self.read_norm(&path("attn_norm"), spec)?,
            memory: self.time_mix(&|name| path(&format!("attn.{name}")), layer, spec)?,
            before_network: self.read_norm(&path("ffn_norm"), spec)?,
            network: ChannelMix {
                mix,
                key: self.linear(&path("ffn.key"))?,
                value: self.linear(&path("ffn.value"))?,
            },
        })
    }

    fn time_mix(
        &mut self,
        path: &dyn Fn(&str) -> String,
        layer: &Rwkv7Spec,
        spec: &ModelSpec,
    ) -> Result<TimeMix, LoadError> {
        let device = self.device;
        let mut mixes = Vec::new();
        for name in Rwkv7Spec::MIXES {
            mixes.push(self.tensor(&path(name))?);
        }
        let mixes = device.concatenate(&mixes, 0)?;
        let mut by_head = |name: &str| self.tensor(&path(name));
        let (corrected, rated, own) = (by_head("k_k")?, by_head("k_a")?, by_head("r_k")?);
        let norm = [by_head("g_norm.weight")?, by_head("g_norm.bias")?];
        self.queue([&mixes, &corrected, &rated, &own].into_iter().chain(&norm));
        let first_value = match layer.is_first {
            true => None,
            false => Some(self.low_rank(&path("v_lora"))?),
        };
        Ok(TimeMix {
            mixes,
            receptance: self.linear(&path("r_proj"))?,
            key: self.linear(&path("k_proj"))?,
            value: self.linear(&path("v_proj"))?,
            output: self.linear(&path("o_proj"))?,
            decay: self.low_rank(&path("w_lora"))?,
            rate: self.low_rank(&path("a_lora"))?,
            gate: self.low_rank(&path("g_lora"))?,
            first_value,
            corrected,
            rated,
            own,
            norm,
            core: Wkv::new(device)?,
            heads: size(spec.hidden / layer.head_dim),
            head_dim: size(layer.head_dim),
        })
    }

    fn low_rank(&mut self, path: &str) -> Result<LowRank, LoadError> {
        Ok(LowRank {
            narrow: self.linear(&format!("{path}.lora.0"))?,
            wide: self.linear(&format!("{path}.lora.2"))?,
        })
    }
}
