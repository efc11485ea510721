//! Rows of a step through the layers: single tokens side by side first, then chunks of prompts.

use super::sequence::{Part, Tokens, ids};
use super::{EngineStage, device_error};
use crate::batch::Batch;
use crate::model::Model;
use bytes::Bytes;
use mlxnode_compute::{Activation, Row, SequenceId, StageError, StepInput};
use mlxnode_mlx::{Array, Device, Dtype, Error};
use std::collections::HashMap;

/// Parts after the layers.
pub(super) struct Passed {
    /// `[1, tokens of all parts, width]`.
    pub(super) hidden: Array,
    /// The first and one past the last column of each part.
    pub(super) spans: Vec<(i32, i32)>,
    /// The parts in the order of their columns.
    pub(super) order: Vec<usize>,
}

impl EngineStage {
    /// Rows through the layers.
    pub(super) fn pass_rows(
        &mut self,
        rows: &[Row],
        chosen: &[usize],
        input: &StepInput,
    ) -> Result<Passed, StageError> {
        let part = |place: &usize| Part {
            sequence: rows[*place].sequence,
            tokens: Tokens::Known([rows[*place].tokens.as_slice(), &rows[*place].guesses].concat()),
        };
        let parts: Vec<Part> = chosen.iter().map(part).collect();
        match input {
            StepInput::Tokens => self.pass(&parts, |model, order, batch| {
                let device = &model.device;
                model.decoder.embed(device, &ids(device, &parts, order)?, batch)
            }),
            StepInput::Activation(activation) => {
                let mut starts = Vec::with_capacity(rows.len());
                let mut start = 0;
                for row in rows {
                    starts.push(start);
                    start += row.width() as i32;
                }
                self.pass(&parts, |model, order, _| {
                    let shape = [1, activation.tokens() as i32, activation.hidden() as i32];
                    let all = Array::from_bytes(activation.bytes(), &shape, activation.dtype().into())?;
                    let places = order.iter().map(|place| chosen[*place]);
                    let columns: Vec<i32> = places
                        .flat_map(|place| starts[place]..starts[place] + rows[place].width() as i32)
                        .collect();
                    gathered(&model.device, &all, &columns)
                })
            }
        }
    }

    /// Parts through the layers; `enter` makes what goes in, in the order that it gets.
    pub(super) fn pass(
        &mut self,
        parts: &[Part],
        enter: impl FnOnce(&Model, &[usize], &mut Batch<'_>) -> Result<Array, Error>,
    ) -> Result<Passed, StageError> {
        let places: HashMap<SequenceId, usize> =
            parts.iter().enumerate().map(|(place, part)| (part.sequence, place)).collect();
        let running: Vec<SequenceId> =
            parts.iter().filter(|part| part.count() == 1).map(|part| part.sequence).collect();
        let chunks: Vec<(SequenceId, i32)> =
            parts.iter().filter(|part| part.count() > 1).map(|part| (part.sequence, part.count())).collect();
        let mut arrange = || -> Result<Vec<SequenceId>, Error> {
            for (sequence, _) in &chunks {
                // A chunk goes through by itself, whatever its sequence did before.
                if self.caches.alone(*sequence).is_none()
                    && let Some(cache) = self.caches.take(&self.model.device, *sequence)?
                {
                    self.caches.insert(*sequence, cache);
                }
            }
            self.caches.arrange(&self.model.device, &running)
        };
        let arranged = arrange().map_err(device_error)?;
        let in_order = arranged.iter().chain(chunks.iter().map(|(sequence, _)| sequence));
        let order: Vec<usize> = in_order.filter_map(|sequence| places.get(sequence).copied()).collect();
        let mut spans = vec![(0, 0); parts.len()];
        let mut start = 0;
        for place in &order {
            let end = start + parts[*place].count();
            spans[*place] = (start, end);
            start = end;
        }
        self.activate(order.iter().map(|place| (parts[*place].sequence, parts[*place].count())));
        let (model, caches) = (&self.model, &mut self.caches);
        let forward = || -> Result<Array, Error> {
            let mut batch = Batch::of(caches.rows(&chunks))?;
            let vectors = enter(model, &order, &mut batch)?;
            model.decoder.forward(&model.device, vectors, &mut batch)
        };
        let hidden = forward().map_err(device_error)?;
        Ok(Passed { hidden, spans, order })
    }

    /// Hidden vectors for the next stage, in the order of the rows.
    pub(super) fn activation(&self, passed: &Passed) -> Result<Activation, StageError> {
        let (device, info) = (&self.model.device, self.model.info());
        let columns: Vec<i32> = passed.spans.iter().flat_map(|(start, end)| *start..*end).collect();
        let bytes = gathered(device, &passed.hidden, &columns)
            .and_then(|hidden| device.cast(&hidden, Dtype::from(info.dtype)))
            .and_then(|hidden| device.contiguous(&hidden))
            .and_then(|hidden| hidden.to_bytes())
            .map_err(device_error)?;
        Ok(Activation::new(columns.len(), info.hidden, info.dtype, Bytes::from(bytes))?)
    }

    /// The arrays to evaluate so that these rows' caches are filled.
    pub(super) fn states_of(&self, rows: &[Row], chosen: &[usize]) -> Vec<Array> {
        let caches = chosen.iter().filter_map(|place| self.caches.of(rows[*place].sequence));
        caches.flat_map(|cache| cache.state().cloned()).collect()
    }
}

/// These columns of `[1, tokens, width]`. The same array when it is all of them, a slice when they follow each other.
pub(super) fn gathered(device: &Device, vectors: &Array, columns: &[i32]) -> Result<Array, Error> {
    let (tokens, width) = (vectors.dim(1), vectors.dim(2));
    let first = columns.first().copied().unwrap_or(0);
    let count = columns.len() as i32;
    if (first..).zip(columns).all(|(expected, column)| expected == *column) {
        return match (first, count) == (0, tokens) {
            true => Ok(vectors.clone()),
            false => device.slice(vectors, &[0, first, 0], &[1, first + count, width]),
        };
    }
    let columns: Vec<u32> = columns.iter().map(|column| column.unsigned_abs()).collect();
    device.take(vectors, &Array::from_u32(&columns, &[count])?, 1)
}
