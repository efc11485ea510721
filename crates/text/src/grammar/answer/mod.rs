//! What an answer has to look like, as a grammar over the model's own way of writing: reasoning first where the model reasons, then
//! the wished format, or tool calls in the notation that the model was trained on.
//!
//! | module | one line |
//! |---|---|
//! | `calls` | the calls of every notation of tool calls |
//! | `arguments` | arguments that are written one by one, each by its declared type |
//! | `rules` | how marks, texts and schemas are written in Lark |

mod arguments;
mod calls;
mod rules;

use crate::{AnswerFormat, Tokenizer, ToolFormat};
use mlxnode_compute::Grammar;
use rules::{Rules, SPACE};
use serde_json::Value;

/// Does the model have to call a function?
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// It must not.
    #[default]
    None,
    /// It may.
    Auto,
    /// It must.
    Required,
    /// It must call this one.
    Named(String),
}

impl ToolChoice {
    /// Must there be a call?
    pub fn is_required(&self) -> bool {
        matches!(self, Self::Required | Self::Named(_))
    }
}

/// What an answer is to be.
#[derive(Clone, Copy, Debug)]
pub struct AnswerWish<'a> {
    /// The language of its content; none: as the model likes.
    pub format: Option<&'a Grammar>,
    /// The functions that may be called, as OpenAI's interface has them: `{"type": "function", "function": {…}}`.
    pub tools: &'a [Value],
    /// Whether one has to be.
    pub choice: &'a ToolChoice,
    /// May there be several calls?
    pub parallel: bool,
}

/// Why there is no such grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerGrammarError {
    /// The model would not understand the tools.
    #[error("this model knows no tool calls: its chat template has no notation for them; leave tools out")]
    NoToolCalls,
    /// The content of this model's answers stands in messages that no grammar is known for.
    #[error("no grammar is known for the messages that this model writes; leave the format out")]
    Messages,
    /// The grammar describes all of the answer, and there is more in it than content.
    #[error(
        "a regular expression or a grammar describes the whole answer, which does not go together with this model's reasoning or \
         with tools; use a JSON schema"
    )]
    WholeAnswer,
    /// The schema is none.
    #[error("the JSON schema is not JSON: {0}")]
    Schema(String),
}

/// The names and argument schemas of functions.
pub fn functions(tools: &[Value]) -> impl Iterator<Item = (&str, Option<&Value>)> {
    tools.iter().filter_map(|tool| {
        let function = tool.get("function")?;
        let schema = function.get("parameters").filter(|schema| !schema.is_null());
        Some((function.get("name")?.as_str()?, schema))
    })
}

/// The grammar of the answer to `prompt`; none where anything goes.
///
/// # Errors
/// [`AnswerGrammarError`]
pub fn answer_grammar(
    tokenizer: &Tokenizer,
    answers: &AnswerFormat,
    wish: &AnswerWish<'_>,
    prompt: &[u32],
) -> Result<Option<Grammar>, AnswerGrammarError> {
    let is_called = wish.choice.is_required();
    let may_call = *wish.choice == ToolChoice::Auto && wish.format.is_some() && !wish.tools.is_empty();
    let content = wish.format.filter(|_| !is_called);
    let notation = answers.tools();
    if (is_called || may_call) && notation.is_none() {
        return Err(AnswerGrammarError::NoToolCalls);
    }
    let is_messages = notation == Some(ToolFormat::Harmony);
    if content.is_some() && notation == Some(ToolFormat::MuseSpark) {
        return Err(AnswerGrammarError::Messages);
    }
    let has_reasoning = is_messages || answers.reasoning().is_some();
    if let (Some(content), false, false) = (content, may_call, has_reasoning) {
        return Ok(Some(content.clone()));
    }
    let mut rules = Rules::new(tokenizer);
    let mut choices = Vec::new();
    if let Some(content) = content {
        let name = content_rule(&mut rules, content)?;
        choices.push(match is_messages {
            true => {
                format!("{} \"final\" {} {name}", rules.mark("<|channel|>"), rules.mark("<|message|>"))
            }
            false => name,
        });
    }
    if let Some(notation) = notation.filter(|_| is_called || may_call) {
        choices.push(calls::calls(&mut rules, notation, wish));
    }
    if choices.is_empty() {
        return Ok(None);
    }
    let before = reasoning(&mut rules, answers, prompt, is_messages);
    Ok(Some(Grammar::Lark(format!("start: {before}answer\nanswer: {}\n{}", choices.join(" | "), rules.text))))
}

/// The name of the rule for the content.
fn content_rule(rules: &mut Rules<'_>, content: &Grammar) -> Result<String, AnswerGrammarError> {
    match content {
        Grammar::JsonObject => Ok(rules.json(&serde_json::json!({"type": "object"}))),
        Grammar::JsonSchema(schema) => {
            let schema: Value = serde_json::from_str(schema)
                .map_err(|error| AnswerGrammarError::Schema(error.to_string()))?;
            Ok(rules.json(&schema))
        }
        Grammar::Regex(_) | Grammar::Lark(_) => Err(AnswerGrammarError::WholeAnswer),
    }
}

/// What may come before the answer, with a space behind it.
fn reasoning(rules: &mut Rules<'_>, answers: &AnswerFormat, prompt: &[u32], is_messages: bool) -> String {
    if is_messages {
        let (channel, message) = (rules.mark("<|channel|>"), rules.mark("<|message|>"));
        let (end, start) = (rules.mark("<|end|>"), rules.mark("<|start|>"));
        let thought = rules.any();
        rules.add(
            "thought",
            &format!("{channel} \"analysis\" {message} {thought} {end} {start} \"assistant\""),
        );
        return "thought? ".to_owned();
    }
    let Some(marks) = answers.reasoning() else { return String::new() };
    // The thought ends at the mark's first occurrence.
    let thought = rules.until(marks.end);
    rules.add("thinking", &format!("{thought} {SPACE}"));
    match marks.open_after(prompt) {
        true => "thinking ".to_owned(),
        false => {
            let start = rules.mark(marks.start);
            rules.add("reasoning", &format!("{start} thinking"));
            "reasoning? ".to_owned()
        }
    }
}
