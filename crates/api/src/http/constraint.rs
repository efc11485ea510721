//! What an answer has to look like, as a grammar over the model's own way of writing: reasoning first where the model reasons, then
//! the wished format, or tool calls in the notation that the model was trained on.

use crate::front::ModelText;
use crate::http::ApiError;
use crate::http::tools::{Choice, Tools};
use mlxnode_compute::Grammar;
use mlxnode_text::ToolFormat;
use serde_json::Value;
use std::fmt::Write as _;

/// The format that a request wishes for its answer's content.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Format {
    /// As the model likes.
    #[default]
    Text,
    /// This language.
    Grammar(Grammar),
}

/// Any whitespace that a model may put between parts; bounded, so that it is no way never to end.
const SPACE: &str = "/[ \\t\\r\\n]{0,4}/";

/// The grammar of the answer to `prompt`; none where anything goes. `field` asked for the format.
///
/// # Errors
/// When calls are required and the model's notation is none that a grammar is known for.
pub(super) fn grammar(
    text: &ModelText,
    format: &Format,
    field: &str,
    tools: &Tools,
    prompt: &[u32],
) -> Result<Option<Grammar>, ApiError> {
    let calls = match &tools.choice {
        Choice::Required | Choice::Named(_) => Some(calls(text, tools)?),
        Choice::Auto if *format != Format::Text && !tools.offered.is_empty() => Some(calls(text, tools)?),
        Choice::Auto | Choice::None => None,
    };
    let content = match format {
        Format::Text => None,
        Format::Grammar(grammar) => Some(grammar),
    };
    let is_messages = text.answers.tools() == Some(ToolFormat::Harmony);
    let has_reasoning = is_messages || text.answers.reasoning().is_some();
    if let (Some(content), None, false) = (content, &calls, has_reasoning) {
        return Ok(Some(content.clone()));
    }
    let mut rules = String::new();
    let mut choices = Vec::new();
    if let Some(content) = content.filter(|_| !matches!(tools.choice, Choice::Required | Choice::Named(_))) {
        let (name, rule) = content_rule(content, field)?;
        rules.push_str(&rule);
        choices.push(if is_messages {
            format!("{} \"final\" {} {name}", mark(text, "<|channel|>"), mark(text, "<|message|>"))
        } else {
            name.to_owned()
        });
    }
    if let Some(calls) = calls {
        rules.push_str(&calls);
        choices.push("calls".to_owned());
    }
    if choices.is_empty() {
        return Ok(None);
    }
    let before = reasoning(text, prompt, is_messages, &mut rules);
    Ok(Some(Grammar::Lark(format!("start: {before}answer\nanswer: {}\n{rules}", choices.join(" | ")))))
}

/// Name and text of the rule for the content.
fn content_rule(content: &Grammar, field: &str) -> Result<(&'static str, String), ApiError> {
    Ok(match content {
        Grammar::JsonObject => ("content", "content: %json {\"type\": \"object\"}\n".to_owned()),
        // The schema is one line, so that it cannot end where its author likes.
        Grammar::JsonSchema(schema) => {
            let schema: Value = serde_json::from_str(schema)
                .map_err(|error| ApiError::field(field, format!("the JSON schema is not JSON: {error}")))?;
            ("content", format!("content: %json {}\n", object(&schema)))
        }
        Grammar::Regex(_) | Grammar::Lark(_) => {
            return Err(ApiError::field(
                field,
                "guided_regex and guided_grammar describe the whole answer, which does not go together with this model's \
                 reasoning or with tools; use response_format",
            ));
        }
    })
}

/// A schema where the grammar wants an object: `true` is one without wishes.
fn object(schema: &Value) -> String {
    if schema.is_object() { schema.to_string() } else { "{}".to_owned() }
}

/// What may come before the answer, with a space behind it; its rules are added to `rules`.
fn reasoning(text: &ModelText, prompt: &[u32], is_messages: bool, rules: &mut String) -> String {
    if is_messages {
        let (channel, message) = (mark(text, "<|channel|>"), mark(text, "<|message|>"));
        let (end, start) = (mark(text, "<|end|>"), mark(text, "<|start|>"));
        let _ =
            writeln!(rules, "thought: {channel} \"analysis\" {message} THOUGHT {end} {start} \"assistant\"");
        rules.push_str("THOUGHT: /(?s:.*)/\n");
        return "thought? ".to_owned();
    }
    let Some(marks) = text.answers.reasoning() else { return String::new() };
    let is_open = marks.open_after(prompt);
    if is_special(text, marks.end) {
        let _ = writeln!(rules, "thinking: THOUGHT {} {SPACE}\nTHOUGHT: /(?s:.*)/", mark(text, marks.end));
    } else {
        // The thought ends at the mark's first occurrence.
        let _ =
            writeln!(rules, "thinking: thought {SPACE}\nthought[suffix={}]: /(?s:.*)/", quoted(marks.end));
    }
    match is_open {
        true => "thinking ".to_owned(),
        false => {
            let _ = writeln!(rules, "reasoning: {} thinking", mark(text, marks.start));
            "reasoning? ".to_owned()
        }
    }
}

