//! The body of `/v1/responses`, turned into the conversation that chat templates know.

use crate::conversation::Conversation;
use crate::conversation::Format;
use crate::conversation::{Tools, named_function};
use crate::front::SamplingDefaults;
use crate::http::ApiError;
use crate::http::fields::{Fields, shortened, wrong};
use crate::http::openai::format::json_schema;
use crate::http::openai::messages::{arguments, text_of, tool_call};
use crate::http::openai::sampling::without_effect;
use crate::http::tools::choice_word;
use mlxnode_compute::Grammar;
use mlxnode_coordinator::requests::{MAX_TEMPERATURE, Parameters};
use mlxnode_text::Message;
use mlxnode_text::grammar::ToolChoice as Choice;
use serde_json::{Map, Value, json};

/// Most items of a conversation, and most tools.
const MAX_ITEMS: usize = 10_000;
const MAX_TOOLS: usize = 128;

/// What a response repeats of its request.
pub(super) struct Wish {
    pub(super) stream: bool,
    pub(super) parallel: bool,
    /// Likeliest tokens to tell with each; none: no log-probabilities.
    pub(super) top_logprobs: Option<u32>,
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<i64>,
    pub(super) effort: Option<&'static str>,
    pub(super) format: Value,
    pub(super) tools: Value,
    pub(super) tool_choice: Value,
}

/// Reads everything but `model`.
pub(super) fn read(
    mut fields: Fields,
    defaults: &SamplingDefaults,
) -> Result<(Conversation, Wish), ApiError> {
    fields.refuse("previous_response_id", "answers are not stored; send the whole conversation in input")?;
    fields.refuse("conversation", "conversations are not stored; send the whole of it in input")?;
    fields.refuse("prompt", "prompts are not stored; send it in input")?;
    fields.only("background", &[false.into()], "answers are not stored")?;
    fields.only("truncation", &["disabled".into()], "what does not fit is refused")?;
    let top_logprobs = logprobs(&mut fields)?;
    fields.refuse("max_tool_calls", "tools are called by the client")?;
    without_effect(&mut fields)?;
    if let Some(mut options) = fields.object("stream_options")? {
        options.only("include_obfuscation", &[false.into()], "pieces are as long as they are")?;
        options.finish()?;
    }
    let instructions = fields.string("instructions")?;
    let messages = messages(&mut fields, instructions.as_deref())?;
    let echoed_tools = json!(fields.list("tools", MAX_TOOLS)?.unwrap_or_default());
    let (tools, tool_choice) = tools(&mut fields, &echoed_tools)?;
    let (format, written_format) = text_format(&mut fields)?;
    let mut effort = None;
    if let Some(mut reasoning) = fields.object("reasoning")? {
        effort = reasoning.one_of("effort", &["none", "minimal", "low", "medium", "high", "xhigh", "max"])?;
        // Reasoning is told as it is, so that there is nothing to sum up.
        reasoning.one_of("summary", &["auto", "concise", "detailed"])?;
        reasoning.one_of("generate_summary", &["auto", "concise", "detailed"])?;
        reasoning.finish()?;
    }
    let max_output_tokens = fields.integer("max_output_tokens", 1..=i64::from(u32::MAX))?;
    let parameters = Parameters {
        max_tokens: max_output_tokens.and_then(|most| u32::try_from(most).ok()).unwrap_or(u32::MAX),
        temperature: fields
            .number("temperature", 0.0..=MAX_TEMPERATURE)?
            .or(defaults.temperature)
            .unwrap_or(1.0),
        top_p: fields.number("top_p", 0.0..=1.0)?.or(defaults.top_p).unwrap_or(1.0),
        top_k: defaults.top_k.unwrap_or_default(),
        min_p: defaults.min_p.unwrap_or_default(),
        repetition_penalty: defaults.repetition_penalty.unwrap_or_default(),
        top_logprobs,
        ..Parameters::default()
    };
    let stream = fields.boolean("stream")?.unwrap_or_default();
    fields.finish()?;
    let mut arguments = Map::new();
    if let Some(effort) = effort.filter(|effort| *effort != "none") {
        arguments.insert("reasoning_effort".to_owned(), effort.into());
    }
    let wish = Wish {
        stream,
        parallel: tools.parallel,
        top_logprobs,
        instructions,
        max_output_tokens,
        effort,
        format: written_format,
        tools: echoed_tools,
        tool_choice,
    };
    let thinking = (effort == Some("none")).then_some(false);
    let conversation = Conversation {
        messages,
        tools,
        format,
        format_field: "text.format",
        parameters,
        thinking,
        arguments,
        ..Conversation::default()
    };
    Ok((conversation, wish))
}

