//! The tree of blocks. It counts what is in each tier and knows which block was used least recently; what to do about it is not its
//! matter.
//!
//! A node is there as long as its block is somewhere, being computed, in use, or a beginning of another one. Nodes are found by their
//! hash, and told apart by their tokens and their parent besides: a collision never mixes two prompts.

use super::Nodes;
use super::capacity::Counts;
use super::{Tier, stored::Entry};
use mlxnode_compute::{BlockHash, BlockId, SequenceId};
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub(super) struct Tree {
    nodes: Nodes,
    /// Blocks in memory, reserved ones included.
    memory: Counts,
    disk: Counts,
    /// By their last use: those in memory, and those on the disk.
    memory_order: BTreeMap<u64, BlockHash>,
    disk_order: BTreeMap<u64, BlockHash>,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
pub(super) struct Node {
    /// The block before, or the root.
    parent: BlockHash,
    tokens: Box<[u32]>,
    /// Blocks before it.
    depth: usize,
    /// Its name in the stages' memory.
    pub(super) held: Option<BlockId>,
    pub(super) is_on_disk: bool,
    /// Where it is, the states after it are there too.
    pub(super) has_checkpoint: bool,
    pub(super) pending: Option<Pending>,
    /// Running sequences whose tokens these are.
    users: usize,
    last_use: u64,
    children: usize,
    children_in_memory: usize,
    children_on_disk: usize,
}

/// A block that a sequence computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) block: BlockId,
    pub(super) sequence: SequenceId,
    pub(super) checkpoint: bool,
}

impl Node {
    /// Is it in memory or on the disk?
    pub(super) fn is_somewhere(&self) -> bool {
        self.held.is_some() || self.is_on_disk
    }

    pub(super) fn is_of(&self, tokens: &[u32], parent: &BlockHash) -> bool {
        *self.tokens == *tokens && self.parent == *parent
    }
}

impl Tree {
    pub(super) fn get(&self, hash: &BlockHash) -> Option<&Node> {
        self.nodes.get(hash)
    }

    /// The node, if its tokens are these.
    pub(super) fn find(&self, hash: &BlockHash, tokens: &[u32]) -> Option<&Node> {
        self.nodes.get(hash).filter(|node| *node.tokens == *tokens)
    }

    pub(super) fn counts(&self, tier: Tier) -> Counts {
        match tier {
            Tier::Memory => self.memory,
            Tier::Disk => self.disk,
        }
    }

    pub(super) fn in_use(&self) -> usize {
        self.nodes.values().filter(|node| node.users > 0).count()
    }

    /// Nodes on the disk that are found with nothing but the disk, those before first.
    pub(super) fn entries(&self) -> Vec<Entry> {
        let mut on_disk: Vec<(&BlockHash, &Node)> =
            self.nodes.iter().filter(|(_, node)| node.is_on_disk).collect();
        on_disk.sort_by_key(|(hash, node)| (node.depth, **hash));
        let mut found = std::collections::HashSet::new();
        let mut entries = Vec::new();
        for (hash, node) in on_disk {
            let parent = node.parent;
            if node.depth == 0 || found.contains(&parent) {
                found.insert(*hash);
                let tokens = node.tokens.clone();
                let (is_first, has_checkpoint) = (node.depth == 0, node.has_checkpoint);
                entries.push(Entry { parent, tokens, is_first, has_checkpoint, last_use: node.last_use });
            }
        }
        entries
    }

    /// Counts a block in memory that is about to be there.
    pub(super) fn reserve(&mut self, checkpoint: bool) {
        self.memory.blocks += 1;
        self.memory.checkpoints += usize::from(checkpoint);
    }

    pub(super) fn unreserve(&mut self, checkpoint: bool) {
        self.memory.blocks -= 1;
        self.memory.checkpoints -= usize::from(checkpoint);
    }

    /// A sequence computes the block; it is reserved.
    pub(super) fn compute(&mut self, hash: &BlockHash, parent: &BlockHash, tokens: &[u32], pending: Pending) {
        self.insert(hash, parent, tokens);
        if let Some(node) = self.nodes.get_mut(hash) {
            node.pending = Some(pending);
        }
    }

