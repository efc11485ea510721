//! Rows of tokens that go through the model together.

use crate::data::{Dataset, Row, Sequence};
use std::ops::Range;

/// mlx-lm's: rows are filled up to one more than a multiple of this, so that few different shapes are computed.
pub(super) const PAD_TO: usize = 32;

/// Rows that are computed at once: ids are `[rows, width]`, filled up with 0. Inputs are all columns but the last, targets all but the
/// first.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// The rows.
    pub rows: Vec<BatchRow>,
    /// Tokens of a row with what fills it up.
    pub width: usize,
    /// The first half of the rows is chosen answers, the second half the rejected ones of the same prompts.
    pub is_preference: bool,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchRow {
    /// Its tokens, not filled up.
    pub tokens: Vec<u32>,
    /// Which positions, from 1 on, count as targets. As mlx-lm does it, the first position behind the row may be among them.
    pub counted: Vec<Range<u32>>,
    /// Lengths of the rows of the data set that were put together; one, unless rows are packed.
    pub segments: Vec<u32>,
    /// Which rows of the data set these are, from 0.
    pub numbers: Vec<u32>,
}

/// Rows of a data set that make a batch: for each row of the batch those that are put together there.
pub type Block = Vec<Vec<u32>>;

impl MicroBatch {
    /// The batch of these rows. Rows of the block that the data set does not have are left out. With `counts_padding` the first
    /// position behind a row counts, if there is one: mlx-lm's slip.
    pub(super) fn of(dataset: &Dataset, block: &Block, max_seq_length: usize, counts_padding: bool) -> Self {
        let (mut rows, mut rejected) = (Vec::with_capacity(block.len()), Vec::new());
        for numbers in block {
            let of_dataset = || numbers.iter().filter_map(|number| Some((*number, dataset.row(*number)?)));
            rows.push(BatchRow::joined(of_dataset().map(|(number, row)| (number, row.sequence()))));
            if dataset.is_preference() {
                let worse = of_dataset().filter_map(|(number, row)| match row {
                    Row::Pair { rejected, .. } => Some((number, rejected)),
                    Row::Single(_) => None,
                });
                rejected.push(BatchRow::joined(worse));
            }
        }
        let is_preference = !rejected.is_empty();
        rows.append(&mut rejected);
        let longest = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let width = width(longest, max_seq_length);
        if counts_padding {
            for row in &mut rows {
                let length = row.tokens.len();
                if let Some(last) = row.counted.last_mut().filter(|last| last.end as usize == length)
                    && length < width
                {
                    last.end += 1;
                }
            }
        }
        Self { rows, width, is_preference }
    }

    /// Ids as the model gets them, row by row, `[rows, width]`.
    pub fn ids(&self) -> Vec<i32> {
        let mut ids = vec![0; self.rows.len() * self.width];
        for (row, places) in self.rows.iter().zip(ids.chunks_mut(self.width.max(1))) {
            for (place, token) in places.iter_mut().zip(&row.tokens) {
                *place = token.cast_signed();
            }
        }
        ids
    }

    /// 1 for each target that counts and 0 for the others, `[rows, width - 1]`.
    pub fn mask(&self) -> Vec<f32> {
        let columns = self.width.saturating_sub(1);
        let mut mask = vec![0.0; self.rows.len() * columns];
        for (row, places) in self.rows.iter().zip(mask.chunks_mut(columns.max(1))) {
            for range in &row.counted {
                let (start, end) = (range.start.max(1) as usize, (range.end as usize).min(self.width));
                if start < end {
                    places[start - 1..end - 1].fill(1.0);
                }
            }
        }
        mask
    }

    /// How many targets count. None at all is possible: rows whose answers were cut off.
    pub fn counted_tokens(&self) -> u64 {
        let in_row = |row: &BatchRow| -> u64 {
            row.counted.iter().map(|range| u64::from(range.end - range.start)).sum()
        };
        self.rows.iter().map(in_row).sum()
    }

    /// The rows of the data set that are in it, for messages.
    pub fn row_numbers(&self) -> Vec<u32> {
        let mut numbers: Vec<u32> = self.rows.iter().flat_map(|row| row.numbers.iter().copied()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}

impl BatchRow {
    fn joined<'a>(sequences: impl Iterator<Item = (u32, &'a Sequence)>) -> Self {
        let mut row =
            Self { tokens: Vec::new(), counted: Vec::new(), segments: Vec::new(), numbers: Vec::new() };
        for (number, sequence) in sequences {
            let start = row.tokens.len() as u32;
            row.tokens.extend(&sequence.tokens);
            // The first token of a row has none before it to be predicted from.
            let inside = sequence.counted.iter().map(|range| range.start.max(1) + start..range.end + start);
            row.counted.extend(inside.filter(|range| range.start < range.end));
            row.segments.push(sequence.tokens.len() as u32);
            row.numbers.push(number);
        }
        row
    }
}

/// How wide a batch is whose longest row has so many tokens.
fn width(longest: usize, max_seq_length: usize) -> usize {
    (1 + PAD_TO * longest.div_ceil(PAD_TO)).min(max_seq_length)
}
