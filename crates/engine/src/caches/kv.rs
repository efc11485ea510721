//! The keys and values of one sequence in one layer: all of them, those of a window, or the first and the last ones; as computed
//! or packed.
//!
//! Without a limit on tokens the slots lie in the order of time:
//!
//! ```text
//! slots   | dropped | seen by the next tokens           | room |
//!         0       start                               stop     capacity
//! ```
//!
//! A layer without window drops nothing (`start` is 0). With a window the tokens that nobody sees any more stay until the room is
//! used up; then the window and a reserve, so that a few tokens can be taken back, move to a new buffer. With a limit on tokens the
//! slots are a ring behind the kept first tokens, as in mlx-lm.

mod stretch;

pub(crate) use stretch::KvStretch;

use super::lanes::{Lanes, runs};
use super::planes::Planes;
use super::ring::Ring;
use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Device, QuantizationMode, QuantizedLayout, Result};
use std::rc::Rc;

/// Tokens by which a cache grows. A longer step wastes memory, a shorter one copies more often; mlx-lm's value.
pub(super) const STEP: i32 = 256;
/// The same of a cache with few tokens, which doubles: many short sequences would be mostly room.
const FIRST_STEP: i32 = 32;
/// Tokens behind a window that are kept, so that as many of the last ones can be taken back (speculative decoding).
const RESERVE: i32 = 64;

/// Keys and values; new tokens are written in place. A clone is cheap: it shares the buffers until either is written to.
#[derive(Clone, Default)]
pub(crate) struct KvCache {
    planes: Planes,
    /// How many tokens went through, dropped ones included.
    tokens: i32,
    slots: Slots,
    packing: Option<Packing>,
    is_packed: bool,
    /// What the tokens of the step in progress see, for layers that have no keys and values of their own.
    shown: Option<Seen>,
    /// When several sequences lie side by side: which slots hold their tokens.
    lanes: Option<Rc<Lanes>>,
}

/// Which token lies where.
#[derive(Clone)]
enum Slots {
    /// In the order of time.
    Line {
        /// First slot that holds a token.
        start: i32,
        /// One past the last.
        stop: i32,
        /// How far back a token sees, as the layer said last.
        window: Option<i32>,
    },
    /// At most so many tokens.
    Ring(Ring),
}

/// How keys and values are packed, and from when on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Packing {
    pub(crate) layout: QuantizedLayout,
    /// Tokens that go through before.
    pub(crate) start: i32,
}

/// What a cache holds, as files have it.
pub(crate) struct Contents {
    /// Without room.
    pub(crate) planes: Planes,
    /// How they are packed, if they are.
    pub(crate) layout: Option<QuantizedLayout>,
    /// How many tokens went through.
    pub(crate) tokens: i32,
    pub(crate) order: Order,
}

/// Which token lies where.
pub(crate) enum Order {
    /// The last ones, in the order of time.
    Line {
        /// How far back a token sees.
        window: Option<i32>,
    },
    /// As the ring says.
    Ring(Ring),
}

/// What the new tokens see: themselves after the tokens before that are still there.
#[derive(Clone)]
pub(crate) struct Seen {
    planes: Planes,
    /// How the planes are packed, if they are.
    layout: Option<QuantizedLayout>,
    /// Tokens before the new ones.
    pub(crate) before: i32,
    /// Key j (in the order of slots) is visible to query i only when `i - limit < j`.
    pub(crate) limit: Option<i32>,
    /// Key j is visible to query i only when both are in the same chunk.
    pub(crate) chunk: Option<Chunk>,
    /// `[lanes, 1, 1, slots]`: is there a token of the lane in the slot? None when there is one in all.
    pub(crate) taken: Option<Array>,
}

/// Boundaries that no query sees beyond.
#[derive(Clone, Copy)]
pub(crate) struct Chunk {
    /// Tokens from one boundary to the next; the first boundary is at position 0.
    pub(crate) size: i32,
    /// Position of the first new token.
    pub(crate) offset: i32,
}

