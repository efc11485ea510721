//! What a model costs to hold and to run, layer by layer.

use mlxnode_checkpoint::ModelProfile;
use mlxnode_compute::{ByteCount, LayerRange};

/// Longest context when the model does not say: longer than any model of today is made for.
const UNSTATED_CONTEXT: usize = 1 << 20;

/// A model as placement sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    /// The model's family ("llama", "qwen3" …).
    pub architecture: String,
    /// In order.
    pub layers: Vec<LayerCost>,
    /// Layers that must be on the same stage as the layer before them. No 0, and none that the model does not have.
    pub joined: Vec<usize>,
    /// How often the layers are gone through: a stage with a layer of several passes holds its weights once.
    pub passes: usize,
    /// What the first stage holds besides its layers.
    pub embedding: ByteCount,
    /// What the last stage holds besides its layers: final norm and head. With tied embeddings this includes the embedding matrix.
    pub head: ByteCount,
    /// The part of `head` that is the embedding matrix itself: not held twice by a stage that is first and last.
    pub shared: ByteCount,
    /// Longest context that the model was made for, in tokens.
    pub context_tokens: usize,
    /// Bits of a weight as stored, when all layers agree: tells what quantizing would save.
    pub weight_bits: Option<f64>,
    /// What a draft model takes beside the first stage.
    pub draft: Option<DraftCost>,
}

/// What a draft model takes: all of it lies beside the model's first stage.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftCost {
    /// All of its weights.
    pub weights: ByteCount,
    /// Its layers, for their caches.
    pub layers: Vec<LayerCost>,
}

impl From<ModelCost> for DraftCost {
    fn from(model: ModelCost) -> Self {
        let layers: ByteCount = model.layers.iter().map(|layer| layer.weights).sum();
        let ends = model.embedding + model.head.saturating_sub(model.shared);
        Self { weights: layers + ends, layers: model.layers }
    }
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerCost {
    /// Bytes of its weights.
    pub weights: ByteCount,
    /// Bytes of caches for each token of each sequence.
    pub kv_per_token: ByteCount,
    /// Bytes that one sequence needs whatever its length: recurrent states.
    pub state: ByteCount,
    /// Most tokens of a sequence that the cache keeps, for a layer with a sliding window.
    pub kv_window: Option<usize>,
}

impl LayerCost {
    /// Bytes of KV cache for `sequences` sequences of `context_tokens` tokens.
    pub fn kv(&self, context_tokens: usize, sequences: usize) -> ByteCount {
        let kept = self.kv_window.map_or(context_tokens, |window| window.min(context_tokens));
        let tokens = (kept as u64).saturating_mul(sequences as u64);
        let states = self.state.0.saturating_mul(sequences as u64);
        ByteCount(self.kv_per_token.0.saturating_mul(tokens).saturating_add(states))
    }

    /// The part of one sequence's cache that does not grow with its tokens, or not to the end of `context_tokens`: states, and windows.
    fn fixed(&self, context_tokens: usize) -> u64 {
        let window = self.kv_window.filter(|window| *window < context_tokens).unwrap_or(0);
        self.state.0.saturating_add(self.kv_per_token.0.saturating_mul(window as u64))
    }
}

impl From<&ModelProfile> for ModelCost {
    fn from(profile: &ModelProfile) -> Self {
        let layers = (0..profile.layer_count())
            .map(|layer| LayerCost {
                weights: profile.layer_bytes[layer],
                kv_per_token: profile.kv_bytes_per_token(layer),
                state: profile.state_bytes(layer),
                kv_window: profile.kv_windows.get(layer).copied().flatten(),
            })
            .collect();
        // How the weights are stored shows in the embedding, whose shape is known: 16 bits, or 4.5 when quantized to 4.
        let embedding_weights = profile.vocabulary.saturating_mul(profile.hidden);
        let bits = profile.embedding_bytes.0 as f64 * 8.0 / embedding_weights.max(1) as f64;
        Self {
            architecture: profile.architecture.clone(),
            layers,
            joined: profile.joined.clone(),
            passes: profile.passes,
            embedding: profile.embedding_bytes + profile.entrance_bytes,
            head: profile.head_bytes,
            shared: if profile.tied_embeddings { profile.embedding_bytes } else { ByteCount(0) },
            context_tokens: profile.context.unwrap_or(UNSTATED_CONTEXT),
            weight_bits: (bits > 0.0).then_some(bits),
            draft: None,
        }
    }
}

impl ModelCost {
    /// What a sequence takes in a stage of these layers whatever its length, as tokens of a whole context: never too few, so that sequences whose
    /// tokens in sum fit have the memory that was reserved for as many whole contexts.
    pub(crate) fn fixed_tokens(&self, layers: LayerRange, context_tokens: usize) -> usize {
        let own = || self.layers.iter().skip(layers.start).take(layers.len());
        let whole: u64 = own().map(|layer| layer.kv(context_tokens, 1).0).sum();
        let fixed: u64 = own().map(|layer| layer.fixed(context_tokens)).sum();
        let tokens = (fixed as u128 * context_tokens as u128).div_ceil(u128::from(whole.max(1)));
        usize::try_from(tokens).unwrap_or(usize::MAX).min(context_tokens)
    }

    /// How many stages the model can be cut into at most.
    pub(crate) fn pieces(&self) -> usize {
        self.layers.len() - self.joined.len()
    }

    /// The same model with its weights stored in `bits` bits instead.
    pub(crate) fn requantized(&self, bits: f64) -> Option<Self> {
        let now = self.weight_bits?;
        let scale = |bytes: ByteCount| ByteCount((bytes.0 as f64 * bits / now).ceil() as u64);
        Some(Self {
            layers: self
                .layers
                .iter()
                .map(|layer| LayerCost { weights: scale(layer.weights), ..*layer })
                .collect(),
            embedding: scale(self.embedding),
            head: scale(self.head),
            shared: scale(self.shared),
            weight_bits: Some(bits),
            ..self.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_grow_counts_from_the_beginning() {
        let layer = |kv: u64, state: u64, kv_window| LayerCost {
            weights: ByteCount(1),
            kv_per_token: ByteCount(kv),
            state: ByteCount(state),
            kv_window,
        };
        let fixed = |layers: Vec<LayerCost>| {
            let range = LayerRange::new(0, layers.len());
            let model = ModelCost {
                architecture: String::new(),
                layers,
                joined: vec![],
                passes: 1,
                embedding: ByteCount(0),
                head: ByteCount(0),
                shared: ByteCount(0),
                context_tokens: 1000,
                weight_bits: None,
                draft: None,
            };
            model.fixed_tokens(range, 1000)
        };
        assert_eq!(fixed(vec![layer(10, 0, None); 4]), 0);
        assert_eq!(fixed(vec![layer(10, 0, Some(2000))]), 0, "a window that is never full");
        assert_eq!(
            fixed(vec![layer(0, 10, None)]),
            1000,
            "states alone: each sequence takes all of its share"
        );
        // 1000 tokens of one layer and 100 of another; 50 tokens' worth of states.
        assert_eq!(fixed(vec![layer(10, 500, None), layer(10, 0, Some(100))]), 131);
    }
}
