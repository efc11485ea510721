//! A micro-batch on its way through a layer range.
//!
//! On a stage that is the whole model a call has up to two passes: one over the rows whose result is asked for now and not there
//! yet, and one over the tokens that come next, which is queued before the host reads anything. A row whose next token was queued by
//! the call before needs no pass of its own; a chunk of a prompt after which nothing is drawn rides with the queued ones, so that
//! the weights are read once for both.
//!
//! ```text
//!  rows ──▶ queued by the call before? ── yes ──────────────┐
//!              └─ no ──▶ pass ──▶ draw ─────────────────────┴──▶ next pass, draw (queued) ──▶ read this call's tokens
//! ```

use super::sequence::{Part, Purpose, Sequence, Tokens, ids};
use super::{EngineStage, device_error};
use crate::batch::Batch;
use crate::draws::Draws;
use crate::model::Model;
use bytes::Bytes;
use mlxnode_compute::{
    Activation, BatchOutput, MicroBatch, Row, RowOutput, Sampled, SequenceId, StageError, StepInput,
};
use mlxnode_mlx::{Array, Dtype, Error};
use std::collections::HashMap;

/// The step of the tokens that were sampled last; the caches hold it already.
pub(super) struct Queued {
    rows: Vec<QueuedRow>,
    /// The tokens that were drawn after it.
    draws: Draws,
    /// The hidden vectors, for rows whose draw has to wait for the token.
    hidden: Array,
}

struct QueuedRow {
    sequence: SequenceId,
    /// The token that went through.
    token: u32,
    place: Place,
}

/// Where the next token of a queued row comes from.
#[derive(Clone, Copy)]
enum Place {
    /// A column of the draws.
    Drawn(usize),
    /// Not drawn yet: a column of the hidden vectors.
    Hidden(i32),
}

/// Parts after the layers.
struct Passed {
    /// `[1, tokens of all parts, width]`.
    hidden: Array,
    /// The first and one past the last column of each part.
    spans: Vec<(i32, i32)>,
    /// The parts in the order of their columns.
    order: Vec<usize>,
}

/// Tokens to be drawn from hidden vectors, and whose.
struct Wanted {
    sequence: SequenceId,
    column: i32,
}

/// Tokens that were drawn.
struct Drawn {
    draws: Draws,
    /// Whose, by column.
    columns: Vec<SequenceId>,
    /// Those that could not be drawn.
    failed: Vec<(SequenceId, StageError)>,
}

/// Tokens by sequence; None where the logits are not numbers.
type Tokened = HashMap<SequenceId, Option<Sampled>>;

