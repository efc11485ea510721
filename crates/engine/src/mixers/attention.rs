//! Softmax attention with grouped keys and values, optional norms, rotation and window; keys may serve as values, and a layer may
//! see another one's keys and values.

use super::latent::growing;
use super::{BlockIndexer, Keeps, SoftmaxAttention};
use crate::batch::{Batch, Row};
use crate::caches::{LayerCache, Seen, SequenceCache};
use crate::linear::{Linear, Stacked};
use crate::norm::{Norm, apply};
use crate::rope::RotaryEmbedding;
use mlxnode_checkpoint::{GateFunction, QkNormKind, QueryGrowth, Temperature};
use mlxnode_mlx::{Array, Device, Dtype, Result};

/// The attention of one layer.
pub(crate) struct Attention {
    /// q, and unless keys and values come from elsewhere k and v, in this order; then the gate on the result, where there is one.
    pub(crate) projections: Stacked,
    /// Their results stay within this distance of zero.
    pub(crate) projection_limit: Option<f32>,
    /// Later layers take keys and values as projected here.
    pub(crate) projects_for_others: bool,
    pub(crate) output: Linear,
    pub(crate) norms: Option<QkNorms>,
    /// Over what all heads give.
    pub(crate) result_norm: Option<Norm>,
    pub(crate) source: Source,
    /// Epsilon of the norm on values, which has no weight.
    pub(crate) value_norm: Option<f32>,
    /// Keys and values are rounded to steps of these sizes, of which a byte counts 256.
    pub(crate) byte_scales: Option<[Array; 2]>,
    pub(crate) rope: Option<RotaryEmbedding>,
    pub(crate) temperature: Option<Temperature>,
    pub(crate) gate: Option<Gate>,
    pub(crate) growth: Option<QueryGrowth>,
    /// The result is multiplied by the logistic function of a gate.
    pub(crate) output_gate: bool,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    /// Width of a head's value. Other than `head_dim` only with projections that are not stacked.
    pub(crate) value_dim: i32,
    /// On values.
    pub(crate) value_factor: Option<f32>,
    /// Queries also see all keys of another layer.
    pub(crate) beside: Option<Beside>,
    /// Chooses the blocks of keys that queries see.
    pub(crate) blocks: Option<BlockIndexer>,
    /// Some layers of the model choose blocks, so that files have a list for each.
    pub(crate) listed: bool,
    pub(crate) core: SoftmaxAttention,
}

/// Another layer's keys and values, which the queries see as well.
pub(crate) struct Beside {
    /// That layer, by its place in the range; it ran before in the same step.
    pub(crate) layer: usize,
    /// `[heads, head_dim, 1]`: a query to the gate that weighs what it sees there.
    pub(crate) weight: Array,
    /// `[heads, 1, 1]`.
    pub(crate) bias: Array,
    /// Over everything that layer keeps.
    pub(crate) core: SoftmaxAttention,
}

/// Which of the two that have norms.
#[derive(Clone, Copy)]
enum Part {
    Queries,
    Keys,
}

/// Where keys and values come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Projections for both.
    Projections,
    /// One projection: values are the keys before norm and rotation.
    Keys,
    /// Another layer of the range, which ran before in the same step.
    Layer(usize),
    /// Another layer's projections, in the same step.
    Handed,
}

/// How much of each result gets through.
pub(crate) struct Gate {
    pub(crate) projection: Linear,
    pub(crate) per_head: bool,
    pub(crate) function: GateFunction,
}

/// Norms on queries and keys.
pub(crate) struct QkNorms {
    pub(crate) kind: QkNormKind,
    /// None for a kind without weights.
    pub(crate) query: Option<Array>,
    /// None also for a layer without keys of its own.
    pub(crate) key: Option<Array>,
    pub(crate) eps: f32,
    pub(crate) after_rope: bool,
    /// On queries after their norm: a number, or `[heads, 1, 1]` of numbers.
    pub(crate) query_factor: Option<Array>,
}

/// What goes into the attention, as `[1, heads, tokens, head_dim]`.
struct Parts {
    queries: Array,
    /// None when another layer has them.
    keys_values: Option<(Array, Array)>,
}

