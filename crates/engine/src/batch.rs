//! What goes through a layer range at once.

use crate::caches::SequenceCache;
use mlxnode_mlx::{Array, Dtype, Result};

/// Consecutive tokens of one or several sequences, one sequence after the other along the token axis: hidden vectors are
/// `[1, tokens of all rows, hidden]`.
///
/// What works on single tokens (projections, experts, norms, the head) works on all rows at once, so that a weight is read once
/// for all of them. What looks across tokens works row by row, each on its own cache: rows may differ in length, in position and
/// in kind (a chunk of a prompt beside single tokens). Sequences that run together for a while share a row and a cache, a lane each.
/// A sequence's result does not depend on the others.
pub(crate) struct Batch<'a> {
    /// The sequences, in the order of their tokens. At least one.
    pub(crate) rows: Vec<Row<'a>>,
    /// The positions of the tokens of the first rows, `[n]`, which have one for each sequence: what they need alike can be done for
    /// them at once.
    pub(crate) positions: Option<Array>,
    /// Keys and values as the last layer projected them that projects for later ones, `[1, tokens of all rows, heads * head_dim]`.
    pub(crate) projected: Vec<Array>,
}

/// One sequence's part of a batch; or that of several, whose caches lie side by side.
pub(crate) struct Row<'a> {
    /// How many tokens of it go through; at least one, and just one of each where there are several sequences.
    pub(crate) tokens: i32,
    /// What its layers remember of the tokens before.
    pub(crate) cache: &'a mut SequenceCache,
}

impl Row<'_> {
    /// How much of the token axis it takes.
    pub(crate) fn span(&self) -> i32 {
        self.tokens * self.cache.lanes() as i32
    }
}

impl<'a> Batch<'a> {
    /// Several sequences, those with one token first.
    pub(crate) fn of(rows: Vec<Row<'a>>) -> Result<Self> {
        let singles = rows.iter().take_while(|row| row.tokens == 1);
        let positions: Vec<u8> =
            singles.flat_map(|row| row.cache.lengths()).flat_map(i32::to_le_bytes).collect();
        let count = positions.len() / size_of::<i32>();
        let positions = match count > 1 {
            true => Some(Array::from_bytes(&positions, &[count as i32], Dtype::I32)?),
            false => None,
        };
        Ok(Self { rows, positions, projected: Vec::new() })
    }

    /// One sequence by itself.
    pub(crate) fn single(cache: &'a mut SequenceCache, tokens: i32) -> Self {
        Self { rows: vec![Row { tokens, cache }], positions: None, projected: Vec::new() }
    }
}
