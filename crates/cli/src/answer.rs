//! An answer on its way to the person: text as it comes, or one JSON object at the end.

use crate::generation::{Finish, Model, Outcome, Piece, Request};
use crate::interrupts::Interrupts;
use crate::output;
use anyhow::Result;
use mlxnode_compute::Sampled;
use serde::Serialize;

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, one that ends the sequence included.
    pub tokens: Vec<Sampled>,
    /// How it went.
    pub outcome: Outcome,
}

/// What `--json` prints. The names are a contract: scripts rely on them.
#[derive(Serialize)]
struct Report<'a> {
    text: &'a str,
    token_ids: Vec<u32>,
    prompt_tokens: usize,
    generation_tokens: usize,
    prompt_tps: f64,
    generation_tps: f64,
    peak_memory_bytes: u64,
    finish_reason: Finish,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<TokenLogprobs>>,
}

/// One entry for each of `token_ids`.
#[derive(Serialize)]
struct TokenLogprobs {
    token_id: u32,
    logprob: Option<f32>,
    top: Vec<TokenLogprob>,
}

#[derive(Serialize)]
struct TokenLogprob {
    token_id: u32,
    logprob: f32,
}

impl Answer {
    /// Lets the model answer; `on_text` gets the text as it comes.
    pub fn of(
        model: &mut dyn Model,
        request: &Request,
        interrupts: &Interrupts,
        on_text: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Self> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let guard = interrupts.answer();
        let outcome = model.generate(request, &guard, &mut |piece: Piece| {
            on_text(&piece.text)?;
            text.push_str(&piece.text);
            tokens.extend(piece.tokens);
            Ok(())
        })?;
        Ok(Self { text, tokens, outcome })
    }

    /// Prints the whole answer as one JSON object.
    pub fn print_json(&self, with_logprobs: bool) -> Result<()> {
        let logprobs = |sampled: &Sampled| TokenLogprobs {
            token_id: sampled.token,
            logprob: sampled.logprob,
            top: sampled
                .top
                .iter()
                .map(|one| TokenLogprob { token_id: one.token, logprob: one.logprob })
                .collect(),
        };
        output::json(&Report {
            text: &self.text,
            token_ids: self.tokens.iter().map(|sampled| sampled.token).collect(),
            prompt_tokens: self.outcome.prompt_tokens,
            generation_tokens: self.outcome.generation_tokens,
            prompt_tps: self.outcome.prompt_tps(),
            generation_tps: self.outcome.generation_tps(),
            peak_memory_bytes: self.outcome.peak_memory_bytes,
            finish_reason: self.outcome.finish,
            logprobs: with_logprobs.then(|| self.tokens.iter().map(logprobs).collect()),
        })
    }

    /// The three lines that mlx-lm prints below an answer.
    pub fn statistics(&self) -> String {
        let outcome = &self.outcome;
        format!(
            "Prompt: {} tokens, {:.3} tokens-per-sec\nGeneration: {} tokens, {:.3} tokens-per-sec\nPeak memory: {:.3} GB\n",
            outcome.prompt_tokens,
            outcome.prompt_tps(),
            outcome.generation_tokens,
            outcome.generation_tps(),
            outcome.peak_memory_bytes as f64 / 1e9,
        )
    }

    /// Ctrl-C ended it.
    pub fn was_interrupted(&self) -> bool {
        self.outcome.finish == Finish::Cancelled
    }
}
