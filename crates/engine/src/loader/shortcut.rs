//! LongCat's double layer.

use super::{LoadError, Source};
use crate::mixers::{Half, Shortcut};
use crate::norm::Norm;
use mlxnode_checkpoint::{ModelSpec, ShortcutSpec};

impl Source<'_> {
    /// `path` gives the full path of a name in the layer.
    pub(super) fn shortcut(
        &mut self,
        path: &dyn Fn(&str) -> String,
        shortcut: &ShortcutSpec,
        spec: &ModelSpec,
    ) -> Result<Shortcut, LoadError> {
        let halves = [self.half(path, 0, shortcut, spec)?, self.half(path, 1, shortcut, spec)?];
        let experts = self.experts(&path(shortcut.experts.block), &shortcut.experts, spec)?;
        Ok(Shortcut { halves, experts })
    }

    fn half(
        &mut self,
        path: &dyn Fn(&str) -> String,
        half: usize,
        shortcut: &ShortcutSpec,
        spec: &ModelSpec,
    ) -> Result<Half, LoadError> {
        let names = ["gate_proj", "up_proj", "down_proj"].map(|name| path(&format!("mlps.{half}.{name}")));
        Ok(Half {
            before_attention: self.evaluated_norm(&path(&format!("input_layernorm.{half}")), spec)?,
            attention: self.latent_attention(&path(&format!("self_attn.{half}")), &shortcut.attention)?,
            before_network: self.evaluated_norm(&path(&format!("post_attention_layernorm.{half}")), spec)?,
            network: self.gated(&names, shortcut.intermediate, shortcut.activation, false)?,
        })
    }

    fn evaluated_norm(&mut self, path: &str, spec: &ModelSpec) -> Result<Norm, LoadError> {
        let norm = self.norm(path, spec)?;
        self.queue(norm.arrays());
        Ok(norm)
    }
}
