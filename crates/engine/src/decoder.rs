//! A layer range of a decoder: optional embedding, layers, optional norm and head.

use crate::alternating_updates::AlternatingUpdates;
use crate::batch::Batch;
use crate::caches::SequenceCache;
use crate::feed_forward::FeedForward;
use crate::linear::{Embedding, Linear};
use crate::mixers::{Mixed, Mixer};
use crate::ngrams::Ngrams;
use crate::norm::{Norm, apply};
use crate::residual_blocks::{Mixture, ResidualBlocks};
use crate::widening::{Blocks, Entrance, Exit, GatedInput, Widened};
use mlxnode_checkpoint::{Logits, ParallelSum, Residual};
use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// The modules of a layer range.
pub(crate) struct Decoder {
    /// On the first stage.
    pub(crate) embedding: Option<Embedding>,
    /// Tables of groups of tokens, on the first stage.
    pub(crate) ngrams: Option<Ngrams>,
    /// Factor on its vectors.
    pub(crate) embedding_scale: Option<f32>,
    /// Epsilon of the norm on them.
    pub(crate) embedding_norm: Option<f32>,
    /// The table of positions, on the first stage.
    pub(crate) positions: Option<Positions>,
    /// On the first stage of a family in which more than one hidden vector travels.
    pub(crate) entrance: Option<Entrance>,
    pub(crate) widened: Widened,
    pub(crate) layers: Vec<Layer>,
    /// On the last stage.
    pub(crate) head: Option<Head>,
}

/// Vectors that are added to the embedding's.
pub(crate) struct Positions {
    /// One for each position.
    pub(crate) table: Embedding,
    /// How many there are.
    pub(crate) rows: i32,
}

/// One layer. A norm that the family does not have is None.
pub(crate) struct Layer {
    pub(crate) before_mixer: Option<Norm>,
    pub(crate) mixer: Mixer,
    pub(crate) after_mixer: Option<Norm>,
    pub(crate) before_feed_forward: Option<Norm>,
    pub(crate) feed_forward: FeedForward,
    pub(crate) after_feed_forward: Option<Norm>,
    pub(crate) flow: Flow,
}

/// How a layer's branches meet the hidden vectors.
pub(crate) enum Flow {
    Sequential(Residual),
    Parallel(ParallelSum),
    /// Sequential, then the layer's own input, then a factor.
    WithInput {
        input: Option<Box<GatedInput>>,
        /// `[1]`.
        factor: Array,
    },
    AlternatingUpdates(Box<AlternatingUpdates>),
    /// Sequential, then a norm.
    ThenNorm(Norm),
    /// Sequential, with factors `[1]` on both results and on the embedding, which is added last.
    WithEmbedding(Box<[Array; 3]>),
    /// Both branches see mixtures over blocks of layers.
    OverBlocks(Box<OverBlocks>),
    /// The mixer is the whole layer.
    Whole,
}

/// What a layer needs that sees mixtures over blocks of layers.
pub(crate) struct OverBlocks {
    /// It begins a block.
    pub(crate) first: bool,
    /// What the mixer sees.
    pub(crate) mixer: Mixture,
    /// What the feed-forward network sees.
    pub(crate) feed_forward: Mixture,
}

/// What arrived at a stage, for layers that take an input of their own out of it.
#[derive(Clone, Copy)]
struct Arrived<'a> {
    vectors: &'a Array,
    widened: Widened,
    /// The one input of all layers, where there is one.
    shared: Option<&'a Array>,
}

impl Arrived<'_> {
    /// The own input of the stage's layer `index`.
    fn input(&self, device: &Device, index: usize) -> Result<Array> {
        match self.shared {
            Some(input) => Ok(input.clone()),
            None => self.widened.input(device, self.vectors, index),
        }
    }
}

/// From hidden vectors to logits.
pub(crate) struct Head {
    /// When there are several for each token.
    pub(crate) exit: Option<Exit>,
    pub(crate) norm: Norm,
    pub(crate) linear: Linear,
    /// What its results go through.
    pub(crate) logits: Logits,
    /// The factor of [`Logits::Gained`], `[1]`.
    pub(crate) gain: Option<Array>,
    /// Over all blocks of layers.
    pub(crate) mixture: Option<Mixture>,
}

impl Head {
    #[inline]
    fn normed(&self, device: &Device, hidden: &Array) -> Result<Array> {
        match &self.exit {
            Some(exit) => self.norm.forward(device, &exit.merge(device, hidden)?),
            None => self.norm.forward(device, hidden),
        }
    }
}