/// Writes the rule of one call, from the function's name and the name of the rule of its arguments.
type Call<'a> = dyn Fn(&str, &str) -> String + 'a;

/// The rules for tool calls, the first of them named `calls`.
fn calls(text: &ModelText, tools: &Tools) -> Result<String, ApiError> {
    let Some(format) = text.answers.tools() else { return Err(tools.unknown_format()) };
    let m = |words: &str| mark(text, words);
    let q = quoted;
    let call: Box<Call<'_>> = match format {
        ToolFormat::JsonTools | ToolFormat::Longcat => Box::new(|name, arguments| {
            let head = format!("{{\"name\": {}, \"arguments\": ", Value::from(name));
            let (start, end) = (format.start().unwrap_or_default(), format.end().unwrap_or_default());
            format!("{} {SPACE} {} {arguments} \"}}\" {SPACE} {}", m(start), q(&head), m(end))
        }),
        ToolFormat::Llama3 => Box::new(|name, arguments| {
            let head = format!("{{\"name\": {}, \"parameters\": ", Value::from(name));
            format!("{} {arguments} \"}}\"", q(&head))
        }),
        ToolFormat::Mistral if text.tokenizer.token_to_id("[ARGS]").is_some() => {
            Box::new(|name, arguments| {
                format!("{} {} {} {arguments}", m("[TOOL_CALLS]"), q(name), m("[ARGS]"))
            })
        }
        ToolFormat::Mistral => Box::new(|name, arguments| {
            let head = format!("[{{\"name\": {}, \"arguments\": ", Value::from(name));
            format!("{} {SPACE} {} {arguments} \"}}]\"", m("[TOOL_CALLS]"), q(&head))
        }),
        ToolFormat::KimiK2 => Box::new(|name, arguments| {
            format!(
                "{} {} {} {arguments} {} {}",
                m("<|tool_calls_section_begin|><|tool_call_begin|>"),
                q(&format!("functions.{name}:0")),
                m("<|tool_call_argument_begin|>"),
                m("<|tool_call_end|>"),
                m("<|tool_calls_section_end|>")
            )
        }),
        ToolFormat::Harmony => Box::new(|name, arguments| {
            let header = q(&format!("commentary to=functions.{name} "));
            let body =
                format!("{} {header} {} \"json\" {}", m("<|channel|>"), m("<|constrain|>"), m("<|message|>"));
            let ends_answer = text
                .tokenizer
                .token_to_id("<|call|>")
                .is_some_and(|id| text.tokenizer.eos_tokens().contains(&id));
            let end = if ends_answer { String::new() } else { m("<|call|>") };
            format!("{body} {arguments} {end}")
        }),
        other => {
            let message = format!(
                "tool_choice can only be \"auto\" or \"none\" for this model: no grammar is known for its notation of tool calls \
                 ({})",
                other.name()
            );
            return Err(ApiError::field("tool_choice", message));
        }
    };
    let functions = tools.functions().filter(|(name, _)| match &tools.choice {
        Choice::Named(wanted) => *name == wanted.as_str(),
        _ => true,
    });
    let (mut rules, mut names) = (String::new(), Vec::new());
    for (index, (name, schema)) in functions.enumerate() {
        let schema = schema.map_or_else(|| "{\"type\": \"object\"}".to_owned(), object);
        let _ = writeln!(
            rules,
            "call{index}: {}\narguments{index}: %json {schema}",
            call(name, &format!("arguments{index}"))
        );
        names.push(format!("call{index}"));
    }
    // Formats whose calls have an end of their own can be repeated.
    let repeats = tools.parallel && matches!(format, ToolFormat::JsonTools | ToolFormat::Longcat);
    let more = if repeats { format!(" ({SPACE} call)*") } else { String::new() };
    Ok(format!("calls: call{more}\ncall: {}\n{rules}", names.join(" | ")))
}

fn is_special(text: &ModelText, words: &str) -> bool {
    text.tokenizer.token_to_id(words).is_some_and(|id| text.tokenizer.is_special(id))
}

/// A mark as the grammar names it: special tokens by their ids, everything else by its text.
fn mark(text: &ModelText, words: &str) -> String {
    // Marks that follow each other without space are told apart by the longest token that fits.
    let mut rest = words;
    let mut parts = Vec::new();
    let mut plain = String::new();
    while let Some(first) = rest.chars().next() {
        let lengths = rest.char_indices().map(|(at, character)| at + character.len_utf8()).rev();
        let special = lengths.into_iter().find(|end| is_special(text, &rest[..*end]));
        match special {
            Some(end) => {
                if !plain.is_empty() {
                    parts.push(quoted(&std::mem::take(&mut plain)));
                }
                let id = text.tokenizer.token_to_id(&rest[..end]).unwrap_or_default();
                parts.push(format!("<[{id}]>"));
                rest = &rest[end..];
            }
            None => {
                plain.push(first);
                rest = &rest[first.len_utf8()..];
            }
        }
    }
    if !plain.is_empty() {
        parts.push(quoted(&plain));
    }
    parts.join(" ")
}

/// A text as Lark writes it, which is JSON's way.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
