//! The messages of a conversation: checked, and turned into what chat templates know.

use crate::http::ApiError;
use crate::http::fields::{Fields, wrong};
use mlxnode_text::Message;
use serde_json::{Map, Value};

/// Most messages of a conversation.
const MAX_MESSAGES: usize = 10_000;
/// Most parts of a message, and most calls in one.
const MAX_PARTS: usize = 1_000;

/// Reads `messages`.
pub(in crate::http) fn messages(fields: &mut Fields) -> Result<Vec<Message>, ApiError> {
    let list = fields.list("messages", MAX_MESSAGES)?.ok_or_else(|| fields.missing("messages"))?;
    if list.is_empty() {
        return Err(ApiError::field("messages", "messages is empty, but must have at least one message"));
    }
    list.into_iter().enumerate().map(|(index, value)| message(value, &format!("messages[{index}]"))).collect()
}

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

fn message(value: Value, path: &str) -> Result<Message, ApiError> {
    let mut fields = Fields::of(path, value)?;
    let role = fields.one_of("role", &ROLES)?.ok_or_else(|| fields.missing("role"))?;
    let mut extra = Map::new();
    if let Some(name) = fields.string("name")? {
        extra.insert("name".to_owned(), name.into());
    }
    let mut has_calls = false;
    match role {
        "assistant" => {
            let calls = calls(&mut fields)?;
            has_calls = !calls.is_empty();
            if has_calls {
                extra.insert("tool_calls".to_owned(), calls.into());
            }
            // Some templates put earlier reasoning back into the prompt; they know it by this name.
            let reasoning = (fields.string("reasoning_content")?, fields.string("reasoning")?);
            if let (Some(reasoning), _) | (None, Some(reasoning)) = reasoning {
                extra.insert("reasoning_content".to_owned(), reasoning.into());
            }
            fields.refuse("function_call", "use tool_calls")?;
            fields.refuse("audio", "there is no audio")?;
            // Part of every answer by OpenAI, which clients send back as it came.
            fields.only("refusal", &[], "a refusal is content here")?;
            fields.only("annotations", &[Value::Array(Vec::new())], "there are no annotations")?;
        }
        "tool" => {
            let id = fields.needed_string("tool_call_id")?;
            extra.insert("tool_call_id".to_owned(), id.into());
        }
        _ => {}
    }
    let path_of_content = fields.path("content");
    let content = match fields.value("content") {
        Some(content) => Some(Value::String(text_of(content, &path_of_content)?)),
        None if has_calls => Some(Value::Null),
        None if role == "assistant" && !extra.is_empty() => Some(Value::String(String::new())),
        None => return Err(fields.missing("content")),
    };
    fields.finish()?;
    // Templates know the developer by the older name.
    let role = if role == "developer" { "system" } else { role };
    Ok(Message { role: role.to_owned(), content, extra })
}

/// A text, or parts that are all text.
pub(in crate::http) fn text_of(content: Value, path: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if parts.len() > MAX_PARTS => {
            let message = format!("{path} has {} parts, but at most {MAX_PARTS} are allowed", parts.len());
            return Err(ApiError::field(path, message));
        }
        Value::Array(parts) => parts,
        other => return Err(wrong(path, &other, "a text or a list of parts")),
    };
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        let mut fields = Fields::of(path.as_str(), part)?;
        let kind = fields.needed_string("type")?;
        match kind.as_str() {
            "text" | "input_text" | "output_text" => {
                text.push_str(&fields.needed_string("text")?);
                fields.only("annotations", &[Value::Array(Vec::new())], "there are no annotations")?;
                fields.only("logprobs", &[Value::Array(Vec::new())], "they cannot be put back")?;
                fields.without_effect("cache_control");
                fields.finish()?;
            }
            "image_url" | "input_image" | "image" | "input_audio" | "audio" | "file" | "input_file"
            | "document" | "video_url" => {
                let message = format!("{path} is of type {kind}, but the models here read text only");
                return Err(ApiError::field(path, message));
            }
            other => {
                let message =
                    format!("{path}.type is {:?}, but must be text", crate::http::fields::shortened(other));
                return Err(ApiError::field(format!("{path}.type"), message));
            }
        }
    }
    Ok(text)
}

