//! How many blocks fit: bytes per block in each stage against the stage's limits.

use mlxnode_compute::{BlockCapacity, ByteCount};

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// In the stages' memory.
    Memory,
    /// On the stages' disks.
    Disk,
}

/// What the stages have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    stages: Vec<BlockCapacity>,
    has_checkpoints: bool,
}

/// Blocks in a tier, and how many of them have states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) blocks: usize,
    pub(super) checkpoints: usize,
}

impl Capacity {
    /// Of these stages, in order. Models with recurrent layers are those of which a stage has a `checkpoint`.
    pub fn new(stages: Vec<BlockCapacity>) -> Self {
        let has_checkpoints = stages.iter().any(|stage| stage.checkpoint.0 > 0);
        Self { stages, has_checkpoints }
    }

    /// Names what the stages compute together.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("mlxnode stages of blocks v1");
        self.stages.iter().for_each(|stage| {
            hasher.update(&stage.fingerprint);
        });
        *hasher.finalize().as_bytes()
    }

    /// Can a sequence go on only after blocks with states?
    pub fn has_checkpoints(&self) -> bool {
        self.has_checkpoints
    }

    /// Does not even one block fit?
    pub fn is_nothing(&self) -> bool {
        self.stages.is_empty() || !self.fits_alone(Tier::Memory, self.has_checkpoints)
    }

    /// Do these fit, and `more` besides, which all have states if `checkpoint`?
    pub(super) fn fits(&self, tier: Tier, counts: Counts, checkpoint: bool, more: usize) -> bool {
        let blocks = counts.blocks + more;
        let checkpoints = counts.checkpoints + if checkpoint { more } else { 0 };
        self.stages.iter().all(|stage| {
            let limit = match tier {
                Tier::Memory => stage.memory,
                Tier::Disk => stage.disk,
            };
            // A stage that keeps none does not know what one takes.
            blocks == 0 || (limit.0 > 0 && bytes(stage, Counts { blocks, checkpoints }) <= limit)
        })
    }

    /// Would one fit if there were no other?
    pub(super) fn fits_alone(&self, tier: Tier, checkpoint: bool) -> bool {
        self.fits(tier, Counts::default(), checkpoint, 1)
    }

    /// What these take in all stages together.
    pub(super) fn bytes(&self, counts: Counts) -> ByteCount {
        self.stages.iter().map(|stage| bytes(stage, counts)).sum()
    }
}

/// What these take in one stage.
fn bytes(stage: &BlockCapacity, counts: Counts) -> ByteCount {
    let times = |bytes: ByteCount, count: usize| ByteCount(bytes.0.saturating_mul(count as u64));
    times(stage.block, counts.blocks) + times(stage.checkpoint, counts.checkpoints)
}
