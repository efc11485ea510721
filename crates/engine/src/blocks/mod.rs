//! Blocks of prompts that outlive their sequences: taken as the tokens go through, put into other sequences, on the disk in
//! between.
//!
//! | module | one line |
//! |---|---|
//! | [`block`] | a block, out of caches and into caches |
//! | [`plain`] | a block as bytes |
//! | [`files`] | blocks on the disk |
//!
//! Keys and values of a block are copies of their own, so that a sequence goes on writing in place, and joining blocks is one
//! operation for each array. With a window a block holds what later tokens see. Recurrent states are those after the last token,
//! where asked for: a copy for each block would be larger than the keys and values.

mod block;
mod files;
mod plain;

pub(crate) use block::{Block, resumed};
pub(crate) use files::BlockFiles;

use files::Reading;
use mlxnode_compute::{BlockCapacity, BlockHash, BlockId, BlockOrder, BlockUsage, ByteCount};
use mlxnode_mlx::{Device, Result};
use plain::PlainBlock;
use std::collections::{HashMap, VecDeque};

/// The blocks of a stage.
#[derive(Default)]
pub(crate) struct Blocks {
    held: HashMap<BlockId, Block>,
    bytes: u64,
    reading: HashMap<BlockId, Reading>,
    /// To be written, in this order: copying them takes the device's time, so a step goes first.
    due: VecDeque<(BlockId, BlockHash)>,
    files: Option<BlockFiles>,
    capacity: BlockCapacity,
}

impl Blocks {
    /// None yet, with this room; on the disk as much as `files` allow.
    pub(crate) fn new(capacity: BlockCapacity, files: Option<BlockFiles>) -> Self {
        let disk = files.as_ref().map_or(ByteCount(0), BlockFiles::limit);
        Self { capacity: BlockCapacity { disk, ..capacity }, files, ..Self::default() }
    }

    /// Frees all in memory.
    pub(crate) fn reset(&mut self) -> BlockCapacity {
        self.held.clear();
        self.reading.clear();
        self.due.clear();
        self.bytes = 0;
        self.capacity
    }

    pub(crate) fn insert(&mut self, id: BlockId, block: Block) {
        self.remove(id);
        self.bytes += block.bytes() as u64;
        self.held.insert(id, block);
    }

    /// The blocks of these names, in order, or the first that is not here. Waits for those that are being read.
    pub(crate) fn get(
        &mut self,
        device: &Device,
        ids: &[BlockId],
    ) -> Result<std::result::Result<Vec<&Block>, BlockId>> {
        for id in ids {
            let Some(reading) = self.reading.remove(id) else { continue };
            if let Some(block) = reading.wait().map(|plain| plain.block(device)).transpose()?.flatten() {
                self.insert(*id, block);
            }
        }
        Ok(ids.iter().map(|id| self.held.get(id).ok_or(*id)).collect())
    }

    pub(crate) fn order(&mut self, device: &Device, order: BlockOrder) -> Result<()> {
        match order {
            BlockOrder::Drop { block } => {
                if let Some(place) = self.due.iter().position(|(due, _)| *due == block)
                    && let Some((_, hash)) = self.due.remove(place)
                    && self.files.as_ref().is_some_and(BlockFiles::has_room)
                {
                    self.write(device, block, hash)?;
                }
                self.remove(block);
            }
            BlockOrder::Spill { block, hash } => {
                if self.files.is_some() && self.held.contains_key(&block) {
                    self.due.push_back((block, hash));
                }
            }
            BlockOrder::Restore { block, hash } => {
                if let Some(files) = self.files.as_ref().filter(|_| !self.held.contains_key(&block)) {
                    self.reading.insert(block, files.read(hash));
                }
            }
            BlockOrder::Erase { hash } => {
                if let Some(files) = &self.files {
                    files.erase(hash);
                }
            }
        }
        Ok(())
    }

    /// Writes the next block that is due, if the disk keeps up. True when there are more.
    pub(crate) fn write_next(&mut self, device: &Device) -> Result<bool> {
        if self.files.as_ref().is_some_and(BlockFiles::has_room)
            && let Some((block, hash)) = self.due.pop_front()
        {
            self.write(device, block, hash)?;
        }
        Ok(!self.due.is_empty())
    }

    /// As [`Self::write_next`], after a moment for the disk if need be.
    pub(crate) fn wait_and_write_next(&mut self, device: &Device) -> Result<bool> {
        if let Some(files) = self.files.as_ref().filter(|files| !self.due.is_empty() && !files.has_room()) {
            files.wait_a_moment();
        }
        self.write_next(device)
    }

    fn write(&self, device: &Device, block: BlockId, hash: BlockHash) -> Result<()> {
        if let (Some(files), Some(block)) = (&self.files, self.held.get(&block))
            && !files.has(hash)
            && let Some(plain) = PlainBlock::of(device, block)?
        {
            files.write(hash, plain);
        }
        Ok(())
    }

    pub(crate) fn usage(&self) -> BlockUsage {
        BlockUsage {
            blocks: self.held.len(),
            memory: ByteCount(self.bytes),
            disk: self.files.as_ref().map_or(ByteCount(0), BlockFiles::bytes),
        }
    }

    fn remove(&mut self, id: BlockId) {
        self.reading.remove(&id);
        if let Some(block) = self.held.remove(&id) {
            self.bytes -= block.bytes() as u64;
        }
    }
}