impl QkNorms {
    /// Over the last axis of `x`.
    fn apply(&self, device: &Device, x: &Array, part: Part) -> Result<Array> {
        let (weight, factor) = match part {
            Part::Queries => (self.query.as_ref(), self.query_factor.as_ref()),
            Part::Keys => (self.key.as_ref(), None),
        };
        let normed = match (self.kind, weight) {
            (QkNormKind::LayerPerHead, Some(weight)) => {
                device.multiply(weight, &device.layer_norm(x, None, None, self.eps)?)
            }
            (QkNormKind::RmsPerHead { eps }, Some(weight)) => {
                device.multiply(&device.rms_normalize(x, eps)?, weight)
            }
            (_, Some(weight)) => device.rms_norm(x, weight, self.eps),
            (_, None) => device.rms_normalize(x, self.eps),
        }?;
        match factor {
            Some(factor) => device.multiply(&normed, factor),
            None => Ok(normed),
        }
    }

    /// Works on heads lying one after the other as on heads side by side.
    fn is_per_head(&self) -> bool {
        matches!(self.kind, QkNormKind::PerHead | QkNormKind::PerHeadUnweighted { .. })
    }
}

impl Attention {
    /// Its own keys and values, unless it sees another layer's.
    pub(crate) fn keeps(&self) -> Keeps {
        Keeps {
            kv: !matches!(self.source, Source::Layer(_)),
            heads: Some((self.kv_heads, self.head_dim)),
            window: self.core.window.or(self.core.chunk),
            chunk: self.core.chunk,
            indexer: self.blocks.is_some(),
            narrow_index: self.blocks.is_some(),
            listed: self.listed,
            ..Keeps::default()
        }
    }

    /// Does it work on sequences side by side?
    pub(crate) fn joins(&self) -> bool {
        self.goes_by_row() && self.core.chunk.is_none()
    }

    /// Can tokens at different positions be arranged at once? Not where a factor or the frequencies depend on the position.
    fn goes_by_row(&self) -> bool {
        self.temperature.is_none()
            && self.growth.is_none()
            && self.blocks.is_none()
            && self.rope.as_ref().is_none_or(RotaryEmbedding::goes_by_row)
    }

    /// `[1, tokens, hidden]` to the same; this is layer `layer` of the range.
    pub(crate) fn forward(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        batch: &mut Batch<'_>,
    ) -> Result<Array> {
        let (mixed, gate) = match batch.rows.as_mut_slice() {
            rows if batch.abreast && self.goes_abreast() => {
                self.forward_abreast(device, x, rows.len() as i32, &mut batch.projected)?
            }
            [row] if row.cache.lanes() == 1 => {
                let offset = row.cache.tokens();
                let whole = self.projections.whole.as_ref().filter(|_| !self.projects_for_others);
                let (parts, gate) = match whole {
                    Some(whole) if row.tokens == 1 => {
                        let projected = self.limited(device, whole.forward(device, x)?)?;
                        (self.cut_one(device, &projected, offset)?, self.cut_gate(device, &projected)?)
                    }
                    _ => {
                        let (parts, gate) = self.project(device, x, &mut batch.projected)?;
                        (self.arranged(device, parts, offset)?, gate)
                    }
                };
                (self.mix(device, x, parts, layer, row.cache)?, gate)
            }
            rows => {
                self.forward_rows(device, x, layer, rows, batch.positions.as_ref(), &mut batch.projected)?
            }
        };
        let mixed = match gate {
            Some(gate) => device.multiply(&mixed, &device.sigmoid(&gate)?)?,
            None => mixed,
        };
        let mixed = match &self.gate {
            Some(gate) => self.gated(device, gate, x, mixed)?,
            None => mixed,
        };
        self.output.forward(device, &apply(device, self.result_norm.as_ref(), mixed)?)
    }

    /// Can whole sequences go through at once? Not where a layer sees another one's keys, or what a token does depends on its position
    /// in ways that are written for one sequence.
    pub(crate) fn goes_abreast(&self) -> bool {
        self.goes_by_row() && self.is_alone()
    }

