//! One layer: its norms, its mixer, its feed-forward network.

use super::{LoadError, Source};
use crate::decoder::Layer;
use crate::mixers::Mixer;
use crate::norm::{Kind as NormForm, Norm};
use mlxnode_checkpoint::{LayerSpec, Mixer as MixerSpec, ModelSpec, NormKind};
use mlxnode_mlx::Array;

impl Source<'_> {
    pub(super) fn layer(
        &mut self,
        index: usize,
        layer: &LayerSpec,
        spec: &ModelSpec,
    ) -> Result<Layer, LoadError> {
        let stored = spec.stored_layer(index);
        let path = |name: &str| format!("model.layers.{stored}.{name}");
        let (before, after) = (spec.norm_eps, spec.after_norm_eps.unwrap_or(spec.norm_eps));
        let mut norm = |name: Option<&str>, eps: f32| match name {
            Some(name) => self.read_norm(&path(name), spec).map(|norm| Some(Norm { eps, ..norm })),
            None => Ok(None),
        };
        let before_mixer = norm(layer.norms.before_mixer, before)?;
        let after_mixer = norm(layer.norms.after_mixer, after)?;
        let before_feed_forward = norm(layer.norms.before_feed_forward, before)?;
        let after_feed_forward = norm(layer.norms.after_feed_forward, after)?;
        let mixer = match &layer.mixer {
            MixerSpec::Attention(attention) if attention.convolved => {
                let path = path(attention.names.block);
                Mixer::ConvolvedAttention(Box::new(self.convolved_attention(&path, attention, spec)?))
            }
            MixerSpec::Attention(attention) => {
                let path = path(attention.names.block);
                Mixer::Attention(Box::new(self.attention(&path, index, attention, spec)?))
            }
            MixerSpec::Latent(latent) => {
                Mixer::Latent(Box::new(self.latent_attention(&path("self_attn"), latent)?))
            }
            MixerSpec::GatedDelta(delta) => {
                Mixer::GatedDelta(Box::new(self.gated_delta(&path(delta.block), delta, spec)?))
            }
            MixerSpec::GatedRecurrence(recurrence) => {
                let path = path(recurrence.block);
                Mixer::GatedRecurrence(Box::new(self.gated_recurrence(&path, recurrence)?))
            }
            MixerSpec::Lightning(lightning) => {
                Mixer::Lightning(Box::new(self.lightning(&path("self_attn"), lightning, spec)?))
            }
            MixerSpec::Mamba(mamba) => Mixer::Mamba(Box::new(self.mamba(&path(mamba.block), mamba, spec)?)),
            MixerSpec::Mamba2(mamba) => {
                Mixer::Mamba2(Box::new(self.mamba2(&path(mamba.block), mamba, spec)?))
            }
            MixerSpec::PlamoMamba(mamba) => {
                Mixer::PlamoMamba(Box::new(self.plamo_mamba(&path(mamba.block), mamba)?))
            }
            MixerSpec::ShortConvolution(_) => Mixer::ShortConvolution(self.short_convolution(&path("conv"))?),
            MixerSpec::ConvolvedKeys(mixer) => {
                Mixer::ConvolvedKeys(Box::new(self.convolved_keys(&path("local_mixer"), mixer, spec)?))
            }
            MixerSpec::Mamba2AndAttention(both) => {
                let (mamba, attention) = both.as_ref();
                Mixer::Mamba2AndAttention(Box::new((
                    self.mamba2(&path(mamba.block), mamba, spec)?,
                    self.attention(&path(attention.names.block), index, attention, spec)?,
                )))
            }
            MixerSpec::Linear { .. } => Mixer::Linear(self.linear(&path("self_attn.linear"))?),
            MixerSpec::Absent => Mixer::Absent,
            MixerSpec::Rwkv7(layer) => Mixer::Rwkv7(Box::new(self.rwkv7(&path, layer, spec)?)),
            MixerSpec::Shortcut(shortcut) => Mixer::Shortcut(Box::new(self.shortcut(&path, shortcut, spec)?)),
        };
        let feed_forward = self.feed_forward(&path, &layer.feed_forward, spec)?;
        let flow = self.flow(&path, &layer.flow, spec)?;
        Ok(Layer {
            before_mixer,
            mixer,
            after_mixer,
            before_feed_forward,
            feed_forward,
            after_feed_forward,
            flow,
        })
    }

    /// A norm, read.
    pub(super) fn read_norm(&mut self, path: &str, spec: &ModelSpec) -> Result<Norm, LoadError> {
        let norm = self.norm(path, spec)?;
        self.queue(norm.arrays());
        Ok(norm)
    }

    /// An RMS norm whatever those of the hidden vectors are, read.
    pub(super) fn read_rms_norm(&mut self, path: &str, spec: &ModelSpec) -> Result<Norm, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        self.queue([&weight]);
        Ok(Norm { kind: NormForm::Rms, weight: Some(weight), eps: spec.norm_eps })
    }

    pub(super) fn norm(&mut self, path: &str, spec: &ModelSpec) -> Result<Norm, LoadError> {
        self.norm_of(spec.norm, path, spec.norm_eps)
    }

    pub(super) fn norm_of(&mut self, kind: NormKind, path: &str, eps: f32) -> Result<Norm, LoadError> {
        if kind == NormKind::RmsUnweighted {
            return Ok(Norm { kind: NormForm::Rms, weight: None, eps });
        }
        let weight = self.tensor(&format!("{path}.weight"))?;
        let (weight, kind) = match kind {
            NormKind::Rms | NormKind::RmsUnweighted => (weight, NormForm::Rms),
            NormKind::RmsPlusOne => (self.plus_one(&weight)?, NormForm::Rms),
            NormKind::Layer { bias } => {
                let bias = bias.then(|| self.tensor(&format!("{path}.bias"))).transpose()?;
                (weight, NormForm::Layer { bias })
            }
            NormKind::LayerPlusOne => {
                let bias = Some(self.tensor(&format!("{path}.bias"))?);
                (self.plus_one(&weight)?, NormForm::Layer { bias })
            }
        };
        Ok(Norm { kind, weight: Some(weight), eps })
    }

    /// A weight that counts from one, in its own element type.
    pub(super) fn plus_one(&self, weight: &Array) -> Result<Array, LoadError> {
        Ok(self.device.add(&Array::scalar(1.0, weight.dtype())?, weight)?)
    }
}
