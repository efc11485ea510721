//! The search itself: contiguous layer ranges onto slots.
//!
//! Two tables over the subsets of slots (at most 2^9 of them). The first says which layer ends a subset can reach at all under
//! the memory limits and a limit on the time of a stage; a binary search over that limit finds the fastest possible slowest
//! stage. The second is a dynamic program over (subset, last slot, layer end) that finds, among the plans with that slowest
//! stage, the one with the least latency, then the most even one, then the one that prefers the earlier slots.

use super::{ModelCost, WORKER_RESERVE};
use crate::NodeId;
use mlxnode_compute::LayerRange;
use std::collections::BTreeMap;
use std::time::Duration;

/// A place for one stage.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) node: NodeId,
    pub(super) name: String,
    /// Bytes.
    pub(super) free: u64,
    /// Bytes per second.
    pub(super) speed: f64,
    pub(super) speed_is_known: bool,
    pub(super) round_trips: BTreeMap<NodeId, Duration>,
}

/// Slots and their ranges, in the order of the layers.
pub(super) type Placed = Vec<(usize, LayerRange)>;

/// A model's sums and the slots for it.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) slots: Vec<Slot>,
    layer_count: usize,
    /// Layers of one pass through the model.
    pass: usize,
    /// `joined[n]`: no stage may end before layer n.
    joined: Vec<bool>,
    /// `weight_sums[n]`: bytes of the weights of the first n layers. Likewise KV.
    weight_sums: Vec<u64>,
    kv_sums: Vec<u64>,
    embedding: u64,
    /// Weights and caches of the draft model, beside the first stage.
    draft: (u64, u64),
    head: u64,
    shared: u64,
}

/// Time as an integer, so that equal plans are exactly equal: picoseconds, 213 days at most.
type Picoseconds = u64;

/// Keeps sums of stage times far from overflow.
const LONGEST: f64 = 1e17;

impl Problem {
    /// Keys and values are reserved for `sequences` sequences of `context_tokens` tokens.
    pub(super) fn new(model: &ModelCost, context_tokens: usize, sequences: usize, slots: Vec<Slot>) -> Self {
        let mut weight_sums = vec![0];
        let mut kv_sums = vec![0];
        let (mut weights, mut kv) = (0u64, 0u64);
        for layer in &model.layers {
            weights = weights.saturating_add(layer.weights.0);
            kv = kv.saturating_add(layer.kv(context_tokens, sequences).0);
            weight_sums.push(weights);
            kv_sums.push(kv);
        }
        let mut joined = vec![false; model.layers.len() + 1];
        for layer in &model.joined {
            if let Some(joined) = joined.get_mut(*layer) {
                *joined = true;
            }
        }
        Self {
            slots,
            layer_count: model.layers.len(),
            pass: model.layers.len() / model.passes.max(1),
            joined,
            weight_sums,
            kv_sums,
            embedding: model.embedding.0,
            draft: model.draft.as_ref().map_or((0, 0), |draft| {
                let kv = draft.layers.iter().map(|layer| layer.kv(context_tokens, sequences).0);
                (draft.weights.0, kv.fold(0, u64::saturating_add))
            }),
            head: model.head.0,
            shared: model.shared.0,
        }
    }

    /// Layers of the whole model.
    pub(super) fn layer_count(&self) -> usize {
        self.layer_count
    }

    /// May a stage end before layer `end`?
    pub(super) fn can_end_at(&self, end: usize) -> bool {
        !self.joined.get(end).copied().unwrap_or(true)
    }

    /// Bytes of weights that a stage with these layers holds.
    pub(super) fn weights(&self, layers: LayerRange) -> u64 {
        // Consecutive layers up to a whole pass are all different ones.
        let end = layers.end.min(layers.start.saturating_add(self.pass));
        let mut bytes = self.weight_sums[end] - self.weight_sums[layers.start];
        if layers.is_first() {
            bytes = bytes.saturating_add(self.embedding).saturating_add(self.draft.0);
        }
        if layers.is_last(self.layer_count) {
            let shared = if layers.is_first() { self.shared } else { 0 };
            bytes = bytes.saturating_add(self.head.saturating_sub(shared));
        }
        bytes
    }

    /// Bytes of KV cache that these layers reserve.
    pub(super) fn kv(&self, layers: LayerRange) -> u64 {
        let draft = if layers.is_first() { self.draft.1 } else { 0 };
        (self.kv_sums[layers.end] - self.kv_sums[layers.start]).saturating_add(draft)
    }

    /// All memory of a stage with these layers.
    pub(super) fn memory(&self, layers: LayerRange) -> u64 {
        self.weights(layers).saturating_add(self.kv(layers)).saturating_add(WORKER_RESERVE.0)
    }

