//! What goes through a layer range at once.

use crate::caches::SequenceCache;
use crate::residual_blocks::ResidualBlocks;
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
    /// What a layer hands on to later ones, `[1, tokens of all rows, ..]`: keys and values as the last layer projected them that
    /// projects for later ones, or the first layer's values (RWKV-7).
    pub(crate) projected: Vec<Array>,
    /// What blocks of layers before added, in a family that mixes over them.
    pub(crate) blocks: ResidualBlocks,
    /// All rows are as long as each other, begin here and end here: what looks across tokens may work on all of them at once, and need
    /// keep nothing.
    pub(crate) abreast: bool,
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
        let blocks = ResidualBlocks::default();
        Ok(Self { rows, positions, projected: Vec::new(), blocks, abreast: false })
    }

    /// Several whole sequences, which are not continued.
    pub(crate) fn whole(rows: Vec<Row<'a>>) -> Self {
        let abreast = rows.windows(2).all(|pair| pair[0].tokens == pair[1].tokens);
        let blocks = ResidualBlocks::default();
        Self { rows, positions: None, projected: Vec::new(), blocks, abreast }
    }

    /// One sequence by itself.
    pub(crate) fn single(cache: &'a mut SequenceCache, tokens: i32) -> Self {
        let rows = vec![Row { tokens, cache }];
        let blocks = ResidualBlocks::default();
        Self { rows, positions: None, projected: Vec::new(), blocks, abreast: false }
    }
}
