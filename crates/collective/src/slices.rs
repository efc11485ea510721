//! Which member adds up which part of the gradient, and the pieces in which it travels.

use std::ops::Range;

/// Values of one frame: 1 MiB of f32.
pub const CHUNK_VALUES: usize = (1 << 20) / 4;

/// A vector cut into one slice per member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slices {
    values: usize,
    members: usize,
}

impl Slices {
    /// Of `values` numbers among `members`, of whom there is at least one.
    pub fn new(values: usize, members: usize) -> Self {
        Self { values, members: members.max(1) }
    }

    /// All of them.
    pub fn values(&self) -> usize {
        self.values
    }

    /// What `member` adds up, in values.
    pub fn slice(&self, member: usize) -> Range<usize> {
        let border = |member: usize| {
            // Through u128: a product of two sizes may not fit one.
            (self.values as u128 * member.min(self.members) as u128 / self.members as u128) as usize
        };
        border(member)..border(member + 1)
    }

    /// The pieces of a slice, in order.
    pub fn chunks(&self, member: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let slice = self.slice(member);
        let end = slice.end;
        slice.step_by(CHUNK_VALUES).map(move |start| start..end.min(start + CHUNK_VALUES))
    }

    /// Whose piece begins at `offset`, and how long it is; `None` when none begins there.
    pub fn chunk_at(&self, offset: usize) -> Option<(usize, Range<usize>)> {
        let member = (0..self.members).find(|&member| self.slice(member).contains(&offset))?;
        let slice = self.slice(member);
        let begins = (offset - slice.start).is_multiple_of(CHUNK_VALUES);
        begins.then(|| (member, offset..slice.end.min(offset + CHUNK_VALUES)))
    }

    /// How many pieces there are in all.
    pub fn count(&self) -> usize {
        (0..self.members).map(|member| self.slice(member).len().div_ceil(CHUNK_VALUES)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_pieces_cover_all_values_once() {
        for values in [0, 1, 2, 7, 1000, CHUNK_VALUES, 3 * CHUNK_VALUES + 5] {
            for members in 1..=8 {
                let slices = Slices::new(values, members);
                let chunks: Vec<_> = (0..members).flat_map(|member| slices.chunks(member)).collect();
                assert_eq!(chunks.len(), slices.count());
                let mut end = 0;
                for chunk in chunks {
                    assert_eq!(chunk.start, end);
                    assert!(!chunk.is_empty() && chunk.len() <= CHUNK_VALUES);
                    assert_eq!(slices.chunk_at(chunk.start).map(|found| found.1), Some(chunk.clone()));
                    end = chunk.end;
                }
                assert_eq!(end, values);
            }
        }
        let slices = Slices::new(10, 3);
        assert_eq!([slices.chunk_at(0), slices.chunk_at(3)], [Some((0, 0..3)), Some((1, 3..6))]);
        assert_eq!([slices.chunk_at(1), slices.chunk_at(10)], [None, None]);
    }
}
