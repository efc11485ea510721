//! What the layers of one sequence remember of the tokens before.
//!
//! A clone is a snapshot: the arrays are shared until either side writes to them, so it costs nothing at first. That is how a
//! prompt's beginning is used again, and how a recurrent layer, whose states cannot be taken back, returns to an earlier token.

mod kv;
mod lanes;
mod planes;
mod ring;
mod states;

pub(crate) use kv::{Chunk, Contents, KvCache, KvStretch, Order, Seen, Stored};
pub(crate) use lanes::{Lanes, Part};
pub(crate) use planes::Planes;
pub(crate) use ring::Ring;
pub(crate) use states::States;

use mlxnode_compute::CacheOptions;
use mlxnode_mlx::{Array, Device, Result};
use std::rc::Rc;

/// The caches of one sequence, one for each layer of a layer range; or of several sequences that run together, a lane each.
#[derive(Clone, Default)]
pub(crate) struct SequenceCache {
    /// By layer of the range, not of the model.
    pub(crate) layers: Vec<LayerCache>,
    tokens: i32,
    /// None for one sequence.
    lanes: Option<Rc<Lanes>>,
}

/// What one layer remembers. A layer uses the parts that its mixer needs; the others stay empty and cost nothing.
#[derive(Clone, Default)]
pub(crate) struct LayerCache {
    /// Keys and values, or what a latent attention keeps in their place.
    pub(crate) kv: KvCache,
    /// Keys of a sparse attention's indexer, or the keys and values of the second attention of a layer with two.
    pub(crate) indexer: KvCache,
    /// What a recurrent mixer keeps, whatever the number of tokens.
    pub(crate) states: States,
}

impl LayerCache {
    /// Empty.
    pub(crate) fn new(options: &CacheOptions) -> Self {
        // The indexer's keys are few and choose among the others: dropped like those, but never packed.
        let plain = CacheOptions { kv_bits: None, ..*options };
        Self { kv: KvCache::new(options), indexer: KvCache::new(&plain), states: States::default() }
    }

    /// The arrays to evaluate so that it is filled.
    fn state(&self) -> impl Iterator<Item = &Array> {
        self.kv.state().chain(self.indexer.state()).chain(self.states.arrays())
    }
}

/// Where a sequence stood: cheap, because keys and values that are in the order of time need only be cut back.
#[derive(Clone)]
pub(crate) struct Snapshot {
    tokens: i32,
    layers: Vec<LayerSnapshot>,
}

#[derive(Clone)]
struct LayerSnapshot {
    /// Only of a cache that overwrites what it would have to go back to.
    kv: Option<KvCache>,
    indexer: Option<KvCache>,
    states: States,
}

impl Snapshot {
    /// The position of the next token.
    pub(crate) fn tokens(&self) -> i32 {
        self.tokens
    }
}

impl SequenceCache {
    /// Empty, for this many layers. The options have been checked.
    pub(crate) fn new(layers: usize, options: &CacheOptions) -> Self {
        Self { layers: (0..layers).map(|_| LayerCache::new(options)).collect(), tokens: 0, lanes: None }
    }

    /// How many tokens went through all layers: the position of the next one. With several lanes that of the longest.
    pub(crate) fn tokens(&self) -> i32 {
        self.tokens
    }

    /// To be called before each step: packs what is due.
    #[inline]
    pub(crate) fn prepare(&mut self, device: &Device) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| layer.kv.pack_when_due(device))
    }

    /// That many more went through all layers.
    pub(crate) fn advance(&mut self, tokens: i32) {
        self.tokens += tokens;
        for layer in &mut self.layers {
            layer.kv.end_step();
        }
    }

    /// How many tokens may go through at once so that each finds what it would find alone; at least one. Less than any number
    /// where packing is about to begin, and where a limit on tokens makes each new one push another one out.
    pub(crate) fn most_at_once(&self) -> i32 {
        let mosts =
            self.layers.iter().flat_map(|layer| [layer.kv.most_at_once(), layer.indexer.most_at_once()]);
        mosts.flatten().min().unwrap_or(i32::MAX).max(1)
    }

    /// The arrays to evaluate so that the caches are filled.
    pub(crate) fn state(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(LayerCache::state)
    }

    /// Bytes of the arrays, room included.
    pub(crate) fn bytes(&self) -> usize {
        self.state().map(Array::byte_size).sum()
    }

    /// Can all tokens from position `tokens` on be forgotten? Not when a recurrent state remembers neither that token nor the one
    /// before the last step, nor when keys and values that the next token would see were dropped.
    pub(crate) fn can_truncate(&self, tokens: i32) -> bool {
        self.layers.iter().all(|layer| {
            layer.states.can_truncate(tokens)
                && layer.kv.can_truncate(tokens)
                && layer.indexer.can_truncate(tokens)
        })
    }

    /// What [`Self::restore`] needs to come back to this token, however many come after it.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let overwritten = |kv: &KvCache| kv.overwrites().then(|| kv.clone());
        let layers = self.layers.iter().map(|layer| LayerSnapshot {
            kv: overwritten(&layer.kv),
            indexer: overwritten(&layer.indexer),
            states: layer.states.clone(),
        });
        Snapshot { tokens: self.tokens, layers: layers.collect() }
    }

    /// Back to where the sequence stood. False, and nothing happens, when a window has dropped what the next token would see, or
    /// the sequence is an earlier or another one.
    #[must_use]
    pub(crate) fn restore(&mut self, snapshot: &Snapshot) -> bool {
        let tokens = snapshot.tokens;
        let fits = |kv: &KvCache, kept: &Option<KvCache>| kept.is_some() || kv.can_truncate(tokens);
        let mut pairs = self.layers.iter().zip(&snapshot.layers);
        if tokens > self.tokens
            || self.layers.len() != snapshot.layers.len()
            || !pairs.all(|(layer, kept)| fits(&layer.kv, &kept.kv) && fits(&layer.indexer, &kept.indexer))
        {
            return false;
        }
        for (layer, kept) in self.layers.iter_mut().zip(&snapshot.layers) {
            for (kv, kept) in [(&mut layer.kv, &kept.kv), (&mut layer.indexer, &kept.indexer)] {
                match kept {
                    Some(kept) => *kv = kept.clone(),
                    None => kv.truncate(tokens),
                }
            }
            layer.states = kept.states.clone();
        }
        self.tokens = tokens;
        true
    }

    /// Could the tokens of the next step be forgotten again? False once a limit on tokens makes every step drop one for good.
    pub(crate) fn can_undo_next(&self) -> bool {
        self.layers.iter().all(|layer| layer.kv.can_undo_next() && layer.indexer.can_undo_next())
    }

    /// Forgets all tokens from position `tokens` on. False when that cannot be done, see [`Self::can_truncate`]; the caches are
    /// then unchanged.
    #[must_use]
    pub(crate) fn truncate(&mut self, tokens: i32) -> bool {
        if !self.can_truncate(tokens) {
            return false;
        }
        for layer in &mut self.layers {
            layer.kv.truncate(tokens);
            layer.indexer.truncate(tokens);
            layer.states.truncate(tokens);
        }
        self.tokens = self.tokens.min(tokens.max(0));
        true
    }
}
