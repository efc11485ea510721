//! What looks across tokens, a file for each kind.

mod attention;
mod by_row;
mod convolution;
mod delta_chunks;
mod delta_rule;
mod gated_delta;
mod indexer;
mod latent;
mod mamba2;
mod short_convolution;
mod shortcut;
mod softmax;
mod state_space;

pub(crate) use attention::{Attention, Gate as AttentionGate, QkNorms, Source as KeySource};
pub(crate) use convolution::CausalConvolution;
pub(crate) use delta_rule::DeltaRule;
pub(crate) use gated_delta::{Decay, GatedDeltaNet};
pub(crate) use indexer::Indexer;
pub(crate) use latent::{Absorbed, Expansion, LatentAttention, LatentNorm};
pub(crate) use mamba2::Mamba2;
pub(crate) use short_convolution::ShortConvolution;
pub(crate) use shortcut::{Half, Shortcut};
pub(crate) use softmax::SoftmaxAttention;
pub(crate) use state_space::StateSpace;

use crate::batch::Batch;
use crate::linear::Linear;
use mlxnode_mlx::{Array, Device, Result};

/// The mixer of one layer.
pub(crate) enum Mixer {
    Attention(Box<Attention>),
    Latent(Box<LatentAttention>),
    GatedDelta(Box<GatedDeltaNet>),
    Mamba2(Box<Mamba2>),
    ShortConvolution(ShortConvolution),
    /// Both with the same input.
    Mamba2AndAttention(Box<(Mamba2, Attention)>),
    /// Looks at each token by itself.
    Linear(Linear),
    Absent,
    Shortcut(Box<Shortcut>),
}

/// What a mixer keeps of the tokens before, as far as files and limits must know.
#[derive(Clone, Copy, Default)]
pub(crate) struct Keeps {
    /// Keys and values, or what stands for them.
    pub(crate) kv: bool,
    /// Heads of the keys, and numbers per head.
    pub(crate) heads: Option<(i32, i32)>,
    /// How far back a token sees.
    pub(crate) window: Option<i32>,
    /// Tokens from one boundary to the next that no token sees beyond.
    pub(crate) chunk: Option<i32>,
    /// Keys of an indexer.
    pub(crate) indexer: bool,
    /// States of a fixed size.
    pub(crate) states: bool,
}

impl Mixer {
    /// What it keeps.
    pub(crate) fn keeps(&self) -> Keeps {
        match self {
            Self::Attention(attention) => attention.keeps(),
            Self::GatedDelta(_) | Self::Mamba2(_) | Self::ShortConvolution(_) => {
                Keeps { states: true, ..Keeps::default() }
            }
            Self::Mamba2AndAttention(both) => Keeps { states: true, ..both.1.keeps() },
            Self::Linear(_) | Self::Absent => Keeps::default(),
            Self::Latent(latent) => Keeps { kv: true, indexer: latent.indexer.is_some(), ..Keeps::default() },
            // The second attention keeps its own where an indexer would.
            Self::Shortcut(_) => Keeps { kv: true, indexer: true, ..Keeps::default() },
        }
    }

    /// Does it work on sequences side by side?
    pub(crate) fn joins(&self) -> bool {
        match self {
            Self::Attention(attention) => attention.joins(),
            Self::Latent(latent) => latent.joins(),
            Self::Shortcut(shortcut) => shortcut.halves.iter().all(|half| half.attention.joins()),
            Self::Mamba2AndAttention(both) => both.1.joins(),
            Self::GatedDelta(_) | Self::Mamba2(_) | Self::ShortConvolution(_) => true,
            Self::Linear(_) | Self::Absent => true,
        }
    }

    /// `[1, tokens of all rows, hidden]` to the same; this is layer `layer` of the range. One result for each branch, in the order in
    /// which they are added to the hidden vectors: none when the mixer is absent.
    #[inline]
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Mixed> {
        Ok(match self {
            Self::Attention(attention) => Mixed::one(attention.forward(device, x, layer, batch)?),
            Self::Latent(latent) => Mixed::one(latent.forward(device, x, layer, batch)?),
            Self::Shortcut(shortcut) => Mixed::one(shortcut.forward(device, x, layer, batch)?),
            Self::GatedDelta(delta) => Mixed::one(delta.forward(device, x, layer, batch)?),
            Self::Mamba2(mamba) => Mixed::one(mamba.forward(device, x, layer, batch)?),
            Self::ShortConvolution(convolution) => Mixed::one(convolution.forward(device, x, layer, batch)?),
            Self::Mamba2AndAttention(both) => Mixed {
                first: both.0.forward(device, x, layer, batch)?,
                second: Some(both.1.forward(device, x, layer, batch)?),
            },
            Self::Linear(linear) => Mixed::one(linear.forward(device, x)?),
            Self::Absent => return Err(mlxnode_mlx::Error::Mlx("this layer has no mixer".to_owned())),
        })
    }
}

/// What a mixer gives.
pub(crate) struct Mixed {
    /// To be added first.
    pub(crate) first: Array,
    /// Of a second mixer, to be added to the sum.
    pub(crate) second: Option<Array>,
}

impl Mixed {
    fn one(first: Array) -> Self {
        Self { first, second: None }
    }
}
