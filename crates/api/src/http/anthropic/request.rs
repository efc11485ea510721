//! The body of `/v1/messages`, turned into the conversation that chat templates know.

use crate::conversation::Conversation;
use crate::conversation::Format;
use crate::conversation::{Tools, named_function};
use crate::front::SamplingDefaults;
use crate::http::ApiError;
use crate::http::fields::{Fields, shortened, wrong};
use crate::http::openai::messages::{arguments, text_of, tool_call};
use crate::http::openai::sampling::stop_texts;
use mlxnode_coordinator::requests::{MAX_STOP_STRINGS, Parameters};
use mlxnode_text::Message;
use mlxnode_text::grammar::ToolChoice as Choice;
use serde_json::{Map, Value};

/// Most messages, blocks of a message, and tools.
const MAX_ENTRIES: usize = 10_000;
const MAX_TOOLS: usize = 128;

/// What a request says besides the conversation.
pub(super) struct Wish {
    pub(super) stream: bool,
    pub(super) parallel: bool,
    pub(super) shows_thinking: bool,
}

/// Reads everything but `model`. `counts`: only the prompt matters, and `max_tokens` is not asked for.
pub(super) fn read(
    mut fields: Fields,
    defaults: &SamplingDefaults,
    counts: bool,
) -> Result<(Conversation, Wish), ApiError> {
    let mut messages = Vec::new();
    if let Some(system) = fields.value("system") {
        messages.push(Message::new("system", text_of(system, "system")?));
    }
    let list = fields.list("messages", MAX_ENTRIES)?.ok_or_else(|| fields.missing("messages"))?;
    if list.is_empty() {
        return Err(ApiError::field("messages", "messages is empty, but must have at least one message"));
    }
    for (index, value) in list.into_iter().enumerate() {
        message(value, &format!("messages[{index}]"), &mut messages)?;
    }
    let tools = tools(&mut fields)?;
    let thinking = thinking(&mut fields)?;
    let mut parameters = Parameters { max_tokens: 1, ..Parameters::default() };
    let mut stream = false;
    if !counts {
        let max_tokens = fields.integer("max_tokens", 1..=i64::from(u32::MAX))?;
        let max_tokens = max_tokens.ok_or_else(|| fields.missing("max_tokens"))?;
        parameters = Parameters {
            max_tokens: u32::try_from(max_tokens).unwrap_or(u32::MAX),
            temperature: fields.number("temperature", 0.0..=1.0)?.or(defaults.temperature).unwrap_or(1.0),
            top_p: fields.number("top_p", 0.0..=1.0)?.or(defaults.top_p).unwrap_or(1.0),
            top_k: fields.count("top_k")?.or(defaults.top_k).unwrap_or_default(),
            min_p: defaults.min_p.unwrap_or_default(),
            repetition_penalty: defaults.repetition_penalty.unwrap_or_default(),
            stop: stop_texts(fields.texts("stop_sequences", MAX_STOP_STRINGS)?, "stop_sequences")?,
            ..Parameters::default()
        };
        stream = fields.boolean("stream")?.unwrap_or_default();
        fields.without_effect("metadata");
        fields.only("service_tier", &["auto".into(), "standard_only".into()], "there is one tier")?;
    }
    fields.refuse("container", "there are no containers")?;
    fields.refuse("mcp_servers", "there are no servers of tools; use tools")?;
    fields.refuse("context_management", "the conversation is taken as it is")?;
    fields.finish()?;
    let wish = Wish { stream, parallel: tools.parallel, shows_thinking: thinking != Some(false) };
    let conversation = Conversation {
        messages,
        tools,
        format: Format::Text,
        format_field: "tools",
        parameters,
        thinking,
        arguments: Map::new(),
        ..Conversation::default()
    };
    Ok((conversation, wish))
}

/// `thinking`: whether the model is to think; how many tokens it may take for it cannot be told to a model here.
fn thinking(fields: &mut Fields) -> Result<Option<bool>, ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else { return Ok(None) };
    let kind = thinking
        .one_of("type", &["enabled", "disabled", "adaptive"])?
        .ok_or_else(|| thinking.missing("type"))?;
    // A bound for the thinking alone; max_tokens bounds it together with the answer.
    thinking.integer("budget_tokens", 1..=i64::from(u32::MAX))?;
    thinking.finish()?;
    Ok(match kind {
        "enabled" => Some(true),
        "disabled" => Some(false),
        _ => None,
    })
}

fn tools(fields: &mut Fields) -> Result<Tools, ApiError> {
    let list = fields.list("tools", MAX_TOOLS)?.unwrap_or_default();
    let mut offered = Vec::with_capacity(list.len());
    for (index, tool) in list.into_iter().enumerate() {
        let mut tool = Fields::of(format!("tools[{index}]"), tool)?;
        tool.one_of("type", &["custom"])?;
        tool.without_effect("cache_control");
        let name = tool.needed_string("name")?;
        offered.push(named_function(&mut tool, name, "input_schema")?);
        tool.finish()?;
    }
    let mut parallel = true;
    let choice = match fields.object("tool_choice")? {
        None => None,
        Some(mut choice) => {
            let kind = choice
                .one_of("type", &["auto", "any", "tool", "none"])?
                .ok_or_else(|| choice.missing("type"))?;
            parallel = !choice.boolean("disable_parallel_tool_use")?.unwrap_or_default();
            let named = match kind {
                "auto" => Choice::Auto,
                "any" => Choice::Required,
                "none" => Choice::None,
                _ => Choice::Named(choice.needed_string("name")?),
            };
            choice.finish()?;
            Some(named)
        }
    };
    Tools::new(offered, choice, parallel)
}

