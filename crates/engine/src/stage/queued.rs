//! The step after this one, queued before the host reads this one's tokens, when a stage is the whole model.
//!
//! The next call finds its tokens done, or takes them back when it asks for something else.

use super::drawing::{Drawn, Tokened, Wanted};
use super::sequence::{Part, Sequence, Tokens, ids};
use super::{EngineStage, device_error};
use crate::draws::Draws;
use mlxnode_compute::{Row, RowOutput, SequenceId, StageError};
use mlxnode_mlx::Array;
use std::collections::HashMap;

/// The step of the tokens that were sampled last; the caches hold it already.
pub(super) struct Queued {
    rows: Vec<QueuedRow>,
    /// The tokens that were drawn after it.
    pub(super) draws: Draws,
    /// The hidden vectors, for rows whose draw has to wait for the token.
    pub(super) hidden: Array,
}

struct QueuedRow {
    sequence: SequenceId,
    /// The token that went through.
    token: u32,
    place: Place,
}

/// Where the next token of a queued row comes from.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// A column of the draws.
    Drawn(usize),
    /// Not drawn yet: a column of the hidden vectors.
    Hidden(i32),
}

/// A column that nobody asks for.
const NOBODY: SequenceId = SequenceId(u64::MAX);

/// What the call before computed already.
#[derive(Default)]
pub(super) struct Served {
    pub(super) queued: Option<Queued>,
    pub(super) places: HashMap<SequenceId, Place>,
    /// Whose each column of the draws is.
    pub(super) drawn: Vec<SequenceId>,
    /// Rows whose draw had to wait, and their columns of the hidden vectors.
    pub(super) late: Vec<(SequenceId, i32)>,
}

/// What was queued, before the tokens are known that went through.
pub(super) struct Next {
    pub(super) drawn: Drawn,
    pub(super) late: Vec<(SequenceId, i32)>,
    pub(super) hidden: Array,
}

impl EngineStage {
    /// Takes what the call before queued: for the rows that ask for exactly that. The others' tokens are taken back.
    pub(super) fn take_served(
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
    pub(super) fn take_back(&mut self, id: SequenceId, advanced: usize) -> Result<(), StageError> {
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

    /// Is the next step of a sequence queued?
    pub(super) fn is_queued(&self, id: SequenceId) -> bool {
        self.queued.as_ref().is_some_and(|queued| queued.rows.iter().any(|row| row.sequence == id))
    }

    /// Takes back all that was queued.
    pub(super) fn drop_queued(&mut self) -> Result<(), StageError> {
        let rows = self.queued.take().map(|queued| queued.rows).unwrap_or_default();
        rows.iter().try_for_each(|row| self.take_back(row.sequence, 0))
    }

    /// May another token of it be queued after the one that is drawn now?
    pub(super) fn goes_on(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| {
            sequence.sampling().is_some()
                && sequence.index() + 1 < sequence.max_tokens as u64
                && sequence.position < self.options.context_tokens
        })
    }

    /// Queues the step of the tokens that are drawn now, when this stage is the whole model, with the chunks that ride along.
    pub(super) fn queue_next(
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
        is_well
            && self.goes_on(id)
            && !self.guesses_for(id)
            && self.caches.of(id).is_some_and(|cache| cache.can_undo_next())
    }

    /// Remembers what was queued, now that the tokens are known that went through.
    pub(super) fn keep(&mut self, next: Next, tokened: &Tokened) -> Result<(), StageError> {
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
}
