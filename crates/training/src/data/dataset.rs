//! Rows as token ids, with what counts in the loss.

use std::ops::Range;

/// One text as the model sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, at least one.
    pub tokens: Vec<u32>,
    /// Positions that count as targets, ascending, apart, from 1 on.
    pub counted: Vec<Range<u32>>,
}

/// A row of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Row {
    /// A text to learn.
    Single(Sequence),
    /// A better and a worse answer to one prompt.
    Pair {
        /// The better one.
        chosen: Sequence,
        /// The worse one.
        rejected: Sequence,
    },
}

/// All rows of one set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    rows: Vec<Row>,
    /// How many fields each row had.
    fields: Vec<u32>,
    cut: Cut,
}

/// What did not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Rows that were longer than the limit.
    pub rows: u64,
    /// Tokens that were cut off, of all those.
    pub tokens: u64,
    /// The longest row, in tokens before it was cut.
    pub longest: u64,
    /// Rows in which nothing counts any more: their answers lie behind the limit.
    pub without_targets: u64,
}

impl Sequence {
    /// Cuts it to so many tokens and says how many went.
    pub(super) fn cut(&mut self, most: usize) -> usize {
        let gone = self.tokens.len().saturating_sub(most);
        self.tokens.truncate(most);
        let end = u32::try_from(self.tokens.len()).unwrap_or(u32::MAX);
        for range in &mut self.counted {
            range.end = range.end.min(end);
        }
        self.counted.retain(|range| range.start < range.end);
        gone
    }
}

impl Row {
    /// The text, or the better answer.
    pub fn sequence(&self) -> &Sequence {
        match self {
            Self::Single(sequence) => sequence,
            Self::Pair { chosen, .. } => chosen,
        }
    }

    fn sequences_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        let (one, other) = match self {
            Self::Single(sequence) => (sequence, None),
            Self::Pair { chosen, rejected } => (chosen, Some(rejected)),
        };
        std::iter::once(one).chain(other)
    }

    fn longest(&self) -> usize {
        match self {
            Self::Single(sequence) => sequence.tokens.len(),
            Self::Pair { chosen, rejected } => chosen.tokens.len().max(rejected.tokens.len()),
        }
    }
}

impl Dataset {
    /// Adds a row, cut to `most` tokens; `fields` is how many fields it had.
    pub fn push(&mut self, mut row: Row, fields: usize, most: usize) {
        let longest = row.longest() as u64;
        let gone: usize = row.sequences_mut().map(|sequence| sequence.cut(most)).sum();
        if gone > 0 {
            self.cut.rows += 1;
            self.cut.tokens += gone as u64;
        }
        self.cut.longest = self.cut.longest.max(longest);
        if row.sequences_mut().all(|sequence| sequence.counted.is_empty()) {
            self.cut.without_targets += 1;
        }
        self.rows.push(row);
        self.fields.push(u32::try_from(fields).unwrap_or(u32::MAX));
    }

    /// Puts another set's rows behind these.
    pub fn append(&mut self, other: Self) {
        self.rows.extend(other.rows);
        self.fields.extend(other.fields);
        self.cut.rows += other.cut.rows;
        self.cut.tokens += other.cut.tokens;
        self.cut.longest = self.cut.longest.max(other.cut.longest);
        self.cut.without_targets += other.cut.without_targets;
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// A row.
    pub fn row(&self, number: u32) -> Option<&Row> {
        self.rows.get(number as usize)
    }

    /// Are the rows pairs of answers?
    pub fn is_preference(&self) -> bool {
        matches!(self.rows.first(), Some(Row::Pair { .. }))
    }

    /// What did not fit.
    pub fn cut(&self) -> Cut {
        self.cut
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.sequence().tokens.len() as u64).sum()
    }

    /// The length of each row, of pairs the longer one's, in tokens.
    pub(crate) fn lengths(&self) -> Vec<u32> {
        self.rows.iter().map(|row| u32::try_from(row.longest()).unwrap_or(u32::MAX)).collect()
    }

    pub(crate) fn fields(&self, number: u32) -> u32 {
        self.fields.get(number as usize).copied().unwrap_or(0)
    }
}
