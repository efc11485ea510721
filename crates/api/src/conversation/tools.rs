//! The functions that a request offers to the model, and whether it has to call one. OpenAI's notation; the other dialects' are turned
//! into it.

use crate::error::ApiError;
use crate::fields::{Fields, shortened};
use crate::front::ModelText;
use mlxnode_text::grammar::{AnswerGrammarError, ToolChoice, functions};
use serde_json::{Value, json};

/// Most functions of a request.
pub(crate) const MAX_TOOLS: usize = 128;
/// Longest name of a function.
const MAX_NAME: usize = 128;

/// What a request says about tools.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tools {
    /// `{"type": "function", "function": {…}}`, as templates take them.
    pub(crate) offered: Vec<Value>,
    pub(crate) choice: ToolChoice,
    /// May the answer have several calls?
    pub(crate) parallel: bool,
}

impl Default for Tools {
    fn default() -> Self {
        Self { offered: Vec::new(), choice: ToolChoice::None, parallel: true }
    }
}

impl Tools {
    /// Checks that choice and functions go together.
    pub(crate) fn new(
        offered: Vec<Value>,
        choice: Option<ToolChoice>,
        parallel: bool,
    ) -> Result<Self, ApiError> {
        let tools = Self { choice: ToolChoice::Auto, offered, parallel };
        let mut names = std::collections::BTreeSet::new();
        for (name, _) in functions(&tools.offered) {
            if !names.insert(name) {
                return Err(ApiError::field("tools", format!("tools has two functions named {name:?}")));
            }
        }
        let choice = match choice {
            None if tools.offered.is_empty() => ToolChoice::None,
            None => ToolChoice::Auto,
            Some(ToolChoice::Named(name)) if !names.contains(name.as_str()) => {
                let message = format!("tool_choice names {:?}, which is not among tools", shortened(&name));
                return Err(ApiError::field("tool_choice", message));
            }
            Some(ToolChoice::Required) if tools.offered.is_empty() => {
                return Err(ApiError::field("tool_choice", "tool_choice is required, but tools is empty"));
            }
            Some(choice) => choice,
        };
        Ok(Self { choice, ..tools })
    }

    /// What the template gets: nothing when no function may be called.
    ///
    /// # Errors
    /// When the model has no notation for tool calls: it would ignore the tools.
    pub(crate) fn for_template(&self, text: &ModelText) -> Result<Option<Vec<Value>>, ApiError> {
        if self.choice == ToolChoice::None || self.offered.is_empty() {
            return Ok(None);
        }
        match text.answers.tools() {
            None => Err(ApiError::grammar(AnswerGrammarError::NoToolCalls, "tools")),
            Some(_) => Ok(Some(self.offered.clone())),
        }
    }
}

/// A function with the fields that are served.
pub(crate) fn function(tool: Value, path: &str) -> Result<Value, ApiError> {
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
pub(crate) fn named_function(fields: &mut Fields, name: String, schema: &str) -> Result<Value, ApiError> {
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
