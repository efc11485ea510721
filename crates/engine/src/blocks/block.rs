//! One block: taken out of a sequence's caches, and put into the caches of another one.

use crate::caches::{KvCache, KvStretch, LayerCache, SequenceCache, States};
use mlxnode_compute::{BLOCK_TOKENS, CacheOptions};
use mlxnode_mlx::{Array, Device, Result};

/// What the layers of a range remember of [`BLOCK_TOKENS`] tokens. Shares no memory with any sequence.
#[derive(Clone)]
pub(crate) struct Block {
    /// The ids: penalties look at them, on the last stage.
    pub(crate) tokens: Vec<u32>,
    /// What changed the weights for it, by the contents of its file; None: nothing.
    pub(crate) adapter: Option<blake3::Hash>,
    /// By layer of the range.
    pub(crate) layers: Vec<LayerBlock>,
    /// Can a sequence go on after it? No when recurrent layers are among these and their states are not in it.
    pub(crate) is_border: bool,
}

/// What one layer remembers of the tokens of a block. What its mixer does not need is absent.
#[derive(Clone, Default)]
pub(crate) struct LayerBlock {
    pub(crate) kv: Option<KvStretch>,
    pub(crate) indexer: Option<KvStretch>,
    /// After the block's last token; empty in a block that is no border.
    pub(crate) states: Vec<Array>,
}

/// Position of the first token of a block, and one past its last.
fn bounds(number: usize) -> Option<(i32, i32)> {
    let first = number.checked_mul(BLOCK_TOKENS)?;
    let end = first.checked_add(BLOCK_TOKENS)?;
    Some((i32::try_from(first).ok()?, i32::try_from(end).ok()?))
}

impl Block {
    /// Block `number` of the sequence in a lane of `cache`, whose ids are `ids`, or as many as went through. None when the cache no longer
    /// holds what a later token would see. `with_states` takes them if they are those after the block's last token. Of no adapter.
    pub(crate) fn of(
        device: &Device,
        cache: &SequenceCache,
        lane: usize,
        ids: &[u32],
        number: usize,
        with_states: bool,
    ) -> Result<Option<Self>> {
        let (Some((first, end)), Some(length)) = (bounds(number), cache.lengths().nth(lane)) else {
            return Ok(None);
        };
        let Some(tokens) = ids.get(first as usize..end as usize).filter(|_| end <= length) else {
            return Ok(None);
        };
        // As the longest lane counts.
        let padding = cache.tokens() - length;
        let (first, end, lane) = (first + padding, end + padding, lane as i32);
        let mut layers = Vec::with_capacity(cache.layers.len());
        let mut is_border = true;
        for layer in &cache.layers {
            let mut block = LayerBlock::default();
            for (kv, kept) in [(&layer.kv, &mut block.kv), (&layer.indexer, &mut block.indexer)] {
                if kv.state().next().is_none() {
                    continue;
                }
                let Some(stretch) = kv.stretch(device, first, end, lane)? else { return Ok(None) };
                *kept = Some(stretch);
            }
            match with_states {
                true => match layer.states.copied_at(device, end, lane)? {
                    Some(states) => block.states = states,
                    None => is_border = false,
                },
                false => is_border &= layer.states.arrays().is_empty(),
            }
            layers.push(block);
        }
        if !is_border {
            layers.iter_mut().for_each(|layer| layer.states.clear());
        }
        Ok(Some(Self { tokens: tokens.to_vec(), adapter: None, layers, is_border }))
    }

    /// The arrays, to be evaluated.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(|layer| {
            let kvs = layer.kv.iter().chain(&layer.indexer);
            kvs.flat_map(|kv| &kv.planes.arrays).chain(&layer.states)
        })
    }

    /// Bytes of the arrays and the ids.
    pub(crate) fn bytes(&self) -> usize {
        self.arrays().map(Array::byte_size).sum::<usize>() + size_of_val(self.tokens.as_slice())
    }
}

/// Caches that hold what these blocks hold, one after the other, with room for `room` more tokens. The last one must be a border,
/// and all must have been taken of sequences of the same layers.
pub(crate) fn resumed(
    device: &Device,
    options: &CacheOptions,
    blocks: &[&Block],
    room: usize,
) -> Result<SequenceCache> {
    let layers = blocks.first().map_or(0, |block| block.layers.len());
    let mut cache = SequenceCache::new(layers, options);
    let tokens = i32::try_from(blocks.len() * BLOCK_TOKENS).unwrap_or(i32::MAX);
    let room = i32::try_from(room).unwrap_or(i32::MAX / 2).min(LARGEST_ROOM);
    let fill = |kv: &mut KvCache, stretches: Vec<&KvStretch>| -> Result<()> {
        *kv = std::mem::take(kv).resumed(device, &stretches, tokens, room)?;
        Ok(())
    };
    for (index, layer) in cache.layers.iter_mut().enumerate() {
        let parts: Vec<&LayerBlock> = blocks.iter().filter_map(|block| block.layers.get(index)).collect();
        let LayerCache { kv, indexer, states } = layer;
        fill(kv, parts.iter().filter_map(|part| part.kv.as_ref()).collect())?;
        fill(indexer, parts.iter().filter_map(|part| part.indexer.as_ref()).collect())?;
        if let Some(last) = parts.last().filter(|last| !last.states.is_empty()) {
            *states = States::of(last.states.clone(), tokens);
        }
    }
    cache.advance(tokens);
    Ok(cache)
}

/// Most tokens that a cache gets room for at once: as many as go through in one step of a prompt.
const LARGEST_ROOM: i32 = 2048;
