//! The format that an answer is to have: `response_format`, and vLLM's `guided_…` fields.

use crate::conversation::Format;
use crate::http::ApiError;
use crate::http::fields::Fields;
use mlxnode_compute::Grammar;
use serde_json::Value;

/// Reads `response_format`, `guided_json`, `guided_regex` and `guided_grammar`; at most one of them may be there. The name of the field
/// comes with the format, for errors.
pub(in crate::http) fn format(fields: &mut Fields) -> Result<(Format, &'static str), ApiError> {
    let mut found = vec![];
    if let Some(mut wish) = fields.object("response_format")? {
        let format = response_format(&mut wish)?;
        wish.finish()?;
        found.push((format, "response_format"));
    }
    if let Some(schema) = fields.value("guided_json") {
        let text = match schema {
            Value::String(text) => text,
            other => other.to_string(),
        };
        found.push((Format::Grammar(Grammar::JsonSchema(text)), "guided_json"));
    }
    if let Some(regex) = fields.string("guided_regex")? {
        found.push((Format::Grammar(Grammar::Regex(regex)), "guided_regex"));
    }
    if let Some(lark) = fields.string("guided_grammar")? {
        found.push((Format::Grammar(Grammar::Lark(lark)), "guided_grammar"));
    }
    match found.len() {
        0 => Ok((Format::Text, "response_format")),
        1 => Ok(found.remove(0)),
        _ => {
            let (first, second) = (found[0].1, found[1].1);
            Err(ApiError::field(second, format!("{first} and {second} do not go together; leave one out")))
        }
    }
}

fn response_format(wish: &mut Fields) -> Result<Format, ApiError> {
    match wish.one_of("type", &["text", "json_object", "json_schema"])?.ok_or_else(|| wish.missing("type"))? {
        "json_object" => Ok(Format::Grammar(Grammar::JsonObject)),
        "json_schema" => {
            let mut named = wish.object("json_schema")?.ok_or_else(|| wish.missing("json_schema"))?;
            let format = json_schema(&mut named)?;
            named.finish()?;
            Ok(format)
        }
        _ => Ok(Format::Text),
    }
}

/// A schema with its name.
pub(in crate::http) fn json_schema(named: &mut Fields) -> Result<Format, ApiError> {
    // The answer follows the schema whether it is called strict or not; name and description are for people.
    named.string("name")?;
    named.string("description")?;
    named.boolean("strict")?;
    let schema = named.value("schema").ok_or_else(|| named.missing("schema"))?;
    Ok(Format::Grammar(Grammar::JsonSchema(schema.to_string())))
}
