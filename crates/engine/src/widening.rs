//! What travels besides one hidden vector: several in parallel, and an input of its own for each layer.
//!
//! A token's vector is then `[streams * hidden + layers * width]`: the hidden vectors one after the other, behind them the layers'
//! inputs. The first stage makes it ([`Entrance`]), every stage takes it apart for its layers ([`Widened`]), the last one makes a
//! single hidden vector of it ([`Exit`]) and needs the inputs no more.

use crate::feed_forward::activate;
use crate::linear::{Embedding, Linear};
use crate::norm::Norm;
use crate::residual_blocks::ResidualBlocks;
use mlxnode_checkpoint::Activation;
use mlxnode_mlx::{Array, Device, Result};

/// From a token's embedding to what travels.
pub(crate) struct Entrance {
    /// To the second hidden vector and those after it.
    pub(crate) projections: Vec<Linear>,
    pub(crate) inputs: Option<InputTable>,
}

/// What the layers' inputs are made from.
pub(crate) struct InputTable {
    /// `[vocabulary, layers * width]`.
    pub(crate) table: Embedding,
    /// Rows of the table that tokens beyond them share the first of; None when there are none beyond.
    pub(crate) rows: Option<u32>,
    /// Of the embedding, to `layers * width`.
    pub(crate) projection: Linear,
    pub(crate) norm: Norm,
    pub(crate) hidden: i32,
    pub(crate) layers: i32,
    pub(crate) width: i32,
}

impl Entrance {
    /// Ids `[1, tokens]` and their embeddings `[1, tokens, hidden]` to what travels, `[1, tokens, all]`.
    pub(crate) fn widen(&self, device: &Device, ids: &Array, embeddings: Array) -> Result<Array> {
        let inputs = match &self.inputs {
            Some(inputs) => Some(inputs.of(device, ids, &embeddings)?),
            None => None,
        };
        let others = match self.projections.as_slice() {
            [] => None,
            projections => Some(of_like_size(device, &embeddings, projections)?),
        };
        device.concatenate([&embeddings].into_iter().chain(&others).chain(&inputs), 2)
    }
}

/// The embedding's projections, each brought to its root mean square: `[1, tokens, projections * hidden]`.
fn of_like_size(device: &Device, embeddings: &Array, projections: &[Linear]) -> Result<Array> {
    let (tokens, hidden) = (embeddings.dim(1), embeddings.dim(2));
    let projected = projections.iter().map(|projection| projection.forward(device, embeddings));
    let projected = device.concatenate(&projected.collect::<Result<Vec<_>>>()?, 2)?;
    let streams = device.reshape(&projected, &[1, tokens, projections.len() as i32, hidden])?;
    let target = device.reshape(&magnitude(device, embeddings)?, &[1, tokens, 1, 1])?;
    let scaled = device.multiply(&streams, &device.divide(&target, &magnitude(device, &streams)?)?)?;
    device.reshape(&scaled, projected.shape())
}

/// The root mean square over the last axis, which stays.
fn magnitude(device: &Device, x: &Array) -> Result<Array> {
    let number = |value: f32| Array::scalar(value, x.dtype());
    let mean = device.mean(&device.power(x, &number(2.0)?)?, -1)?;
    device.power(&mean, &number(0.5)?)
}

impl InputTable {
    /// `[1, tokens, layers * width]` for tokens and their embeddings.
    fn of(&self, device: &Device, ids: &Array, embeddings: &Array) -> Result<Array> {
        let number = |value: f64| Array::scalar(value as f32, embeddings.dtype());
        let ids = match self.rows {
            None => ids.clone(),
            Some(rows) => {
                let nothing = Array::from_u32(&[0], &[])?;
                device.select(&device.less(ids, &Array::from_u32(&[rows], &[])?)?, ids, &nothing)?
            }
        };
        let (tokens, all) = (ids.dim(1), self.layers * self.width);
        let looked_up = self.table.lookup(device, &ids)?;
        let looked_up = device.multiply(&looked_up, &number(f64::from(self.width).sqrt())?)?;
        let projected = self.projection.forward(device, embeddings)?;
        let projected = device.multiply(&projected, &number(f64::from(self.hidden).powf(-0.5))?)?;
        let projected = device.reshape(&projected, &[1, tokens, self.layers, self.width])?;
        let projected = device.reshape(&self.norm.forward(device, &projected)?, &[1, tokens, all])?;
        device.multiply(&device.add(&projected, &looked_up)?, &number(0.5_f64.sqrt())?)
    }
}