    /// Does it neither take anything from another layer nor hand anything on?
    pub(crate) fn is_alone(&self) -> bool {
        let is_alone = matches!(self.source, Source::Projections | Source::Keys) && !self.projects_for_others;
        is_alone && self.beside.is_none() && !self.core.shown
    }

    /// `rows` whole sequences of one length, one behind the other, which nobody goes on with: what their tokens see,
    /// `[1, tokens of all, heads * value_dim]`, and the gate on it.
    fn forward_abreast(
        &self,
        device: &Device,
        x: &Array,
        rows: i32,
        handed: &mut Vec<Array>,
    ) -> Result<(Array, Option<Array>)> {
        let (projected, gate) = self.project(device, x, handed)?;
        let parts = self.arranged_rows(device, projected, 0, rows)?;
        let Some((keys, values)) = &parts.keys_values else { return Err(wrong_projections()) };
        let seen = Seen::whole(keys, values, self.core.window, self.core.chunk);
        let mixed = self.core.attend(device, &parts.queries, &seen)?;
        let mixed = device.transpose(&mixed, &[0, 2, 1, 3])?;
        Ok((device.reshape(&mixed, &[1, x.dim(1), self.heads * self.value_dim])?, gate))
    }

    /// Several sequences, those with one token first and these at `positions`: what their tokens see,
    /// `[1, tokens, heads * head_dim]`, and the gate on it.
    fn forward_rows(
        &self,
        device: &Device,
        x: &Array,
        layer: usize,
        rows: &mut [Row<'_>],
        positions: Option<&Array>,
        handed: &mut Vec<Array>,
    ) -> Result<(Array, Option<Array>)> {
        let positions = positions.filter(|_| self.goes_by_row());
        let count = positions.map_or(0, |positions| positions.dim(0));
        let singles = rows.iter().take_while(|row| count > 0 && row.tokens == 1).count();
        let (singles, others) = rows.split_at_mut(singles);
        let (projected, gate) = match &self.projections.whole {
            Some(whole) if others.is_empty() && !self.projects_for_others => {
                self.project_whole(device, whole, x)?
            }
            _ => self.project(device, x, handed)?,
        };
        let cut = |array: &Array, from: i32, to: i32| match (from, to) == (0, array.dim(1)) {
            true => Ok(array.clone()),
            false => device.slice(array, &[0, from, 0], &[1, to, array.dim(2)]),
        };
        let mut mixed = Vec::with_capacity(others.len() + 1);
        if let Some(positions) = positions {
            let parts = projected.iter().map(|part| cut(part, 0, count)).collect::<Result<Vec<_>>>()?;
            let parts = self.arranged_by_row(device, &parts, positions)?;
            mixed.push(self.mix_by_row(device, parts, layer, singles)?);
        }
        let mut start = count;
        for row in others {
            let stop = start + row.span();
            let parts = projected.iter().map(|part| cut(part, start, stop)).collect::<Result<Vec<_>>>()?;
            let parts = self.arranged(device, parts, row.cache.tokens())?;
            let own = if self.blocks.is_some() { cut(x, start, stop)? } else { x.clone() };
            mixed.push(self.mix(device, &own, parts, layer, row.cache)?);
            start = stop;
        }
        match mixed.as_slice() {
            [only] => Ok((only.clone(), gate)),
            _ => Ok((device.concatenate(&mixed, 1)?, gate)),
        }
    }

    /// The parts `[sequences, heads, 1, head_dim]` of rows with one token each to what these see, `[1, sequences, heads * head_dim]`.
    fn mix_by_row(&self, device: &Device, parts: Parts, layer: usize, rows: &mut [Row<'_>]) -> Result<Array> {
        let count = parts.queries.dim(0);
        let mut mixed = Vec::with_capacity(rows.len());
        let mut start = 0;
        for row in rows {
            let stop = start + row.span();
            let of_row = |array: &Array| match (start, stop) == (0, count) {
                true => Ok(array.clone()),
                false => device.slice_axis(array, 0, start, stop, 1),
            };
            let queries = of_row(&parts.queries)?;
            let caches = &mut row.cache.layers;
            let keys_values = match &parts.keys_values {
                Some((keys, values)) => Some((of_row(keys)?, of_row(values)?)),
                None => None,
            };
            mixed.push(self.see(device, &queries, keys_values.as_ref(), None, layer, caches)?);
            start = stop;
        }
        let mixed = match mixed.as_slice() {
            [only] => only.clone(),
            _ => device.concatenate(&mixed, 0)?,
        };
        // With one token [sequence, heads, 1, width] is [sequence, heads * width].
        device.reshape(&mixed, &[1, count, self.heads * self.value_dim])
    }

    /// Projections `[1, rows, heads * head_dim]` of one token each to `[rows, heads, 1, head_dim]`, normed and rotated.
    fn arranged_by_row(&self, device: &Device, projected: &[Array], positions: &Array) -> Result<Parts> {
        let norms = self.norms.as_ref();
        let shaped = |x: &Array, heads: i32| device.reshape(x, &[x.dim(1), heads, 1, -1]);
        let arranged = |x: &Array, heads: i32, part: Part| {
            let before = norms.filter(|norms| !norms.after_rope);
            let x = match before {
                Some(norms) if norms.kind == QkNormKind::Whole => {
                    shaped(&norms.apply(device, x, part)?, heads)?
                }
                Some(norms) if norms.is_per_head() => norms.apply(device, &shaped(x, heads)?, part)?,
                Some(norms) => {
                    // The weight is a matrix with a row for each head.
                    let x = device.reshape(x, &[1, x.dim(1), heads, self.head_dim])?;
                    let x = norms.apply(device, &x, part)?;
                    device.reshape(&x, &[x.dim(1), heads, 1, self.head_dim])?
                }
                None => shaped(x, heads)?,
            };
            let x = match &self.rope {
                Some(rope) => rope.apply_by_row(device, &x, positions)?,
                None => x,
            };
            match norms.filter(|norms| norms.after_rope) {
                Some(norms) => norms.apply(device, &x, part),
                None => Ok(x),
            }
        };
        let (queries, keys, values) = self.sorted(projected)?;
        let queries = arranged(queries, self.heads, Part::Queries)?;
        let keys_values = match (keys, values) {
            (Some(keys), Some(values)) => {
                let keys = arranged(keys, self.kv_heads, Part::Keys)?;
                Some(self.rounded(
                    device,
                    keys,
                    self.normed_values(device, shaped(values, self.kv_heads)?)?,
                )?)
            }
            _ => None,
        };
        Ok(Parts { queries, keys_values })
    }

    /// The same as [`Self::project`], by one product that is cut.
    fn project_whole(
        &self,
        device: &Device,
        whole: &Linear,
        x: &Array,
    ) -> Result<(Vec<Array>, Option<Array>)> {
        let projected = self.limited(device, whole.forward(device, x)?)?;
        let mut parts = device.pieces(&projected, &self.cuts(self.head_dim), 2)?;
        let gate = if self.output_gate { parts.pop() } else { None };
        Ok((parts, gate))
    }

    /// Which projection is which.
    fn sorted<'p>(
        &self,
        projected: &'p [Array],
    ) -> Result<(&'p Array, Option<&'p Array>, Option<&'p Array>)> {
        match (projected, self.source) {
            ([queries], Source::Layer(_)) => Ok((queries, None, None)),
            ([queries, keys], Source::Keys) => Ok((queries, Some(keys), Some(keys))),
            ([queries, keys, values], Source::Projections | Source::Handed) => {
                Ok((queries, Some(keys), Some(values)))
            }
            _ => Err(wrong_projections()),
        }
    }

    /// `mixed` `[1, tokens, heads * value_dim]` times what the gate makes of `x`.
    fn gated(&self, device: &Device, gate: &Gate, x: &Array, mixed: Array) -> Result<Array> {
        let open = gate.projection.forward(device, x)?;
        let open = match gate.function {
            GateFunction::Sigmoid => device.sigmoid(&open)?,
            GateFunction::SigmoidInSingle => {
                device.cast(&device.sigmoid(&device.cast(&open, Dtype::F32)?)?, mixed.dtype())?
            }
            GateFunction::Softplus => {
                device.cast(&device.softplus(&device.cast(&open, Dtype::F32)?)?, mixed.dtype())?
            }
        };
        if !gate.per_head {
            return device.multiply(&mixed, &open);
        }
        let heads = device.reshape(&mixed, &[1, mixed.dim(1), self.heads, self.value_dim])?;
        device.reshape(&device.multiply(&heads, &device.expand(&open, -1)?)?, mixed.shape())
    }

    /// What queries `[1, heads, tokens, head_dim]` see, as `[1, heads, tokens, value_dim]`: where `visible`
    /// `[1, heads, tokens, keys]` is true, if it is given. New keys and values go into the cache.
    fn see(
        &self,
        device: &Device,
        queries: &Array,
        keys_values: Option<&(Array, Array)>,
        visible: Option<&Array>,
        layer: usize,
        caches: &mut [LayerCache],
    ) -> Result<Array> {
        let own = match (keys_values, self.source) {
            (Some((keys, values)), _) if let Some(visible) = visible => {
                self.core.forward_where(device, queries, keys, values, visible, &mut caches[layer].kv)?
            }
            (Some((keys, values)), _) => {
                self.core.forward(device, queries, keys, values, &mut caches[layer].kv)?
            }
            (None, Source::Layer(owner)) => self.core.again(device, queries, &caches[owner].kv)?,
            (None, _) => return Err(wrong_projections()),
        };
        let Some(beside) = &self.beside else { return Ok(own) };
        let other = beside.core.again(device, queries, &caches[beside.layer].kv)?;
        let gate = device.add(&device.matmul(queries, &beside.weight)?, &beside.bias)?;
        let gate = device.sigmoid(&gate)?;
        let rest = device.subtract(&Array::scalar(1.0, gate.dtype())?, &gate)?;
        device.add(&device.multiply(&gate, &other)?, &device.multiply(&rest, &own)?)
    }

    /// One sequence's parts, of `x` `[1, tokens, hidden]`, to what its tokens see, `[1, tokens, heads * value_dim]`.
    fn mix(
        &self,
        device: &Device,
        x: &Array,
        parts: Parts,
        layer: usize,
        cache: &mut SequenceCache,
    ) -> Result<Array> {
        let offset = cache.tokens();
        let visible = match &self.blocks {
            Some(blocks) => blocks.select(device, x, offset, &mut cache.layers[layer].indexer)?,
            None => None,
        };
        let (keys_values, visible) = (parts.keys_values.as_ref(), visible.as_ref());
        let tokens = parts.queries.dim(2);
        let queries = self.tempered(device, parts.queries, offset)?;
        let mixed = self.see(device, &queries, keys_values, visible, layer, &mut cache.layers)?;
        let mixed = device.transpose(&mixed, &[0, 2, 1, 3])?;
        device.reshape(&mixed, &[1, tokens, self.heads * self.value_dim])
    }

    /// Queries of tokens from position `offset` on, grown with their position.
    fn tempered(&self, device: &Device, queries: Array, offset: i32) -> Result<Array> {
        let tokens = queries.dim(2);
        if let Some(growth) = self.growth {
            if f64::from(offset + tokens - 1) < growth.original_max_positions {
                return Ok(queries); // the factor is 1
            }
            let factors = growing(device, growth, tokens, offset, queries.dtype())?;
            return device.multiply(&queries, &factors);
        }
        let Some(Temperature { floor, scale }) = self.temperature else { return Ok(queries) };
        if ((offset + tokens) as f32) < floor {
            return Ok(queries); // the factor is ln(1) * scale + 1
        }
        let number = |value: f32| Array::scalar(value, Dtype::F32);
        let positions =
            device.arange(f64::from(offset + 1), f64::from(offset + tokens + 1), 1.0, Dtype::F32)?;
        let steps = device.floor(&device.divide(&positions, &number(floor)?)?)?;
        let growth = device.log(&device.add(&steps, &number(1.0)?)?)?;
        let factors = device.add(&device.multiply(&growth, &number(scale)?)?, &number(1.0)?)?;
        let factors = device.reshape(&factors, &[tokens, 1])?;
        device.cast(&device.multiply(&queries, &factors)?, queries.dtype())
    }

    /// The one product for a single token, `[1, 1, heads * head_dim]` of queries, keys and values (and the gate), cut by heads.
    fn cut_one(&self, device: &Device, projected: &Array, offset: i32) -> Result<Parts> {
        let rotating = self.heads + self.kv_heads;
        if self.norms.as_ref().is_some_and(|norms| !norms.is_per_head() || norms.after_rope) {
            let mut parts = device.pieces(projected, &self.cuts(self.head_dim), 2)?;
            if self.output_gate {
                parts.pop();
            }
            return self.arranged(device, parts, offset);
        }
        // For one token [1, 1, heads, width] and [1, heads, 1, width] are the same elements in the same order.
        let projected = device.reshape(projected, &[1, -1, 1, self.head_dim])?;
        let Some(norms) = &self.norms else {
            // What rotates goes through that together. Without values of their own the keys serve, before that.
            let (both, values) = match self.cuts(1).split_first() {
                Some((_, [])) => (projected, None),
                Some((_, later)) => {
                    let mut parts = device.pieces(&projected, later, 1)?.into_iter();
                    let (Some(both), values) = (parts.next(), parts.next()) else {
                        return Err(wrong_projections());
                    };
                    (both, values.filter(|_| self.source != Source::Keys))
                }
                None => return Err(wrong_projections()),
            };
            let values = match values {
                Some(values) => values,
                None => device.slice_axis(&both, 1, self.heads, rotating, 1)?,
            };
            let values = self.normed_values(device, values)?;
            let [queries, keys] = device.split(&self.rotated(device, both, offset)?, &[self.heads], 1)?;
            return Ok(Parts { queries, keys_values: Some((keys, values)) });
        };
        let parts = device.pieces(&projected, &self.cuts(1), 1)?;
        let (queries, keys, values) = match (parts.as_slice(), self.source) {
            ([queries, keys, ..], Source::Keys) => (queries, keys, keys),
            ([queries, keys, values, ..], _) => (queries, keys, values),
            _ => return Err(wrong_projections()),
        };
        let values = self.normed_values(device, values.clone())?;
        let queries = norms.apply(device, queries, Part::Queries)?;
        let keys = norms.apply(device, keys, Part::Keys)?;
        let queries = self.rotated(device, queries, offset)?;
        Ok(Parts { queries, keys_values: Some((self.rotated(device, keys, offset)?, values)) })
    }

    /// Where the one product of queries, keys, values and gate is cut, in elements of `width` to a head.
    fn cuts(&self, width: i32) -> Vec<i32> {
        let keys = self.heads + self.kv_heads;
        let values = if self.source == Source::Keys { keys } else { keys + self.kv_heads };
        let all = if self.output_gate { values + self.heads } else { values };
        let mut cuts = vec![self.heads, keys, values];
        cuts.dedup();
        cuts.retain(|cut| *cut < all);
        cuts.into_iter().map(|cut| cut * width).collect()
    }

    /// The gate on the result, which comes last in the one product.
    fn cut_gate(&self, device: &Device, projected: &Array) -> Result<Option<Array>> {
        if !self.output_gate {
            return Ok(None);
        }
        let start = (self.heads + 2 * self.kv_heads) * self.head_dim;
        let stop = start + self.heads * self.head_dim;
        device.slice(projected, &[0, 0, start], &[1, projected.dim(1), stop]).map(Some)
    }

    /// What the projections give, `[1, tokens, heads * head_dim]` each, and the gate on the result. Keys and values come from `handed`
    /// where this layer has no projections of its own, and go there where later layers have none.
    fn project(
        &self,
        device: &Device,
        x: &Array,
        handed: &mut Vec<Array>,
    ) -> Result<(Vec<Array>, Option<Array>)> {
        let parts = self.projections.parts.iter().map(|part| self.limited(device, part.forward(device, x)?));
        let mut parts = parts.collect::<Result<Vec<_>>>()?;
        let gate = if self.output_gate { parts.pop() } else { None };
        if self.source == Source::Handed {
            parts.extend(handed.iter().cloned());
        }
        if self.projects_for_others {
            *handed = parts.iter().skip(1).cloned().collect();
        }
        Ok((parts, gate))
    }

    fn limited(&self, device: &Device, x: Array) -> Result<Array> {
        let Some(limit) = self.projection_limit else { return Ok(x) };
        let bound = |value: f32| Array::scalar(value, x.dtype());
        device.minimum(&device.maximum(&x, &bound(-limit)?)?, &bound(limit)?)
    }

    /// Projections `[1, tokens, heads * head_dim]` to `[1, heads, tokens, head_dim]`, normed and rotated.
    fn arranged(&self, device: &Device, projected: Vec<Array>, offset: i32) -> Result<Parts> {
        self.arranged_rows(device, projected, offset, 1)
    }

    /// The same of several sequences of one length, one behind the other, to `[rows, heads, tokens of one, head_dim]`.
    fn arranged_rows(&self, device: &Device, projected: Vec<Array>, offset: i32, rows: i32) -> Result<Parts> {
        let norms = self.norms.as_ref();
        let arranged = |x: &Array, heads: i32, part: Part| {
            let x = self.turned(device, x, heads, part, rows)?;
            let x = self.rotated(device, x, offset)?;
            match norms.filter(|norms| norms.after_rope) {
                Some(norms) => norms.apply(device, &x, part),
                None => Ok(x),
            }
        };
        let heads =
            |x: &Array| device.reshape(x, &[rows, x.dim(1) / rows.max(1), self.kv_heads, self.value_dim]);
        let (queries, keys, values) = self.sorted(&projected)?;
        let queries = arranged(queries, self.heads, Part::Queries)?;
        let keys_values = match (keys, values) {
            (Some(keys), Some(values)) => {
                let keys = arranged(keys, self.kv_heads, Part::Keys)?;
                let values = self.normed_values(device, heads(values)?)?;
                Some(self.rounded(device, keys, device.transpose(&values, &[0, 2, 1, 3])?)?)
            }
            _ => None,
        };
        Ok(Parts { queries, keys_values })
    }

    /// Queries or keys `[1, tokens, heads * head_dim]` to `[rows, heads, tokens of a row, head_dim]`, normed unless that comes later.
    fn turned(&self, device: &Device, x: &Array, heads: i32, part: Part, rows: i32) -> Result<Array> {
        let shape = [rows, x.dim(1) / rows.max(1), heads, self.head_dim];
        let x = match self.norms.as_ref().filter(|norms| !norms.after_rope) {
            Some(norms) if norms.kind == QkNormKind::Whole => {
                device.reshape(&norms.apply(device, x, part)?, &shape)?
            }
            Some(norms) => norms.apply(device, &device.reshape(x, &shape)?, part)?,
            None => device.reshape(x, &shape)?,
        };
        device.transpose(&x, &[0, 2, 1, 3])
    }

    fn normed_values(&self, device: &Device, values: Array) -> Result<Array> {
        let values = match self.value_factor {
            Some(factor) => device.multiply(&values, &Array::scalar(factor, values.dtype())?)?,
            None => values,
        };
        match self.value_norm {
            Some(eps) => device.rms_normalize(&values, eps),
            None => Ok(values),
        }
    }

    /// Keys and values, rounded where they are.
    fn rounded(&self, device: &Device, keys: Array, values: Array) -> Result<(Array, Array)> {
        match &self.byte_scales {
            Some([of_keys, of_values]) => {
                Ok((to_bytes(device, &keys, of_keys)?, to_bytes(device, &values, of_values)?))
            }
            None => Ok((keys, values)),
        }
    }

    fn rotated(&self, device: &Device, x: Array, offset: i32) -> Result<Array> {
        match &self.rope {
            Some(rope) => rope.apply(device, &x, offset),
            None => Ok(x),
        }
    }
}

/// Rounded to the nearest of 256 steps of size `scale`, in `x`'s element type.
fn to_bytes(device: &Device, x: &Array, scale: &Array) -> Result<Array> {
    let bound = |value: f32| Array::scalar(value, Dtype::F32);
    let steps = device.round(&device.divide(&device.cast(x, Dtype::F32)?, scale)?)?;
    let steps = device.minimum(&device.maximum(&steps, &bound(-128.0)?)?, &bound(127.0)?)?;
    device.cast(&device.multiply(&steps, scale)?, x.dtype())
}

fn wrong_projections() -> mlxnode_mlx::Error {
    mlxnode_mlx::Error::Mlx("attention has other projections than its keys and values need".to_owned())
}
