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

use super::drawing::{Drawn, Tokened, Wanted};
use super::passes::Passed;
use super::queued::Served;
use super::sequence::{Purpose, Sequence};
use super::{EngineStage, device_error};
use mlxnode_compute::{BatchOutput, MicroBatch, Row, RowOutput, StageError, StepInput};
use mlxnode_mlx::Array;

/// Rows that need a pass now, and those that ride with the queued one.
struct Chosen {
    now: Vec<usize>,
    riding: Vec<usize>,
}

impl EngineStage {
    pub(super) fn run_rows(&mut self, batch: &MicroBatch) -> Result<BatchOutput, StageError> {
        let MicroBatch { rows, input } = batch;
        let mut outputs: Vec<Result<RowOutput, StageError>> = Vec::with_capacity(rows.len());
        for (place, row) in rows.iter().enumerate() {
            self.settle(row.sequence, row.position)?;
            outputs.push(self.check_row(row, &rows[..place]).map(|()| RowOutput::default()));
        }
        if outputs.iter().all(Result::is_err) {
            return Ok(BatchOutput { rows: outputs, activation: None });
        }
        self.check_input(input, batch.tokens())?;
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
            && rows
                .iter()
                .any(|row| row.sample && self.goes_on(row.sequence) && !self.guesses_for(row.sequence));
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
            for place in now {
                self.leave_unsure(&rows[place]);
            }
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
        let mut guessed = Vec::new();
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
                if !draws || outputs[*place].is_err() {
                    continue;
                }
                match row.guesses.is_empty() {
                    true => wanted.push(Wanted { sequence: row.sequence, column: *end - 1 }),
                    false => guessed.push((*place, self.verify(row, &passed.hidden, *end)?)),
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
            match wanted.is_empty() && guessed.is_empty() {
                // Waiting here keeps the queue of the device short.
                true => self.model.device.eval(&states).map_err(device_error)?,
                false => {
                    let verified = guessed.iter().flat_map(|(_, draws)| draws.arrays());
                    self.model.device.async_eval(verified.chain(&states)).map_err(device_error)?;
                    if !wanted.is_empty() {
                        let drawn = self.draw(&wanted, &passed.hidden, None)?;
                        self.model.device.async_eval(drawn.draws.arrays()).map_err(device_error)?;
                        all.push(drawn);
                    }
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
        for (place, draws) in guessed {
            self.accept(&rows[place], &draws, &mut outputs[place])?;
        }
        if let Some(next) = next {
            self.keep(next, &tokened)?;
        }
        Ok(())
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

    /// Checks the steps of a single sequence and queues them: its hidden vectors `[1, tokens, width]`, nothing drawn.
    pub(super) fn hidden(&mut self, batch: &MicroBatch) -> Result<Array, StageError> {
        let MicroBatch { rows, input } = batch;
        for row in rows {
            self.check_row(row, &[])?;
        }
        self.check_input(input, batch.tokens())?;
        self.drop_queued()?;
        for row in rows {
            if let Some(sequence) = self.sequences.get_mut(&row.sequence) {
                sequence.advance(&row.tokens)?;
            }
        }
        let all: Vec<usize> = (0..rows.len()).collect();
        Ok(self.pass_rows(rows, &all, input)?.hidden)
    }
}
