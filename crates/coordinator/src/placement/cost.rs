//! What a model costs to hold and to run, layer by layer.

use mlxnode_compute::ByteCount;

/// A model as placement sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCost {
    /// The model's family ("llama", "qwen3" …).
    pub architecture: String,
    /// In order.
    pub layers: Vec<LayerCost>,
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
}

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerCost {
    /// Bytes of its weights.
    pub weights: ByteCount,
    /// Bytes of KV cache for each token of each sequence.
    pub kv_per_token: ByteCount,
}

impl ModelCost {
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
