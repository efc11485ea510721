//! Multi-head latent attention: keys and values of all heads from one narrow vector a token (DeepSeek-V2, arXiv 2405.04434).

use super::RopeSpec;
use crate::layout::{ModuleKind, Push};

/// Latent attention. A token becomes a latent vector, from which each head's key and value are projected, and one rotated key that
/// all heads share. A head's query has a part for each of the two.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentSpec {
    /// Heads.
    pub heads: usize,
    /// Width of the part of queries and keys that does not rotate.
    pub still_dims: usize,
    /// Width of the part that rotates; even.
    pub rotated_dims: usize,
    /// Width of a head's value.
    pub value_dims: usize,
    /// Width of the latent vector.
    pub latent: usize,
    /// Width of the vector between the two projections to queries; None: one projection, `q_proj`.
    pub query_latent: Option<usize>,
    /// The projections from the hidden vectors to narrow ones, and the output's, have biases; `q_proj` never has.
    pub bias: bool,
    /// Epsilon of the norms on the two narrow vectors.
    pub norm_eps: f32,
    /// Factor on the queries, in the model's element type.
    pub query_factor: Option<f32>,
    /// Factor on the latent vectors, in the model's element type.
    pub latent_factor: Option<f32>,
    /// How positions enter.
    pub rope: RopeSpec,
    /// They do not: the parts that should rotate stay as they are.
    pub unrotated: bool,
    /// A projection `g_proj` of the layer's input, through a logistic function, multiplies the result before the output projection.
    pub gate: bool,
    /// Queries grow with their position.
    pub growth: Option<QueryGrowth>,
    /// A linear map `g_proj` of the layer's input to a number for each head, whose logistic function, made in single precision, is a
    /// factor on the head's result.
    pub head_gate: bool,
    /// Factor on the scores before the softmax.
    pub scale: f32,
    /// Where keys and values are made from latent vectors.
    pub form: LatentForm,
    /// What chooses the keys that a query sees; None: it sees all before it.
    pub indexer: Option<IndexerSpec>,
}

/// Where keys and values are made from latent vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatentForm {
    /// Before the cache, which holds keys and values of all heads (`kv_b_proj`).
    Expanded,
    /// After the cache, which holds latent vectors and shared keys, by a matrix for each head (`embed_q`, `unembed_out`). A single
    /// token's queries and results are projected instead, so that the cached latent vectors serve as keys and values.
    /// In a prompt the scores of the rotated parts are a mask added to those of the others.
    Absorbed,
    /// The same, but a prompt's keys are joined from both parts.
    AbsorbedJoined,
}

/// Queries at position p are multiplied by `1 + beta * ln(1 + floor(p / original))` (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    /// How fast.
    pub beta: f64,
    /// Positions up to which they do not grow.
    pub original_max_positions: f64,
}

/// A sparse attention's indexer (DeepSeek-V3.2): small heads of its own score all keys, and each query sees the best only.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexerSpec {
    /// Its heads.
    pub heads: usize,
    /// Width of a head. The first `rotated_dims` of the attention rotate.
    pub head_dim: usize,
    /// How many keys a query sees.
    pub keys: usize,
    /// How positions enter.
    pub rope: RopeSpec,
}

/// Epsilon of the layer norm on an indexer's keys: MLX's default.
pub const INDEXER_NORM_EPS: f32 = 1e-5;

impl LatentSpec {
    /// Width of a head's query.
    pub fn query_dims(&self) -> usize {
        self.still_dims + self.rotated_dims
    }

    /// Elements that the cache keeps of a token.
    pub fn cached_elements(&self) -> usize {
        let own = match self.form {
            LatentForm::Expanded => self.heads * (self.query_dims() + self.value_dims),
            LatentForm::Absorbed | LatentForm::AbsorbedJoined => self.latent + self.rotated_dims,
        };
        // An indexer's keys have one column of no use beside them.
        own + self.indexer.as_ref().map_or(0, |indexer| indexer.head_dim + 1)
    }

    /// Widths of the two vectors that its cache keeps for each head that it keeps, and token.
    pub fn kept_widths(&self) -> [usize; 2] {
        match self.form {
            LatentForm::Expanded => [self.query_dims(), self.value_dims],
            LatentForm::Absorbed | LatentForm::AbsorbedJoined => [self.latent, self.rotated_dims],
        }
    }

    /// Its modules in the part `prefix` ("self_attn") of a layer of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, prefix: &str, hidden: usize, push: &mut Push<'_>) {
        let Self { heads, still_dims, rotated_dims, value_dims, latent, bias, .. } = *self;
        let mut push = |name: &str, kind| push(&format!("{prefix}.{name}"), kind);
        let linear = |inputs, outputs, bias| ModuleKind::Linear { inputs, outputs, bias };
        let norm = |width| ModuleKind::Norm { width, bias: false };
        let of_heads = |inputs, outputs| ModuleKind::Experts { experts: heads, inputs, outputs, bias: false };
        let queries = heads * self.query_dims();
        match self.query_latent {
            None => push("q_proj", linear(hidden, queries, false)),
            Some(narrow) => {
                push("q_a_proj", linear(hidden, narrow, bias));
                push("q_a_layernorm", norm(narrow));
                push("q_b_proj", linear(narrow, queries, false));
            }
        }
        push("kv_a_proj_with_mqa", linear(hidden, latent + rotated_dims, bias));
        push("kv_a_layernorm", norm(latent));
        match self.form {
            LatentForm::Expanded => {
                push("kv_b_proj", linear(latent, heads * (still_dims + value_dims), false));
            }
            LatentForm::Absorbed | LatentForm::AbsorbedJoined => {
                push("embed_q", of_heads(still_dims, latent));
                push("unembed_out", of_heads(latent, value_dims));
            }
        }
        push("o_proj", linear(heads * value_dims, hidden, bias));
        if self.gate {
            push("g_proj", linear(hidden, heads * value_dims, false));
        } else if self.head_gate {
            push("g_proj", linear(hidden, heads, false));
        }
        let (Some(indexer), Some(narrow)) = (&self.indexer, self.query_latent) else { return };
        push("indexer.wq_b", linear(narrow, indexer.heads * indexer.head_dim, false));
        push("indexer.wk", linear(hidden, indexer.head_dim, false));
        push("indexer.k_norm", ModuleKind::Norm { width: indexer.head_dim, bias: true });
        push("indexer.weights_proj", linear(hidden, indexer.heads, false));
    }
}
