//! What the scheduler does with the index of prompts: nothing until the workers say what they have room for, and nothing for
//! requests that need every token of their prompt computed.

use crate::prompt_index::{Capacity, Effect as IndexEffect, Prompt, PromptIndex, Statistics};
use mlxnode_compute::{BlockCapacity, BlockPlan, Output, SequenceId, SequenceSpec};
use tracing::debug;

/// The index, once there is one.
#[derive(Debug, Default)]
pub(super) struct Reuse {
    index: Option<PromptIndex>,
    /// What an earlier scheduler of this model left behind, until the workers say what it is worth.
    stored: Option<Vec<u8>>,
}

/// What the workers are to be told before and after.
pub(super) type Effects = Vec<IndexEffect>;

impl Reuse {
    /// With what an earlier scheduler left behind.
    pub(super) fn with_stored(stored: Option<Vec<u8>>) -> Self {
        Self { index: None, stored }
    }

    /// The workers say what they have room for; they have no block in memory.
    pub(super) fn set_capacity(&mut self, stages: Vec<BlockCapacity>) -> Effects {
        let mut index = PromptIndex::new(Capacity::new(stages));
        let effects = match self.stored.take().map(|stored| index.load(&stored)) {
            Some(Ok(effects)) => effects,
            Some(Err(error)) => {
                debug!(%error, "no prompts on the disk");
                Vec::new()
            }
            None => Vec::new(),
        };
        self.index = Some(index);
        effects
    }

    /// Another one when what is being computed has changed.
    pub(super) fn version(&self) -> u64 {
        self.index.as_ref().map_or(0, PromptIndex::version)
    }

    /// Is it better to wait until another sequence computed what this one begins with?
    pub(super) fn is_awaited(&self, tenant: &str, prompt: &[u32], spec: &SequenceSpec) -> bool {
        let index = self.index.as_ref().filter(|_| is_reusable(spec));
        index.is_some_and(|index| index.is_being_computed(named(tenant, prompt, spec)))
    }

    /// What a sequence that is about to be opened begins with, and what is kept of it.
    pub(super) fn begin(
        &mut self,
        sequence: SequenceId,
        tenant: &str,
        prompt: &[u32],
        spec: &SequenceSpec,
    ) -> (BlockPlan, Effects) {
        match self.index.as_mut().filter(|_| is_reusable(spec)) {
            Some(index) => index.begin(sequence, named(tenant, prompt, spec)),
            None => Default::default(),
        }
    }

    /// All stages computed so many tokens of a prompt.
    pub(super) fn went_through(&mut self, sequence: SequenceId, tokens: usize) -> Effects {
        self.index.as_mut().map(|index| index.went_through(sequence, tokens)).unwrap_or_default()
    }

    /// A token at `position` was sampled: all before it went through.
    pub(super) fn generated(&mut self, sequence: SequenceId, position: usize, token: u32) -> Effects {
        let Some(index) = &mut self.index else { return Vec::new() };
        // The prompt's blocks come with the first token, those of the answer one by one.
        let mut effects = index.went_through(sequence, position);
        effects.extend(index.generated(sequence, token));
        effects
    }

    /// A stage did not have what the sequence was to begin with.
    pub(super) fn missed(&mut self, sequence: SequenceId) -> Effects {
        self.index.as_mut().map(|index| index.missed(sequence)).unwrap_or_default()
    }

    /// The sequence is closed in all stages.
    pub(super) fn end(&mut self, sequence: SequenceId) -> Effects {
        self.index.as_mut().map(|index| index.end(sequence)).unwrap_or_default()
    }

    /// How well it serves.
    pub(super) fn statistics(&self) -> Statistics {
        self.index.as_ref().map(PromptIndex::statistics).unwrap_or_default()
    }

    /// What is on the disk, for the next scheduler of this model; None while nothing is known.
    pub(super) fn store(&self) -> Option<Vec<u8>> {
        self.index.as_ref().filter(|index| index.statistics().blocks_on_disk > 0).map(PromptIndex::store)
    }
}

/// Scores and vectors need every token of the prompt.
fn is_reusable(spec: &SequenceSpec) -> bool {
    spec.prompt_logprobs.is_none() && spec.output == Output::Tokens
}

fn named<'a>(tenant: &'a str, tokens: &'a [u32], spec: &'a SequenceSpec) -> Prompt<'a> {
    // Of a sequence that is continued a part of the answer is there.
    let generated = tokens.len().saturating_sub(spec.prompt_tokens);
    let max_tokens = spec.max_tokens.saturating_sub(generated);
    Prompt { tenant, adapter: spec.adapter.as_deref(), tokens, max_tokens }
}