/// One message becomes one or several: the results of tools are messages of their own in templates.
fn message(value: Value, path: &str, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    let mut fields = Fields::of(path, value)?;
    let role = fields.one_of("role", &["user", "assistant"])?.ok_or_else(|| fields.missing("role"))?;
    let content = fields.value("content").ok_or_else(|| fields.missing("content"))?;
    let path = fields.path("content");
    fields.finish()?;
    let blocks = match content {
        Value::String(text) => {
            messages.push(Message::new(role, text));
            return Ok(());
        }
        Value::Array(blocks) if blocks.len() > MAX_ENTRIES => {
            let message =
                format!("{path} has {} blocks, but at most {MAX_ENTRIES} are allowed", blocks.len());
            return Err(ApiError::field(path, message));
        }
        Value::Array(blocks) => blocks,
        other => return Err(wrong(&path, &other, "a text or a list of blocks")),
    };
    let (mut text, mut reasoning, mut calls, mut has_results) =
        (String::new(), String::new(), Vec::new(), false);
    for (index, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::of(format!("{path}[{index}]"), block)?;
        let kind = block.needed_string("type")?;
        block.without_effect("cache_control");
        match (kind.as_str(), role) {
            ("text", _) => {
                text.push_str(&block.needed_string("text")?);
                block.only("citations", &[Value::Array(Vec::new())], "there are no citations")?;
            }
            ("thinking", "assistant") => {
                reasoning.push_str(&block.needed_string("thinking")?);
                block.without_effect("signature"); // ours is empty
            }
            ("tool_use", "assistant") => {
                let (id, name) = (block.needed_string("id")?, block.needed_string("name")?);
                let path = block.path("input");
                calls.push(tool_call(id, name, arguments(block.value("input"), &path)?));
            }
            ("tool_result", "user") => {
                let id = block.needed_string("tool_use_id")?;
                let path = block.path("content");
                let result = block
                    .value("content")
                    .map_or_else(|| Ok(String::new()), |content| text_of(content, &path))?;
                // A result that is an error says so in its words.
                block.boolean("is_error")?;
                let extra = Map::from_iter([("tool_call_id".to_owned(), id.into())]);
                messages.push(Message { role: "tool".to_owned(), content: Some(result.into()), extra });
                has_results = true;
            }
            ("image" | "document" | "search_result", _) => {
                let path = block.path("type");
                return Err(ApiError::field(
                    path.clone(),
                    format!("{path} is {kind}, but the models here read text only"),
                ));
            }
            (other, role) => {
                let path = block.path("type");
                let message =
                    format!("{path} is {:?}, which is no block of a message by {role}", shortened(other));
                return Err(ApiError::field(path, message));
            }
        }
        block.finish()?;
    }
    if has_results && text.is_empty() {
        return Ok(());
    }
    let mut extra = Map::new();
    let content = if calls.is_empty() || !text.is_empty() { Value::String(text) } else { Value::Null };
    if !calls.is_empty() {
        extra.insert("tool_calls".to_owned(), calls.into());
    }
    if !reasoning.is_empty() {
        extra.insert("reasoning_content".to_owned(), reasoning.into());
    }
    messages.push(Message { role: role.to_owned(), content: Some(content), extra });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn blocks_become_messages() {
        let body = json!({"max_tokens": 5, "system": [{"type": "text", "text": "S"}], "messages": [
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "T", "signature": ""},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "R"}, {"type": "text", "text": "V"}]},
        ]});
        let (conversation, _) =
            read(Fields::of("", body).unwrap(), &SamplingDefaults::default(), false).unwrap();
        let roles: Vec<&str> = conversation.messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool", "user"]);
        assert_eq!(conversation.messages[2].extra["reasoning_content"], "T");
        assert_eq!(conversation.messages[2].extra["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        assert_eq!(conversation.messages[3].content, Some(json!("R")));
    }

    #[test]
    fn what_is_wrong_is_said_by_path() {
        let user = json!([{"role": "user", "content": "x"}]);
        let cases = [
            (json!({"messages": user}), "max_tokens is missing"),
            (json!({"max_tokens": 1}), "messages is missing"),
            (
                json!({"max_tokens": 1, "messages": [{"role": "system", "content": "x"}]}),
                "messages[0].role is \"system\"",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
                "messages[0].content[0].type is image, but the models here read text only",
            ),
            (
                json!({"max_tokens": 1, "messages": user, "tools": [{"name": "f", "type": "bash_20250124"}]}),
                "tools[0].type is",
            ),
            (json!({"max_tokens": 1, "messages": user, "n": 2}), "n is not a field that is served here"),
            (
                json!({"max_tokens": 1, "messages": user, "temperature": 1.5}),
                "temperature is 1.5, but must be between 0 and 1",
            ),
        ];
        for (body, words) in cases {
            let error = read(Fields::of("", body).unwrap(), &SamplingDefaults::default(), false)
                .err()
                .unwrap()
                .message;
            assert!(error.starts_with(words), "{error}");
        }
    }
}
