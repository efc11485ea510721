//! Embeddings of groups of tokens: LongCat's "n-gram embedding", which looks up a token together with those before it.

use crate::layout::{ModuleKind, Push};

/// Tables beside the token embedding. Each group size from 2 to `longest` has `splits` tables, in which the group's number, counted in the
/// vocabulary's size and taken modulo the table's rows, names a narrow vector. Projections bring these to the hidden vectors' width; they
/// are added to the token's embedding, and all is divided by how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NgramsSpec {
    /// Rows of the first table; each next one has two more, and all one besides.
    pub rows: usize,
    /// Tokens in the longest group, at least 2.
    pub longest: usize,
    /// Tables for each group size.
    pub splits: usize,
}

impl NgramsSpec {
    /// How many tables.
    pub fn tables(&self) -> usize {
        self.splits * (self.longest - 1)
    }

    /// Rows of table `index`.
    pub fn rows_of(&self, index: usize) -> usize {
        self.rows + 2 * index + 1
    }

    /// Its modules on the first stage of a model of hidden vectors of width `hidden`.
    pub(crate) fn modules(&self, hidden: usize, push: &mut Push<'_>) {
        let width = hidden / self.tables();
        for index in 0..self.tables() {
            let kind = ModuleKind::Embedding { rows: self.rows_of(index), width };
            push(&format!("ngram_embeddings.embedders.{index}"), kind);
            let kind = ModuleKind::Linear { inputs: width, outputs: hidden, bias: false };
            push(&format!("ngram_embeddings.post_projs.{index}"), kind);
        }
    }
}