/// Most of the likeliest tokens that are told.
const MAX_TOP: i64 = 20;

/// How many of the likeliest tokens to tell with each; none when log-probabilities are not to be included.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let mut included = false;
    for item in fields.texts("include", 2)? {
        match item.as_str() {
            "message.output_text.logprobs" => included = true,
            "reasoning.encrypted_content" => {} // reasoning is told as it is
            other => {
                let message = format!(
                    "include has {:?}, but only message.output_text.logprobs and reasoning.encrypted_content can be included",
                    shortened(other)
                );
                return Err(ApiError::field("include", message));
            }
        }
    }
    let top = fields.integer("top_logprobs", 0..=MAX_TOP)?.unwrap_or_default();
    if top > 0 && !included {
        let message = "top_logprobs needs include to have message.output_text.logprobs";
        return Err(ApiError::field("top_logprobs", message));
    }
    Ok(included.then(|| u32::try_from(top).unwrap_or_default()))
}

fn text_format(fields: &mut Fields) -> Result<(Format, Value), ApiError> {
    let plain = json!({"type": "text"});
    let Some(mut text) = fields.object("text")? else { return Ok((Format::Text, plain)) };
    text.refuse("verbosity", "say it in the instructions")?;
    let written = text.value("format");
    text.finish()?;
    let Some(written) = written else { return Ok((Format::Text, plain)) };
    let mut format = Fields::of("text.format", written.clone())?;
    let kind = format.one_of("type", &["text", "json_object", "json_schema"])?;
    let read = match kind.ok_or_else(|| format.missing("type"))? {
        "json_object" => Format::Grammar(Grammar::JsonObject),
        "json_schema" => json_schema(&mut format)?,
        _ => Format::Text,
    };
    format.finish()?;
    Ok((read, written))
}

fn tools(fields: &mut Fields, list: &Value) -> Result<(Tools, Value), ApiError> {
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let mut offered = Vec::new();
    for (index, tool) in list.as_array().into_iter().flatten().enumerate() {
        let mut tool = Fields::of(format!("tools[{index}]"), tool.clone())?;
        tool.one_of("type", &["function"])?.ok_or_else(|| tool.missing("type"))?;
        let name = tool.needed_string("name")?;
        offered.push(named_function(&mut tool, name, "parameters")?);
        tool.finish()?;
    }
    let written = fields.value("tool_choice");
    let choice = match written.clone() {
        None => None,
        Some(Value::String(word)) => Some(choice_word(&word)?),
        Some(Value::Object(map)) => {
            let mut choice = Fields::new("tool_choice", map);
            choice.one_of("type", &["function"])?.ok_or_else(|| choice.missing("type"))?;
            let name = choice.needed_string("name")?;
            choice.finish()?;
            Some(Choice::Named(name))
        }
        Some(other) => return Err(wrong("tool_choice", &other, "a word or an object")),
    };
    Ok((Tools::new(offered, choice, parallel)?, written.unwrap_or_else(|| "auto".into())))
}