    /// The stages have what this sequence computed. What is to be dropped from memory, as this takes its place; and whether the copy on
    /// the disk is to go, because only one of the two has states. It is written anew when its turn comes.
    pub(super) fn finish(&mut self, hash: &BlockHash, sequence: SequenceId) -> (Option<BlockId>, bool) {
        let Some(node) = self.nodes.get_mut(hash) else { return (None, false) };
        let Some(Pending { block, checkpoint, .. }) =
            node.pending.take_if(|pending| pending.sequence == sequence)
        else {
            return (None, false);
        };
        let is_another = node.has_checkpoint != checkpoint;
        let replaced = self.unhold_memory(hash);
        let is_erased = is_another && self.off_disk(hash);
        if let Some(node) = self.nodes.get_mut(hash) {
            node.has_checkpoint = checkpoint;
        }
        self.hold_memory(hash, block);
        (replaced, is_erased)
    }

    /// The sequence ends; what it did not finish is not there. Its name, to be dropped.
    pub(super) fn give_up(&mut self, hash: &BlockHash, sequence: SequenceId) -> Option<BlockId> {
        let node = self.nodes.get_mut(hash)?;
        let pending = node.pending.take_if(|pending| pending.sequence == sequence)?;
        self.unreserve(pending.checkpoint);
        Some(pending.block)
    }

    /// A block that is in memory now, and reserved no longer. False, and nothing happens, when another sequence has or makes it.
    pub(super) fn insert_held(
        &mut self,
        hash: &BlockHash,
        parent: &BlockHash,
        tokens: &[u32],
        block: BlockId,
        checkpoint: bool,
    ) -> bool {
        if let Some(node) = self.nodes.get(hash)
            && (!node.is_of(tokens, parent) || node.is_somewhere() || node.pending.is_some())
        {
            return false;
        }
        self.insert(hash, parent, tokens);
        if let Some(node) = self.nodes.get_mut(hash) {
            node.has_checkpoint = checkpoint;
        }
        self.reserve(checkpoint);
        self.hold_memory(hash, block);
        true
    }

    /// As an earlier index left it. Nothing when the parent is not there.
    pub(super) fn insert_on_disk(&mut self, entry: Entry) {
        let Entry { parent, tokens, is_first, has_checkpoint, last_use } = entry;
        let hash = super::hash::next(&parent, &tokens);
        if self.nodes.contains_key(&hash) || (!is_first && !self.nodes.contains_key(&parent)) {
            return;
        }
        self.insert(&hash, &parent, &tokens);
        self.clock = self.clock.max(last_use) + 1;
        if let Some(node) = self.nodes.get_mut(&hash) {
            node.has_checkpoint = has_checkpoint;
            // Two of the same age are told apart; any order will do.
            node.last_use = if self.disk_order.contains_key(&last_use) { self.clock } else { last_use };
        }
        self.saved(&hash);
    }

    /// A block on the disk is being read into memory; it is reserved.
    pub(super) fn restored(&mut self, hash: &BlockHash, block: BlockId) {
        self.hold_memory(hash, block);
    }

    /// Drops a block from memory. Its name there.
    pub(super) fn dropped(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let block = self.unhold_memory(hash);
        self.prune(*hash);
        block
    }