impl EngineStage {
    pub(super) fn run_rows(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError> {
        let MicroBatch { rows, input } = batch;
        let mut outputs: Vec<Result<RowOutput, StageError>> = Vec::with_capacity(rows.len());
        for (place, row) in rows.iter().enumerate() {
            outputs.push(self.check_row(row, &rows[..place]).map(|()| RowOutput::default()));
        }
        if outputs.iter().all(Result::is_err) {
            return Ok(BatchOutput { rows: outputs, activation: None });
        }
        let tokens = rows.iter().map(|row| row.tokens.len()).sum();
        self.check_input(input, tokens)?;
        for (row, output) in rows.iter().zip(&mut outputs) {
            if output.is_ok()
                && let Some(sequence) = self.sequences.get_mut(&row.sequence)
                && let Err(error) = sequence.advance(&row.tokens)
            {
                *output = Err(error.into());
            }
        }

        let served = self.take_served(rows, &outputs)?;
        let (mut now, mut riding) = (Vec::new(), Vec::new());
        let goes_on = self.model.info().is_first()
            && self.model.info().is_last()
            && rows.iter().any(|row| row.sample && self.goes_on(row.sequence));
        for (place, row) in rows.iter().enumerate().filter(|(place, _)| outputs[*place].is_ok()) {
            if served.places.contains_key(&row.sequence) {
                continue;
            }
            let is_plain = self.sequences.get(&row.sequence).is_some_and(Sequence::is_plain);
            if goes_on && !row.sample && is_plain { &mut riding } else { &mut now }.push(place);
        }

        let passed = match now.is_empty() {
            true => None,
            false => Some(self.pass_rows(rows, &now, input)?),
        };
        if !self.model.info().is_last() {
            let activation = match &passed {
                Some(passed) => Some(self.activation(passed)?),
                None => None,
            };
            return Ok(BatchOutput { rows: outputs, activation });
        }
        self.finish(rows, &mut outputs, served, &Chosen { now, riding }, passed.as_ref())?;
        Ok(BatchOutput { rows: outputs, activation: None })
    }

    /// What the last stage makes of the rows.
    fn finish(
        &mut self,
        rows: &[Row],
        outputs: &mut [Result<RowOutput, StageError>],
        served: Served,
        chosen: &Chosen,
        passed: Option<&Passed>,
    ) -> Result<(), StageError> {
        let mut wanted = Vec::new();
        if let Some(passed) = passed {
            for (place, (start, end)) in chosen.now.iter().zip(&passed.spans) {
                let result = self.use_hidden(&rows[*place], passed, *start, *end);
                match result {
                    Ok(output) => outputs[*place] = Ok(output),
                    Err(error @ StageError::Device(_)) => return Err(error),
                    Err(error) => outputs[*place] = Err(error),
                }
                let row = &rows[*place];
                let draws =
                    row.sample && self.sequences.get(&row.sequence).is_some_and(|it| it.sampling().is_some());
                if draws && outputs[*place].is_ok() {
                    wanted.push(Wanted { sequence: row.sequence, column: *end - 1 });
                }
            }
        }
        // Three draws at most: what the call before drew, what it left to be drawn, and what this one's pass gives.
        let mut all = Vec::new();
        if let Some(queued) = served.queued {
            let late: Vec<Wanted> = served
                .late
                .iter()
                .map(|(sequence, column)| Wanted { sequence: *sequence, column: *column })
                .collect();
            if !late.is_empty() {
                all.push(self.draw(&late, &queued.hidden, None)?);
            }
            let failed = Vec::new();
            all.push(Drawn { draws: queued.draws, columns: served.drawn, failed });
        }
        if let Some(passed) = passed {
            let states: Vec<Array> = self.states_of(rows, &chosen.now);
            match wanted.is_empty() {
                // Waiting here keeps the queue of the device short.
                true => self.model.device.eval(&states).map_err(device_error)?,
                false => {
                    let drawn = self.draw(&wanted, &passed.hidden, None)?;
                    let arrays = drawn.draws.arrays().chain(&states);
                    self.model.device.async_eval(arrays).map_err(device_error)?;
                    all.push(drawn);
                }
            }
        }
        for drawn in &mut all {
            for (sequence, error) in drawn.failed.drain(..) {
                if let Some(place) = rows.iter().position(|row| row.sequence == sequence) {
                    outputs[place] = Err(error);
                }
            }
        }
        let next = self.queue_next(rows, outputs, &all, &chosen.riding)?;
        if next.is_none() && !chosen.riding.is_empty() {
            // Nothing to ride with after all.
            self.pass_rows(rows, &chosen.riding, &StepInput::Tokens)?;
            self.model.device.eval(&self.states_of(rows, &chosen.riding)).map_err(device_error)?;
        }
        let mut tokened = Tokened::new();
        for drawn in &all {
            let sampled = drawn.draws.read(&self.model.device).map_err(device_error)?;
            tokened.extend(drawn.columns.iter().copied().zip(sampled));
        }
        self.hand_out(rows, outputs, &tokened);
        if let Some(next) = next {
            self.keep(next, &tokened)?;
        }
        Ok(())
    }

    /// Puts the tokens into the rows' outputs.
    fn hand_out(&mut self, rows: &[Row], outputs: &mut [Result<RowOutput, StageError>], tokened: &Tokened) {
        for (row, output) in rows.iter().zip(outputs) {
            let Some(sampled) = tokened.get(&row.sequence).filter(|_| row.sample) else { continue };
            let Ok(own) = output else { continue };
            let Some(sampled) = sampled else {
                *output = Err(StageError::NotANumber);
                continue;
            };
            own.sampled = Some(sampled.clone());
            let Some(sequence) = self.sequences.get_mut(&row.sequence) else { continue };
            let position = sequence.position;
            let constraint = sequence.sampling_mut().and_then(|sampling| sampling.constraint.as_mut());
            if let Some(constraint) = constraint {
                match constraint.accept(position, sampled.token) {
                    Ok(is_complete) => own.is_complete = is_complete,
                    Err(error) => *output = Err(error.into()),
                }
            }
        }
    }

    /// Takes what the call before queued: for the rows that ask for exactly that. The others' tokens are taken back.
    fn take_served(
        &mut self,
        rows: &[Row],
        outputs: &[Result<RowOutput, StageError>],
    ) -> Result<Served, StageError> {
        let mut served = Served::default();
        let Some(queued) = self.queued.take() else { return Ok(served) };
        let asked: HashMap<SequenceId, &Row> = rows
            .iter()
            .zip(outputs)
            .filter(|(_, output)| output.is_ok())
            .map(|(row, _)| (row.sequence, row))
            .collect();
        served.drawn =
            vec![NOBODY; queued.rows.iter().filter(|row| matches!(row.place, Place::Drawn(_))).count()];
        for row in &queued.rows {
            let sequence = row.sequence;
            let is_next =
                asked.get(&sequence).is_some_and(|asked| asked.sample && asked.tokens == [row.token]);
            if !is_next {
                self.take_back(sequence, asked.get(&sequence).map_or(0, |asked| asked.tokens.len()))?;
                continue;
            }
            served.places.insert(sequence, row.place);
            match row.place {
                Place::Drawn(column) => {
                    if let Some(owner) = served.drawn.get_mut(column) {
                        *owner = sequence;
                    }
                }
                Place::Hidden(column) => served.late.push((sequence, column)),
            }
        }
        served.queued = Some(queued);
        Ok(served)
    }

    /// Cuts a sequence's cache back to where its caller believes it to be; `advanced` tokens of it are about to go through.
    fn take_back(&mut self, id: SequenceId, advanced: usize) -> Result<(), StageError> {
        let Some(sequence) = self.sequences.get(&id) else { return Ok(()) };
        let position = sequence.position.saturating_sub(advanced);
        let Some(mut cache) = self.caches.take(&self.model.device, id).map_err(device_error)? else {
            return Ok(());
        };
        let is_back = cache.truncate(i32::try_from(position).unwrap_or(i32::MAX));
        self.caches.insert(id, cache);
        match is_back {
            true => Ok(()),
            false => Err(StageError::Device("a queued step cannot be undone".to_owned())),
        }
    }

    /// May another token of it be queued after the one that is drawn now?
    fn goes_on(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| {
            sequence.sampling().is_some()
                && sequence.index() + 1 < sequence.max_tokens as u64
                && sequence.position < self.options.context_tokens
        })
    }

