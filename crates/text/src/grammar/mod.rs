//! Which tokens may come next in an answer that has to be a sentence of a language: JSON by a schema, a regular expression, Lark.
//!
//! The work is done by llguidance (Microsoft, MIT): a lexer of derivatives of regular expressions under an Earley parser, walked along
//! the tree of the vocabulary. Here it gets a [`Vocabulary`] made of our tokenizer, limits, and errors that a client understands.
//!
//! ```text
//! Tokenizer ──▶ Vocabulary ──[compile(source)]──▶ Matcher ──▶ mask, accept, mask, accept, …
//! ```
//! [`answer_grammar`] writes the grammar of a whole answer, reasoning and tool calls included.

mod answer;
mod matcher;
mod source;
mod vocabulary;

pub use answer::{AnswerGrammarError, AnswerWish, ToolChoice, answer_grammar, functions};
pub use matcher::Matcher;
pub use source::{GrammarError, Source};
pub use vocabulary::Vocabulary;
