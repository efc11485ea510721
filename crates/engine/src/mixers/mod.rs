//! What looks across tokens, a file for each kind.

mod attention;
mod block_indexer;
mod by_row;
mod convolution;
mod convolved_attention;
mod convolved_keys;
mod delta_chunks;
mod delta_rule;
mod fading;
mod gated_delta;
mod gated_recurrence;
mod indexer;
mod latent;
mod lightning;
mod mamba;
mod mamba2;
mod plamo_mamba;
mod rwkv7;
mod short_convolution;
mod shortcut;
mod softmax;
mod state_space;
mod wkv;

pub(crate) use attention::{Attention, Beside, Gate as AttentionGate, QkNorms, Source as KeySource};
pub(crate) use block_indexer::BlockIndexer;
pub(crate) use convolution::CausalConvolution;
pub(crate) use convolved_attention::{ConvolvedAttention, Taps};
pub(crate) use convolved_keys::ConvolvedKeys;
pub(crate) use delta_rule::DeltaRule;
pub(crate) use fading::Fading;
pub(crate) use gated_delta::{Decay, GatedDeltaNet};
pub(crate) use gated_recurrence::GatedRecurrence;
pub(crate) use indexer::Indexer;
pub(crate) use latent::{Absorbed, Expansion, LatentAttention, LatentNorm};
pub(crate) use lightning::Lightning;
pub(crate) use mamba::{Mamba, StateNorms};
pub(crate) use mamba2::Mamba2;
pub(crate) use plamo_mamba::PlamoMamba;
pub(crate) use rwkv7::{ChannelMix, LowRank, Rwkv7, TimeMix};
pub(crate) use short_convolution::ShortConvolution;
pub(crate) use shortcut::{Half, Shortcut};
pub(crate) use softmax::SoftmaxAttention;
pub(crate) use state_space::StateSpace;
pub(crate) use wkv::Wkv;

use crate::batch::Batch;
use crate::linear::Linear;
use mlxnode_mlx::{Array, Device, Result};

/// The mixer of one layer.
pub(crate) enum Mixer {
    Attention(Box<Attention>),
    ConvolvedAttention(Box<ConvolvedAttention>),
    Latent(Box<LatentAttention>),
    GatedDelta(Box<GatedDeltaNet>),
    GatedRecurrence(Box<GatedRecurrence>),
    Lightning(Box<Lightning>),
    Mamba(Box<Mamba>),
    Mamba2(Box<Mamba2>),
    PlamoMamba(Box<PlamoMamba>),
    ShortConvolution(ShortConvolution),
    ConvolvedKeys(Box<ConvolvedKeys>),
    /// Both with the same input.
    Mamba2AndAttention(Box<(Mamba2, Attention)>),
    /// Looks at each token by itself.
    Linear(Linear),
    Absent,
    Rwkv7(Box<Rwkv7>),
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
    /// Where a file has an indexer's values, these have no width; otherwise its keys stand there again. It has no values.
    pub(crate) narrow_index: bool,
    /// Files have the layer's cache in a list, although it may be alone there.
    pub(crate) listed: bool,
    /// Where an indexer would keep its keys are the keys and values of a second attention.
    pub(crate) second: bool,
    /// States of a fixed size.
    pub(crate) states: bool,
    /// The first of them are the last inputs of three convolutions side by side, with so many channels each. Files have one array for each.
    pub(crate) convolutions: Option<[i32; 3]>,
}

impl Mixer {
    /// What it keeps.
    pub(crate) fn keeps(&self) -> Keeps {
        match self {
            Self::Attention(attention) => attention.keeps(),
            Self::ConvolvedAttention(attention) => attention.keeps(),
            Self::GatedDelta(delta) => {
                Keeps { states: true, convolutions: delta.convolutions, ..Keeps::default() }
            }
            Self::GatedRecurrence(_)
            | Self::Lightning(_)
            | Self::Mamba(_)
            | Self::Mamba2(_)
            | Self::PlamoMamba(_)
            | Self::Rwkv7(_)
            | Self::ConvolvedKeys(_)
            | Self::ShortConvolution(_) => Keeps { states: true, ..Keeps::default() },
            Self::Mamba2AndAttention(both) => Keeps { states: true, ..both.1.keeps() },
            Self::Linear(_) | Self::Absent => Keeps::default(),
            Self::Latent(latent) => Keeps { kv: true, indexer: latent.indexer.is_some(), ..Keeps::default() },
            Self::Shortcut(_) => Keeps { kv: true, indexer: true, second: true, ..Keeps::default() },
        }
    }

    /// Does it work on sequences side by side?
    pub(crate) fn joins(&self) -> bool {
        match self {
            Self::Attention(attention) => attention.joins(),
            Self::Latent(latent) => latent.joins(),
            Self::Shortcut(shortcut) => shortcut.halves.iter().all(|half| half.attention.joins()),
            Self::Mamba2AndAttention(both) => both.1.joins(),
            Self::GatedDelta(_)
            | Self::GatedRecurrence(_)
            | Self::Mamba(_)
            | Self::Mamba2(_)
            | Self::PlamoMamba(_)
            | Self::Rwkv7(_)
            | Self::ConvolvedKeys(_)
            | Self::ShortConvolution(_) => true,
            // Its rotation is of one sequence at a time.
            Self::ConvolvedAttention(_) | Self::Lightning(_) => false,
            Self::Linear(_) | Self::Absent => true,
        }
    }

    /// Does it neither take anything from another layer nor hand anything on?
    pub(crate) fn is_alone(&self) -> bool {
        match self {
            Self::Attention(attention) => attention.is_alone(),
            Self::Mamba2AndAttention(both) => both.1.is_alone(),
            // The first layer's values go to all.
            Self::Rwkv7(_) => false,
            _ => true,
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
            Self::ConvolvedAttention(attention) => Mixed::one(attention.forward(device, x, layer, batch)?),
            Self::Latent(latent) => Mixed::one(latent.forward(device, x, layer, batch)?),
            Self::Rwkv7(rwkv) => Mixed::one(rwkv.forward(device, x, layer, batch)?),
            Self::Shortcut(shortcut) => Mixed::one(shortcut.forward(device, x, layer, batch)?),
            Self::GatedDelta(delta) => Mixed::one(delta.forward(device, x, layer, batch)?),
            Self::GatedRecurrence(recurrence) => Mixed::one(recurrence.forward(device, x, layer, batch)?),
            Self::Lightning(lightning) => Mixed::one(lightning.forward(device, x, layer, batch)?),
            Self::Mamba(mamba) => Mixed::one(mamba.forward(device, x, layer, batch)?),
            Self::Mamba2(mamba) => Mixed::one(mamba.forward(device, x, layer, batch)?),
            Self::PlamoMamba(mamba) => Mixed::one(mamba.forward(device, x, layer, batch)?),
            Self::ShortConvolution(convolution) => Mixed::one(convolution.forward(device, x, layer, batch)?),
            Self::ConvolvedKeys(mixer) => Mixed::one(mixer.forward(device, x, layer, batch)?),
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
