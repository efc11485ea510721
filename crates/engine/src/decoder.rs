//! A layer range of a decoder: optional embedding, layers, optional norm and head.

use crate::alternating_updates::AlternatingUpdates;
use crate::batch::Batch;
use crate::caches::SequenceCache;
use crate::feed_forward::FeedForward;
use crate::linear::{Embedding, Linear};
use crate::mixers::{Mixed, Mixer};
use crate::norm::{Norm, apply};
use crate::widening::{Entrance, Exit, GatedInput, Widened};
use mlxnode_checkpoint::{Logits, ParallelSum, Residual};
use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// The modules of a layer range.
pub(crate) struct Decoder {
    /// On the first stage.
    pub(crate) embedding: Option<Embedding>,
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
    /// The mixer is the whole layer.
    Whole,
}

/// What arrived at a stage, for layers that take an input of their own out of it.
#[derive(Clone, Copy)]
struct Arrived<'a> {
    vectors: &'a Array,
    widened: Widened,
}

/// From hidden vectors to logits.
pub(crate) struct Head {
    /// When there are several for each token.
    pub(crate) exit: Option<Exit>,
    pub(crate) norm: Norm,
    pub(crate) linear: Linear,
    /// What its results go through.
    pub(crate) logits: Logits,
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
        if matches!(self.mixer, Mixer::Absent) {
            return self.finish(device, hidden, index, arrived);
        }
        let input = apply(device, self.before_mixer.as_ref(), hidden.clone())?;
        let Mixed { first, second } = self.mixer.forward(device, &input, index, batch)?;
        let mixed = apply(device, self.after_mixer.as_ref(), first)?;
        let residual = match self.flow {
            Flow::Sequential(residual) => residual,
            Flow::Whole => return Ok(mixed),
            Flow::WithInput { .. } | Flow::AlternatingUpdates(_) => Residual::Add,
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
        let Flow::WithInput { input, factor } = &self.flow else { return Ok(hidden) };
        let hidden = match input {
            Some(input) => {
                let own = arrived.widened.input(device, arrived.vectors, index)?;
                device.add(&hidden, &input.forward(device, &hidden, &own)?)?
            }
            None => hidden,
        };
        device.multiply(&hidden, factor)
    }

    /// What the feed-forward network makes of `[1, tokens, hidden]`, with its norms.
    #[inline]
    fn feed(&self, device: &Device, hidden: &Array) -> Result<Array> {
        let input = apply(device, self.before_feed_forward.as_ref(), hidden.clone())?;
        let fed = self.feed_forward.forward(device, &input)?;
        apply(device, self.after_feed_forward.as_ref(), fed)
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
        let own = arrived.widened.input(device, arrived.vectors, index)?;
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

    /// `[1, tokens]` ids to what travels, `[1, tokens, width]`: the hidden vectors, and what a family has besides. The ids are below
    /// the vocabulary size.
    pub(crate) fn embed(&self, device: &Device, ids: &Array) -> Result<Array> {
        let Some(embedding) = &self.embedding else {
            return Err(mlxnode_mlx::Error::Mlx("this layer range has no embedding".to_owned()));
        };
        let vectors = embedding.lookup(device, ids)?;
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
        let vectors = match &self.positions {
            Some(positions) => device.add(&vectors, &positions.of(device, batch)?)?,
            None => vectors,
        };
        let widened = self.widened;
        for row in &mut batch.rows {
            row.cache.prepare(device)?;
        }
        let mut hidden = match widened.is_plain() {
            true => vectors.clone(),
            false => widened.hidden(device, &vectors)?,
        };
        let arrived = Arrived { vectors: &vectors, widened };
        for (index, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(device, hidden, index, arrived, batch)?;
        }
        if !widened.is_plain() {
            hidden = widened.leave(device, hidden, &vectors, self.head.is_some())?;
        }
        for row in &mut batch.rows {
            row.cache.advance(row.tokens);
        }
        Ok(hidden)
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
