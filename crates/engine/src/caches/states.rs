//! The states of a recurrent mixer: arrays that are replaced at each step, such as the last inputs of a convolution.

use super::lanes::{are_alike, runs};
use super::planes::{copied, lane_of};
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

    /// Copies of a lane's arrays as they were after `tokens` tokens of the longest one, which share no memory with these; None when
    /// that was before the last step.
    pub(crate) fn copied_at(&self, device: &Device, tokens: i32, lane: i32) -> Result<Option<Vec<Array>>> {
        let snapshot = match &self.before {
            Some(before) if before.tokens == tokens => before,
            _ if self.now.tokens == tokens || self.now.arrays.is_empty() => &self.now,
            _ => return Ok(None),
        };
        let copies = snapshot.arrays.iter().map(|array| copied(device, &lane_of(device, array, lane)?));
        copies.collect::<Result<_>>().map(Some)
    }

    /// Can all tokens from position `tokens` on be forgotten?
    pub(crate) fn can_truncate(&self, tokens: i32) -> bool {
        tokens <= 0
            || tokens >= self.now.tokens
            || self.before.as_ref().is_some_and(|before| before.tokens == tokens)
    }

    /// Can lanes of both lie in one?
    pub(super) fn can_join(&self, other: &Self) -> bool {
        let before = |states: &Self| states.before.as_ref().map_or(0, |before| before.arrays.len());
        self.now.can_join(&other.now) && before(self) == before(other)
    }

    /// States of these lanes, whose sequences have these numbers of tokens: the lanes follow each other along the first axis.
    pub(super) fn of_lanes(device: &Device, parts: &[(&Self, &[usize])], lengths: &[i32]) -> Result<Self> {
        let snapshots: Vec<_> = parts.iter().map(|(states, lanes)| (&states.now, *lanes)).collect();
        let mut now = Snapshot::of_lanes(device, &snapshots)?;
        let befores: Option<Vec<_>> =
            parts.iter().map(|(states, lanes)| Some((states.before.as_ref()?, *lanes))).collect();
        let mut before = befores.map(|befores| Snapshot::of_lanes(device, &befores)).transpose()?;
        if let (false, [tokens]) = (now.arrays.is_empty(), lengths) {
            // A lane's count is its own again; the step before took up as many tokens in all lanes.
            let taken = now.tokens - before.as_ref().map_or(0, |before| before.tokens);
            now.tokens = *tokens;
            before.iter_mut().for_each(|before| before.tokens = tokens - taken);
        }
        Ok(Self { now, before })
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

impl Snapshot {
    fn can_join(&self, other: &Self) -> bool {
        let mut pairs = self.arrays.iter().zip(&other.arrays);
        self.arrays.len() == other.arrays.len() && pairs.all(|(one, other)| are_alike(one, other, 0))
    }

    /// Counted as the longest counts.
    fn of_lanes(device: &Device, parts: &[(&Self, &[usize])]) -> Result<Self> {
        let Some((first, _)) = parts.first() else { return Ok(Self::default()) };
        let lanes_of = |index: usize| {
            let mut pieces = Vec::new();
            for (snapshot, lanes) in parts {
                let Some(array) = snapshot.arrays.get(index) else { continue };
                for (start, length) in runs(lanes) {
                    pieces.push(device.slice_axis(array, 0, start as i32, (start + length) as i32, 1)?);
                }
            }
            // A copy even of one piece: it must not keep the other lanes in memory.
            match pieces.as_slice() {
                [only] => {
                    let room = device.zeros(only.shape(), only.dtype())?;
                    device.slice_update(&room, only, &vec![0; only.shape().len()], only.shape())
                }
                _ => device.concatenate(&pieces, 0),
            }
        };
        let arrays = (0..first.arrays.len()).map(lanes_of).collect::<Result<_>>()?;
        Ok(Self { arrays, tokens: parts.iter().map(|(snapshot, _)| snapshot.tokens).max().unwrap_or(0) })
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
