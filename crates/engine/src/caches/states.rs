//! The states of a recurrent mixer: arrays that are replaced at each step, such as the last inputs of a convolution.

use super::planes::copied;
use mlxnode_mlx::{Array, Device, Result};

/// Arrays of a fixed size, whatever the number of tokens; none before the first token. Their meaning is the mixer's.
///
/// The states before the last step are kept as well, so that a step that was queued too early can be undone.
#[derive(Clone, Default)]
pub(crate) struct States {
    now: Snapshot,
    before: Option<Snapshot>,
}

/// The states after some tokens.
#[derive(Clone, Default)]
struct Snapshot {
    arrays: Vec<Array>,
    tokens: i32,
}

impl States {
    /// The arrays, in the mixer's order.
    pub(crate) fn arrays(&self) -> &[Array] {
        &self.now.arrays
    }

    /// Replaces them after `tokens` more tokens.
    pub(crate) fn replace(&mut self, arrays: Vec<Array>, tokens: i32) {
        let next = Snapshot { arrays, tokens: self.now.tokens + tokens };
        self.before = Some(std::mem::replace(&mut self.now, next));
    }

    /// What a file held, after `tokens` tokens.
    pub(crate) fn of(arrays: Vec<Array>, tokens: i32) -> Self {
        Self { now: Snapshot { arrays, tokens }, before: None }
    }

    /// Copies of the arrays as they were after `tokens` tokens, which share no memory with these; None when that was before the last
    /// step. None at all when there are none.
    pub(crate) fn copied_at(&self, device: &Device, tokens: i32) -> Result<Option<Vec<Array>>> {
        let snapshot = match &self.before {
            Some(before) if before.tokens == tokens => before,
            _ if self.now.tokens == tokens || self.now.arrays.is_empty() => &self.now,
            _ => return Ok(None),
        };
        snapshot.arrays.iter().map(|array| copied(device, array)).collect::<Result<_>>().map(Some)
    }

    /// Can all tokens from position `tokens` on be forgotten?
    pub(crate) fn can_truncate(&self, tokens: i32) -> bool {
        tokens <= 0
            || tokens >= self.now.tokens
            || self.before.as_ref().is_some_and(|before| before.tokens == tokens)
    }

    /// Forgets all tokens from position `tokens` on, when [`Self::can_truncate`].
    pub(crate) fn truncate(&mut self, tokens: i32) {
        if tokens <= 0 {
            *self = Self::default();
        } else if tokens < self.now.tokens
            && let Some(before) = self.before.take_if(|before| before.tokens == tokens)
        {
            self.now = before;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_mlx::Dtype;

    #[test]
    fn the_last_step_can_be_undone_and_no_older_one() {
        let state = |value: f32| vec![Array::scalar(value, Dtype::F32).unwrap()];
        let value = |states: &States| states.arrays()[0].to_f32().unwrap()[0];
        let mut states = States::default();
        assert!(states.arrays().is_empty());
        states.replace(state(1.0), 5);
        states.replace(state(2.0), 1);
        assert!(states.can_truncate(5) && states.can_truncate(6) && !states.can_truncate(4));
        states.truncate(5);
        assert_eq!(value(&states), 1.0);
        states.replace(state(3.0), 2);
        assert!(!states.can_truncate(6));
        states.truncate(0);
        assert!(states.arrays().is_empty());
    }
}