impl Layer {
    /// The same for a layer that takes nothing but hidden vectors from others, see [`Decoder::is_chain`]; this is layer `index` of the
    /// range.
    pub(crate) fn alone(
        &self,
        device: &Device,
        hidden: Array,
        index: usize,
        widened: Widened,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let vectors = hidden.clone();
        let arrived = Arrived { vectors: &vectors, widened, shared: None };
        self.forward(device, hidden, index, arrived, batch)
    }

    /// `[1, tokens, hidden]` to the same, or several of them; this is layer `index` of the range.
    fn forward(
        &self,
        device: &Device,
        hidden: Array,
        index: usize,
        arrived: Arrived<'_>,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        if let Flow::AlternatingUpdates(updates) = &self.flow {
            return self.update(device, updates, &hidden, index, arrived, batch);
        }
        if let Flow::OverBlocks(flow) = &self.flow {
            return self.over_blocks(device, flow, hidden, index, batch);
        }
        if matches!(self.mixer, Mixer::Absent) {
            return self.finish(device, hidden, index, arrived);
        }
        let input = apply(device, self.before_mixer.as_ref(), hidden.clone())?;
        let Mixed { first, second } = self.mixer.forward(device, &input, index, batch)?;
        let mixed = apply(device, self.after_mixer.as_ref(), first)?;
        let residual = match self.flow {
            Flow::Sequential(residual) => residual,
            Flow::Whole => return Ok(mixed),
            Flow::WithInput { .. }
            | Flow::AlternatingUpdates(_)
            | Flow::OverBlocks(_)
            | Flow::ThenNorm(_) => Residual::Add,
            Flow::WithEmbedding(ref gains) => {
                return self.finish_with_embedding(device, gains, &hidden, &mixed, index, arrived);
            }
            Flow::Parallel(order) => {
                let input = match &self.before_feed_forward {
                    Some(norm) => norm.forward(device, &hidden)?,
                    None => input,
                };
                let fed = self.feed_forward.forward(device, &input)?;
                let fed = apply(device, self.after_feed_forward.as_ref(), fed)?;
                return match order {
                    ParallelSum::BranchesFirst => device.add(&device.add(&mixed, &fed)?, &hidden),
                    ParallelSum::HiddenFirst => device.add(&device.add(&hidden, &mixed)?, &fed),
                };
            }
        };
        let hidden = add(device, residual, &hidden, &mixed)?;
        let hidden = match second {
            Some(second) => add(device, residual, &hidden, &second)?,
            None => hidden,
        };
        self.finish(device, hidden, index, arrived)
    }

    /// What comes after the mixer in a layer whose branches follow each other.
    #[inline]
    fn finish(&self, device: &Device, hidden: Array, index: usize, arrived: Arrived<'_>) -> Result<Array> {
        let residual = match self.flow {
            Flow::Sequential(residual) => residual,
            _ => Residual::Add,
        };
        let hidden = match self.feed_forward {
            FeedForward::Absent => hidden,
            _ => add(device, residual, &hidden, &self.feed(device, &hidden)?)?,
        };
        if let Flow::ThenNorm(norm) = &self.flow {
            return norm.forward(device, &hidden);
        }
        let Flow::WithInput { input, factor } = &self.flow else { return Ok(hidden) };
        let hidden = match input {
            Some(input) => {
                let own = arrived.input(device, index)?;
                device.add(&hidden, &input.forward(device, &hidden, &own)?)?
            }
            None => hidden,
        };
        device.multiply(&hidden, factor)
    }

    /// What comes after the mixer in a layer to which the embedding is added.
    fn finish_with_embedding(
        &self,
        device: &Device,
        [mixer, feed_forward, embedding]: &[Array; 3],
        hidden: &Array,
        mixed: &Array,
        index: usize,
        arrived: Arrived<'_>,
    ) -> Result<Array> {
        let hidden = device.add(hidden, &device.multiply(mixed, mixer)?)?;
        let fed = self.feed(device, &hidden)?;
        let hidden = device.add(&hidden, &device.multiply(&fed, feed_forward)?)?;
        device.add(&hidden, &device.multiply(&arrived.input(device, index)?, embedding)?)
    }

    /// What the feed-forward network makes of `[1, tokens, hidden]`, with its norms.
    #[inline]
    fn feed(&self, device: &Device, hidden: &Array) -> Result<Array> {
        let input = apply(device, self.before_feed_forward.as_ref(), hidden.clone())?;
        let fed = self.feed_forward.forward(device, &input)?;
        apply(device, self.after_feed_forward.as_ref(), fed)
    }

    /// `[1, tokens, hidden]`, what the block has added so far, to the same after this layer.
    fn over_blocks(
        &self,
        device: &Device,
        flow: &OverBlocks,
        added: Array,
        index: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let seen = flow.mixer.of(device, &batch.blocks, &added)?;
        if flow.first {
            batch.blocks.append(device, &added, flow.mixer.eps)?;
        }
        let input = apply(device, self.before_mixer.as_ref(), seen)?;
        let mixed = self.mixer.forward(device, &input, index, batch)?.first;
        let mixed = apply(device, self.after_mixer.as_ref(), mixed)?;
        let added = if flow.first { mixed } else { device.add(&added, &mixed)? };
        let seen = flow.feed_forward.of(device, &batch.blocks, &added)?;
        device.add(&added, &self.feed(device, &seen)?)
    }

    /// `[streams, 1, tokens, hidden]` to the same.
    fn update(
        &self,
        device: &Device,
        updates: &AlternatingUpdates,
        streams: &Array,
        index: usize,
        arrived: Arrived<'_>,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let predictions = updates.predict(device, streams)?;
        let active = updates.active(device, &predictions)?;
        let input = apply(device, self.before_mixer.as_ref(), active.clone())?;
        let beside = updates.branch(device, &input)?;
        let mixed = self.mixer.forward(device, &input, index, batch)?.first;
        let mixed = apply(device, self.after_mixer.as_ref(), mixed)?;
        let both = device.add(&device.add(&active, &mixed)?, &beside)?;
        let half = Array::scalar(0.5_f64.sqrt() as f32, both.dtype())?;
        let hidden = device.multiply(&both, &half)?;
        let made = device.add(&hidden, &self.feed(device, &hidden)?)?;
        let own = arrived.input(device, index)?;
        updates.correct(device, &predictions, &made, &own)
    }
}

