//! What a model weighs, for those who decide where its layers go: true bytes, no files.

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::layout::EMBEDDING;
use crate::names;
use crate::spec::{LayerSpec, Mixer, ModelSpec};
use mlxnode_compute::{ByteCount, CacheOptions, Dtype, LayerRange};

/// The weights and caches of a model in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelProfile {
    /// The family.
    pub architecture: String,
    /// Weights of each layer.
    pub layer_bytes: Vec<ByteCount>,
    /// Cache of each layer for one token of one sequence.
    pub kv_bytes: Vec<ByteCount>,
    /// Most tokens that each layer's cache keeps, for layers with a window.
    pub kv_windows: Vec<Option<usize>>,
    /// What each layer keeps of one sequence whatever its length: recurrent states and the inputs of convolutions, with those before
    /// the last step.
    pub state_bytes: Vec<ByteCount>,
    /// Layers that must be on the same stage as the layer before them, because they or later ones see the keys and values of layers
    /// before them.
    pub joined: Vec<usize>,
    /// The embedding, on the first stage.
    pub embedding_bytes: ByteCount,
    /// What else the first stage needs to make of a token what travels.
    pub entrance_bytes: ByteCount,
    /// How often the stored layers are gone through: a stage with a layer of several passes holds its weights once.
    pub passes: usize,
    /// Norm and head, on the last stage. With tied embeddings the head is the embedding again.
    pub head_bytes: ByteCount,
    /// The head is the embedding, so that a single stage holds it once.
    pub tied_embeddings: bool,
    /// Width of the hidden vectors.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Most positions, when the config says so.
    pub context: Option<usize>,
    /// Element type of hidden vectors and caches.
    pub dtype: Dtype,
}

impl ModelProfile {
    /// Weighs a model. Checks all of its tensors first.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let spec = checkpoint.spec();
        let all = checkpoint.shard_tensors(LayerRange::new(0, spec.layer_count()))?;
        let mut layer_bytes = vec![ByteCount(0); spec.layer_count()];
        let (mut embedding_bytes, mut head_bytes) = (ByteCount(0), ByteCount(0));
        let mut entrance_bytes = ByteCount(0);
        let entrance = spec.modules(LayerRange::new(0, 0));
        let is_of =
            |name: &str, path: &str| name.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
        for (name, tensor) in &all.tensors {
            let bytes = ByteCount(tensor.byte_count());
            match names::layer_of(name) {
                Some(stored) => {
                    let of = |layer: &usize| spec.stored_layer(*layer) == stored;
                    (0..spec.layer_count()).filter(of).for_each(|layer| layer_bytes[layer] += bytes);
                }
                None if is_of(name, EMBEDDING) => embedding_bytes += bytes,
                None if entrance.iter().any(|module| is_of(name, &module.path)) => entrance_bytes += bytes,
                None => head_bytes += bytes,
            }
        }
        if spec.tied_embeddings {
            head_bytes += embedding_bytes;
        }
        Ok(Self {
            architecture: spec.architecture.into(),
            layer_bytes,
            kv_bytes: spec.layers.iter().map(|layer| kv_bytes(layer, spec.dtype)).collect(),
            kv_windows: spec.layers.iter().map(kv_window).collect(),
            state_bytes: spec.layers.iter().map(|layer| state_bytes(layer, spec)).collect(),
            joined: (1..spec.layer_count()).filter(|layer| !spec.can_split_before(*layer)).collect(),
            passes: spec.passes,
            embedding_bytes,
            entrance_bytes,
            head_bytes,
            tied_embeddings: spec.tied_embeddings,
            hidden: spec.hidden,
            vocabulary: spec.vocabulary,
            context: spec.context,
            dtype: spec.dtype,
        })
    }

    /// How many layers.
    pub fn layer_count(&self) -> usize {
        self.layer_bytes.len()
    }

    /// Cache of one layer for one token of one sequence; zero for a layer that the model does not have.
    pub fn kv_bytes_per_token(&self, layer: usize) -> ByteCount {
        self.kv_bytes.get(layer).copied().unwrap_or_default()
    }

    /// What one layer keeps of one sequence whatever its length; zero for a layer that the model does not have.
    pub fn state_bytes(&self, layer: usize) -> ByteCount {
        self.state_bytes.get(layer).copied().unwrap_or_default()
    }

    /// Weights of a stage with these layers.
    pub fn stage_bytes(&self, layers: LayerRange) -> ByteCount {
        let (first, last) = (layers.is_first(), layers.is_last(self.layer_count()));
        // Consecutive layers up to a whole pass are all different ones.
        let own = layers.len().min(self.layer_count() / self.passes.max(1));
        let mut bytes = self.layer_bytes.iter().skip(layers.start).take(own).copied().sum::<ByteCount>();
        if first {
            bytes += self.embedding_bytes + self.entrance_bytes;
        }
        if last {
            bytes += self.head_bytes;
        }
        if first && last && self.tied_embeddings {
            bytes = bytes - self.embedding_bytes; // held once
        }
        bytes
    }

    /// Cache of a stage with these layers for one sequence of `tokens` tokens, when all are kept as computed.
    pub fn stage_kv_bytes(&self, layers: LayerRange, tokens: usize) -> ByteCount {
        self.stage_kv_bytes_with(layers, tokens, &CacheOptions::default())
    }

    /// Most that the cache of a stage with these layers takes while one sequence grows to `tokens` tokens.
    pub fn stage_kv_bytes_with(
        &self,
        layers: LayerRange,
        tokens: usize,
        options: &CacheOptions,
    ) -> ByteCount {
        let layer = |layer: usize| {
            let window = self.kv_windows.get(layer).copied().flatten();
            let most = window.unwrap_or(usize::MAX).min(options.max_kv_size.unwrap_or(usize::MAX));
            let plain = self.kv_bytes_per_token(layer).0;
            let bytes = |tokens: usize, per_token: u64| per_token.saturating_mul(most.min(tokens) as u64);
            let growing = ByteCount(match options.kv_bits {
                None => bytes(tokens, plain),
                Some(_) if tokens <= options.quantized_kv_start => bytes(tokens, plain),
                Some(bits) => {
                    let before = bytes(options.quantized_kv_start, plain);
                    before.max(bytes(tokens, self.packed_bytes(plain, bits, options.kv_group_size)))
                }
            });
            growing + self.state_bytes(layer)
        };
        (layers.start..layers.end.min(self.layer_count())).map(layer).sum()
    }

    /// What `plain` bytes of numbers take when packed: their bits, and a scale and a bias per group.
    fn packed_bytes(&self, plain: u64, bits: u8, group_size: usize) -> u64 {
        let width = self.dtype.size() as u64;
        let numbers = plain / width.max(1);
        (numbers * u64::from(bits)).div_ceil(8) + numbers.div_ceil(group_size.max(1) as u64) * 2 * width
    }

    /// What a stage with these layers keeps of `tokens` consecutive tokens of a sequence when they are kept by themselves: keys and
    /// values at most, and the states after them.
    pub fn stretch_bytes(spec: &ModelSpec, layers: LayerRange, tokens: usize) -> (ByteCount, ByteCount) {
        let (mut growing, mut states) = (0_u64, 0_u64);
        for layer in spec.layers.iter().take(layers.end).skip(layers.start) {
            let kept = kv_window(layer).unwrap_or(usize::MAX).min(tokens);
            growing = growing.saturating_add(kv_bytes(layer, spec.dtype).0.saturating_mul(kept as u64));
            // Those before the last step are of no use to anybody else.
            states = states.saturating_add(state_bytes(layer, spec).0.div_ceil(2));
        }
        (ByteCount(growing), ByteCount(states))
    }

    /// All weights, each once.
    pub fn total_bytes(&self) -> ByteCount {
        self.stage_bytes(LayerRange::new(0, self.layer_count()))
    }
}

