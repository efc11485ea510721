//! What can be done with the models of a family, as data: what `mlxnode models --architectures` shows, and what other parts ask.

/// What can be done with the models of a family today. A test holds it against the specs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Its layers can lie on several nodes.
    pub pipeline: bool,
    /// One layer can be spread over several nodes.
    pub tensor: bool,
    /// It can be fine-tuned with adapters.
    pub lora: bool,
    /// Its keys and values can be packed (`--kv-bits`). Not in a family that keeps none.
    pub quantized_kv: bool,
    /// Tokens can be guessed ahead for it, by a draft model or from its prompt.
    pub speculative: bool,
    /// It was made for images too, but here it answers text only: the weights for images are not read.
    pub vision_unused: bool,
}

impl Capabilities {
    /// A decoder of attention layers for text. Tensor parallelism does not exist yet, for any family.
    pub(super) const DECODER: Self = Self {
        pipeline: true,
        tensor: false,
        lora: true,
        quantized_kv: true,
        speculative: true,
        vision_unused: false,
    };
}