impl Positions {
    /// The vectors of a batch's tokens, `[1, tokens of all rows, hidden]`.
    fn of(&self, device: &Device, batch: &Batch<'_>) -> Result<Array> {
        let mut positions = Vec::new();
        let rows = batch.rows.iter().flat_map(|row| row.cache.lengths().map(|start| (start, row.tokens)));
        for (start, tokens) in rows {
            let end = start.saturating_add(tokens);
            if end > self.rows {
                // Looking up what is not there reads foreign memory.
                let rows = self.rows;
                return Err(mlxnode_mlx::Error::Mlx(format!(
                    "the model has {rows} positions, but {end} are needed"
                )));
            }
            positions.extend((start..end).map(i32::unsigned_abs));
        }
        let ids = Array::from_u32(&positions, &[1, positions.len() as i32])?;
        self.table.lookup(device, &ids)
    }
}

/// Adds a branch's result.
#[inline]
fn add(device: &Device, residual: Residual, hidden: &Array, branch: &Array) -> Result<Array> {
    match residual {
        Residual::Scaled(factor) => {
            device.add(hidden, &device.multiply(branch, &Array::scalar(factor, branch.dtype())?)?)
        }
        Residual::Clipped if hidden.dtype() == Dtype::F16 => {
            let bound = |value: f32| Array::scalar(value, Dtype::F32);
            let sum = device.add(&device.cast(hidden, Dtype::F32)?, &device.cast(branch, Dtype::F32)?)?;
            let sum = device.minimum(&device.maximum(&sum, &bound(-LARGEST_F16)?)?, &bound(LARGEST_F16)?)?;
            device.cast(&sum, Dtype::F16)
        }
        Residual::Add | Residual::Clipped => device.add(hidden, branch),
    }
}

/// The largest finite number in half precision.
const LARGEST_F16: f32 = 65_504.0;

impl Decoder {
    /// Empty caches. The options have been checked.
    pub(crate) fn new_cache(&self, options: &CacheOptions) -> SequenceCache {
        SequenceCache::new(self.layers.len(), options)
    }

    /// Can several sequences go through side by side?
    pub(crate) fn joins(&self) -> bool {
        self.layers.iter().all(|layer| layer.mixer.joins())
    }

    /// Do layers hand nothing but hidden vectors on to each other?
    pub(crate) fn is_chain(&self) -> bool {
        self.widened.is_plain() && self.layers.iter().all(|layer| layer.mixer.is_alone())
    }

    /// `[1, tokens]` ids to what travels, `[1, tokens, width]`: the hidden vectors, and what a family has besides. The ids are below
    /// the vocabulary size, and those of `batch`, which goes through [`Self::forward`] next.
    pub(crate) fn embed(&self, device: &Device, ids: &Array, batch: &mut Batch<'_>) -> Result<Array> {
        let Some(embedding) = &self.embedding else {
            return Err(mlxnode_mlx::Error::Mlx("this layer range has no embedding".to_owned()));
        };
        let vectors = embedding.lookup(device, ids)?;
        let vectors = match &self.ngrams {
            Some(ngrams) => ngrams.join(device, ids, vectors, batch)?,
            None => vectors,
        };
        let vectors = match self.embedding_norm {
            Some(eps) => device.rms_normalize(&vectors, eps)?,
            None => vectors,
        };
        let vectors = match self.embedding_scale {
            Some(scale) => device.multiply(&vectors, &Array::scalar(scale, vectors.dtype())?)?,
            None => vectors,
        };
        match &self.entrance {
            Some(entrance) => entrance.widen(device, ids, vectors),
            None => Ok(vectors),
        }
    }

