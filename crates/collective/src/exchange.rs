//! One step between the members: the parts that come in for this one's slice, and the sums that come in for the others'.
//!
//! A piece is added up and sent on as soon as all its parts are here, so that the way there and the way back overlap.

use crate::gather::Gather;
use crate::{FrameError, MemberId, Slices};
use bytes::{Bytes, BytesMut};
use mlxnode_compute::{Partial, Sum, Tally, TreeNode, TreeSum, nodes_of};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ops::Range;

/// What does not change within a formation.
#[derive(Debug)]
pub(crate) struct Circle {
    /// In order.
    pub(crate) members: Vec<MemberId>,
    /// What each computes.
    pub(crate) runs: Vec<Range<u32>>,
    pub(crate) micro_batches: u32,
    pub(crate) slices: Slices,
    /// This member's place.
    pub(crate) me: usize,
}

impl Circle {
    fn nodes(&self, place: usize) -> Vec<TreeNode> {
        self.runs.get(place).map(|run| nodes_of(run, self.micro_batches)).unwrap_or_default()
    }

    /// The nodes that this member computes.
    pub(crate) fn my_nodes(&self) -> Vec<TreeNode> {
        self.nodes(self.me)
    }

    fn check_node(&self, from: usize, node: TreeNode) -> Result<(), FrameError> {
        if self.nodes(from).contains(&node) { Ok(()) } else { Err(FrameError::Node(node)) }
    }

    /// The piece at `offset`, which must be of the slice of `owner`.
    pub(crate) fn piece(
        &self,
        owner: Option<usize>,
        offset: usize,
        values: &Bytes,
    ) -> Result<Range<usize>, FrameError> {
        let (found, piece) = self.slices.chunk_at(offset).ok_or(FrameError::Offset(offset))?;
        if owner.is_some_and(|owner| owner != found) {
            return Err(FrameError::Offset(offset));
        }
        if values.len() != piece.len() * 4 {
            return Err(FrameError::Length { expected: piece.len() * 4, found: values.len() });
        }
        Ok(piece)
    }
}

/// A piece that was added up here: where it begins, and its values.
pub(crate) type Piece = (Range<usize>, Bytes);

/// What is here of one step.
#[derive(Debug)]
pub(crate) struct Exchange {
    step: u64,
    /// The pieces of this member's slice, by where they begin.
    pieces: BTreeMap<usize, TreeSum<Bytes>>,
    tallies: TreeSum<Tally>,
    /// Members that compute nothing of the step and have not come to it yet.
    expected_idle: BTreeSet<usize>,
    /// There as soon as it is needed.
    gather: Option<Gather>,
    contributed: bool,
}

impl Exchange {
    pub(crate) fn new(step: u64, circle: &Circle) -> Self {
        let tallies = TreeSum::new(circle.micro_batches);
        let runs = circle.runs.iter().enumerate();
        let idle = runs.filter(|(place, run)| run.is_empty() && *place != circle.me);
        let expected_idle = idle.map(|(place, _)| place).collect();
        Self { step, pieces: BTreeMap::new(), tallies, expected_idle, gather: None, contributed: false }
    }

    pub(crate) fn step(&self) -> u64 {
        self.step
    }

    pub(crate) fn contributed(&self) -> bool {
        self.contributed
    }

    /// A part of this member's slice; the piece's sum when it was the last one.
    pub(crate) fn part(
        &mut self,
        circle: &Circle,
        from: usize,
        node: TreeNode,
        offset: usize,
        values: Bytes,
    ) -> Result<Option<Piece>, FrameError> {
        circle.check_node(from, node)?;
        let piece = circle.piece(Some(circle.me), offset, &values)?;
        self.insert(circle, node, &piece, values)?;
        Ok(if self.contributed { self.whole(circle, piece) } else { None })
    }