fn messages(fields: &mut Fields, instructions: Option<&str>) -> Result<Vec<Message>, ApiError> {
    let mut messages: Vec<Message> =
        instructions.map(|text| Message::new("system", text)).into_iter().collect();
    let items = match fields.value("input").ok_or_else(|| fields.missing("input"))? {
        Value::String(text) => {
            messages.push(Message::new("user", text));
            return Ok(messages);
        }
        Value::Array(items) if items.is_empty() => {
            return Err(ApiError::field("input", "input is an empty list"));
        }
        Value::Array(items) if items.len() > MAX_ITEMS => {
            let message = format!("input has {} items, but at most {MAX_ITEMS} are allowed", items.len());
            return Err(ApiError::field("input", message));
        }
        Value::Array(items) => items,
        other => return Err(wrong("input", &other, "a text or a list of items")),
    };
    // What the assistant thought, and called, belongs to one message of templates.
    let mut reasoning = None;
    for (index, item) in items.into_iter().enumerate() {
        let mut item = Fields::of(format!("input[{index}]"), item)?;
        let kind = item.string("type")?.unwrap_or_else(|| "message".to_owned());
        item.without_effect("id");
        item.without_effect("status");
        match kind.as_str() {
            "message" => {
                let roles = ["user", "assistant", "system", "developer"];
                let role = item.one_of("role", &roles)?.ok_or_else(|| item.missing("role"))?;
                let path = item.path("content");
                let content = item.value("content").ok_or_else(|| item.missing("content"))?;
                item.without_effect("phase");
                let mut message =
                    Message::new(if role == "developer" { "system" } else { role }, text_of(content, &path)?);
                if role == "assistant" {
                    attach(&mut message, reasoning.take());
                }
                messages.push(message);
            }
            "function_call" => {
                let (id, name) = (item.needed_string("call_id")?, item.needed_string("name")?);
                let path = item.path("arguments");
                let call = tool_call(id, name, arguments(item.value("arguments"), &path)?);
                let last = messages.last_mut().filter(|message| message.role == "assistant");
                match last.and_then(|message| message.extra.get_mut("tool_calls")?.as_array_mut()) {
                    Some(calls) => calls.push(call),
                    None => {
                        let extra = Map::from_iter([("tool_calls".to_owned(), json!([call]))]);
                        let mut message =
                            Message { role: "assistant".to_owned(), content: Some(Value::Null), extra };
                        attach(&mut message, reasoning.take());
                        messages.push(message);
                    }
                }
            }
            "function_call_output" => {
                let id = item.needed_string("call_id")?;
                let path = item.path("output");
                let output = text_of(item.value("output").ok_or_else(|| item.missing("output"))?, &path)?;
                let extra = Map::from_iter([("tool_call_id".to_owned(), id.into())]);
                messages.push(Message { role: "tool".to_owned(), content: Some(output.into()), extra });
            }
            "reasoning" => {
                item.without_effect("summary");
                item.without_effect("encrypted_content");
                reasoning = reasoning_text(&mut item)?;
            }
            other => {
                let path = item.path("type");
                let message = format!(
                    "{path} is {:?}, but must be message, function_call, function_call_output or reasoning",
                    shortened(other)
                );
                return Err(ApiError::field(path, message));
            }
        }
        item.finish()?;
    }
    Ok(messages)
}

fn attach(message: &mut Message, reasoning: Option<String>) {
    if let Some(reasoning) = reasoning {
        message.extra.insert("reasoning_content".to_owned(), reasoning.into());
    }
}

fn reasoning_text(item: &mut Fields) -> Result<Option<String>, ApiError> {
    let path = item.path("content");
    let mut whole = String::new();
    for (index, part) in item.list("content", MAX_ITEMS)?.unwrap_or_default().into_iter().enumerate() {
        let mut part = Fields::of(format!("{path}[{index}]"), part)?;
        part.one_of("type", &["reasoning_text"])?;
        whole.push_str(&part.needed_string("text")?);
        part.finish()?;
    }
    Ok(Some(whole).filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_messages() {
        let body = json!({"instructions": "S", "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "U"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{\"x\": 1}"},
            {"type": "function_call_output", "call_id": "1", "output": "R"},
        ]});
        let (conversation, _) = read(Fields::of("", body).unwrap(), &SamplingDefaults::default()).unwrap();
        let roles: Vec<&str> = conversation.messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        let assistant = &conversation.messages[2].extra;
        assert_eq!(assistant["tool_calls"].as_array().map(Vec::len), Some(2));
        assert_eq!(assistant["reasoning_content"], "T");
    }

    #[test]
    fn what_would_need_a_memory_is_refused() {
        let cases = [
            (
                json!({"input": "x", "previous_response_id": "resp_1"}),
                "previous_response_id is not supported",
            ),
            (json!({"input": "x", "store": true}), "store is not supported"),
            (json!({"input": "x", "background": true}), "background is not supported"),
            (json!({}), "input is missing"),
            (
                json!({"input": [{"type": "item_reference", "id": "x"}]}),
                "input[0].type is \"item_reference\"",
            ),
            (json!({"input": "x", "tools": [{"type": "web_search"}]}), "tools[0].type is \"web_search\""),
            (
                json!({"input": "x", "include": ["file_search_call.results"]}),
                "include has \"file_search_call.results\"",
            ),
            (json!({"input": "x", "top_logprobs": 2}), "top_logprobs needs include"),
            (json!({"input": "x", "top_logprobs": 21, "include": []}), "top_logprobs is 21"),
        ];
        for (body, words) in cases {
            let error =
                read(Fields::of("", body).unwrap(), &SamplingDefaults::default()).err().unwrap().message;
            assert!(error.starts_with(words), "{error}");
        }
    }
}