/// How what travels lies in a stage.
#[derive(Clone, Copy)]
pub(crate) struct Widened {
    pub(crate) streams: i32,
    pub(crate) hidden: i32,
    /// Width of a layer's input, 0 when there are none.
    pub(crate) input: i32,
    /// Width of what the model's first layer hands on to later ones, 0 when there is no such thing.
    pub(crate) handed: i32,
    /// The stage's first layer.
    pub(crate) first: i32,
    /// The embedding travels along, behind the hidden vector, as the input of all layers. The first stage needs no second copy of it:
    /// there the hidden vectors that arrive are the embedding.
    pub(crate) embedding: bool,
    /// What blocks of layers added travels along.
    pub(crate) blocks: Option<Blocks>,
}

/// The blocks of a model's layers, of each of which one vector travels.
#[derive(Clone, Copy)]
pub(crate) struct Blocks {
    /// How many have begun before the stage.
    pub(crate) before: i32,
    /// How many the model has.
    pub(crate) all: i32,
    /// Epsilon of the norms on them.
    pub(crate) eps: f32,
}

impl Widened {
    /// One hidden vector and nothing else.
    pub(crate) fn is_plain(self) -> bool {
        let is_single = self.streams == 1 && self.input == 0 && self.handed == 0;
        is_single && !self.embedding && self.blocks.is_none()
    }

    /// The hidden vectors out of what arrived, `[1, tokens, all]`: `[1, tokens, hidden]`, or `[streams, 1, tokens, hidden]`.
    pub(crate) fn hidden(self, device: &Device, arrived: &Array) -> Result<Array> {
        let (tokens, width) = (arrived.dim(1), self.streams * self.hidden);
        let own = match arrived.dim(2) == width {
            true => arrived.clone(),
            false => device.slice(arrived, &[0; 3], &[1, tokens, width])?,
        };
        if self.streams == 1 {
            return Ok(own);
        }
        let apart = device.reshape(&own, &[1, tokens, self.streams, self.hidden])?;
        device.transpose(&apart, &[2, 0, 1, 3])
    }

    /// What the model's first layer handed on, `[1, tokens, width]`, out of what arrived; None on the first stage.
    pub(crate) fn handed(self, device: &Device, arrived: &Array) -> Result<Option<Array>> {
        match self.handed > 0 && arrived.dim(2) > self.hidden {
            true => {
                device.slice(arrived, &[0, 0, self.hidden], &[1, arrived.dim(1), arrived.dim(2)]).map(Some)
            }
            false => Ok(None),
        }
    }

    /// The input of the stage's layer `index`, `[1, tokens, width]`, out of what arrived.
    pub(crate) fn input(self, device: &Device, arrived: &Array, index: usize) -> Result<Array> {
        let start = self.streams * self.hidden + (self.first + index as i32) * self.input;
        device.slice(arrived, &[0, 0, start], &[1, arrived.dim(1), start + self.input])
    }

    /// The embedding out of what arrived, `[1, tokens, hidden]`.
    pub(crate) fn embedding(self, device: &Device, arrived: &Array) -> Result<Array> {
        match arrived.dim(2) == self.hidden {
            true => Ok(arrived.clone()),
            false => device.slice(arrived, &[0, 0, self.hidden], &[1, arrived.dim(1), 2 * self.hidden]),
        }
    }