    /// Time of one decode step of a stage: its weights are read once. Of the embedding only a row is read, so it does not count.
    pub(super) fn time(&self, slot: usize, layers: LayerRange) -> Picoseconds {
        let mut bytes = self.weight_sums[layers.end] - self.weight_sums[layers.start];
        if layers.is_last(self.layer_count) {
            bytes = bytes.saturating_add(self.head);
        }
        (bytes as f64 / self.slots[slot].speed * 1e12).min(LONGEST) as Picoseconds
    }

    /// The smallest number of stages that fits, if any does.
    pub(super) fn fewest_stages(&self) -> Option<usize> {
        let most = self.slots.len().min(self.layer_count);
        let reachable = self.reachable(most, Picoseconds::MAX);
        (1..=most).find(|stages| self.completes(&reachable, *stages))
    }

    /// Does a plan with exactly so many stages fit?
    pub(super) fn fits(&self, stages: usize) -> bool {
        let stages = stages.min(self.slots.len());
        self.completes(&self.reachable(stages, Picoseconds::MAX), stages)
    }

    /// The best plan with exactly so many stages.
    pub(super) fn best(&self, stages: usize) -> Option<Placed> {
        if stages == 0 || stages > self.slots.len() || !self.fits(stages) {
            return None;
        }
        let whole = LayerRange::new(0, self.layer_count);
        let mut too_short: Picoseconds = 0;
        let mut enough =
            (0..self.slots.len()).map(|slot| self.time(slot, whole)).max().unwrap_or(0).saturating_add(1);
        while enough - too_short > 1 {
            let limit = too_short + (enough - too_short) / 2;
            if self.completes(&self.reachable(stages, limit), stages) {
                enough = limit;
            } else {
                too_short = limit;
            }
        }
        self.least_latency(stages, enough)
    }

    /// Tokens per second of one sequence: every stage's weights are read once and every hop (the ring closes with one from
    /// the last stage to the first) takes half a round trip. `None` when the speed of a node is not known.
    pub(super) fn predicted_tokens_per_second(&self, placed: &Placed) -> Option<f64> {
        if placed.iter().any(|(slot, _)| !self.slots[*slot].speed_is_known) {
            return None;
        }
        let computing: Picoseconds = placed.iter().map(|(slot, layers)| self.time(*slot, *layers)).sum();
        let next = placed.iter().cycle().skip(1);
        let hops: Picoseconds =
            placed.iter().zip(next).map(|((from, _), (to, _))| self.hop(*from, *to)).sum();
        let seconds = (computing + hops) as f64 / 1e12;
        (seconds > 0.0).then(|| 1.0 / seconds)
    }

    fn hop(&self, from: usize, to: usize) -> Picoseconds {
        let (from, to) = (&self.slots[from], &self.slots[to]);
        let round_trip = from.round_trips.get(&to.node).or_else(|| to.round_trips.get(&from.node));
        round_trip.map_or(0, |time| (time.as_secs_f64() / 2.0 * 1e12).min(LONGEST) as Picoseconds)
    }

    /// The furthest layer end that `slot` reaches from `start` within its memory and the time limit; `start` when not one layer fits.
    fn furthest(&self, slot: usize, start: usize, limit: Picoseconds) -> usize {
        let within = |end: usize| {
            let layers = LayerRange::new(start, end);
            self.memory(layers) <= self.slots[slot].free && self.time(slot, layers) <= limit
        };
        // Memory and time only grow with the range, so the ends that are within come first.
        let (mut fits, mut fails) = (start, self.layer_count + 1);
        while fails - fits > 1 {
            let end = fits + (fails - fits) / 2;
            if within(end) {
                fits = end;
            } else {
                fails = end;
            }
        }
        fits
    }

    /// `[subset][end]`: can the slots of the subset, each with at least one layer and in some order, hold the layers `0..end`?
    /// Only subsets of at most `stages` slots are filled.
    fn reachable(&self, stages: usize, limit: Picoseconds) -> Vec<Vec<bool>> {
        let furthest: Vec<Vec<usize>> = (0..self.slots.len())
            .map(|slot| (0..self.layer_count).map(|start| self.furthest(slot, start, limit)).collect())
            .collect();
        let mut reachable = vec![vec![false; self.layer_count + 1]; 1 << self.slots.len()];
        reachable[0][0] = true;
        for subset in 1..reachable.len() {
            if subset.count_ones() as usize > stages {
                continue;
            }
            let mut ends = vec![false; self.layer_count + 1];
            for (slot, furthest) in furthest.iter().enumerate() {
                if subset & (1 << slot) == 0 {
                    continue;
                }
                let before = &reachable[subset ^ (1 << slot)];
                let mut marked = 0; // ends up to here are marked already: `furthest` never falls as `start` grows
                for start in (0..self.layer_count).filter(|start| before[*start]) {
                    let first = start.max(marked) + 1;
                    if first <= furthest[start] {
                        ends[first..=furthest[start]].fill(true);
                        marked = furthest[start];
                    }
                }
            }
            for (end, joined) in ends.iter_mut().zip(&self.joined) {
                *end &= !joined;
            }
            reachable[subset] = ends;
        }
        reachable
    }