/// Keys and values of one token.
fn kv_bytes(layer: &LayerSpec, dtype: Dtype) -> ByteCount {
    match &layer.mixer {
        Mixer::Latent(latent) => return ByteCount((latent.cached_elements() * dtype.size()) as u64),
        Mixer::Shortcut(shortcut) => {
            return ByteCount((2 * shortcut.attention.cached_elements() * dtype.size()) as u64);
        }
        _ => {}
    }
    let Some(attention) = layer.mixer.attention().filter(|attention| attention.shares.is_none()) else {
        return ByteCount(0);
    };
    let width = attention.head_dim + attention.value_dim;
    // An indexer's keys have one column of no use beside them.
    let indexer = attention.blocks.as_ref().map_or(0, |blocks| blocks.head_dim + 1);
    ByteCount(((attention.kv_heads * width + indexer) * dtype.size()) as u64)
}

fn kv_window(layer: &LayerSpec) -> Option<usize> {
    let attention = layer.mixer.attention()?;
    attention.window.or(attention.chunk)
}

/// Twice, because the states before the last step are kept as well.
fn state_bytes(layer: &LayerSpec, spec: &ModelSpec) -> ByteCount {
    ByteCount(2 * layer.mixer.state_bytes(spec.hidden, spec.dtype.size()) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> ModelProfile {
        ModelProfile {
            architecture: "a".to_owned(),
            layer_bytes: vec![ByteCount(0); 2],
            // 64 numbers in half precision for a token, in a layer without and in one with a window.
            kv_bytes: vec![ByteCount(128); 2],
            kv_windows: vec![None, Some(100)],
            state_bytes: vec![ByteCount(0); 2],
            joined: vec![],
            passes: 1,
            embedding_bytes: ByteCount(0),
            entrance_bytes: ByteCount(0),
            head_bytes: ByteCount(0),
            tied_embeddings: false,
            hidden: 1,
            vocabulary: 1,
            context: None,
            dtype: Dtype::F16,
        }
    }

    #[test]
    fn caches_weigh_what_their_options_say() {
        let plain = CacheOptions::default();
        // 4 bits each, and a scale and a bias for 32.
        let packed = 64 * 4 / 8 + 2 * 2 * 2;
        let bits = CacheOptions { kv_bits: Some(4), kv_group_size: 32, ..plain };
        let cases = [
            (plain, 1000, 128 * (1000 + 100)),
            (CacheOptions { max_kv_size: Some(500), ..plain }, 1000, 128 * (500 + 100)),
            (CacheOptions { max_kv_size: Some(50), ..plain }, 1000, 128 * (50 + 50)),
            (bits, 1000, packed * (1000 + 100)),
            // Before they are packed they weigh more.
            (CacheOptions { quantized_kv_start: 900, ..bits }, 1000, 128 * (900 + 100)),
            (CacheOptions { quantized_kv_start: 2000, ..bits }, 1000, 128 * (1000 + 100)),
        ];
        for (options, tokens, expected) in cases {
            let actual = profile().stage_kv_bytes_with(LayerRange::new(0, 2), tokens, &options);
            assert_eq!(actual, ByteCount(expected), "{options:?}");
        }
    }
}
