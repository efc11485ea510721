//! Attention with grouped keys and values.

use super::{LoadError, Source, size};
use crate::linear::Stacked;
use crate::mixers::{
    Attention, AttentionGate, Beside, BlockIndexer, ConvolvedAttention, KeySource, QkNorms, SoftmaxAttention,
    Taps,
};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::{
    AttentionSpec, BlockIndexerSpec, ModelSpec, NormKind, QkNormKind, QueryFactor, SinglePrecision, Values,
};
use mlxnode_mlx::Array;

impl Source<'_> {
    /// The attention of the model's layer `index`, in a layer range that begins with layer `first`.
    pub(super) fn attention(
        &mut self,
        path: &str,
        index: usize,
        attention: &AttentionSpec,
        spec: &ModelSpec,
    ) -> Result<Attention, LoadError> {
        let (heads, kv_heads) = (size(attention.heads), size(attention.kv_heads));
        let head_dim = size(attention.head_dim);
        let source = match (attention.shares, attention.values) {
            (Some(owner), _) => KeySource::Layer(owner.saturating_sub(self.shard.layers.start)),
            (None, _) if attention.projected_by.is_some() => KeySource::Handed,
            (None, Values::Keys) => KeySource::Keys,
            (None, Values::Projected) => KeySource::Projections,
        };
        let names: &[&str] = match source {
            KeySource::Layer(_) | KeySource::Handed => &["q_proj"],
            KeySource::Keys => &["q_proj", "k_proj"],
            KeySource::Projections => &["q_proj", "k_proj", "v_proj"],
        };
        let widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
        let projections = match (attention.fused, names) {
            (true, _) => self.fused(&format!("{path}.qkv_proj"), &widths)?,
            (false, _) if attention.output_gate => self.with_gates(path, attention)?,
            (false, names) if attention.value_dim != attention.head_dim => {
                let parts = names.iter().map(|name| self.linear(&format!("{path}.{name}")));
                Stacked { whole: None, parts: parts.collect::<Result<_, _>>()? }
            }
            (false, [name]) => Stacked { whole: None, parts: vec![self.linear(&format!("{path}.{name}"))?] },
            (false, names) => {
                let names = names.iter().map(|name| format!("{path}.{name}"));
                let parts: Vec<_> = names.zip(widths).collect();
                self.stacked(&parts)?
            }
        };
        let single_precision = match attention.single_precision {
            SinglePrecision::Never => false,
            SinglePrecision::ForF16 => spec.dtype == mlxnode_compute::Dtype::F16,
            SinglePrecision::Always => spec.dtype != mlxnode_compute::Dtype::F32,
        };
        let sinks = match attention.sinks {
            false => None,
            true => {
                let sinks = self.tensor(&format!("{path}.sinks"))?;
                self.queue([&sinks]);
                Some(sinks)
            }
        };
        let beside = match attention.beside {
            None => None,
            Some(owner) => Some(self.beside(path, owner, attention)?),
        };
        let blocks = match &attention.blocks {
            None => None,
            Some(blocks) => Some(self.block_indexer(path, blocks, heads, spec)?),
        };
        let serves = |owner: fn(&AttentionSpec) -> Option<usize>| {
            let mut others = spec.layers.iter().filter_map(|layer| layer.mixer.attention());
            others.any(|other| owner(other) == Some(index))
        };
        let rope = attention.rope.as_ref();
        let count = |tokens: usize| i32::try_from(tokens).unwrap_or(i32::MAX);
        Ok(Attention {
            projections,
            projection_limit: attention.projection_limit,
            projects_for_others: serves(|other| other.projected_by),
            output: self.linear(&format!("{path}.{}", attention.names.output))?,
            norms: self.qk_norms(path, attention, spec)?,
            result_norm: match attention.result_norm {
                Some(name) => Some(self.read_rms_norm(&format!("{path}.{name}"), spec)?),
                None => None,
            },
            source,
            value_norm: attention.value_norm.then_some(spec.norm_eps),
            byte_scales: match attention.rounded_to_bytes {
                true => {
                    let [keys, values] =
                        AttentionSpec::BYTE_SCALES.map(|name| self.tensor(&format!("{path}.{name}")));
                    let scales = [keys?, values?];
                    self.queue(&scales);
                    Some(scales)
                }
                false => None,
            },
            rope: rope.map(|rope| RotaryEmbedding::new(self.device, rope)).transpose()?,
            output_gate: attention.output_gate,
            temperature: attention.temperature,
            gate: match attention.gate {
                None => None,
                Some(gate) => Some(AttentionGate {
                    projection: self.linear(&format!("{path}.{}", gate.name))?,
                    per_head: gate.per_head,
                    function: gate.function,
                }),
            },
            growth: attention.growth,
            heads,
            kv_heads,
            head_dim,
            value_dim: size(attention.value_dim),
            value_factor: attention.value_factor,
            beside,
            blocks,
            listed: spec
                .layers
                .iter()
                .any(|layer| layer.mixer.attention().is_some_and(|it| it.blocks.is_some())),
            core: SoftmaxAttention {
                scale: attention.scale,
                window: attention.window.map(count),
                wider: i32::from(attention.wider_in_prompts),
                score_cap: attention.score_cap,
                single_precision,
                chunk: attention.chunk.map(count),
                sinks,
                shown: serves(|other| other.shares.or(other.beside)),
            },
        })
    }

    fn beside(&mut self, path: &str, owner: usize, attention: &AttentionSpec) -> Result<Beside, LoadError> {
        let heads = size(attention.heads);
        let weight = self.tensor(&format!("{path}.loop_gate.weight"))?;
        let bias = self.tensor(&format!("{path}.loop_gate.bias"))?;
        let weight = self.device.reshape(&weight, &[heads, size(attention.head_dim), 1])?;
        let bias = self.device.reshape(&bias, &[heads, 1, 1])?;
        self.queue([&weight, &bias]);
        let layer = owner.saturating_sub(self.shard.layers.start);
        Ok(Beside { layer, weight, bias, core: SoftmaxAttention::plain(attention.scale) })
    }

    fn block_indexer(
        &mut self,
        path: &str,
        blocks: &BlockIndexerSpec,
        attention_heads: i32,
        spec: &ModelSpec,
    ) -> Result<BlockIndexer, LoadError> {
        let within = |name: &str| format!("{path}.{name}");
        Ok(BlockIndexer {
            queries: self.linear(&within("index_q_proj"))?,
            keys: self.linear(&within("index_k_proj"))?,
            query_norm: self.read_norm(&within("index_q_norm"), spec)?,
            key_norm: self.read_norm(&within("index_k_norm"), spec)?,
            rope: RotaryEmbedding::new(self.device, &blocks.rope)?,
            heads: size(blocks.heads),
            head_dim: size(blocks.head_dim),
            block: size(blocks.block),
            blocks: size(blocks.blocks),
            local: size(blocks.local),
            attention_heads,
        })
    }

    /// Attention whose keys and values are mixed with those of the token before.
    pub(super) fn convolved_attention(
        &mut self,
        path: &str,
        attention: &AttentionSpec,
        spec: &ModelSpec,
    ) -> Result<ConvolvedAttention, LoadError> {
        let (heads, kv_heads) = (size(attention.heads), size(attention.kv_heads));
        let head_dim = size(attention.head_dim);
        let rope = attention.rope.as_ref();
        let count = |tokens: usize| i32::try_from(tokens).unwrap_or(i32::MAX);
        let single_precision = match attention.single_precision {
            SinglePrecision::Never => false,
            SinglePrecision::ForF16 => spec.dtype == mlxnode_compute::Dtype::F16,
            SinglePrecision::Always => spec.dtype != mlxnode_compute::Dtype::F32,
        };
        Ok(ConvolvedAttention {
            projections: self.fused(
                &format!("{path}.qkv_proj"),
                &[heads * head_dim, kv_heads * head_dim, kv_heads * head_dim],
            )?,
            key_taps: self.taps(&format!("{path}.conv_k"), kv_heads)?,
            value_taps: self.taps(&format!("{path}.conv_v"), kv_heads)?,
            rope: rope.map(|rope| RotaryEmbedding::new(self.device, rope)).transpose()?,
            output: self.linear(&format!("{path}.{}", attention.names.output))?,
            heads,
            kv_heads,
            head_dim,
            core: SoftmaxAttention {
                window: attention.window.map(count),
                single_precision,
                ..SoftmaxAttention::plain(attention.scale)
            },
        })
    }

    /// From `[1, 1, kv_heads, 1, 2]`.
    fn taps(&mut self, name: &str, kv_heads: i32) -> Result<Taps, LoadError> {
        let device = self.device;
        let both = device.reshape(&self.tensor(name)?, &[1, kv_heads, 1, size(AttentionSpec::TAPS)])?;
        let tap = |index: i32| device.contiguous(&device.slice_axis(&both, 3, index, index + 1, 1)?);
        let taps = Taps { before: tap(0)?, own: tap(1)? };
        self.queue([&taps.before, &taps.own]);
        Ok(taps)
    }

    /// Projections of which the first has a gate after each head's query: queries, keys, values, then all gates.
    fn with_gates(&mut self, path: &str, attention: &AttentionSpec) -> Result<Stacked, LoadError> {
        let (heads, head_dim) = (size(attention.heads), size(attention.head_dim));
        let (queries, keys) = (heads * head_dim, size(attention.kv_heads) * head_dim);
        let order = |gate: i32| {
            (0..heads).flat_map(move |head| {
                let first = (2 * head + gate) * head_dim;
                first..first + head_dim
            })
        };
        let order: Vec<i32> = order(0).chain(order(1)).collect();
        let both = self.stored(&format!("{path}.q_proj"))?.reordered(self.device, &order)?;
        let [query, gate] = both.split(self.device, queries)?;
        let key = self.stored(&format!("{path}.k_proj"))?;
        let value = self.stored(&format!("{path}.v_proj"))?;
        self.stacked_of(vec![(query, queries), (key, keys), (value, keys), (gate, queries)])
    }

    pub(super) fn qk_norms(
        &mut self,
        path: &str,
        attention: &AttentionSpec,
        spec: &ModelSpec,
    ) -> Result<Option<QkNorms>, LoadError> {
        let Some(norm) = attention.qk_norm else { return Ok(None) };
        let after_rope = norm.after_rope;
        let query_factor = match norm.query_factor {
            None => None,
            Some(QueryFactor::Number(factor)) => Some(Array::scalar(factor, self.dtype)?),
            Some(QueryFactor::OfHeads(name)) => {
                let factors = self.device.cast(&self.tensor(&format!("{path}.{name}"))?, self.dtype)?;
                let factors = self.device.reshape(&factors, &[size(attention.heads), 1, 1])?;
                self.queue([&factors]);
                Some(factors)
            }
        };
        if let QkNormKind::PerHeadUnweighted { eps } = norm.kind {
            return Ok(Some(QkNorms {
                kind: norm.kind,
                query: None,
                key: None,
                eps,
                after_rope,
                query_factor,
            }));
        }
        let mut weight = |name: &str| {
            let weight = self.tensor(&format!("{path}.{name}.weight"))?;
            match (norm.kind, spec.norm) {
                (QkNormKind::PerHead, NormKind::RmsPlusOne) => self.plus_one(&weight),
                _ => Ok(weight),
            }
        };
        let query = weight(norm.names[0])?;
        let key = match attention.shares {
            None => Some(weight(norm.names[1])?),
            Some(_) => None,
        };
        self.queue([&query].into_iter().chain(&key));
        Ok(Some(QkNorms {
            kind: norm.kind,
            query: Some(query),
            key,
            eps: spec.norm_eps,
            after_rope,
            query_factor,
        }))
    }
}