    fn completes(&self, reachable: &[Vec<bool>], stages: usize) -> bool {
        reachable
            .iter()
            .enumerate()
            .any(|(subset, ends)| subset.count_ones() as usize == stages && ends[self.layer_count])
    }

    /// Among the plans of exactly `stages` stages none of which takes longer than `limit`: the one with the least latency.
    fn least_latency(&self, stages: usize, limit: Picoseconds) -> Option<Placed> {
        let slots = self.slots.len();
        let ends = self.layer_count + 1;
        let index = |subset: usize, last: usize, end: usize| (subset * slots + last) * ends + end;
        let mut table: Vec<Option<Reached>> = vec![None; (1 << slots) * slots * ends];
        let mut best: Option<(Score, usize)> = None;
        for subset in 0usize..1 << slots {
            let used = subset.count_ones() as usize;
            if used >= stages {
                continue;
            }
            for start in 0..self.layer_count {
                for slot in (0..slots).filter(|slot| subset & (1 << slot) == 0) {
                    let before = if subset == 0 {
                        (start == 0).then_some((Score::default(), NONE))
                    } else {
                        self.cheapest_before(&table, subset, slot, start, &index)
                    };
                    let Some((score, from)) = before else { continue };
                    for end in
                        (start + 1..=self.furthest(slot, start, limit)).filter(|end| self.can_end_at(*end))
                    {
                        let is_whole = end == self.layer_count;
                        if is_whole != (used + 1 == stages) {
                            continue;
                        }
                        let score =
                            score.and(self.time(slot, LayerRange::new(start, end)), slot * (stages - used));
                        let entry = index(subset | (1 << slot), slot, end);
                        if table[entry].as_ref().is_none_or(|old| score < old.score) {
                            table[entry] = Some(Reached { score, from, slot, start, end });
                        }
                        if is_whole && best.as_ref().is_none_or(|(old, _)| score < *old) {
                            best = Some((score, entry));
                        }
                    }
                }
            }
        }
        let mut placed = Vec::new();
        let mut entry = best?.1;
        while entry != NONE {
            let reached = table[entry].as_ref()?;
            placed.push((reached.slot, LayerRange::new(reached.start, reached.end)));
            entry = reached.from;
        }
        placed.reverse();
        Some(placed)
    }

    /// The cheapest way to have placed `0..start` on `subset` when `slot` comes next, with the hop to it.
    fn cheapest_before(
        &self,
        table: &[Option<Reached>],
        subset: usize,
        slot: usize,
        start: usize,
        index: &impl Fn(usize, usize, usize) -> usize,
    ) -> Option<(Score, usize)> {
        let mut cheapest: Option<(Score, usize)> = None;
        for last in (0..self.slots.len()).filter(|last| subset & (1 << last) != 0) {
            let entry = index(subset, last, start);
            let Some(reached) = &table[entry] else { continue };
            let mut score = reached.score;
            score.latency = score.latency.saturating_add(self.hop(last, slot));
            if cheapest.as_ref().is_none_or(|(old, _)| score < *old) {
                cheapest = Some((score, entry));
            }
        }
        cheapest
    }
}

const NONE: usize = usize::MAX;

/// How a prefix of the layers was placed.
#[derive(Clone, Debug)]
struct Reached {
    score: Score,
    /// The table entry before, or [`NONE`].
    from: usize,
    slot: usize,
    start: usize,
    end: usize,
}

/// Smaller is better, field by field. Every field is a sum over the stages, which is what makes the dynamic program exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    latency: Picoseconds,
    /// Sum of the squared stage times: the more even, the smaller.
    unevenness: u128,
    /// Later slots cost more, most of all for early stages.
    preference: usize,
}

impl Score {
    fn and(self, time: Picoseconds, preference: usize) -> Self {
        Self {
            latency: self.latency.saturating_add(time),
            unevenness: self.unevenness + u128::from(time) * u128::from(time),
            preference: self.preference + preference,
        }
    }
}
