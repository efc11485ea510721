//! An answer on its way to the person: text as it comes, or one JSON object at the end.

use crate::generation::{Finish, Model, Outcome, Piece, Request};
use crate::interrupts::Interrupts;
use crate::{output, warnings};
use anyhow::Result;
use mlxnode_compute::Sampled;
use mlxnode_text::{Delta, ToolCall};
use serde::Serialize;

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Its text as the model wrote it.
    pub text: String,
    /// What the text consists of.
    pub parts: Parts,
    /// Its tokens, one that ends the sequence included.
    pub tokens: Vec<Sampled>,
    /// How it went.
    pub outcome: Outcome,
}

/// What an answer consists of.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Parts {
    /// What the person is to see.
    pub content: String,
    /// What the model thought; none when it did not.
    pub reasoning: Option<String>,
    /// The functions that it wants called.
    pub tool_calls: Vec<ToolCall>,
    /// Tool calls that cannot be read, which are content.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// What `--json` prints. The names are a contract: scripts rely on them.
#[derive(Serialize)]
struct Report<'a> {
    text: &'a str,
    #[serde(flatten)]
    parts: &'a Parts,
    token_ids: Vec<u32>,
    prompt_tokens: usize,
    cached_tokens: usize,
    generation_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    guessed_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accepted_tokens: Option<usize>,
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

impl Parts {
    /// The next step of the answer.
    fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Content(text) => self.content.push_str(&text),
            Delta::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
            Delta::ToolCallStarted => {}
            Delta::ToolCall(call) => self.tool_calls.push(call),
            Delta::Warning(problem) => self.warnings.push(problem.to_string()),
        }
    }
}

impl Answer {
    /// Lets the model answer; `on_piece` sees it as it comes.
    pub fn of(
        model: &mut dyn Model,
        request: &Request,
        interrupts: &Interrupts,
        on_piece: &mut dyn FnMut(&Piece) -> Result<()>,
    ) -> Result<Self> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let mut parts = Parts::default();
        let guard = interrupts.answer();
        let outcome = model.generate(request, &guard, &mut |piece: Piece| {
            on_piece(&piece)?;
            text.push_str(&piece.text);
            tokens.extend(piece.tokens);
            piece.deltas.into_iter().for_each(|delta| parts.add(delta));
            Ok(())
        })?;
        Ok(Self { text, parts, tokens, outcome })
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
            parts: &self.parts,
            token_ids: self.tokens.iter().map(|sampled| sampled.token).collect(),
            prompt_tokens: self.outcome.prompt_tokens,
            cached_tokens: self.outcome.cached_tokens,
            generation_tokens: self.outcome.generation_tokens,
            guessed_tokens: self.outcome.guessed.map(|(_, guessed)| guessed),
            accepted_tokens: self.outcome.guessed.map(|(accepted, _)| accepted),
            prompt_tps: self.outcome.prompt_tps(),
            generation_tps: self.outcome.generation_tps(),
            peak_memory_bytes: self.outcome.peak_memory_bytes,
            finish_reason: self.outcome.finish,
            logprobs: with_logprobs.then(|| self.tokens.iter().map(logprobs).collect()),
        })
    }

    /// The three lines that mlx-lm prints below an answer, and one about guesses.
    pub fn statistics(&self) -> String {
        let outcome = &self.outcome;
        let mut lines = format!(
            "Prompt: {} tokens, {:.3} tokens-per-sec\nGeneration: {} tokens, {:.3} tokens-per-sec\nPeak memory: {:.3} GB\n",
            outcome.processed_tokens(),
            outcome.prompt_tps(),
            outcome.generation_tokens,
            outcome.generation_tps(),
            outcome.peak_memory_bytes as f64 / 1e9,
        );
        if let Some((accepted, guessed)) = outcome.guessed {
            lines.push_str(&format!("Guesses: {accepted} of {guessed} tokens were right\n"));
        }
        lines
    }

    /// Says on stderr what is odd about the answer.
    pub fn warn(&self, quiet: bool) {
        for problem in self.parts.warnings.iter().filter(|_| !quiet) {
            warnings::text(&format!("warning: a tool call of the model cannot be read: {problem}\n"));
        }
    }

    /// Ctrl-C ended it.
    pub fn was_interrupted(&self) -> bool {
        self.outcome.finish == Finish::Cancelled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up() {
        let mut parts = Parts::default();
        let call = ToolCall { id: None, name: "f".into(), arguments: serde_json::Map::new() };
        for delta in [
            Delta::Reasoning("a".into()),
            Delta::Reasoning("b".into()),
            Delta::Content("c".into()),
            Delta::ToolCallStarted,
            Delta::ToolCall(call.clone()),
            Delta::Content("d".into()),
        ] {
            parts.add(delta);
        }
        let expected = Parts {
            content: "cd".into(),
            reasoning: Some("ab".into()),
            tool_calls: vec![call],
            warnings: Vec::new(),
        };
        assert_eq!(parts, expected);
        let json = serde_json::to_string(&parts).unwrap();
        assert_eq!(json, r#"{"content":"cd","reasoning":"ab","tool_calls":[{"name":"f","arguments":{}}]}"#);
    }
}