impl KvCache {
    /// Empty.
    pub(crate) fn new(options: &CacheOptions) -> Self {
        let int = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
        let packing = options.kv_bits.map(|bits| Packing {
            layout: QuantizedLayout {
                mode: QuantizationMode::Affine,
                bits: i32::from(bits),
                group_size: int(options.kv_group_size),
            },
            start: int(options.quantized_kv_start),
        });
        let slots = match options.max_kv_size {
            Some(most) => Slots::Ring(Ring::new(int(most), int(CacheOptions::KEPT))),
            None => Slots::default(),
        };
        Self { slots, packing, ..Self::default() }
    }

    /// Appends `[1, heads, tokens, width]`, or one token of each lane, `[lanes, heads, 1, width]`, of which a token sees only the last
    /// `window`.
    pub(crate) fn extend(
        &mut self,
        device: &Device,
        keys: &Array,
        values: &Array,
        window: Option<i32>,
    ) -> Result<Seen> {
        let new = Planes::of(device, keys, values, self.layout())?;
        self.adopt(window);
        let tokens = keys.dim(2);
        match &mut self.slots {
            Slots::Ring(ring) => {
                self.planes = ring.extend(device, std::mem::take(&mut self.planes), &new, tokens)?
            }
            Slots::Line { start, stop, window } => {
                let buffer = std::mem::take(&mut self.planes);
                let buffer = with_room(device, buffer, &new, tokens, (start, stop), *window)?;
                // The old handles are gone when the update runs, so that it happens in place.
                self.planes = buffer.put(device, &new, *stop)?;
                *stop += tokens;
            }
        }
        self.tokens += tokens;
        self.seen(device, tokens)
    }

    /// What the last `tokens` tokens, just appended, see: for a layer that attends to the keys and values of another one.
    pub(crate) fn seen(&self, device: &Device, tokens: i32) -> Result<Seen> {
        let (first, last, limit) = match &self.slots {
            Slots::Ring(ring) => (0, ring.held(), Some(ring.most())),
            Slots::Line { start, stop, window } => {
                let first = window.map_or(0, |window| stop - tokens.saturating_add(window - 1)).max(*start);
                (first, *stop, *window)
            }
        };
        let planes = self.planes.cut(device, first, last)?;
        let taken = match &self.lanes {
            Some(lanes) => lanes.mask(device, self.tokens - (last - first), self.tokens)?,
            None => None,
        };
        Ok(Seen { planes, layout: self.layout(), before: last - first - tokens, limit, chunk: None, taken })
    }

    /// Appends `[1, heads, tokens, width]`, of which a token sees only those of its own chunk of `size` tokens.
    ///
    /// They lie in the order of time even with a limit on tokens, which is then a window.
    pub(crate) fn extend_chunked(
        &mut self,
        device: &Device,
        keys: &Array,
        values: &Array,
        size: i32,
    ) -> Result<Seen> {
        let offset = self.tokens;
        let window = match &self.slots {
            Slots::Ring(ring) => size.min(ring.most()),
            Slots::Line { window, .. } => window.unwrap_or(size),
        };
        let seen = self.extend(device, keys, values, Some(window))?;
        let (held, own) = (seen.planes.slots(), offset % size + 1);
        match keys.dim(2) == 1 && held > own {
            // The one token sees the last ones.
            true => {
                let planes = seen.planes.cut(device, held - own, held)?;
                Ok(Seen { planes, before: own - 1, ..seen })
            }
            false => Ok(Seen { chunk: Some(Chunk { size, offset }), ..seen }),
        }
    }

    /// Keeps what the tokens of this step see, until [`Self::end_step`].
    pub(crate) fn show(&mut self, seen: &Seen) {
        self.shown = Some(seen.clone());
    }

    /// What [`Self::show`] kept in this step.
    pub(crate) fn shown(&self) -> Option<&Seen> {
        self.shown.as_ref()
    }

    /// Lets go of what was shown, so that the next step writes into the buffers in place.
    pub(crate) fn end_step(&mut self) {
        self.shown = None;
    }

    /// Packs what was kept as computed, when enough tokens went through. Before a step, so that a token that is taken back packs
    /// nothing.
    pub(crate) fn pack_when_due(&mut self, device: &Device) -> Result<()> {
        let Some(packing) = self.packing else { return Ok(()) };
        if !self.is_packed && self.tokens >= packing.start && !self.planes.is_empty() {
            self.planes = self.planes.packed(device, packing.layout)?;
            self.is_packed = true;
        }
        Ok(())
    }

