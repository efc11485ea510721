//! What a replica can take.

use std::time::Duration;

/// What a replica can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences at the same time in the workers.
    pub max_sequences: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// KV tokens reserved over all sequences.
    pub kv_tokens: usize,
    /// What of them is promised to a sequence.
    pub promise: Promise,
    /// Requests that may wait.
    pub max_queued: usize,
    /// Prompt tokens that may wait. A single request is taken even if it has more, so that long prompts have a chance.
    pub max_queued_tokens: usize,
    /// What one tenant may fill of both, in hundredths: whatever one does, others find a place.
    pub tenant_percent: usize,
    /// With open sequences and no word from the workers for this long (and `stall_per_prompt_token` for each prompt token
    /// that is being worked on), they count as lost.
    pub stall_after: Duration,
    /// See `stall_after`.
    pub stall_per_prompt_token: Duration,
}

impl Limits {
    /// The limits of a plan: `max_sequences` sequences of `context_tokens` tokens, 256 waiting requests with a million prompt
    /// tokens (4 MB), 30 s of silence and 0.1 s for each prompt token (a Mac that prefills at 10 tokens per second is of no use).
    pub fn new(max_sequences: usize, context_tokens: usize) -> Self {
        Self {
            max_sequences,
            context_tokens,
            kv_tokens: max_sequences.saturating_mul(context_tokens),
            promise: Promise::Whole,
            max_queued: 256,
            max_queued_tokens: 1_000_000,
            tenant_percent: 75,
            stall_after: Duration::from_secs(30),
            stall_per_prompt_token: Duration::from_millis(100),
        }
    }
}

/// What of the reserved memory a sequence counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// All that it may ever take: its prompt and `max_tokens`.
    Whole,
    /// What it takes now. It is opened when what all will probably take fits too.
    Probable {
        /// What a sequence takes whatever its length (states, windows), in tokens of a whole context.
        fixed_tokens: usize,
    },
}

/// How many sequences may be open for each whole context that is reserved.
const SEQUENCES_PER_CONTEXT: usize = 4;
/// A worker keeps something for each sequence, and a step of more rows than that gains nothing.
const MOST_SEQUENCES: usize = 256;

impl Limits {
    /// The limits of a plan that reserves memory for so many whole contexts and shares it among more sequences than that, as long as they
    /// are short. The workers must take [`Limits::sequences_for`] of them.
    pub fn shared(contexts: usize, context_tokens: usize, fixed_tokens: usize) -> Self {
        Self {
            max_sequences: Self::sequences_for(contexts),
            promise: Promise::Probable { fixed_tokens },
            ..Self::new(contexts, context_tokens)
        }
    }

    /// Most sequences that are open at the same time where memory for so many whole contexts is reserved.
    pub fn sequences_for(contexts: usize) -> usize {
        contexts.saturating_mul(SEQUENCES_PER_CONTEXT).min(MOST_SEQUENCES).max(contexts)
    }
}
