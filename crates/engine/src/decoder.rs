//! A layer range of a decoder: optional embedding, layers, optional norm and head.

use crate::attention::Attention;
use crate::feed_forward::FeedForward;
use crate::kv_cache::KvCache;
use crate::linear::{Embedding, Linear};
use mlxnode_mlx::{Array, Device, Result};

/// The modules of a layer range.
pub(crate) struct Decoder {
    /// On the first stage.
    pub(crate) embedding: Option<Embedding>,
    pub(crate) layers: Vec<Layer>,
    /// On the last stage.
    pub(crate) head: Option<Head>,
}

/// One layer with the norms before its parts.
pub(crate) struct Layer {
    pub(crate) input_norm: Norm,
    pub(crate) attention: Attention,
    pub(crate) post_norm: Norm,
    pub(crate) feed_forward: FeedForward,
}

/// RMS norm.
pub(crate) struct Norm {
    pub(crate) weight: Array,
    pub(crate) eps: f32,
}

/// From hidden vectors to logits.
pub(crate) struct Head {
    pub(crate) norm: Norm,
    pub(crate) linear: Linear,
}

/// The caches of one sequence, one for each layer of the decoder.
pub(crate) struct SequenceCache {
    layers: Vec<KvCache>,
}

impl SequenceCache {
    pub(crate) fn state(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(KvCache::state)
    }

    /// Forgets all tokens from position `tokens` on.
    pub(crate) fn truncate(&mut self, tokens: i32) {
        self.layers.iter_mut().for_each(|cache| cache.truncate(tokens));
    }
}

impl Norm {
    fn forward(&self, device: &Device, x: &Array) -> Result<Array> {
        device.rms_norm(x, &self.weight, self.eps)
    }
}

impl Decoder {
    /// Empty caches.
    pub(crate) fn new_cache(&self) -> SequenceCache {
        SequenceCache { layers: self.layers.iter().map(|_| KvCache::default()).collect() }
    }

    /// `[1, tokens]` ids to hidden vectors `[1, tokens, hidden]`. The ids are below the vocabulary size.
    pub(crate) fn embed(&self, device: &Device, ids: &Array) -> Result<Array> {
        match &self.embedding {
            Some(embedding) => embedding.lookup(device, ids),
            None => Err(mlxnode_mlx::Error::Mlx("this layer range has no embedding".to_owned())),
        }
    }

    /// Hidden vectors `[1, tokens, hidden]` through all layers.
    pub(crate) fn forward(&self, device: &Device, hidden: Array, cache: &mut SequenceCache) -> Result<Array> {
        let mut hidden = hidden;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            let mixed =
                layer.attention.forward(device, &layer.input_norm.forward(device, &hidden)?, cache)?;
            hidden = device.add(&hidden, &mixed)?;
            let fed = layer.feed_forward.forward(device, &layer.post_norm.forward(device, &hidden)?)?;
            hidden = device.add(&hidden, &fed)?;
        }
        Ok(hidden)
    }

    /// Logits `[tokens, vocabulary]` of hidden vectors `[1, tokens, hidden]`.
    pub(crate) fn logits(&self, device: &Device, hidden: &Array) -> Result<Array> {
        let Some(head) = &self.head else {
            return Err(mlxnode_mlx::Error::Mlx("this layer range has no head".to_owned()));
        };
        let logits = head.linear.forward(device, &head.norm.forward(device, hidden)?)?;
        device.reshape(&logits, &[hidden.dim(1), -1])
    }
}

/// The last of `[1, tokens, hidden]`, as `[1, 1, hidden]`.
pub(crate) fn last_token(device: &Device, hidden: &Array) -> Result<Array> {
    let (tokens, width) = (hidden.dim(1), hidden.dim(2));
    if tokens == 1 {
        return Ok(hidden.clone());
    }
    device.slice(hidden, &[0, tokens - 1, 0], &[1, tokens, width])
}
