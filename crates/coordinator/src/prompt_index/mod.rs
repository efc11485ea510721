//! Which beginnings of prompts are computed already, and where: one index for each replica, beside its scheduler.
//!
//! A tree whose every edge is a block of [`BLOCK_TOKENS`] tokens; a path from the root is the beginning of a prompt, for one
//! tenant and one adapter. Pure: what sequences do goes in, [`Effect`]s come out, and all stages are told the same in the same
//! order, so that a block is in every stage or in none.
//!
//! ```text
//!             begin                 kept                    room is needed            begin
//!  (nothing) ───────▶ being computed ────▶ in memory ──spill──▶ on the disk only ──restore──▶ in memory
//!                          │ end                  └─drop─▶ gone          └─erase─▶ gone
//!                          └────▶ gone
//! ```
//!
//! | module | one line |
//! |---|---|
//! | `tree` | the blocks, by the hash of all tokens up to their end |
//! | `capacity` | how many fit, in each stage and tier |
//! | `stored` | what is on the disk, as a file for the next start |
//!
//! An index belongs to one epoch of a deployment: its names of blocks mean nothing to other workers. What outlives it is on the
//! disk, under hashes.

mod capacity;
mod hash;
mod stored;
mod tree;

pub use capacity::{Capacity, Tier};
pub use hash::root;
pub use stored::StoredError;

use mlxnode_compute::{BLOCK_TOKENS, BlockHash, BlockId, BlockOrder, BlockPlan, ByteCount, Keep, SequenceId};
use std::collections::{BTreeMap, HashMap};
use tree::{Pending, Tree};

/// Recurrent models: a sequence can go on only where their states were kept, which is after the last full block of each prompt, where
/// two prompts part, and after every so many blocks. The states of a large model take as much as the keys and values of some
/// thousand tokens, hence not more often.
const BLOCKS_PER_CHECKPOINT: usize = 8;

/// What the stages are to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Keep a block of a sequence that is running.
    Keep {
        /// Whose.
        sequence: SequenceId,
        /// Which.
        keep: Keep,
    },
    /// Move blocks between memory, disk and nowhere.
    Order(BlockOrder),
}

/// A request, as far as the index cares.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Nobody else finds its blocks: how fast an answer comes would tell what others asked.
    pub tenant: &'a str,
    /// The adapter that changes keys and values.
    pub adapter: Option<&'a str>,
    /// The token ids.
    pub tokens: &'a [u32],
    /// Most tokens that are generated.
    pub max_tokens: usize,
}

/// How well the index serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Blocks in memory, those being computed included.
    pub blocks_in_memory: usize,
    /// Blocks on the disk.
    pub blocks_on_disk: usize,
    /// Bytes in the memory of all stages.
    pub memory: ByteCount,
    /// Bytes on the disks of all stages.
    pub disk: ByteCount,
    /// Tokens of all prompts that began.
    pub prompt_tokens: u64,
    /// Those of them that needed no work.
    pub cached_tokens: u64,
}

/// The index.
#[derive(Debug)]
pub struct PromptIndex {
    capacity: Capacity,
    /// Of the stages, so that no other ones' files are found.
    fingerprint: [u8; 32],
    tree: Tree,
    running: BTreeMap<SequenceId, Running>,
    next_block: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    /// Changes with what [`PromptIndex::is_being_computed`] depends on.
    version: u64,
    effects: Vec<Effect>,
}

/// A sequence that is open in the stages.
#[derive(Debug)]
struct Running {
    root: BlockHash,
    /// The blocks of its tokens, from the first one on. They stay while it runs.
    path: Vec<BlockHash>,
    /// How many of them it began with.
    reused: usize,
    /// How many of them are there: those that it began with, and those that all stages computed since.
    finished: usize,
    /// The block whose tokens are being generated.
    growing: Option<Growing>,
    /// Tokens that may go through, prompt included.
    most_tokens: usize,
}