    fn insert(
        &mut self,
        circle: &Circle,
        node: TreeNode,
        piece: &Range<usize>,
        values: Bytes,
    ) -> Result<(), FrameError> {
        let sums = self.pieces.entry(piece.start).or_insert_with(|| TreeSum::new(circle.micro_batches));
        match sums.insert(node, values, |left, right| Ok::<_, Infallible>(added(left, &right))) {
            Ok(true) => Ok(()),
            Ok(false) => Err(FrameError::Again { node, offset: piece.start }),
            Err(never) => match never {},
        }
    }

    /// Takes a piece's sum out, when it is complete, and keeps a copy for the whole.
    fn whole(&mut self, circle: &Circle, piece: Range<usize>) -> Option<Piece> {
        let values = self.pieces.get(&piece.start)?.whole()?.clone();
        self.pieces.remove(&piece.start);
        self.gather(circle).accept(&piece, &values);
        Some((piece, values))
    }

    fn gather(&mut self, circle: &Circle) -> &mut Gather {
        let step = self.step;
        self.gather.get_or_insert_with(|| Gather::new(step, &circle.slices, circle.members.len()))
    }

    /// What a member counted.
    pub(crate) fn tally(
        &mut self,
        circle: &Circle,
        from: usize,
        node: TreeNode,
        tally: Tally,
    ) -> Result<(), FrameError> {
        circle.check_node(from, node)?;
        match self.tallies.insert(node, tally, |left, right| Ok::<_, Infallible>(left.plus(right))) {
            Ok(true) => Ok(()),
            Ok(false) => Err(FrameError::Again { node, offset: 0 }),
            Err(never) => match never {},
        }
    }

    /// A member that computes nothing has come to the step.
    pub(crate) fn idle(&mut self, from: usize) -> Result<(), FrameError> {
        if self.expected_idle.remove(&from) { Ok(()) } else { Err(FrameError::Idle) }
    }

    /// The sum of a piece of another member's slice.
    pub(crate) fn sum(
        &mut self,
        circle: &Circle,
        from: usize,
        offset: usize,
        values: &Bytes,
    ) -> Result<(), FrameError> {
        let piece = circle.piece(Some(from), offset, values)?;
        if self.gather(circle).accept(&piece, values) {
            Ok(())
        } else {
            Err(FrameError::Again { node: TreeNode { start: 0, end: circle.micro_batches }, offset })
        }
    }

    /// This member's own parts, which are those of its run and as long as they should be; the pieces that are complete with them.
    pub(crate) fn contribute(
        &mut self,
        circle: &Circle,
        partials: &[Partial],
    ) -> Result<Vec<Piece>, FrameError> {
        self.contributed = true;
        for partial in partials {
            self.tally(circle, circle.me, partial.node, partial.tally)?;
            for piece in circle.slices.chunks(circle.me) {
                let values = partial.values.slice(piece.start * 4..piece.end * 4);
                self.insert(circle, partial.node, &piece, values)?;
            }
        }
        Ok(circle.slices.chunks(circle.me).filter_map(|piece| self.whole(circle, piece)).collect())
    }

    /// The sum of the step, when all of it is here.
    pub(crate) fn finish(&mut self, circle: &Circle) -> Option<Sum> {
        let tally = *self.tallies.whole()?;
        let everybody = self.contributed && self.expected_idle.is_empty();
        let complete = everybody && self.gather(circle).is_complete();
        let gather = if complete { self.gather.take() } else { None };
        gather.map(|gather| gather.finish(tally))
    }
}

/// `left + right`, element by element.
fn added(left: Bytes, right: &Bytes) -> Bytes {
    // Parts that came over the network share their frame's memory; sums of them are this one's own, and are added to in place.
    let mut sum = left.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    let (ours, _) = sum.as_chunks_mut::<4>();
    let (theirs, _) = right.as_chunks::<4>();
    for (ours, theirs) in ours.iter_mut().zip(theirs) {
        *ours = (f32::from_le_bytes(*ours) + f32::from_le_bytes(*theirs)).to_le_bytes();
    }
    sum.freeze()
}
