//! Latent attention.

use super::matrices::Matrix;
use super::{LoadError, Source, arrays, size};
use crate::linear::OfHeads;
use crate::mixers::{Absorbed, Expansion, Indexer, LatentAttention, LatentNorm, SoftmaxAttention};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::{INDEXER_NORM_EPS, IndexerSpec, LatentForm, LatentSpec};

impl Source<'_> {
    pub(super) fn latent_attention(
        &mut self,
        path: &str,
        spec: &LatentSpec,
    ) -> Result<LatentAttention, LoadError> {
        let keys = (format!("{path}.kv_a_proj_with_mqa"), size(spec.latent + spec.rotated_dims));
        let (narrow, query_width, widen) = match spec.query_latent {
            None => {
                let width = size(spec.heads * spec.query_dims());
                (self.stacked(&[(format!("{path}.q_proj"), width), keys])?, width, None)
            }
            Some(narrow) => {
                let stacked = self.stacked(&[(format!("{path}.q_a_proj"), size(narrow)), keys])?;
                let norm = self.latent_norm(&format!("{path}.q_a_layernorm"), spec.norm_eps)?;
                (stacked, size(narrow), Some((norm, self.linear(&format!("{path}.q_b_proj"))?)))
            }
        };
        let expansion = match spec.form {
            LatentForm::Expanded => Expansion::Expanded {
                up: self.linear(&format!("{path}.kv_b_proj"))?,
                core: SoftmaxAttention::plain(spec.scale),
            },
            LatentForm::Absorbed | LatentForm::AbsorbedJoined => Expansion::Absorbed(Absorbed {
                embed_query: self.of_heads(&format!("{path}.embed_q"))?,
                unembed: self.of_heads(&format!("{path}.unembed_out"))?,
                joined: spec.form == LatentForm::AbsorbedJoined,
            }),
        };
        let indexer = spec.indexer.as_ref();
        Ok(LatentAttention {
            narrow,
            query_width,
            widen,
            latent_norm: self.latent_norm(&format!("{path}.kv_a_layernorm"), spec.norm_eps)?,
            expansion,
            gate: match spec.gate {
                true => Some(self.linear(&format!("{path}.g_proj"))?),
                false => None,
            },
            head_gate: match spec.head_gate && !spec.gate {
                true => Some(self.linear(&format!("{path}.g_proj"))?),
                false => None,
            },
            output: self.linear(&format!("{path}.o_proj"))?,
            rope: match spec.unrotated {
                true => None,
                false => Some(RotaryEmbedding::new(self.device, &spec.rope)?),
            },
            growth: spec.growth,
            query_factor: spec.query_factor,
            latent_factor: spec.latent_factor,
            heads: size(spec.heads),
            still_dims: size(spec.still_dims),
            rotated_dims: size(spec.rotated_dims),
            value_dims: size(spec.value_dims),
            latent: size(spec.latent),
            scale: spec.scale,
            indexer: indexer.map(|indexer| self.indexer(&format!("{path}.indexer"), indexer)).transpose()?,
        })
    }

    fn indexer(&mut self, path: &str, spec: &IndexerSpec) -> Result<Indexer, LoadError> {
        let key_norm =
            [self.tensor(&format!("{path}.k_norm.weight"))?, self.tensor(&format!("{path}.k_norm.bias"))?];
        self.queue(&key_norm);
        Ok(Indexer {
            queries: self.linear(&format!("{path}.wq_b"))?,
            keys: self.linear(&format!("{path}.wk"))?,
            key_norm,
            eps: INDEXER_NORM_EPS,
            weights: self.linear(&format!("{path}.weights_proj"))?,
            rope: RotaryEmbedding::new(self.device, &spec.rope)?,
            heads: size(spec.heads),
            head_dim: size(spec.head_dim),
            seen: size(spec.keys),
        })
    }

    fn latent_norm(&mut self, path: &str, eps: f32) -> Result<LatentNorm, LoadError> {
        let weight = self.tensor(&format!("{path}.weight"))?;
        self.queue([&weight]);
        Ok(LatentNorm { weight, eps })
    }

    /// A matrix for each head, read.
    fn of_heads(&mut self, path: &str) -> Result<OfHeads, LoadError> {
        Ok(match self.matrix(path)? {
            Matrix::Dense(stored) => {
                self.queue([&stored]);
                let turned = self.device.transpose(&stored, &[0, 2, 1])?;
                self.queue([&turned]);
                OfHeads::Dense { stored, turned }
            }
            // Only linear maps and tables are turned.
            Matrix::Quantized(matrices) | Matrix::Turned(matrices, _) => {
                self.queue(arrays(&matrices));
                OfHeads::Quantized(matrices)
            }
        })
    }
}
