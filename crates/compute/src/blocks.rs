//! Blocks: what a stage remembers of [`BLOCK_TOKENS`] tokens of a prompt, kept after the sequence that computed it is closed.
//!
//! Who may start from which block is decided in one place, beside the scheduler; stages do as they are told, all of them the
//! same and in the same order, so that a block is there everywhere or nowhere. A stage that lost one all the same (a damaged
//! file) says [`crate::StageError::MissingBlock`], and the sequence is computed from its first token.

use crate::{ByteCount, SequenceId, StageError};
use std::fmt;

/// Tokens in a block. Short blocks fit more prompts' common beginnings and cost more bookkeeping; 256 tokens of an 8B model are
/// 32 MB, which a disk reads in a hundredth of a second, and caches grow by as many.
pub const BLOCK_TOKENS: usize = 256;

/// Names a block within one replica. Chosen beside the scheduler, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u64);

/// Names what a block holds, for ever and on every machine: its tokens, all tokens before them, and for whom they were computed.
/// Files are named by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl fmt::Display for BlockHash {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "BlockHash({self})")
    }
}

/// A block to be taken of a sequence, once its tokens went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Keep {
    /// Which of the sequence's: block n holds the tokens from `n * BLOCK_TOKENS` on.
    pub number: usize,
    /// Its name from now on.
    pub block: BlockId,
    /// With the states of recurrent layers after its last token, so that a sequence can go on from there. A step must end at that
    /// token then. Models without such layers can go on from every block.
    pub checkpoint: bool,
}

/// What a sequence begins with, and what is to be kept of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockPlan {
    /// The blocks of the prompt's first tokens, in order: nothing is computed for those. They leave at least one token of the
    /// prompt, as something has to be computed for the first answer.
    pub reuse: Vec<BlockId>,
    /// What to keep, by number.
    pub keep: Vec<Keep>,
}

impl BlockPlan {
    /// Tokens of the prompt that need no work.
    pub fn cached_tokens(&self) -> usize {
        self.reuse.len() * BLOCK_TOKENS
    }

    /// Nothing to begin with and nothing to keep.
    pub fn is_empty(&self) -> bool {
        self.reuse.is_empty() && self.keep.is_empty()
    }
}

/// What a stage does with its blocks, between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockOrder {
    /// Free its memory. One that is not there is fine.
    Drop {
        /// Which.
        block: BlockId,
    },
    /// Put a copy on the disk, when there is time for it. It stays in memory until it is dropped. One that cannot be written, or is dropped
    /// before it was, is a miss later on.
    Spill {
        /// Which.
        block: BlockId,
        /// The name of its file.
        hash: BlockHash,
    },
    /// Read it from the disk into memory. What is not there, or damaged, is missing when a sequence wants to begin with it.
    Restore {
        /// Its name from now on.
        block: BlockId,
        /// The name of its file.
        hash: BlockHash,
    },
    /// Remove it from the disk. One that is not there is fine.
    Erase {
        /// The name of its file.
        hash: BlockHash,
    },
}

/// What a stage's blocks take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockUsage {
    /// Blocks in memory.
    pub blocks: usize,
    /// Their bytes in memory.
    pub memory: ByteCount,
    /// Bytes of the files.
    pub disk: ByteCount,
}

/// What one stage has for blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCapacity {
    /// Bytes of a block's keys and values, at most.
    pub block: ByteCount,
    /// Bytes more when the states of recurrent layers are in it.
    pub checkpoint: ByteCount,
    /// All blocks in memory may take so much.
    pub memory: ByteCount,
    /// All blocks on the disk may take so much. 0: there is no disk.
    pub disk: ByteCount,
    /// Names what the stage computes: model, layers and options. Files of one stage mean nothing to another.
    pub fingerprint: [u8; 32],
}

/// The part of a stage that keeps blocks.
pub trait BlockStore {
    /// Frees all blocks in memory, and says what there is room for: the first word of whoever is to decide from now on.
    fn reset(&mut self) -> BlockCapacity;

    /// Lets an open sequence, through which nothing went yet, begin after these blocks. When one is not there it ends in
    /// [`StageError::MissingBlock`], and the sequence is as it was.
    fn begin_with(&mut self, sequence: SequenceId, blocks: &[BlockId]) -> Result<(), StageError>;

    /// Takes a block of an open sequence as soon as its tokens went through: at once if they did.
    fn keep(&mut self, sequence: SequenceId, keep: Keep) -> Result<(), StageError>;

    /// Does as told, without waiting for a disk.
    fn order(&mut self, order: BlockOrder) -> Result<(), StageError>;

    /// Nothing waits for the stage: does one of the things that it put off. True when there are more, so that it is to be called again
    /// unless something else came; it may then wait a moment for a disk.
    fn rest(&mut self) -> Result<bool, StageError> {
        Ok(false)
    }

    /// What the blocks take now.
    fn usage(&self) -> BlockUsage;
}