/// The calls of an assistant's message, with their arguments as templates want them: an object, not its text.
fn calls(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let path = fields.path("tool_calls");
    let list = fields.list("tool_calls", MAX_PARTS)?.unwrap_or_default();
    let mut calls = Vec::with_capacity(list.len());
    for (index, value) in list.into_iter().enumerate() {
        let mut call = Fields::of(format!("{path}[{index}]"), value)?;
        let id = call.needed_string("id")?;
        call.one_of("type", &["function"])?;
        call.without_effect("index"); // streams have it, and clients that add the pieces up keep it
        let mut function = call.object("function")?.ok_or_else(|| call.missing("function"))?;
        call.finish()?;
        let name = function.needed_string("name")?;
        let path = function.path("arguments");
        let arguments = arguments(function.value("arguments"), &path)?;
        function.finish()?;
        calls.push(tool_call(id, name, arguments));
    }
    Ok(calls)
}

/// A call as templates take it.
pub(in crate::http) fn tool_call(id: String, name: String, arguments: Map<String, Value>) -> Value {
    serde_json::json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// Arguments as an object; clients write them as its text.
pub(in crate::http) fn arguments(value: Option<Value>, path: &str) -> Result<Map<String, Value>, ApiError> {
    match value {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Map::new()),
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => Err(ApiError::field(path, format!("{path} is the text of no object"))),
            Err(error) => Err(ApiError::field(path, format!("{path} is no JSON: {error}"))),
        },
        Some(other) => Err(wrong(path, &other, "the text of an object")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(message: Value) -> Result<Message, String> {
        let body = json!({"messages": [message]});
        let read = messages(&mut Fields::of("", body).unwrap()).map_err(|error| error.message);
        Ok(read?.remove(0))
    }

    #[test]
    fn parts_become_one_text_and_calls_get_their_arguments() {
        let parts = json!({"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(read(parts).unwrap(), Message::new("system", "ab"));
        let call = json!({"role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]});
        let message = read(call).unwrap();
        assert_eq!(message.content, Some(Value::Null));
        assert_eq!(message.extra["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
        let result = read(json!({"role": "tool", "tool_call_id": "c1", "content": "7"})).unwrap();
        assert_eq!(result.extra["tool_call_id"], "c1");
    }

    #[test]
    fn what_is_wrong_with_a_message_is_said_by_path() {
        let cases = [
            (json!({"content": "x"}), "messages[0].role is missing"),
            (json!({"role": "user"}), "messages[0].content is missing"),
            (json!({"role": "wizard", "content": "x"}), "messages[0].role is \"wizard\", but must be one of"),
            (
                json!({"role": "user", "content": 7}),
                "messages[0].content is a number, but must be a text or a list",
            ),
            (
                json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
                "messages[0].content[0] is of type image_url, but the models here read text only",
            ),
            (
                json!({"role": "user", "content": [{"type": "text"}]}),
                "messages[0].content[0].text is missing",
            ),
            (json!({"role": "tool", "content": "x"}), "messages[0].tool_call_id is missing"),
            (
                json!({"role": "user", "content": "x", "tool_calls": []}),
                "messages[0].tool_calls is not a field",
            ),
            (
                json!({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}),
                "messages[0].tool_calls[0].function.arguments is no JSON",
            ),
            (json!("hello"), "messages[0] is a text, but must be an object"),
        ];
        for (message, words) in cases {
            let error = read(message.clone()).unwrap_err();
            assert!(error.starts_with(words), "{message}: {error}");
        }
    }
}