    /// A copy is on the disk now.
    pub(super) fn saved(&mut self, hash: &BlockHash) {
        let Some(node) = self.nodes.get_mut(hash).filter(|node| !node.is_on_disk) else { return };
        node.is_on_disk = true;
        let (parent, last_use) = (node.parent, node.last_use);
        self.disk.blocks += 1;
        self.disk.checkpoints += usize::from(node.has_checkpoint);
        self.disk_order.insert(last_use, *hash);
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children_on_disk += 1;
        }
    }

    /// It is no longer on the disk.
    pub(super) fn erased(&mut self, hash: &BlockHash) {
        self.off_disk(hash);
        self.prune(*hash);
    }

    /// It is nowhere. Its name in memory, and whether it was on the disk.
    pub(super) fn forget(&mut self, hash: &BlockHash) -> (Option<BlockId>, bool) {
        let block = self.unhold_memory(hash);
        let was_on_disk = self.off_disk(hash);
        self.prune(*hash);
        (block, was_on_disk)
    }

    /// One more sequence uses it.
    pub(super) fn hold(&mut self, hash: &BlockHash) {
        if let Some(node) = self.nodes.get_mut(hash) {
            node.users += 1;
        }
    }

    /// One sequence less.
    pub(super) fn release(&mut self, hash: &BlockHash) {
        if let Some(node) = self.nodes.get_mut(hash) {
            node.users = node.users.saturating_sub(1);
        }
        self.prune(*hash);
    }

    /// The blocks of a sequence were used just now. A beginning counts as used after what follows it, so that it outlives that.
    pub(super) fn touch(&mut self, path: &[BlockHash]) {
        for hash in path.iter().rev() {
            self.clock += 1;
            let Some(node) = self.nodes.get_mut(hash) else { continue };
            let before = std::mem::replace(&mut node.last_use, self.clock);
            for (order, is_in) in
                [(&mut self.memory_order, node.held.is_some()), (&mut self.disk_order, node.is_on_disk)]
            {
                if is_in {
                    order.remove(&before);
                    order.insert(self.clock, *hash);
                }
            }
        }
    }

    /// What was used least recently of what nobody uses and nothing in memory follows.
    pub(super) fn oldest_in_memory(&self) -> Option<BlockHash> {
        let is_free = |node: &Node| node.users == 0 && node.pending.is_none() && node.children_in_memory == 0;
        self.memory_order.values().find(|hash| self.nodes.get(hash).is_some_and(is_free)).copied()
    }

    /// The same on the disk.
    pub(super) fn oldest_on_disk(&self) -> Option<BlockHash> {
        let is_free = |node: &Node| node.users == 0 && node.children_on_disk == 0;
        self.disk_order.values().find(|hash| self.nodes.get(hash).is_some_and(is_free)).copied()
    }

    fn insert(&mut self, hash: &BlockHash, parent: &BlockHash, tokens: &[u32]) {
        if self.nodes.contains_key(hash) {
            return;
        }
        let depth = match self.nodes.get_mut(parent) {
            Some(parent) => {
                parent.children += 1;
                parent.depth + 1
            }
            None => 0,
        };
        self.clock += 1;
        let node = Node {
            parent: *parent,
            tokens: tokens.into(),
            depth,
            held: None,
            is_on_disk: false,
            has_checkpoint: false,
            pending: None,
            users: 0,
            last_use: self.clock,
            children: 0,
            children_in_memory: 0,
            children_on_disk: 0,
        };
        self.nodes.insert(*hash, node);
    }

    /// It is counted already.
    fn hold_memory(&mut self, hash: &BlockHash, block: BlockId) {
        let Some(node) = self.nodes.get_mut(hash) else { return };
        node.held = Some(block);
        let (parent, last_use) = (node.parent, node.last_use);
        self.memory_order.insert(last_use, *hash);
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children_in_memory += 1;
        }
    }

    fn unhold_memory(&mut self, hash: &BlockHash) -> Option<BlockId> {
        let node = self.nodes.get_mut(hash)?;
        let block = node.held.take()?;
        let (parent, last_use, checkpoint) = (node.parent, node.last_use, node.has_checkpoint);
        self.unreserve(checkpoint);
        self.memory_order.remove(&last_use);
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children_in_memory -= 1;
        }
        Some(block)
    }

    fn off_disk(&mut self, hash: &BlockHash) -> bool {
        let Some(node) = self.nodes.get_mut(hash).filter(|node| node.is_on_disk) else { return false };
        node.is_on_disk = false;
        let (parent, last_use, checkpoint) = (node.parent, node.last_use, node.has_checkpoint);
        self.disk.blocks -= 1;
        self.disk.checkpoints -= usize::from(checkpoint);
        self.disk_order.remove(&last_use);
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children_on_disk -= 1;
        }
        true
    }

    /// Removes the node, and those before it, when there is nothing to them.
    fn prune(&mut self, hash: BlockHash) {
        let mut hash = hash;
        while let Some(node) = self.nodes.get(&hash) {
            if node.is_somewhere() || node.pending.is_some() || node.users > 0 || node.children > 0 {
                return;
            }
            let parent = node.parent;
            self.nodes.remove(&hash);
            if let Some(parent) = self.nodes.get_mut(&parent) {
                parent.children -= 1;
            }
            hash = parent;
        }
    }

    /// Are there no nodes?
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}