    /// How many tokens may be appended at once so that each sees what it would see alone; None: any number.
    pub(crate) fn most_at_once(&self) -> Option<i32> {
        let packing = self.packing.filter(|_| !self.is_packed).map(|packing| packing.start);
        let packing = packing.filter(|start| *start > self.tokens).map(|start| start - self.tokens);
        match &self.slots {
            Slots::Ring(ring) => Some((ring.most() - ring.held()).min(packing.unwrap_or(i32::MAX))),
            Slots::Line { .. } => packing,
        }
    }

    /// Can all tokens from position `tokens` on be forgotten, so that the next one finds what it would have found before them?
    pub(crate) fn can_truncate(&self, tokens: i32) -> bool {
        if tokens <= 0 || tokens >= self.tokens {
            return true;
        }
        match &self.slots {
            Slots::Ring(ring) => ring.held() == self.tokens && ring.is_in_order(),
            Slots::Line { start, stop, window } => {
                let left = stop - (self.tokens - tokens) - start;
                left >= window.map_or(tokens, |window| tokens.min(window - 1))
            }
        }
    }

    /// Is what was dropped lost, so that going back takes a copy?
    pub(crate) fn overwrites(&self) -> bool {
        matches!(self.slots, Slots::Ring(_))
    }

    /// Could the next token be forgotten again?
    pub(crate) fn can_undo_next(&self) -> bool {
        match &self.slots {
            Slots::Ring(ring) => ring.is_in_order() && ring.held() < ring.most(),
            Slots::Line { .. } => true,
        }
    }

    /// Forgets all tokens from position `tokens` on, when [`Self::can_truncate`].
    pub(crate) fn truncate(&mut self, tokens: i32) {
        if tokens <= 0 {
            self.clear();
        } else if tokens < self.tokens && self.can_truncate(tokens) {
            match &mut self.slots {
                Slots::Ring(ring) => ring.truncate(tokens),
                Slots::Line { stop, .. } => *stop -= self.tokens - tokens,
            }
            self.tokens = tokens;
        }
    }

    /// The arrays to evaluate so that the cache is filled.
    pub(crate) fn state(&self) -> impl Iterator<Item = &Array> {
        self.planes.arrays.iter()
    }

    /// What it holds, to be put into a file; None when it holds nothing.
    pub(crate) fn contents(&self, device: &Device) -> Result<Option<Contents>> {
        if self.planes.is_empty() || self.tokens == 0 {
            return Ok(None);
        }
        let (first, last, order) = match &self.slots {
            Slots::Ring(ring) => (0, ring.held(), Order::Ring(ring.clone())),
            Slots::Line { start, stop, window } => {
                let first = window.map_or(*start, |window| (stop - window).max(*start));
                (first, *stop, Order::Line { window: *window })
            }
        };
        let planes = self.planes.cut(device, first, last)?;
        Ok(Some(Contents { planes, layout: self.layout(), tokens: self.tokens, order }))
    }

    /// An empty cache filled with what a file held. The contents have been checked.
    pub(crate) fn filled(self, contents: Contents) -> Self {
        let Contents { planes, layout, tokens, order } = contents;
        let held = planes.slots();
        let slots = match order {
            Order::Ring(ring) => Slots::Ring(ring),
            Order::Line { window } => Slots::Line { start: 0, stop: held, window },
        };
        let packing = match layout {
            Some(layout) => Some(Packing { layout, start: 0 }),
            None => self.packing,
        };
        Self { planes, tokens, slots, packing, is_packed: layout.is_some(), ..self }
    }

    /// How keys and values are packed, if they are.
    pub(crate) fn layout(&self) -> Option<QuantizedLayout> {
        self.packing.filter(|_| self.is_packed).map(|packing| packing.layout)
    }

    /// Can lanes of both lie in one cache? Not with a limit on tokens, and not when keys are or will be packed.
    pub(super) fn can_join(&self, other: &Self) -> bool {
        let windows = match (&self.slots, &other.slots) {
            (Slots::Line { window: one, .. }, Slots::Line { window: other, .. }) => one == other,
            _ => false,
        };
        let is_unused = self.planes.is_empty() && other.planes.is_empty();
        is_unused
            || (windows
                && self.packing.is_none()
                && other.packing.is_none()
                && self.planes.are_like(&other.planes))
    }