    /// What travels, `[1, tokens, width]`, through all layers.
    pub(crate) fn forward(&self, device: &Device, vectors: Array, batch: &mut Batch<'_>) -> Result<Array> {
        let vectors = self.positioned(device, vectors, batch)?;
        let widened = self.widened;
        for row in &mut batch.rows {
            row.cache.prepare(device)?;
        }
        let mut hidden = match widened.is_plain() {
            true => vectors.clone(),
            false => widened.hidden(device, &vectors)?,
        };
        if let Some(blocks) = widened.blocks {
            batch.blocks = self.arrived_blocks(device, &vectors, blocks)?;
        }
        if let Some(handed) = widened.handed(device, &vectors)? {
            batch.projected = vec![handed];
        }
        let shared = if widened.embedding { Some(widened.embedding(device, &vectors)?) } else { None };
        let arrived = Arrived { vectors: &vectors, widened, shared: shared.as_ref() };
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(device, hidden, index, arrived, batch)?;
        }
        match (widened.blocks, &self.head) {
            (Some(_), Some(Head { mixture: Some(mixture), .. })) => {
                hidden = mixture.of(device, &batch.blocks, &hidden)?;
            }
            (Some(blocks), _) => hidden = widened.with_blocks(device, hidden, &batch.blocks, blocks)?,
            (None, _) if widened.is_plain() => {}
            (None, head) => {
                let handed = batch.projected.first();
                hidden = widened.leave(device, hidden, &vectors, handed, head.is_some())?;
            }
        }
        for row in &mut batch.rows {
            row.cache.advance(row.tokens);
        }
        Ok(hidden)
    }

    /// With the vectors of the tokens' positions, in a family that has them, on the first stage.
    pub(crate) fn positioned(&self, device: &Device, vectors: Array, batch: &Batch<'_>) -> Result<Array> {
        match &self.positions {
            Some(positions) => device.add(&vectors, &positions.of(device, batch)?),
            None => Ok(vectors),
        }
    }

    /// What blocks of layers on stages before added.
    fn arrived_blocks(&self, device: &Device, vectors: &Array, blocks: Blocks) -> Result<ResidualBlocks> {
        if blocks.before == 0 {
            return Ok(ResidualBlocks::default());
        }
        let hidden = self.widened.hidden;
        let stop = hidden * (1 + blocks.before);
        let all = device.slice(vectors, &[0, 0, hidden], &[1, vectors.dim(1), stop])?;
        ResidualBlocks::arrived(device, &all, blocks.before, blocks.eps)
    }

    /// Hidden vectors `[1, tokens, hidden]` after the last norm.
    pub(crate) fn normed(&self, device: &Device, hidden: &Array) -> Result<Array> {
        match &self.head {
            Some(head) => head.normed(device, hidden),
            None => Err(mlxnode_mlx::Error::Mlx("this layer range has no head".to_owned())),
        }
    }

    /// Logits `[tokens, vocabulary]` of hidden vectors `[1, tokens, hidden]`.
    pub(crate) fn logits(&self, device: &Device, hidden: &Array) -> Result<Array> {
        let Some(head) = &self.head else {
            return Err(mlxnode_mlx::Error::Mlx("this layer range has no head".to_owned()));
        };
        let normed = head.normed(device, hidden)?;
        let normed = match head.logits {
            Logits::OfDivided(divisor) => device.divide(&normed, &Array::scalar(divisor, normed.dtype())?)?,
            _ => normed,
        };
        let logits = head.linear.forward(device, &normed)?;
        let number = |value: f32| Array::scalar(value, logits.dtype());
        let logits = match head.logits {
            Logits::Plain | Logits::OfDivided(_) => logits,
            Logits::Multiplied(factor) => device.multiply(&logits, &number(factor)?)?,
            Logits::Divided(divisor) => device.divide(&logits, &number(divisor)?)?,
            Logits::MultipliedThenCapped { factor, cap } => {
                let multiplied = device.multiply(&logits, &number(factor)?)?;
                let capped = device.tanh(&device.divide(&multiplied, &number(cap)?)?)?;
                device.multiply(&capped, &number(cap)?)?
            }
            Logits::Gained => match &head.gain {
                Some(gain) => device.multiply(&logits, gain)?,
                None => logits,
            },
            Logits::Capped(cap) => {
                let capped = device.tanh(&device.divide(&logits, &number(cap)?)?)?;
                device.multiply(&capped, &number(cap)?)?
            }
        };
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
