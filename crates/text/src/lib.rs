//! Text to tokens and back: tokenizer, streaming detokenizer, chat templates, stop strings; and what an answer's text
//! means: content, reasoning, tool calls. Later grammars.
//!
//! A plain library for both sides of the system: synchronous, no network, no thread of its own that outlives a call,
//! and the only files it reads are those of the folder it is given. Everything here comes from a model's author or
//! from a client, so each input has a limit and each mistake is a [`TextError`]; nothing panics.
//!
//! ```text
//! TextFiles ──> Tokenizer ──────> token ids ──> model ──> token ids ──> Detokenizer ──> StopStrings ──> text
//!      ├──────> ChatTemplate ──> prompt text ──┘                                                         │
//!      └──────> AnswerFormat ──────────────────────> AnswerParser ──> content, reasoning, tool calls <───┘
//! ```
//!
//! The rules are those of mlx-lm 0.32.2 with the Hugging Face tokenizers behind it: same ids, same text.

mod answer;
mod chat;
mod class;
mod conversion;
mod detokenizer;
mod error;
mod files;
mod limits;
mod reasoning;
mod sandbox;
mod sentencepiece;
mod special;
mod stop;
mod template;
mod tiktoken;
mod tokenizer;
mod tools;

pub use answer::{AnswerFormat, AnswerParser, Delta};
pub use chat::{ChatRequest, Message};
pub use detokenizer::StreamingDetokenizer;
pub use error::TextError;
pub use files::TextFiles;
pub use reasoning::ReasoningMarkers;
pub use sandbox::{InProcess, Sandbox, SandboxError};
pub use stop::{StopStep, StopStrings};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
pub use tools::{ToolCall, ToolError, ToolFormat};
