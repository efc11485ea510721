//! Tokens of a step, drawn from hidden vectors: the greedy ones in one go.

use super::passes::gathered;
use super::sequence::{Sequence, Tokens};
use super::{EngineStage, device_error};
use crate::draws::Draws;
use mlxnode_compute::{Row, RowOutput, Sampled, SequenceId, StageError};
use mlxnode_mlx::{Array, Error};
use std::collections::HashMap;

/// Tokens to be drawn from hidden vectors, and whose.
pub(super) struct Wanted {
    pub(super) sequence: SequenceId,
    pub(super) column: i32,
}

/// Tokens that were drawn.
pub(super) struct Drawn {
    pub(super) draws: Draws,
    /// Whose, by column.
    pub(super) columns: Vec<SequenceId>,
    /// Those that could not be drawn.
    pub(super) failed: Vec<(SequenceId, StageError)>,
}

/// Tokens by sequence; None where the logits are not numbers.
pub(super) type Tokened = HashMap<SequenceId, Option<Sampled>>;

impl EngineStage {
    /// Queues draws after some of the hidden vectors. `more` holds the tokens that went through and that the host does not know yet.
    pub(super) fn draw(
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

    /// Puts the tokens into the rows' outputs.
    pub(super) fn hand_out(
        &mut self,
        rows: &[Row],
        outputs: &mut [Result<RowOutput, StageError>],
        tokened: &Tokened,
    ) {
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
}
