//! What chooses the blocks of keys that an attention with grouped heads sees (MiniMax M3's sparse attention).

use super::RopeSpec;
use crate::layout::{ModuleKind, Push};

/// Small heads of its own, each for a group of the attention's query heads, score all keys; a block of keys is as good as its best
/// one. Each query sees the best blocks and the last ones. While there are no more blocks than it may see, nothing is scored.
///
/// Its projections `index_q_proj` and `index_k_proj`, of one key for all heads, and the norms on both are modules of the attention.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockIndexerSpec {
    /// Its heads; divides those of the attention.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys in a block.
    pub block: usize,
    /// How many blocks a query sees, the last ones included.
    pub blocks: usize,
    /// How many blocks up to its own a query sees whatever their scores.
    pub local: usize,
    /// How positions enter.
    pub rope: RopeSpec,
}

impl BlockIndexerSpec {
    /// Its modules in the attention `block` of a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, block: &str, hidden: usize, push: &mut Push<'_>) {
        let linear = |outputs| ModuleKind::Linear { inputs: hidden, outputs, bias: false };
        push(&format!("{block}.index_q_proj"), linear(self.heads * self.head_dim));
        push(&format!("{block}.index_k_proj"), linear(self.head_dim));
        for norm in ["index_q_norm", "index_k_norm"] {
            push(&format!("{block}.{norm}"), ModuleKind::Norm { width: self.head_dim, bias: false });
        }
    }
}
