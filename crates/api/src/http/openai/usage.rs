//! What a request took, as OpenAI counts it.

use crate::front::Summary;
use serde::Serialize;

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(in crate::http) struct Usage {
    pub(in crate::http) prompt_tokens: usize,
    pub(in crate::http) completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
}

impl Usage {
    /// Counts a prompt once, however many samples it has.
    pub(in crate::http) fn add_prompt(&mut self, tokens: usize) {
        self.prompt_tokens += tokens;
        self.total_tokens += tokens;
    }

    /// Counts a finished sample. `is_first`: of its prompt, whose cached tokens count once.
    pub(in crate::http) fn add_sample(&mut self, summary: &Summary, reasoning: usize, is_first: bool) {
        self.completion_tokens += summary.generation_tokens;
        self.total_tokens += summary.generation_tokens;
        self.completion_tokens_details.reasoning_tokens += reasoning;
        if is_first {
            self.prompt_tokens_details.cached_tokens += summary.cached_tokens;
        }
    }
}

/// Tokens of texts that were embedded.
#[derive(Clone, Copy, Debug, Serialize)]
pub(in crate::http) struct EmbeddingUsage {
    pub(in crate::http) prompt_tokens: usize,
    pub(in crate::http) total_tokens: usize,
}
