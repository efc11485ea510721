//! Is a micro-batch one that a stage can do?

use super::EngineStage;
use mlxnode_compute::{Row, StageError, StepInput};

impl EngineStage {
    /// Is the row one that this stage can do?
    pub(super) fn check_row(&self, row: &Row, before: &[Row]) -> Result<(), StageError> {
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
        let end = row.position.saturating_add(row.width());
        if end > limit {
            return Err(StageError::Full { tokens: end, limit });
        }
        let may_guess = row.sample && row.tokens.len() == 1 && sequence.may_guess;
        if !row.guesses.is_empty() && (!may_guess || row.guesses.len() > Row::MOST_GUESSES) {
            return Err(StageError::Input(format!("{:?} may not have these guesses", row.sequence)));
        }
        match row.tokens.iter().chain(&row.guesses).find(|token| **token as usize >= info.vocabulary) {
            Some(token) => Err(StageError::Token { token: *token, vocabulary: info.vocabulary }),
            None => Ok(()),
        }
    }

    /// Is the input what this stage takes for so many tokens?
    pub(super) fn check_input(&self, input: &StepInput, tokens: usize) -> Result<(), StageError> {
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
