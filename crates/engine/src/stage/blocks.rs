//! Blocks of prompts in a stage: taken of sequences whose tokens went through, and put before those of others.

use super::{EngineStage, device_error};
use crate::blocks::{Block, BlockFiles, Blocks, resumed};
use mlxnode_checkpoint::ModelProfile;
use mlxnode_compute::{
    BLOCK_TOKENS, BlockCapacity, BlockId, BlockOrder, BlockStore, BlockUsage, ByteCount, CacheOptions, Keep,
    LayerRange, SequenceId, StageError,
};
use std::path::Path;

impl EngineStage {
    /// Blocks take `memory` bytes at most, and with `files` as many more in that folder, which is made when it is missing: blocks of
    /// other stages that are there count as well.
    pub fn with_blocks(
        mut self,
        memory: ByteCount,
        files: Option<(&Path, ByteCount)>,
    ) -> std::io::Result<Self> {
        let LayerRange { start, end } = self.model.info().layers;
        let CacheOptions { max_kv_size, kv_bits, kv_group_size, quantized_kv_start } = self.options.cache;
        let numbers = [
            BLOCK_TOKENS,
            start,
            end,
            max_kv_size.unwrap_or(0),
            usize::from(kv_bits.unwrap_or(0)),
            kv_group_size,
            quantized_kv_start,
        ];
        let mut hasher = blake3::Hasher::new_derive_key("mlxnode stage of blocks v1");
        hasher.update(&self.model.fingerprint());
        for number in numbers {
            hasher.update(&(number as u64).to_le_bytes());
        }
        let fingerprint = *hasher.finalize().as_bytes();
        let files = match files.filter(|(_, limit)| limit.0 > 0) {
            Some((folder, limit)) => Some(BlockFiles::open(folder, fingerprint, limit)?),
            None => None,
        };
        let layers = LayerRange { start, end };
        let (block, checkpoint) = ModelProfile::stretch_bytes(self.model.spec(), layers, BLOCK_TOKENS);
        let ids = ByteCount(size_of::<[u32; BLOCK_TOKENS]>() as u64);
        let disk = ByteCount(0); // as much as the files allow
        let capacity = BlockCapacity { block: block + ids, checkpoint, memory, disk, fingerprint };
        self.blocks = Blocks::new(capacity, files);
        Ok(self)
    }

    /// Takes the blocks of a sequence whose tokens went through. One of which a part is lost (a limit on tokens dropped it) is not
    /// taken, and missing when a sequence wants to begin with it.
    pub(super) fn take_blocks(&mut self, id: SequenceId) -> Result<(), StageError> {
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        let position = sequence.position;
        let is_due = |keep: &Keep| keep.number.saturating_add(1).saturating_mul(BLOCK_TOKENS) <= position;
        if !sequence.keeps.iter().any(is_due) {
            return Ok(());
        }
        let (due, later) = std::mem::take(&mut sequence.keeps).into_iter().partition(is_due);
        sequence.keeps = later;
        let adapter = sequence.adapter.and_then(|adapter| self.adapter_files.get(&adapter)).copied();
        let due: Vec<Keep> = due;
        for Keep { number, block: name, checkpoint } in due {
            let device = &self.model.device;
            let Some((cache, lane)) = self.caches.lane_of(id) else { continue };
            let block = Block::of(device, cache, lane, &sequence.ids, number, checkpoint);
            let Some(mut block) = block.map_err(device_error)? else {
                tracing::debug!(number, "a block could not be kept");
                continue;
            };
            block.adapter = adapter;
            // Now, or the block would hold the caches' buffers, which are then no longer written in place.
            device.async_eval(block.arrays()).map_err(device_error)?;
            self.blocks.insert(name, block);
        }
        Ok(())
    }
}

impl BlockStore for EngineStage {
    fn reset(&mut self) -> BlockCapacity {
        self.blocks.reset()
    }

    fn begin_with(&mut self, id: SequenceId, blocks: &[BlockId]) -> Result<(), StageError> {
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        if sequence.position > 0 {
            return Err(StageError::Position { expected: sequence.position, actual: 0 });
        }
        let device = &self.model.device;
        let found = self.blocks.get(device, blocks).map_err(device_error)?;
        let found = found.map_err(StageError::MissingBlock)?;
        let layers = self.model.decoder.layers.len();
        // Another adapter may have taken the name since.
        let adapter = sequence.adapter.and_then(|adapter| self.adapter_files.get(&adapter)).copied();
        let fits = |block: &&Block| {
            block.layers.len() == layers && block.tokens.len() == BLOCK_TOKENS && block.adapter == adapter
        };
        let (Some(last), Some(name)) = (found.last(), blocks.last()) else { return Ok(()) };
        if !last.is_border || !found.iter().all(fits) {
            return Err(StageError::MissingBlock(*name));
        }
        let tokens = found.len() * BLOCK_TOKENS;
        if tokens > self.options.context_tokens {
            return Err(StageError::Full { tokens, limit: self.options.context_tokens });
        }
        let room = sequence.prompt.saturating_sub(tokens);
        let cache = resumed(device, &self.options.cache, &found, room).map_err(device_error)?;
        for block in found {
            sequence.advance(&block.tokens)?;
        }
        self.caches.remove(id);
        self.caches.insert(id, cache);
        Ok(())
    }

    fn keep(&mut self, id: SequenceId, keep: Keep) -> Result<(), StageError> {
        let sequence = self.sequences.get_mut(&id).ok_or(StageError::UnknownSequence(id))?;
        sequence.keeps.push(keep);
        self.take_blocks(id)
    }

    fn order(&mut self, order: BlockOrder) -> Result<(), StageError> {
        self.blocks.order(&self.model.device, order).map_err(device_error)
    }

    fn rest(&mut self) -> Result<bool, StageError> {
        self.blocks.wait_and_write_next(&self.model.device).map_err(device_error)
    }

    fn usage(&self) -> BlockUsage {
        self.blocks.usage()
    }
}
