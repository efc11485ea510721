//! The functions that a request offers to the model, and whether it has to call one. OpenAI's notation; the other dialects' are turned
//! into it.

use crate::front::ModelText;
use crate::http::ApiError;
use crate::http::fields::{Fields, shortened, wrong};
use serde_json::{Value, json};

/// Most functions of a request.
const MAX_TOOLS: usize = 128;
/// Longest name of a function.
const MAX_NAME: usize = 128;

/// What a request says about tools.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tools {
    /// `{"type": "function", "function": {…}}`, as templates take them.
    pub(super) offered: Vec<Value>,
    pub(super) choice: Choice,
    /// May the answer have several calls?
    pub(super) parallel: bool,
}

/// Does the model have to call a function?
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// It must not.
    None,
    /// It may.
    Auto,
    /// It must.
    Required,
    /// It must call this one.
    Named(String),
}

impl Default for Tools {
    fn default() -> Self {
        Self { offered: Vec::new(), choice: Choice::None, parallel: true }
    }
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls` of chat completions.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
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
            Some(Value::String(word)) => Some(Self::choice_word(&word)?),
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
        Self::new(offered, choice, parallel)
    }

    /// `auto`, `none`, `required`.
    pub(super) fn choice_word(word: &str) -> Result<Choice, ApiError> {
        match word {
            "none" => Ok(Choice::None),
            "auto" => Ok(Choice::Auto),
            "required" => Ok(Choice::Required),
            other => {
                let other = shortened(other);
                let message =
                    format!("tool_choice is {other:?}, but must be none, auto, required or a function");
                Err(ApiError::field("tool_choice", message))
            }
        }
    }

    /// Checks that choice and functions go together.
    pub(super) fn new(offered: Vec<Value>, choice: Option<Choice>, parallel: bool) -> Result<Self, ApiError> {
        let tools = Self { choice: Choice::Auto, offered, parallel };
        let mut names = std::collections::BTreeSet::new();
        for (name, _) in tools.functions() {
            if !names.insert(name) {
                return Err(ApiError::field("tools", format!("tools has two functions named {name:?}")));
            }
        }
        let choice = match choice {
            None if tools.offered.is_empty() => Choice::None,
            None => Choice::Auto,
            Some(Choice::Named(name)) if !names.contains(name.as_str()) => {
                let message = format!("tool_choice names {:?}, which is not among tools", shortened(&name));
                return Err(ApiError::field("tool_choice", message));
            }
            Some(Choice::Required) if tools.offered.is_empty() => {
                return Err(ApiError::field("tool_choice", "tool_choice is required, but tools is empty"));
            }
            Some(choice) => choice,
        };
        Ok(Self { choice, ..tools })
    }

    /// Name and schema of the arguments of each function.
    pub(super) fn functions(&self) -> impl Iterator<Item = (&str, Option<&Value>)> {
        self.offered.iter().filter_map(|tool| {
            let function = tool.get("function")?;
            Some((
                function.get("name")?.as_str()?,
                function.get("parameters").filter(|schema| !schema.is_null()),
            ))
        })
    }

    /// What the template gets: nothing when no function may be called.
    ///
    /// # Errors
    /// When the model has no notation for tool calls: it would ignore the tools.
    pub(super) fn for_template(&self, text: &ModelText) -> Result<Option<Vec<Value>>, ApiError> {
        if self.choice == Choice::None || self.offered.is_empty() {
            return Ok(None);
        }
        match text.answers.tools() {
            None => Err(self.unknown_format()),
            Some(_) => Ok(Some(self.offered.clone())),
        }
    }

    pub(super) fn unknown_format(&self) -> ApiError {
        ApiError::field(
            "tools",
            "this model knows no tool calls: its chat template has no notation for them; leave tools out",
        )
    }
}

/// A function with the fields that are served.
fn function(tool: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::of(path, tool)?;
    fields.one_of("type", &["function"])?.ok_or_else(|| fields.missing("type"))?;
    let mut function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
    fields.finish()?;
    let name = function.needed_string("name")?;
    let tool = named_function(&mut function, name, "parameters")?;
    function.finish()?;
    Ok(tool)
}

/// Builds the tool of this name from `description`, `strict` and the schema in the field `schema`.
pub(super) fn named_function(fields: &mut Fields, name: String, schema: &str) -> Result<Value, ApiError> {
    let path = fields.path("name");
    let is_word = |character: char| character.is_ascii_alphanumeric() || "_-.".contains(character);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_word) {
        let message = format!(
            "{path} is {:?}, but must have 1 to {MAX_NAME} of a-z, A-Z, 0-9, _, - and .",
            shortened(&name)
        );
        return Err(ApiError::field(path, message));
    }
    let description = fields.string("description")?;
    // Arguments follow the schema by grammar whenever a call is required; "strict" asks for no more.
    fields.boolean("strict")?;
    let parameters = fields.map(schema)?;
    let mut function = serde_json::Map::new();
    function.insert("name".to_owned(), name.into());
    if let Some(description) = description {
        function.insert("description".to_owned(), description.into());
    }
    // Templates walk through the properties of every function.
    let parameters = parameters.map_or_else(|| json!({"type": "object", "properties": {}}), Value::Object);
    function.insert("parameters".to_owned(), parameters);
    Ok(json!({"type": "function", "function": function}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Tools, String> {
        Tools::read(&mut Fields::of("", body).unwrap()).map_err(|error| error.message)
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
