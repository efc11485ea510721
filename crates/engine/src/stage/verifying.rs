//! Guesses that went through: the last stage draws a token after each, and the first one that was not guessed is where they end.
//!
//! What is drawn is a function of logits, parameters, seed and position, so the tokens are those without guesses. Stages before the last
//! one learn with the next row, by its position, how many were right, and take the others back.

use super::passes::gathered;
use super::{EngineStage, device_error};
use crate::draws::Draws;
use mlxnode_compute::{Row, RowOutput, SequenceId, StageError};
use mlxnode_mlx::{Array, Error};

impl EngineStage {
    /// The row's guesses went through; which are right, the last stage knows.
    pub(super) fn leave_unsure(&mut self, row: &Row) {
        if let Some(sequence) = self.sequences.get_mut(&row.sequence) {
            sequence.unsure.clone_from(&row.guesses);
        }
    }

    /// The sequence goes on at `position`: guesses before it are right, the others are taken back.
    pub(super) fn settle(&mut self, id: SequenceId, position: usize) -> Result<(), StageError> {
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        if sequence.unsure.is_empty() {
            return Ok(());
        }
        let unsure = std::mem::take(&mut sequence.unsure);
        // A position that cannot be is refused where rows are checked.
        let right = position.checked_sub(sequence.position).filter(|right| *right <= unsure.len());
        let right = right.unwrap_or(0);
        sequence.advance(&unsure[..right])?;
        if right < unsure.len() {
            self.take_back(id, 0)?;
        }
        self.take_blocks(id)
    }

    /// Queues a draw after the row's token and one after each of its guesses; `end` is one past its last column of `hidden`.
    pub(super) fn verify(&mut self, row: &Row, hidden: &Array, end: i32) -> Result<Draws, StageError> {
        let count = row.guesses.len() as i32 + 1;
        self.activate([(row.sequence, count)].into_iter());
        let (device, decoder) = (&self.model.device, &self.model.decoder);
        let Some(sequence) = self.sequences.get_mut(&row.sequence) else { return Ok(Draws::default()) };
        let index = sequence.index();
        let Some(sampling) = sequence.sampling_mut() else { return Ok(Draws::default()) };
        let mut draw = || -> Result<Draws, Error> {
            let columns: Vec<i32> = (end - count..end).collect();
            let logits = decoder.logits(device, &gathered(device, hidden, &columns)?)?;
            if sampling.sampler.is_plainly_greedy() {
                return Draws::greedy(device, &logits);
            }
            let mut draws = Draws::default();
            for column in 0..count {
                let before = &row.guesses[..column as usize];
                let more = match before.is_empty() {
                    true => None,
                    false => Some(Array::from_u32(before, &[column])?),
                };
                let history = sampling.history(device, more.as_ref())?;
                let logits = device.slice(&logits, &[column, 0], &[column + 1, logits.dim(1)])?;
                let index = index + u64::from(column.unsigned_abs());
                draws.push(sampling.sampler.draw(device, logits, history.as_ref(), index)?);
            }
            draws.close(device)?;
            Ok(draws)
        };
        draw().map_err(device_error)
    }

    /// Reads what was drawn: as many tokens as guesses are right, and one more.
    pub(super) fn accept(
        &mut self,
        row: &Row,
        draws: &Draws,
        output: &mut Result<RowOutput, StageError>,
    ) -> Result<(), StageError> {
        let Ok(own) = output else { return Ok(()) };
        let mut drawn = draws.read(&self.model.device).map_err(device_error)?.into_iter();
        let Some(first) = drawn.next().flatten() else {
            *output = Err(StageError::NotANumber);
            return Ok(());
        };
        let mut token = first.token;
        for (guess, next) in row.guesses.iter().zip(drawn) {
            // Logits behind a right guess that are not numbers come again, and fail then.
            let (true, Some(next)) = (*guess == token, next) else { break };
            token = next.token;
            own.further.push(next);
        }
        let right = own.further.len();
        own.sampled = Some(first);
        self.leave_unsure(row);
        self.settle(row.sequence, row.end() + right)
    }
}