#[derive(Debug)]
struct Growing {
    keep: Keep,
    tokens: Vec<u32>,
}

impl PromptIndex {
    /// Empty, for these stages.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            tree: Tree::default(),
            fingerprint: capacity.fingerprint(),
            capacity,
            running: BTreeMap::new(),
            next_block: 1,
            prompt_tokens: 0,
            cached_tokens: 0,
            version: 1,
            effects: Vec::new(),
        }
    }

    /// Is a running sequence computing more of this prompt's beginning than is there? Then waiting for it is cheaper than computing
    /// it twice. It ends or goes on, so nobody waits for ever.
    pub fn is_being_computed(&self, prompt: Prompt<'_>) -> bool {
        let mut is_pending = false;
        let root = root(&self.fingerprint, prompt.tenant, prompt.adapter);
        for (hash, tokens) in hash::chain(root, usable(prompt.tokens)) {
            let Some(node) = self.tree.find(&hash, tokens) else { break };
            match &node.pending {
                Some(pending) if !node.is_somewhere() => {
                    is_pending |= pending.checkpoint || !self.capacity.has_checkpoints();
                }
                _ if node.is_somewhere() => is_pending &= !self.can_begin_after(node.has_checkpoint),
                _ => break,
            }
        }
        is_pending
    }

    /// Another one when [`Self::is_being_computed`] may give another answer.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// A sequence is about to be opened: what it begins with and what is kept of it. The effects come before the opening.
    /// Sequences that the index should not know, such as those whose whole prompt is scored, are simply never told to it.
    pub fn begin(&mut self, sequence: SequenceId, prompt: Prompt<'_>) -> (BlockPlan, Vec<Effect>) {
        if self.running.contains_key(&sequence) || self.capacity.is_nothing() {
            return Default::default();
        }
        let root = root(&self.fingerprint, prompt.tenant, prompt.adapter);
        let all: Vec<(BlockHash, &[u32])> = hash::chain(root, prompt.tokens).collect();
        let usable = usable(prompt.tokens).len() / BLOCK_TOKENS;
        let known = self.known(&all[..usable]);
        let mut running = Running {
            root,
            path: Vec::with_capacity(all.len()),
            reused: 0,
            finished: 0,
            growing: None,
            most_tokens: prompt.tokens.len() + prompt.max_tokens.saturating_sub(1),
        };
        let deepest = (0..known).rev().find(|number| {
            let node = self.tree.find(&all[*number].0, all[*number].1);
            node.is_some_and(|node| self.can_begin_after(node.has_checkpoint))
        });
        let wanted = deepest.map_or(0, |number| number + 1);
        let mut plan = BlockPlan::default();
        // Those it begins with are in use from now on, so that making room for one does not drop another.
        for (hash, _) in &all[..wanted] {
            self.tree.hold(hash);
        }
        for (place, (hash, _)) in all[..wanted].iter().enumerate() {
            match self.in_memory(hash) {
                Some(block) => plan.reuse.push(block),
                None => {
                    // No room. The rest is computed, and perhaps so is more, down to where a sequence can begin.
                    let place = self.border_before(&all, place);
                    plan.reuse.truncate(place);
                    break;
                }
            }
        }
        let reused = plan.reuse.len();
        for (hash, _) in &all[reused..wanted] {
            self.tree.release(hash);
        }
        (running.reused, running.finished) = (reused, reused);
        running.path.extend(all[..reused].iter().map(|(hash, _)| *hash));
        let last_full = all.len().checked_sub(1);
        for (number, (hash, tokens)) in all.iter().enumerate().skip(reused) {
            let checkpoint = self.capacity.has_checkpoints()
                && (Some(number) == last_full
                    || (number + 1).is_multiple_of(BLOCKS_PER_CHECKPOINT)
                    || number + 1 == known);
            let Some(keep) = self.plan_block(sequence, number, hash, tokens, &running, checkpoint) else {
                break;
            };
            plan.keep.extend(keep);
            running.path.push(*hash);
        }
        if running.path.len() == all.len() {
            let tail = &prompt.tokens[all.len() * BLOCK_TOKENS..];
            self.grow(&mut running, tail.to_vec());
            plan.keep.extend(running.growing.as_ref().map(|growing| growing.keep));
        }
        self.tree.touch(&running.path);
        self.prompt_tokens += prompt.tokens.len() as u64;
        self.cached_tokens += plan.cached_tokens() as u64;
        self.running.insert(sequence, running);
        self.version += 1;
        (plan, self.take_effects())
    }

    /// All stages computed the first `tokens` tokens of a sequence's prompt.
    pub fn went_through(&mut self, sequence: SequenceId, tokens: usize) -> Vec<Effect> {
        let Some(running) = self.running.get_mut(&sequence) else { return Vec::new() };
        let done = running.path.len().min(tokens / BLOCK_TOKENS);
        if done <= running.finished {
            return Vec::new();
        }
        self.version += 1;
        let before = std::mem::replace(&mut running.finished, done);
        for hash in running.path.get(before..done).unwrap_or_default() {
            let (replaced, is_erased) = self.tree.finish(hash, sequence);
            self.effects.extend(replaced.map(|block| Effect::Order(BlockOrder::Drop { block })));
            if is_erased {
                self.effects.push(Effect::Order(BlockOrder::Erase { hash: *hash }));
            }
        }
        self.take_effects()
    }

    /// A sequence's next token was sampled: all tokens before it went through all stages.
    pub fn generated(&mut self, sequence: SequenceId, token: u32) -> Vec<Effect> {
        let Some(mut running) = self.running.remove(&sequence) else { return Vec::new() };
        if let Some(growing) = running.growing.take_if(|growing| growing.tokens.len() >= BLOCK_TOKENS) {
            self.grown(&mut running, growing);
            self.grow(&mut running, Vec::new());
            if let Some(growing) = &running.growing {
                self.effects.push(Effect::Keep { sequence, keep: growing.keep });
            }
        }
        if let Some(growing) = &mut running.growing {
            growing.tokens.push(token);
        }
        self.running.insert(sequence, running);
        self.take_effects()
    }

    /// The stages closed a sequence: nothing of it is on its way any more. Unknown ones are fine. What it computed goes to the disk as
    /// well now, if there is one: from the first block on, as those that follow are of no use without it.
    pub fn end(&mut self, sequence: SequenceId) -> Vec<Effect> {
        let Some(running) = self.running.remove(&sequence) else { return Vec::new() };
        self.version += 1;
        if let Some(growing) = running.growing {
            self.tree.unreserve(growing.keep.checkpoint);
            self.effects.push(Effect::Order(BlockOrder::Drop { block: growing.keep.block }));
        }
        for hash in &running.path[..running.finished.min(running.path.len())] {
            self.save(hash);
        }
        for hash in running.path.iter().rev() {
            if let Some(block) = self.tree.give_up(hash, sequence) {
                self.effects.push(Effect::Order(BlockOrder::Drop { block }));
            }
            self.tree.release(hash);
        }
        self.take_effects()
    }

    /// A stage did not have a block that a sequence was to begin with: none of them is found again. The sequence is then closed as any
    /// other ([`Self::end`]) and may begin anew.
    pub fn missed(&mut self, sequence: SequenceId) -> Vec<Effect> {
        let Some(running) = self.running.get(&sequence) else { return Vec::new() };
        self.version += 1;
        for hash in running.path[..running.reused].iter().rev() {
            let (block, was_on_disk) = self.tree.forget(hash);
            self.effects.extend(block.map(|block| Effect::Order(BlockOrder::Drop { block })));
            if was_on_disk {
                self.effects.push(Effect::Order(BlockOrder::Erase { hash: *hash }));
            }
        }
        self.take_effects()
    }

    /// What is on the disk, for the next index of this model, see [`Self::load`].
    pub fn store(&self) -> Vec<u8> {
        stored::encode(&self.fingerprint, &self.tree)
    }

    /// Takes over what an earlier index left on the disk. What does not fit the capacity is erased.
    ///
    /// # Errors
    /// [`StoredError`] when the bytes are damaged or another model's; the index stays empty then.
    pub fn load(&mut self, bytes: &[u8]) -> Result<Vec<Effect>, StoredError> {
        let entries = stored::decode(&self.fingerprint, bytes)?;
        for entry in entries {
            self.tree.insert_on_disk(entry);
        }
        while !self.capacity.fits(Tier::Disk, self.tree.counts(Tier::Disk), false, 0) {
            let Some(hash) = self.tree.oldest_on_disk() else { break };
            self.erase(&hash);
        }
        Ok(self.take_effects())
    }

    /// How well it serves.
    pub fn statistics(&self) -> Statistics {
        let (memory, disk) = (self.tree.counts(Tier::Memory), self.tree.counts(Tier::Disk));
        Statistics {
            blocks_in_memory: memory.blocks,
            blocks_on_disk: disk.blocks,
            memory: self.capacity.bytes(memory),
            disk: self.capacity.bytes(disk),
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
        }
    }

    /// How many blocks are held by running sequences.
    pub fn blocks_in_use(&self) -> usize {
        self.tree.in_use()
    }

    /// How many of the blocks are there one after the other from the first one on, in memory or on the disk.
    fn known(&self, blocks: &[(BlockHash, &[u32])]) -> usize {
        let is_there = |(hash, tokens): &(BlockHash, &[u32])| {
            self.tree.find(hash, tokens).is_some_and(tree::Node::is_somewhere)
        };
        blocks.iter().take_while(|block| is_there(block)).count()
    }

    fn can_begin_after(&self, has_checkpoint: bool) -> bool {
        has_checkpoint || !self.capacity.has_checkpoints()
    }

    /// The largest number of first blocks, at most `most`, after which a sequence can begin.
    fn border_before(&self, blocks: &[(BlockHash, &[u32])], most: usize) -> usize {
        let is_border = |count: &usize| {
            *count == 0 || {
                let (hash, tokens) = blocks[*count - 1];
                self.tree.find(&hash, tokens).is_some_and(|node| self.can_begin_after(node.has_checkpoint))
            }
        };
        (0..=most).rev().find(is_border).unwrap_or(0)
    }

    /// The block's name in memory, after it was brought there if need be; None when there is no room.
    fn in_memory(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let node = self.tree.get(hash)?;
        if let Some(block) = node.held {
            return Some(block);
        }
        let checkpoint = node.has_checkpoint;
        self.reserve(checkpoint)?;
        let block = self.name();
        self.tree.restored(hash, block);
        self.effects.push(Effect::Order(BlockOrder::Restore { block, hash: *hash }));
        Some(block)
    }

    /// Makes a block of a sequence that begins part of the tree, held by it. What is to be kept, if it is this sequence that does; None
    /// when there is no room.
    #[expect(clippy::option_option, reason = "no room is another thing than nothing to keep")]
    fn plan_block(
        &mut self,
        sequence: SequenceId,
        number: usize,
        hash: &BlockHash,
        tokens: &[u32],
        running: &Running,
        checkpoint: bool,
    ) -> Option<Option<Keep>> {
        let parent = running.path.last().copied().unwrap_or(running.root);
        let is_needed = match self.tree.get(hash) {
            // Another prompt with the same hash: its blocks cannot be told apart.
            Some(node) if !node.is_of(tokens, &parent) => return None,
            Some(node) if node.pending.is_some() => false,
            Some(node) => node.held.is_none() || (checkpoint && !node.has_checkpoint),
            None => true,
        };
        if !is_needed {
            self.tree.hold(hash);
            return Some(None);
        }
        self.reserve(checkpoint)?;
        let block = self.name();
        let pending = Pending { block, sequence, checkpoint };
        self.tree.compute(hash, &parent, tokens, pending);
        self.tree.hold(hash);
        Some(Some(Keep { number, block, checkpoint }))
    }

    /// Begins the block after the sequence's last full one, if it can get full and there is room.
    fn grow(&mut self, running: &mut Running, tokens: Vec<u32>) {
        let number = running.path.len();
        if (number + 1) * BLOCK_TOKENS > running.most_tokens {
            return;
        }
        let checkpoint =
            self.capacity.has_checkpoints() && (number + 1).is_multiple_of(BLOCKS_PER_CHECKPOINT);
        if self.reserve(checkpoint).is_some() {
            let keep = Keep { number, block: self.name(), checkpoint };
            running.growing = Some(Growing { keep, tokens });
        }
    }

    /// A generated block is full, and every stage has it.
    fn grown(&mut self, running: &mut Running, growing: Growing) {
        let Growing { keep, tokens } = growing;
        let parent = running.path.last().copied().unwrap_or(running.root);
        let hash = hash::next(&parent, &tokens);
        self.tree.unreserve(keep.checkpoint);
        if self.tree.insert_held(&hash, &parent, &tokens, keep.block, keep.checkpoint) {
            self.tree.hold(&hash);
            running.path.push(hash);
            running.finished = running.path.len();
            self.version += 1;
            self.tree.touch(&running.path);
        } else {
            // Another sequence went the same way. This one does not follow it: its next blocks would hang on what it does not hold.
            self.effects.push(Effect::Order(BlockOrder::Drop { block: keep.block }));
            running.most_tokens = 0;
        }
    }

    /// Counts one more block in memory, after those used least recently made room. None, and nothing is counted, when those in use
    /// take all of it.
    fn reserve(&mut self, checkpoint: bool) -> Option<()> {
        if !self.capacity.fits_alone(Tier::Memory, checkpoint) {
            return None;
        }
        while !self.capacity.fits(Tier::Memory, self.tree.counts(Tier::Memory), checkpoint, 1) {
            let hash = self.tree.oldest_in_memory()?;
            self.save(&hash);
            let block = self.tree.dropped(&hash)?;
            self.effects.push(Effect::Order(BlockOrder::Drop { block }));
        }
        self.tree.reserve(checkpoint);
        Some(())
    }

    /// Puts a block that is in memory on the disk as well, if there is one, after those used least recently made room.
    fn save(&mut self, hash: &BlockHash) {
        let Some(node) = self.tree.get(hash) else { return };
        let (Some(block), false, checkpoint) = (node.held, node.is_on_disk, node.has_checkpoint) else {
            return;
        };
        if !self.capacity.fits_alone(Tier::Disk, checkpoint) {
            return;
        }
        while !self.capacity.fits(Tier::Disk, self.tree.counts(Tier::Disk), checkpoint, 1) {
            let Some(oldest) = self.tree.oldest_on_disk() else { return };
            self.erase(&oldest);
        }
        // What is under it on the disk can be found only with it; what made room may have been above it.
        if self.tree.get(hash).is_some() {
            self.tree.saved(hash);
            self.effects.push(Effect::Order(BlockOrder::Spill { block, hash: *hash }));
        }
    }

    fn erase(&mut self, hash: &BlockHash) {
        self.tree.erased(hash);
        self.effects.push(Effect::Order(BlockOrder::Erase { hash: *hash }));
    }

    fn name(&mut self) -> BlockId {
        let block = BlockId(self.next_block);
        self.next_block += 1;
        block
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }
}

/// The full blocks that a prompt may begin with: something has to be computed for the first answer.
fn usable(tokens: &[u32]) -> &[u32] {
    let blocks = tokens.len().saturating_sub(1) / BLOCK_TOKENS;
    &tokens[..blocks * BLOCK_TOKENS]
}

/// By hash.
type Nodes = HashMap<BlockHash, tree::Node>;

#[cfg(test)]
mod tests;
