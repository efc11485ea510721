//! A request from its submission to its end, wherever it is: waiting, running, waiting again.

use super::RequestId;
use super::queue::Waits;
use super::reuse::Reuse;
use mlxnode_compute::SequenceSpec;
use std::time::Instant;

/// One sequence for one front.
#[derive(Debug)]
pub(super) struct Request {
    /// Its name; the larger, the younger.
    pub(super) id: RequestId,
    pub(super) tenant: String,
    /// The prompt, and every token that was generated so far: what it takes to go on with it anywhere.
    pub(super) tokens: Vec<u32>,
    /// Of the whole: `prompt_tokens` is the first prompt's length, `max_tokens` counts all that is generated.
    pub(super) spec: SequenceSpec,
    pub(super) deadline: Option<Instant>,
    /// Does another sequence compute what it begins with? As of that version of the index.
    pub(super) awaited: Option<(u64, bool)>,
    /// The front knows that it began.
    pub(super) has_started: bool,
    /// Tokens of the prompt whose scores went to the front.
    pub(super) scored: usize,
}

impl Request {
    /// Tokens of the answer that are there.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len().saturating_sub(self.spec.prompt_tokens)
    }

    /// What the workers are to do from here.
    pub(super) fn spec_from_here(&self) -> SequenceSpec {
        let mut spec = self.spec.clone();
        if self.generated() > 0 {
            // All scores came before the first token; now they would be those of the answer too.
            spec.prompt_logprobs = None;
        }
        spec
    }

    /// Is it better to wait? Asked at every event, so the answer is kept until the index changes.
    pub(super) fn is_awaited(&mut self, reuse: &Reuse) -> bool {
        let version = reuse.version();
        if let Some((_, known)) = self.awaited.filter(|(of, _)| *of == version) {
            return known;
        }
        let is_awaited = reuse.is_awaited(&self.tenant, &self.tokens, &self.spec);
        self.awaited = Some((version, is_awaited));
        is_awaited
    }
}

impl Waits for Request {
    fn tenant(&self) -> &str {
        &self.tenant
    }

    fn tokens(&self) -> usize {
        self.tokens.len()
    }
}
