//! `<function=NAME><parameter=KEY>value</parameter></function>`: Qwen3-Coder and Qwen 3.5. Values are text; the schema
//! says what they mean.

use serde_json::{Map, Value};

use super::{
    ToolCall, ToolError, literal,
    scan::{between, is_space, strip, without_outer_newlines},
    schema::properties,
    value,
};

const END: &str = "</function>";

pub(super) fn parse(text: &str, tools: &[Value]) -> Result<Vec<ToolCall>, ToolError> {
    let (_, functions) = text.split_once("<function=").ok_or(ToolError::NoCall)?;
    // The last end counts: code in a value may hold one. Another function begins right behind an end, and there
    // mlx-lm would take its parameters for those of the first.
    let functions = functions.trim_end_matches(is_space).strip_suffix(END).ok_or(ToolError::Unfinished)?;
    let mut calls = Vec::new();
    let mut start = 0;
    for (at, _) in functions.match_indices(END) {
        let behind = &functions[at + END.len()..];
        let next = behind.trim_start_matches(is_space);
        if at >= start
            && let Some(next) = next.strip_prefix("<function=")
        {
            calls.push(function(&functions[start..at], tools)?);
            start = functions.len() - next.len();
        }
    }
    calls.push(function(&functions[start..], tools)?);
    Ok(calls)
}

fn function(text: &str, tools: &[Value]) -> Result<ToolCall, ToolError> {
    let (name, parameters) = name(text).ok_or(ToolError::NoName)?;
    let properties = properties(tools, name);
    let mut arguments = Map::new();
    for parameter in between(parameters, "<parameter=", "</parameter>") {
        if let Some((key, value)) = self::name(parameter?) {
            let schema = properties.as_ref().and_then(|properties| properties.get(key));
            arguments.insert(key.to_owned(), converted(without_outer_newlines(value), schema)?);
        }
    }
    Ok(ToolCall::new(name, arguments))
}

/// A name up to white space or an angle bracket, and what follows.
fn name(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start_matches(is_space);
    let end = text.find(|letter| is_space(letter) || matches!(letter, '<' | '>')).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    (!name.is_empty()).then_some((name, rest.strip_prefix('>').unwrap_or(rest)))
}

fn converted(text: &str, schema: Option<&Value>) -> Result<Value, ToolError> {
    let plain = || Value::String(text.to_owned());
    if text.to_lowercase() == "null" {
        return Ok(Value::Null);
    }
    let Some(schema) = schema.and_then(Value::as_object).filter(|schema| !schema.is_empty()) else {
        return Ok(plain());
    };
    let kind = match schema.get("type") {
        Some(Value::String(kind)) => kind.as_str(),
        // Of several types the first that is not null; mlx-lm takes the list for an unknown type, so that the text "5"
        // of an optional string became a number.
        Some(Value::Array(kinds)) => {
            let mut named = kinds.iter().filter_map(Value::as_str).filter(|kind| *kind != "null");
            named.next().unwrap_or("string")
        }
        _ => {
            let nested = value::json(text).ok().filter(|value| value.is_object() || value.is_array());
            return Ok(nested.unwrap_or_else(plain));
        }
    };
    let kind = strip(kind).to_lowercase();
    let begins = |names: &[&str]| names.iter().any(|name| kind.starts_with(name));
    if ["string", "str", "text", "varchar", "char", "enum"].contains(&kind.as_str()) {
        return Ok(plain());
    }
    if begins(&["int", "uint", "long", "short", "unsigned"]) {
        let number =
            value::number(text).filter(|number| !number.is_f64() || number.as_f64().is_some_and(is_whole));
        return number.map(Value::Number).ok_or(ToolError::NotANumber { declared: "integer" });
    }
    if begins(&["num", "float"]) {
        return value::number(text).map(Value::Number).ok_or(ToolError::NotANumber { declared: "number" });
    }
    if ["boolean", "bool", "binary"].contains(&kind.as_str()) {
        return Ok(Value::Bool(text.to_lowercase() == "true"));
    }
    let nested = ["object", "array", "arr"].contains(&kind.as_str()) || begins(&["dict", "list"]);
    let nested = if nested { value::loose_json(text).ok() } else { None };
    Ok(nested.or_else(|| literal::literal(text)).unwrap_or_else(plain))
}

fn is_whole(value: f64) -> bool {
    value.fract() == 0.0
}
