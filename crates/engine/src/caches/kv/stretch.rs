//! Consecutive tokens out of a cache, with memory of their own, and a cache made of such stretches.

use super::{KvCache, Packing, STEP, Slots};
use crate::caches::planes::Planes;
use crate::caches::ring::Ring;
use mlxnode_mlx::{Device, QuantizedLayout, Result};

/// What a cache held of consecutive tokens. It shares no memory with the cache.
#[derive(Clone)]
pub(crate) struct KvStretch {
    /// Of the last ones that a later token sees, at most; none when it sees none of them.
    pub(crate) planes: Planes,
    /// How they are packed, if they are.
    pub(crate) layout: Option<QuantizedLayout>,
    /// How far back a token sees.
    pub(crate) window: Option<i32>,
}

impl KvCache {
    /// Copies a lane's tokens from position `first` to `end`, as the longest lane counts them, or as many of the last ones as a token
    /// at `end` sees. None when some of those are dropped already.
    pub(crate) fn stretch(
        &self,
        device: &Device,
        first: i32,
        end: i32,
        lane: i32,
    ) -> Result<Option<KvStretch>> {
        let (start, stop, window) = match &self.slots {
            Slots::Ring(ring) if ring.held() == self.tokens && ring.is_in_order() => (0, ring.held(), None),
            Slots::Ring(_) => return Ok(None),
            Slots::Line { start, stop, window } => (*start, *stop, *window),
        };
        let first = window.map_or(first, |window| first.max(end - (window - 1)));
        let (from, to) = (stop - (self.tokens - first), stop - (self.tokens - end));
        if from < start || to > stop {
            return Ok(None);
        }
        let planes = match to > from {
            true => self.planes.cut(device, from, to)?.copied(device, lane)?,
            false => Planes::default(),
        };
        Ok(Some(KvStretch { planes, layout: self.layout(), window }))
    }

    /// This empty cache after `tokens` tokens, of which these are the stretches, in order, and with room for `room` more.
    pub(crate) fn resumed(
        self,
        device: &Device,
        stretches: &[&KvStretch],
        tokens: i32,
        room: i32,
    ) -> Result<Self> {
        let Some(last) = stretches.last() else { return Ok(self) };
        let layout = stretches.iter().find_map(|stretch| stretch.layout);
        let mut wanted = last.window.map_or(tokens, |window| tokens.min(window - 1));
        let mut parts = Vec::with_capacity(stretches.len() + 1);
        for stretch in stretches.iter().rev() {
            let (held, take) = (stretch.planes.slots(), wanted.min(stretch.planes.slots()));
            if take <= 0 {
                break;
            }
            wanted -= take;
            let part = stretch.planes.cut(device, held - take, held)?;
            // Packing began while the tokens went through: those before were packed then too, each by itself.
            parts.push(match (layout, stretch.layout) {
                (Some(layout), None) => part.packed(device, layout)?,
                _ => part,
            });
        }
        parts.reverse();
        let held: i32 = parts.iter().map(Planes::slots).sum();
        let slots = match self.slots {
            Slots::Ring(ring) if last.window.is_none() => {
                Slots::Ring(Ring::at(ring.most(), ring.kept(), held, held))
            }
            _ => Slots::Line { start: 0, stop: held, window: last.window },
        };
        if let (Some(part), Slots::Line { window: None, .. }) = (parts.first(), &slots) {
            let room = (room.max(1) + STEP - 1) / STEP * STEP;
            parts.push(part.room(device, room)?);
        }
        let packing = match layout {
            Some(layout) => Some(Packing { layout, start: 0 }),
            None => self.packing,
        };
        let planes = Planes::joined(device, &parts)?;
        Ok(Self { planes, tokens, slots, packing, is_packed: layout.is_some(), ..self })
    }
}
