//! Tools as JSON has them.

use crate::conversation::{MAX_TOOLS, Tools, function};
use crate::http::ApiError;
use crate::http::fields::{Fields, shortened, wrong};
use mlxnode_text::grammar::ToolChoice as Choice;
use serde_json::Value;

/// Reads `tools`, `tool_choice` and `parallel_tool_calls` of chat completions.
pub(super) fn read(fields: &mut Fields) -> Result<Tools, ApiError> {
    fields.refuse("functions", "use tools")?;
    fields.refuse("function_call", "use tool_choice")?;
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let list = fields.list("tools", MAX_TOOLS)?.unwrap_or_default();
    let mut offered = Vec::with_capacity(list.len());
    for (index, tool) in list.into_iter().enumerate() {
        offered.push(function(tool, &format!("tools[{index}]"))?);
    }
    let choice = match fields.value("tool_choice") {
        None => None,
        Some(Value::String(word)) => Some(choice_word(&word)?),
        Some(Value::Object(map)) => {
            let mut choice = Fields::new("tool_choice", map);
            choice.one_of("type", &["function"])?.ok_or_else(|| choice.missing("type"))?;
            let mut named = choice.object("function")?.ok_or_else(|| choice.missing("function"))?;
            let name = named.needed_string("name")?;
            named.finish()?;
            choice.finish()?;
            Some(Choice::Named(name))
        }
        Some(other) => return Err(wrong("tool_choice", &other, "a word or an object")),
    };
    Tools::new(offered, choice, parallel)
}

/// `auto`, `none`, `required`.
pub(super) fn choice_word(word: &str) -> Result<Choice, ApiError> {
    match word {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "required" => Ok(Choice::Required),
        other => {
            let other = shortened(other);
            let message = format!("tool_choice is {other:?}, but must be none, auto, required or a function");
            Err(ApiError::field("tool_choice", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value) -> Result<Tools, String> {
        super::read(&mut Fields::of("", body).unwrap()).map_err(|error| error.message)
    }

    #[test]
    fn choices_must_fit_the_tools() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        assert_eq!(read(json!({})).unwrap().choice, Choice::None);
        assert_eq!(read(json!({"tools": [tool("f")]})).unwrap().choice, Choice::Auto);
        let named =
            json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "f"}}});
        assert_eq!(read(named).unwrap().choice, Choice::Named("f".into()));
        let cases = [
            (json!({"tools": [tool("f"), tool("f")]}), "tools has two functions named \"f\""),
            (json!({"tools": [tool("")]}), "tools[0].function.name is \"\", but must have"),
            (json!({"tool_choice": "required"}), "tool_choice is required, but tools is empty"),
            (json!({"tool_choice": "maybe"}), "tool_choice is \"maybe\", but must be"),
            (
                json!({"tools": [{"type": "retrieval"}]}),
                "tools[0].type is \"retrieval\", but must be one of function",
            ),
            (
                json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice names \"g\"",
            ),
            (json!({"functions": []}), "functions is not supported: use tools"),
        ];
        for (body, words) in cases {
            let error = read(body.clone()).unwrap_err();
            assert!(error.starts_with(words), "{body}: {error}");
        }
    }
}
