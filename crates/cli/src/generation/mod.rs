//! Generation as the commands see it: one request, a stream of pieces, an outcome; in this process or on the cluster.

mod cluster;
mod conversation;
mod local;

pub use cluster::ClusterModel;
pub use local::{LocalModel, LocalOptions, MemoryOptions};

use crate::interrupts::AnswerGuard;
use anyhow::Result;
use mlxnode_compute::{Grammar, Sampled, Sampling};
use mlxnode_text::grammar::ToolChoice;
use mlxnode_text::{ChatRequest, Delta};
use std::time::Duration;

/// What shall be continued, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to continue.
    pub input: Input,
    /// How tokens are chosen; the tokens that XTC spares are filled in where the tokenizer is.
    pub sampling: Sampling,
    /// Most tokens; none: until the model ends.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer besides the model's own, by number or text.
    pub extra_eos: Vec<String>,
    /// What the answer has to look like.
    pub shape: Shape,
}

/// What an answer has to look like, and who gives it. The functions that it may call are the conversation's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shape {
    /// The language of its content.
    pub format: Option<Grammar>,
    /// Whether it has to call a function.
    pub choice: ToolChoice,
    /// Name of an adapter of the deployment.
    pub adapter: Option<String>,
}

/// What a generation continues.
#[derive(Clone, Debug)]
pub enum Input {
    /// Text as it is.
    Text(String),
    /// A conversation for the model's chat template.
    Chat(Box<ChatRequest>),
}

/// A piece of an answer. The text may be empty while a character is incomplete.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// New text.
    pub text: String,
    /// New tokens, one that ends the sequence included.
    pub tokens: Vec<Sampled>,
    /// What the text means, as far as that is certain: it may come later than the text.
    pub deltas: Vec<Delta>,
}

/// Why an answer ended. The names are a contract: `--json` prints them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A token or a text that ends answers.
    Stop,
    /// No tokens left.
    Length,
    /// Ctrl-C.
    Cancelled,
}

/// How it went.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt, those that the model remembered included.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that the model remembered from before.
    pub cached_tokens: usize,
    /// Tokens that were generated, one that ends the sequence included.
    pub generation_tokens: usize,
    /// Guesses that were right, and all guesses; none when nobody guessed.
    pub guessed: Option<(usize, usize)>,
    /// From the start to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub generation_time: Duration,
    /// Most bytes that MLX held.
    pub peak_memory_bytes: u64,
}

impl Outcome {
    /// Tokens of the prompt that were processed.
    pub fn processed_tokens(&self) -> usize {
        self.prompt_tokens.saturating_sub(self.cached_tokens)
    }

    /// Processed prompt tokens per second.
    pub fn prompt_tps(&self) -> f64 {
        rate(self.processed_tokens(), self.prompt_time)
    }

    /// Generated tokens per second.
    pub fn generation_tps(&self) -> f64 {
        rate(self.generation_tokens, self.generation_time)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

/// A model that answers.
pub trait Model {
    /// Generates; gives each piece as it comes. Ends early, without an error, when `guard` tells of Ctrl-C.
    fn generate(
        &mut self,
        request: &Request,
        guard: &AnswerGuard,
        on_piece: &mut dyn FnMut(Piece) -> Result<()>,
    ) -> Result<Outcome>;
}