    /// A cache of lanes of others, whose sequences have these numbers of tokens.
    pub(super) fn of_lanes(
        device: &Device,
        parts: &[(&Self, &[usize])],
        lengths: &[i32],
        lanes: Option<&Rc<Lanes>>,
    ) -> Result<Self> {
        let Some((first, _)) = parts.first() else { return Ok(Self::default()) };
        let Slots::Line { window, .. } = first.slots else { return Ok((*first).clone()) };
        if first.planes.is_empty() {
            return Ok((*first).clone());
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let needed = window.map_or(longest, |window| (window - 1).saturating_add(RESERVE)).min(longest);
        // A lane that dropped tokens must not seem to have them again, as padding.
        let (mut slots, mut left) = (needed, lengths);
        for (kv, chosen) in parts {
            let (own, rest) = left.split_at(chosen.len().min(left.len()));
            if own.iter().any(|length| *length > kv.held()) {
                slots = slots.min(kv.held());
            }
            left = rest;
        }
        let count = lengths.len() as i32;
        let mut planes = first.planes.empty(device, count, capacity(slots + 1))?;
        let mut lane = 0;
        for (kv, chosen) in parts {
            let held = kv.held().min(slots);
            let own = kv.planes.cut(device, kv.stop() - held, kv.stop())?;
            for (start, length) in runs(chosen) {
                let own = own.lanes(device, start as i32, length as i32)?;
                planes = planes.put_lanes(device, &own, lane, slots - held)?;
                lane += length as i32;
            }
        }
        let slots = Slots::Line { start: 0, stop: slots, window };
        Ok(Self { planes, tokens: longest, slots, lanes: lanes.cloned(), ..Self::default() })
    }

    /// Slots that hold a token of the longest lane.
    fn held(&self) -> i32 {
        match &self.slots {
            Slots::Ring(ring) => ring.held(),
            Slots::Line { start, stop, .. } => stop - start,
        }
    }

    /// One past the last slot that holds a token.
    fn stop(&self) -> i32 {
        match &self.slots {
            Slots::Ring(ring) => ring.held(),
            Slots::Line { stop, .. } => *stop,
        }
    }

    fn clear(&mut self) {
        self.planes = Planes::default();
        self.tokens = 0;
        self.is_packed = false;
        match &mut self.slots {
            Slots::Ring(ring) => *ring = Ring::new(ring.most(), ring.kept()),
            Slots::Line { start, stop, .. } => (*start, *stop) = (0, 0),
        }
    }

    /// A layer with a window smaller than the limit keeps its window and needs no ring.
    fn adopt(&mut self, asked: Option<i32>) {
        match &mut self.slots {
            Slots::Ring(ring) if self.tokens == 0 && asked.is_some_and(|window| window <= ring.most()) => {
                self.slots = Slots::Line { start: 0, stop: 0, window: asked };
            }
            Slots::Line { window, .. } => *window = asked,
            Slots::Ring(_) => {}
        }
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self::Line { start: 0, stop: 0, window: None }
    }
}

impl Seen {
    /// Keys and values `[rows, heads, tokens, width]` of whole sequences, of which a token sees the last `limit`, or those of its own
    /// chunk of so many tokens.
    pub(crate) fn whole(keys: &Array, values: &Array, limit: Option<i32>, chunk: Option<i32>) -> Self {
        let planes = Planes { arrays: vec![keys.clone(), values.clone()] };
        let chunk = chunk.map(|size| Chunk { size, offset: 0 });
        Self { planes, layout: None, before: 0, limit, chunk, taken: None }
    }

    /// How many tokens in all.
    pub(crate) fn tokens(&self) -> i32 {
        self.planes.slots()
    }

    /// Keys and values as they are stored.
    pub(crate) fn stored(&self) -> Stored<'_> {
        match self.layout.and_then(|layout| self.planes.quantized(layout)) {
            Some((keys, values)) => Stored::Packed(keys, values),
            None => match self.planes.plain() {
                Some((keys, values)) => Stored::Plain(keys, values),
                None => Stored::Nothing,
            },
        }
    }