    /// Queues the step of the tokens that are drawn now, when this stage is the whole model, with the chunks that ride along.
    fn queue_next(
        &mut self,
        rows: &[Row],
        outputs: &[Result<RowOutput, StageError>],
        all: &[Drawn],
        riding: &[usize],
    ) -> Result<Option<Next>, StageError> {
        if !self.model.info().is_first() {
            return Ok(None);
        }
        let mut parts = Vec::new();
        for (source, drawn) in all.iter().enumerate() {
            let goes_on: Vec<bool> =
                drawn.columns.iter().map(|id| self.can_queue(*id, rows, outputs)).collect();
            if !goes_on.contains(&true) {
                continue;
            }
            let tokens = drawn.draws.tokens(&self.model.device).map_err(device_error)?;
            for (column, sequence) in (0..).zip(&drawn.columns) {
                if goes_on[column as usize] {
                    let tokens = Tokens::Drawn { of: tokens.clone(), source, column };
                    parts.push(Part { sequence: *sequence, tokens });
                }
            }
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let running = parts.len();
        for place in riding {
            let row = &rows[*place];
            parts.push(Part { sequence: row.sequence, tokens: Tokens::Known(row.tokens.clone()) });
        }
        let passed = self.pass(&parts, |model, order, batch| {
            let device = &model.device;
            model.decoder.embed(device, &ids(device, &parts, order)?, batch)
        })?;
        let (mut wanted, mut late) = (Vec::new(), Vec::new());
        let mut tokens = HashMap::new();
        for place in passed.order.iter().filter(|place| **place < running) {
            let (sequence, column) = (parts[*place].sequence, passed.spans[*place].0);
            let waits = self.sequences.get(&sequence).and_then(Sequence::sampling);
            if waits.is_some_and(|sampling| sampling.constraint.is_some()) {
                late.push((sequence, column));
                continue;
            }
            wanted.push(Wanted { sequence, column });
            tokens.insert(sequence, parts[*place].tokens.clone());
        }
        let drawn = self.draw(&wanted, &passed.hidden, Some(&tokens))?;
        let states = self.states_of(rows, riding);
        let hidden = late.first().map(|_| &passed.hidden);
        let arrays = drawn.draws.arrays().chain(&states).chain(hidden);
        self.model.device.async_eval(arrays).map_err(device_error)?;
        Ok(Some(Next { drawn, late, hidden: passed.hidden }))
    }

    fn can_queue(&self, id: SequenceId, rows: &[Row], outputs: &[Result<RowOutput, StageError>]) -> bool {
        let is_well = rows.iter().zip(outputs).any(|(row, output)| row.sequence == id && output.is_ok());
        is_well && self.goes_on(id) && self.caches.of(id).is_some_and(|cache| cache.can_undo_next())
    }

    /// Remembers what was queued, now that the tokens are known that went through.
    fn keep(&mut self, next: Next, tokened: &Tokened) -> Result<(), StageError> {
        let drawn = next.drawn.columns.iter().enumerate().map(|(column, id)| (*id, Place::Drawn(column)));
        let late = next.late.iter().map(|(id, column)| (*id, Place::Hidden(*column)));
        let places: Vec<(SequenceId, Place)> = drawn.chain(late).collect();
        let mut rows = Vec::with_capacity(places.len());
        for (sequence, place) in places {
            match tokened.get(&sequence) {
                Some(Some(sampled)) => rows.push(QueuedRow { sequence, token: sampled.token, place }),
                _ => self.take_back(sequence, 0)?,
            }
        }
        self.queued = Some(Queued { rows, draws: next.drawn.draws, hidden: next.hidden });
        Ok(())
    }

    /// Queues draws after some of the hidden vectors. `more` holds the tokens that went through and that the host does not know yet.
    fn draw(
        &mut self,
        wanted: &[Wanted],
        hidden: &Array,
        more: Option<&HashMap<SequenceId, Tokens>>,
    ) -> Result<Drawn, StageError> {
        let vocabulary = self.model.info().vocabulary;
        let (device, decoder) = (&self.model.device, &self.model.decoder);
        let mut failed = Vec::new();
        let (mut greedy, mut others) = (Vec::new(), Vec::new());
        for row in wanted {
            let sampling = self.sequences.get_mut(&row.sequence).and_then(Sequence::sampling_mut);
            let Some(sampling) = sampling else { continue };
            let allowed = match sampling.constraint.as_mut().map(|it| it.allowed(vocabulary)).transpose() {
                Ok(allowed) => allowed.transpose().map_err(device_error)?,
                Err(error) => {
                    failed.push((row.sequence, error.into()));
                    continue;
                }
            };
            match sampling.sampler.is_plainly_greedy() && allowed.is_none() {
                true => greedy.push(row),
                false => others.push((row, allowed)),
            }
        }
        let rows: Vec<&Wanted> = greedy.iter().copied().chain(others.iter().map(|(row, _)| *row)).collect();
        if rows.is_empty() {
            return Ok(Drawn { draws: Draws::default(), columns: Vec::new(), failed });
        }
        self.activate(rows.iter().map(|row| (row.sequence, 1)));
        let sequences = &mut self.sequences;
        let mut draw = || -> Result<Draws, Error> {
            let columns: Vec<i32> = rows.iter().map(|row| row.column).collect();
            let logits = decoder.logits(device, &gathered(device, hidden, &columns)?)?;
            let (count, first) = (rows.len() as i32, greedy.len() as i32);
            let cut = |from: i32, to: i32| match (from, to) == (0, count) {
                true => Ok(logits.clone()),
                false => device.slice(&logits, &[from, 0], &[to, logits.dim(1)]),
            };
            let mut draws = match first {
                0 => Draws::default(),
                _ => Draws::greedy(device, &cut(0, first)?)?,
            };
            for (column, (row, allowed)) in (first..).zip(&others) {
                let Some(sequence) = sequences.get_mut(&row.sequence) else { continue };
                let index = sequence.index() + u64::from(more.is_some());
                let Some(sampling) = sequence.sampling_mut() else { continue };
                let more = match more.and_then(|more| more.get(&row.sequence)) {
                    Some(Tokens::Drawn { of, column, .. }) => {
                        Some(device.slice(of, &[*column], &[*column + 1])?)
                    }
                    _ => None,
                };
                let history = sampling.history(device, more.as_ref())?;
                let logits = cut(column, column + 1)?;
                draws.push(sampling.sampler.draw_among(
                    device,
                    logits,
                    history.as_ref(),
                    index,
                    allowed.as_ref(),
                )?);
            }
            draws.close(device)?;
            Ok(draws)
        };
        let draws = draw().map_err(device_error)?;
        Ok(Drawn { draws, columns: rows.iter().map(|row| row.sequence).collect(), failed })
    }

    /// What is made of a row's own hidden vectors: scores, or its part of a vector.
    fn use_hidden(
        &mut self,
        row: &Row,
        passed: &Passed,
        start: i32,
        end: i32,
    ) -> Result<RowOutput, StageError> {
        let mut output = RowOutput::default();
        let (device, decoder) = (&self.model.device, &self.model.decoder);
        let Some(sequence) = self.sequences.get_mut(&row.sequence) else { return Ok(output) };
        if sequence.is_plain() {
            return Ok(output);
        }
        self.model.adapters.active.set_all(sequence.adapter);
        let hidden = &passed.hidden;
        let own = match (start, end) == (0, hidden.dim(1)) {
            true => hidden.clone(),
            false => device.slice(hidden, &[0, start, 0], &[1, end, hidden.dim(2)]).map_err(device_error)?,
        };
        if let Some(scoring) = &mut sequence.scoring {
            output.scores = scoring.score(device, decoder, &row.tokens, &own)?;
            if row.sample {
                sequence.scoring = None;
            }
        }
        if let Some(Purpose::Vector(sum)) = &mut sequence.purpose {
            sum.add(device, decoder, &own).map_err(device_error)?;
            if row.sample {
                output.embedding = sum.mean(device).map_err(device_error)?;
                let is_finite = |values: &Vec<f32>| values.iter().all(|value| value.is_finite());
                if !output.embedding.as_ref().is_some_and(is_finite) {
                    return Err(StageError::NotANumber);
                }
            }
        }
        Ok(output)
    }

    /// Rows through the layers.
    fn pass_rows(&mut self, rows: &[Row], chosen: &[usize], input: &StepInput) -> Result<Passed, StageError> {
        let part = |place: &usize| Part {
            sequence: rows[*place].sequence,
            tokens: Tokens::Known(rows[*place].tokens.clone()),
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
                    start += row.tokens.len() as i32;
                }
                self.pass(&parts, |model, order, _| {
                    let shape = [1, activation.tokens() as i32, activation.hidden() as i32];
                    let all = Array::from_bytes(activation.bytes(), &shape, activation.dtype().into())?;
                    let places = order.iter().map(|place| chosen[*place]);
                    let columns: Vec<i32> = places
                        .flat_map(|place| starts[place]..starts[place] + rows[place].tokens.len() as i32)
                        .collect();
                    gathered(&model.device, &all, &columns)
                })
            }
        }
    }

    /// Parts through the layers; `enter` makes what goes in, in the order that it gets.
    fn pass(
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
    fn activation(&self, passed: &Passed) -> Result<Activation, StageError> {
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
    fn states_of(&self, rows: &[Row], chosen: &[usize]) -> Vec<Array> {
        let caches = chosen.iter().filter_map(|place| self.caches.of(rows[*place].sequence));
        caches.flat_map(|cache| cache.state().cloned()).collect()
    }

    /// Checks the steps of a single sequence and queues them: its hidden vectors `[1, tokens, width]`, nothing drawn.
    pub(super) fn hidden(&mut self, batch: &MicroBatch) -> Result<Array, StageError> {
        let MicroBatch { rows, input } = batch;
        for row in rows {
            self.check_row(row, &[])?;
        }
        self.check_input(input, rows.iter().map(|row| row.tokens.len()).sum())?;
        self.drop_queued()?;
        for row in rows {
            if let Some(sequence) = self.sequences.get_mut(&row.sequence) {
                sequence.advance(&row.tokens)?;
            }
        }
        let all: Vec<usize> = (0..rows.len()).collect();
        Ok(self.pass_rows(rows, &all, input)?.hidden)
    }

    /// Takes back all that was queued.
    fn drop_queued(&mut self) -> Result<(), StageError> {
        let rows = self.queued.take().map(|queued| queued.rows).unwrap_or_default();
        rows.iter().try_for_each(|row| self.take_back(row.sequence, 0))
    }

    /// Is the row one that this stage can do?
    fn check_row(&self, row: &Row, before: &[Row]) -> Result<(), StageError> {
        let sequence = self.sequences.get(&row.sequence).ok_or(StageError::UnknownSequence(row.sequence))?;
        if before.iter().any(|other| other.sequence == row.sequence) {
            return Err(StageError::Input(format!("{:?} has two rows in one step", row.sequence)));
        }
        let (info, limit) = (self.model.info(), self.options.context_tokens);
        if row.position != sequence.position {
            return Err(StageError::Position { expected: sequence.position, actual: row.position });
        }
        if row.tokens.is_empty() {
            return Err(StageError::Input("a step needs at least one token".to_owned()));
        }
        if row.end() > limit {
            return Err(StageError::Full { tokens: row.end(), limit });
        }
        match row.tokens.iter().find(|token| **token as usize >= info.vocabulary) {
            Some(token) => Err(StageError::Token { token: *token, vocabulary: info.vocabulary }),
            None => Ok(()),
        }
    }

    /// Is the input what this stage takes for so many tokens?
    fn check_input(&self, input: &StepInput, tokens: usize) -> Result<(), StageError> {
        let info = self.model.info();
        match (input, info.is_first()) {
            (StepInput::Tokens, true) => Ok(()),
            (StepInput::Tokens, false) => {
                Err(StageError::Input(format!("layers {} take activations, not token ids", info.layers)))
            }
            (StepInput::Activation(_), true) => {
                Err(StageError::Input(format!("layers {} take token ids, not activations", info.layers)))
            }
            (StepInput::Activation(activation), false) => {
                let expected = (tokens, info.hidden, info.dtype);
                let actual = (activation.tokens(), activation.hidden(), activation.dtype());
                if expected == actual {
                    return Ok(());
                }
                Err(StageError::Input(format!(
                    "the activation is {} x {} of {:?}, but these layers take {} x {} of {:?}",
                    actual.0, actual.1, actual.2, expected.0, expected.1, expected.2
                )))
            }
        }
    }
}

/// A column that nobody asks for.
const NOBODY: SequenceId = SequenceId(u64::MAX);

/// What the call before computed already.
#[derive(Default)]
struct Served {
    queued: Option<Queued>,
    places: HashMap<SequenceId, Place>,
    /// Whose each column of the draws is.
    drawn: Vec<SequenceId>,
    /// Rows whose draw had to wait, and their columns of the hidden vectors.
    late: Vec<(SequenceId, i32)>,
}

/// Rows that need a pass now, and those that ride with the queued one.
struct Chosen {
    now: Vec<usize>,
    riding: Vec<usize>,
}

/// What was queued, before the tokens are known that went through.
struct Next {
    drawn: Drawn,
    late: Vec<(SequenceId, i32)>,
    hidden: Array,
}

/// These columns of `[1, tokens, width]`. The same array when it is all of them, a slice when they follow each other.
fn gathered(device: &mlxnode_mlx::Device, vectors: &Array, columns: &[i32]) -> Result<Array, Error> {
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
