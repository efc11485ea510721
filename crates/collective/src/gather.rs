//! A sum on its way in: its pieces, and what was counted along with it.

use crate::Slices;
use bytes::{Bytes, BytesMut};
use mlxnode_compute::{Sum, Tally};
use std::collections::BTreeSet;
use std::ops::Range;

/// The sum of one step, as far as it is here.
#[derive(Debug)]
pub(crate) struct Gather {
    step: u64,
    values: BytesMut,
    /// Where pieces begin that are not here yet.
    missing: BTreeSet<usize>,
}

impl Gather {
    /// Room for the sum of `step`.
    pub(crate) fn new(step: u64, slices: &Slices, members: usize) -> Self {
        let missing =
            (0..members).flat_map(|member| slices.chunks(member)).map(|chunk| chunk.start).collect();
        Self { step, values: BytesMut::zeroed(slices.values() * 4), missing }
    }

    pub(crate) fn step(&self) -> u64 {
        self.step
    }

    /// Takes a piece, whose length fits; false when it was here before.
    pub(crate) fn accept(&mut self, chunk: &Range<usize>, values: &Bytes) -> bool {
        let is_new = self.missing.remove(&chunk.start);
        if is_new {
            self.values[chunk.start * 4..chunk.end * 4].copy_from_slice(values);
        }
        is_new
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// The sum. Only when it is complete.
    pub(crate) fn finish(self, tally: Tally) -> Sum {
        Sum { step: self.step, values: self.values.freeze(), tally }
    }
}
