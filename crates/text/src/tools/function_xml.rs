//! What the formats with `name="…"` attributes and schema-typed values share: MiniMax M2 and MiniCPM 5.

use serde_json::{Map, Value};

use super::{ToolCall, ToolError, scan::unquoted, schema};

/// A call from the name as written and its parameters' names and texts.
pub(super) fn call<'a>(
    name: &str,
    parameters: impl Iterator<Item = Result<(&'a str, &'a str), ToolError>>,
    tools: &[Value],
) -> Result<ToolCall, ToolError> {
    let name = unquoted(name);
    if name.is_empty() {
        return Err(ToolError::NoName);
    }
    let properties = schema::properties(tools, name);
    let mut arguments = Map::new();
    for parameter in parameters {
        let (key, text) = parameter?;
        let key = unquoted(key);
        arguments.insert(key.to_owned(), schema::converted(text, properties.as_ref(), key));
    }
    Ok(ToolCall::new(name, arguments))
}