    /// Keys and values as arrays of numbers.
    pub(crate) fn unpacked(&self, device: &Device) -> Result<(Array, Array)> {
        match self.stored() {
            Stored::Plain(keys, values) => Ok((keys.clone(), values.clone())),
            Stored::Packed(keys, values) => Ok((device.dequantize(&keys)?, device.dequantize(&values)?)),
            Stored::Nothing => Err(mlxnode_mlx::Error::Mlx("a cache without keys was read".to_owned())),
        }
    }
}

/// Keys and values as they are stored.
pub(crate) enum Stored<'a> {
    Plain(&'a Array, &'a Array),
    Packed(mlxnode_mlx::Quantized, mlxnode_mlx::Quantized),
    /// Nothing was appended yet.
    Nothing,
}

/// The buffers of slots `start..stop`, with room behind `stop` for `tokens` more; dropped tokens and excess room go when they are
/// made anew.
fn with_room(
    device: &Device,
    buffer: Planes,
    new: &Planes,
    tokens: i32,
    (start, stop): (&mut i32, &mut i32),
    window: Option<i32>,
) -> Result<Planes> {
    let slots = buffer.slots();
    let needed = window.map_or(*stop, |window| (window - 1).saturating_add(RESERVE));
    // After a long chunk of a prompt most of a window's buffer is of no use any more.
    let is_wasteful = window.is_some() && slots > needed.saturating_add(tokens).saturating_add(2 * STEP);
    if *stop + tokens <= slots && !is_wasteful {
        return Ok(buffer);
    }
    let first = (*stop - needed).max(*start);
    let whole_steps = (tokens + STEP - 1) / STEP * STEP;
    let room = match first {
        0 => whole_steps.min(capacity(stop.saturating_add(tokens)) - *stop),
        _ => whole_steps, // a window moves
    };
    let grown = match *stop > first {
        true => Planes::joined(device, &[buffer.cut(device, first, *stop)?, buffer.room(device, room)?])?,
        false => new.room(device, room)?,
    };
    (*start, *stop) = (0, *stop - first);
    Ok(grown)
}