    /// What leaves a stage before the last in a family with blocks: the hidden vectors, those of the blocks, and zeros for blocks to come.
    pub(crate) fn with_blocks(
        self,
        device: &Device,
        hidden: Array,
        kept: &ResidualBlocks,
        blocks: Blocks,
    ) -> Result<Array> {
        let kept = kept.leaving(device)?;
        let missing = blocks.all * self.hidden - kept.as_ref().map_or(0, |kept| kept.dim(2));
        let zeros = match missing {
            0 => None,
            _ => Some(device.zeros(&[1, hidden.dim(1), missing], hidden.dtype())?),
        };
        device.concatenate([&hidden].into_iter().chain(&kept).chain(&zeros), 2)
    }

    /// What leaves the stage: the hidden vectors in the place of those that arrived, and what is handed on; the last stage lets go of
    /// the inputs.
    pub(crate) fn leave(
        self,
        device: &Device,
        hidden: Array,
        arrived: &Array,
        handed: Option<&Array>,
        last: bool,
    ) -> Result<Array> {
        if let Some(handed) = handed.filter(|_| self.handed > 0 && !last) {
            return device.concatenate([&hidden, handed], 2);
        }
        let (tokens, width) = (arrived.dim(1), self.streams * self.hidden);
        let hidden = match self.streams {
            1 => hidden,
            _ => device.reshape(&device.transpose(&hidden, &[1, 2, 0, 3])?, &[1, tokens, width])?,
        };
        if self.embedding && !last {
            return device.concatenate([&hidden, &self.embedding(device, arrived)?], 2);
        }
        if last || arrived.dim(2) == width {
            return Ok(hidden);
        }
        let inputs = device.slice(arrived, &[0, 0, width], &[1, tokens, arrived.dim(2)])?;
        device.concatenate([&hidden, &inputs], 2)
    }
}

/// From several hidden vectors to one.
pub(crate) struct Exit {
    /// Of the second hidden vector and those after it.
    pub(crate) projections: Vec<Linear>,
}

impl Exit {
    /// `[1, tokens, streams * hidden]` to `[1, tokens, hidden]`: the first one's size for all, then their mean.
    pub(crate) fn merge(&self, device: &Device, all: &Array) -> Result<Array> {
        let others = self.projections.len() as i32;
        let (tokens, hidden) = (all.dim(1), all.dim(2) / (others + 1));
        let cut = |from: i32, to: i32| device.slice(all, &[0, 0, from * hidden], &[1, tokens, to * hidden]);
        let first = cut(0, 1)?;
        let mut projected = Vec::with_capacity(self.projections.len());
        for (stream, projection) in (1..).zip(&self.projections) {
            projected.push(projection.forward(device, &cut(stream, stream + 1)?)?);
        }
        let projected = device.reshape(&device.concatenate(&projected, 2)?, &[1, tokens, others, hidden])?;
        let first = device.reshape(&first, &[1, tokens, 1, hidden])?;
        let factors = device.divide(&magnitude(device, &first)?, &magnitude(device, &projected)?)?;
        let like = device.multiply(&projected, &factors)?;
        let mean = device.mean(&device.concatenate([&first, &like], 2)?, 2)?;
        device.reshape(&mean, &[1, tokens, hidden])
    }
}

/// A layer's own input, let through by a gate and brought to the hidden vectors' width.
pub(crate) struct GatedInput {
    pub(crate) gate: Linear,
    pub(crate) projection: Linear,
    pub(crate) norm: Norm,
}

impl GatedInput {
    /// What `hidden` `[1, tokens, hidden]` lets through of `input` `[1, tokens, width]`.
    pub(crate) fn forward(&self, device: &Device, hidden: &Array, input: &Array) -> Result<Array> {
        let open = activate(device, Activation::GeluTanh, &self.gate.forward(device, hidden)?)?;
        let through = self.projection.forward(device, &device.multiply(&open, input)?)?;
        self.norm.forward(device, &through)
    }
}
