//! Several sequences side by side in one cache, a lane each: a token of every sequence then goes through a layer like one token of
//! one sequence, written at once and attended at once.
//!
//! The lanes end at the same slot. What a shorter one lacks at the front is padding, which nobody sees:
//!
//! ```text
//! lane 0 | a a a a a a a |
//! lane 1 | . . . b b b b |   7 slots, 3 of them padding
//! lane 2 | . c c c c c c |
//! ```
//!
//! Putting lanes together and taking some of them out are one thing: a new cache out of lanes of others. It copies keys, values and
//! states, so it pays for sequences that run together for a while. Caches with a limit on tokens and packed ones have no lanes.

use super::{KvCache, LayerCache, SequenceCache, States};
use mlxnode_mlx::{Array, Device, Dtype, Result};
use std::cell::RefCell;
use std::rc::Rc;

/// Which slots of a cache with several lanes hold tokens. Positions are counted as the longest lane counts them.
pub(crate) struct Lanes {
    /// Where each lane's first token lies.
    begins: Vec<i32>,
    /// The same, `[lanes, 1, 1, 1]`.
    begins_array: Array,
    /// The masks of the last step.
    masks: RefCell<Masks>,
}

#[derive(Default)]
struct Masks {
    end: i32,
    /// The first position of those that a layer sees, and which of them are tokens.
    of: Vec<(i32, Option<Array>)>,
}

/// Lanes of a cache.
pub(crate) struct Part<'a> {
    pub(crate) cache: &'a SequenceCache,
    /// Which of them, ascending.
    pub(crate) lanes: Vec<usize>,
}

impl Lanes {
    /// Of sequences with these numbers of tokens, at least two.
    fn new(lengths: &[i32]) -> Result<Self> {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let begins: Vec<i32> = lengths.iter().map(|length| longest - length).collect();
        let bytes: Vec<u8> = begins.iter().flat_map(|begin| begin.to_le_bytes()).collect();
        let begins_array = Array::from_bytes(&bytes, &[begins.len() as i32, 1, 1, 1], Dtype::I32)?;
        Ok(Self { begins, begins_array, masks: RefCell::default() })
    }

    /// `[lanes, 1, 1, end - first]`: does the slot of the position hold a token of the lane? None when all do.
    pub(super) fn mask(&self, device: &Device, first: i32, end: i32) -> Result<Option<Array>> {
        if self.begins.iter().all(|begin| *begin <= first) {
            return Ok(None);
        }
        let mut masks = self.masks.borrow_mut();
        if masks.end != end {
            *masks = Masks { end, of: Vec::new() };
        }
        if let Some((_, mask)) = masks.of.iter().find(|(start, _)| *start == first) {
            return Ok(mask.clone());
        }
        let positions = device.arange(f64::from(first), f64::from(end), 1.0, Dtype::I32)?;
        let mask = Some(device.greater_equal(&positions, &self.begins_array)?);
        masks.of.push((first, mask.clone()));
        Ok(mask)
    }
}

impl SequenceCache {
    /// How many sequences lie side by side.
    pub(crate) fn lanes(&self) -> usize {
        self.lanes.as_ref().map_or(1, |lanes| lanes.begins.len())
    }

    /// The position of each lane's next token.
    pub(crate) fn lengths(&self) -> impl Iterator<Item = i32> {
        let begins = self.lanes.as_ref().map_or(&[0][..], |lanes| &lanes.begins);
        begins.iter().map(|begin| self.tokens - begin)
    }

    /// Can lanes of both lie in one cache?
    pub(crate) fn can_join(&self, other: &Self) -> bool {
        self.tokens > 0
            && other.tokens > 0
            && self.layers.len() == other.layers.len()
            && self.layers.iter().zip(&other.layers).all(|(one, other)| one.can_join(other))
    }

    /// A cache of these lanes, in this order, with arrays of its own; parts of several caches must be able to join.
    pub(crate) fn of_lanes(device: &Device, parts: &[Part<'_>]) -> Result<Self> {
        let mut lengths = Vec::new();
        for part in parts {
            let all: Vec<i32> = part.cache.lengths().collect();
            lengths.extend(part.lanes.iter().filter_map(|lane| all.get(*lane)));
        }
        let lanes = match lengths.len() {
            0 | 1 => None,
            _ => Some(Rc::new(Lanes::new(&lengths)?)),
        };
        let layers = parts.iter().map(|part| part.cache.layers.len()).min().unwrap_or(0);
        let layer = |index: usize| {
            let layers: Vec<_> =
                parts.iter().map(|part| (&part.cache.layers[index], part.lanes.as_slice())).collect();
            let kv: Vec<_> = layers.iter().map(|(layer, lanes)| (&layer.kv, *lanes)).collect();
            let indexer: Vec<_> = layers.iter().map(|(layer, lanes)| (&layer.indexer, *lanes)).collect();
            let states: Vec<_> = layers.iter().map(|(layer, lanes)| (&layer.states, *lanes)).collect();
            Ok(LayerCache {
                kv: KvCache::of_lanes(device, &kv, &lengths, lanes.as_ref())?,
                indexer: KvCache::of_lanes(device, &indexer, &lengths, lanes.as_ref())?,
                states: States::of_lanes(device, &states, &lengths)?,
            })
        };
        let layers = (0..layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, tokens: lengths.iter().copied().max().unwrap_or(0), lanes })
    }
}

impl LayerCache {
    fn can_join(&self, other: &Self) -> bool {
        self.kv.can_join(&other.kv)
            && self.indexer.can_join(&other.indexer)
            && self.states.can_join(&other.states)
    }
}

/// Runs of consecutive numbers, as start and length.
pub(super) fn runs(lanes: &[usize]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for lane in lanes {
        match runs.last_mut() {
            Some((start, length)) if *start + *length == *lane => *length += 1,
            _ => runs.push((*lane, 1)),
        }
    }
    runs
}

/// Do the arrays differ in the first axis at most, and in this one?
pub(super) fn are_alike(one: &Array, other: &Array, axis: usize) -> bool {
    let rest = |array: &Array| -> Vec<i32> {
        let sizes = array.shape().iter().enumerate().skip(1);
        sizes.filter(|(place, _)| *place != axis).map(|(_, size)| *size).collect()
    };
    one.dtype() == other.dtype() && rest(one) == rest(other)
}