/// Slots of a buffer that is made for so many.
fn capacity(slots: i32) -> i32 {
    let step = (slots.clamp(FIRST_STEP, STEP) as u32).next_power_of_two() as i32;
    slots.saturating_add(step - 1) / step * step
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlxnode_mlx::Dtype;

    #[test]
    fn short_sequences_take_little_room_and_long_ones_grow_by_steps() {
        let cases = [
            (1, 32),
            (32, 32),
            (33, 64),
            (65, 128),
            (96, 128),
            (129, 256),
            (257, 512),
            (512, 512),
            (513, 768),
            (1025, 1280),
        ];
        for (slots, expected) in cases {
            assert_eq!(capacity(slots), expected, "{slots}");
        }
    }

    /// Keys of `count` tokens from number `first`: token t is `[t, t, ..]`, 32 wide.
    fn keys(device: &Device, first: i32, count: i32) -> Array {
        let column = device.arange(f64::from(first), f64::from(first + count), 1.0, Dtype::F32).unwrap();
        let column = device.reshape(&column, &[1, 1, count, 1]).unwrap();
        device.add(&column, &device.zeros(&[1, 1, count, 32], Dtype::F32).unwrap()).unwrap()
    }

    /// Appends tokens with their numbers and returns the numbers that are seen.
    fn extend(device: &Device, cache: &mut KvCache, count: i32, window: Option<i32>) -> Vec<i32> {
        cache.pack_when_due(device).unwrap();
        let new = keys(device, cache.tokens, count);
        let seen = cache.extend(device, &new, &new, window).unwrap();
        let (keys, values) = seen.unpacked(device).unwrap();
        let numbers = |array: &Array| -> Vec<i32> {
            let array = device.contiguous(array).unwrap();
            array.to_f32().unwrap().chunks(32).map(|token| token[0].round() as i32).collect()
        };
        assert_eq!(numbers(&keys), numbers(&values));
        assert_eq!(seen.before + count, seen.tokens());
        numbers(&keys)
    }

    fn packed(bits: u8, start: usize) -> KvCache {
        let options = CacheOptions {
            kv_bits: Some(bits),
            kv_group_size: 32,
            quantized_kv_start: start,
            ..CacheOptions::default()
        };
        KvCache::new(&options)
    }

    #[test]
    fn every_token_is_seen_in_order_while_it_grows() {
        let device = Device::open().unwrap();
        for mut cache in [KvCache::default(), packed(8, 0), packed(5, 400)] {
            for count in [300, 1, 211, 1, 256] {
                let seen = extend(&device, &mut cache, count, None);
                assert_eq!(seen, (0..cache.tokens).collect::<Vec<_>>());
            }
            // 300 -> 512; the 513th token -> 768; 256 more than 513 do not fit: cut to 513 and grown by 256.
            assert_eq!(cache.state().next().unwrap().dim(2), 769);
            cache.truncate(1);
            assert_eq!(extend(&device, &mut cache, 2, None), [0, 1, 2]);
        }
    }

    #[test]
    fn a_window_sees_its_last_tokens_and_stays_small() {
        let device = Device::open().unwrap();
        let window = 100;
        for mut cache in [KvCache::default(), packed(8, 0)] {
            for count in [2000, 1, 1, 700, 1, 300, 5].into_iter().chain(std::iter::repeat_n(1, 400)) {
                let first = (cache.tokens - (window - 1)).max(0);
                let seen = extend(&device, &mut cache, count, Some(window));
                assert_eq!(seen, (first..cache.tokens).collect::<Vec<_>>());
                let slots = cache.state().next().unwrap().dim(2);
                assert!(slots <= window + RESERVE + count + 2 * STEP, "{slots} slots after {count}");
                // As many as a draft has can always be taken back.
                let all = cache.tokens;
                assert!(cache.can_truncate(all - 1) && cache.can_truncate((all - RESERVE).max(0)));
            }
            assert!(!cache.can_truncate(cache.tokens - 1000));
            cache.truncate(cache.tokens - 10);
            let first = cache.tokens - (window - 1);
            assert_eq!(
                extend(&device, &mut cache, 1, Some(window)),
                (first..cache.tokens).collect::<Vec<_>>()
            );
            assert!(cache.can_truncate(0));
            cache.truncate(0);
            assert_eq!(extend(&device, &mut cache, 1, Some(window)), [0]);
        }
    }

    #[test]
    fn a_limit_keeps_the_first_and_the_last() {
        let device = Device::open().unwrap();
        let options = CacheOptions { max_kv_size: Some(10), ..CacheOptions::default() };
        let mut cache = KvCache::new(&options);
        assert_eq!(extend(&device, &mut cache, 8, None).len(), 8);
        assert!(cache.can_truncate(3) && cache.can_undo_next());
        extend(&device, &mut cache, 2, None);
        assert!(!cache.can_undo_next());
        let mut seen = extend(&device, &mut cache, 1, None);
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]);
        assert!(!cache.can_truncate(10) && cache.can_truncate(11));
        assert_eq!(extend(&device, &mut cache, 2, None), [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]);
        let mut narrow = KvCache::new(&options);
        for _ in 0..20 {
            extend(&device, &mut narrow, 1, Some(5));
        }
        assert_eq!(
            extend(&device, &mut narrow, 1, Some(5)),
            [16, 17, 18, 19, 20],
            "a window keeps no first tokens"
        );
    }

    #[test]
    fn a_clone_stays_what_it_was() {
        let device = Device::open().unwrap();
        let mut cache = KvCache::default();
        extend(&device, &mut cache, 5, None);
        device.eval(cache.state()).unwrap();
        let mut copy = cache.clone();
        cache.truncate(2);
        let zeros = device.zeros(&[1, 1, 3, 32], Dtype::F32).unwrap();
        let (overwritten, _) =
            cache.extend(&device, &zeros, &zeros, None).unwrap().unpacked(&device).unwrap();
        device.eval([&overwritten]).unwrap();
        assert_eq!(extend(&device, &mut copy, 1, None), [0, 1, 2, 3, 4, 5]);
    }
}
