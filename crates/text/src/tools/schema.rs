//! What the request's function schemas declare about arguments.

use serde_json::{Map, Value};

use super::value::{json, loose_json};
use super::{literal, value};

/// Schemas that are looked at for one call; a schema may refer to itself, and what is refused elsewhere must not keep us busy here.
const MOST_SCHEMAS: usize = 10_000;
/// How deep references and alternatives are followed.
const DEEPEST: usize = 16;

/// Properties of the function's parameters by name, with what their references mean in place of these; none where the function or its
/// schema is not there.
pub(super) fn properties(tools: &[Value], function: &str) -> Option<Map<String, Value>> {
    let functions = tools.iter().filter_map(|tool| tool.get("function"));
    let mut named =
        functions.filter(|candidate| candidate.get("name").and_then(Value::as_str) == Some(function));
    named.find_map(|found| {
        let root = found.get("parameters")?;
        let mut left = MOST_SCHEMAS;
        let whole = resolved(root, root, 0, &mut left);
        let properties = whole.get("properties")?.as_object()?;
        Some(
            properties
                .iter()
                .map(|(name, schema)| (name.clone(), resolved(schema, root, 0, &mut left)))
                .collect(),
        )
    })
}

/// The schema with what its reference, and those of its alternatives, mean in `root`. Its own keywords win over those of what it refers to.
fn resolved(schema: &Value, root: &Value, depth: usize, left: &mut usize) -> Value {
    let Some(own) = schema.as_object() else { return schema.clone() };
    *left = left.saturating_sub(1);
    if *left == 0 || depth > DEEPEST {
        return schema.clone();
    }
    let mut whole = match own.get("$ref").and_then(Value::as_str).and_then(|path| target(path, root)) {
        Some(target) => match resolved(target, root, depth + 1, left) {
            Value::Object(target) => target,
            _ => Map::new(),
        },
        None => Map::new(),
    };
    whole.extend(
        own.iter().filter(|(key, _)| *key != "$ref").map(|(key, value)| (key.clone(), value.clone())),
    );
    for choice in ["anyOf", "oneOf", "allOf"] {
        if let Some(Value::Array(schemas)) = whole.get_mut(choice) {
            schemas.iter_mut().for_each(|schema| *schema = resolved(schema, root, depth + 1, left));
        }
    }
    Value::Object(whole)
}

/// What a reference within the schema points at: `#` or `#/$defs/NAME`.
fn target<'a>(reference: &str, root: &'a Value) -> Option<&'a Value> {
    root.pointer(reference.strip_prefix('#')?)
}

/// Whether the schema says in one word that this argument is a string.
pub(super) fn is_string(tools: &[Value], function: &str, argument: &str) -> bool {
    properties(tools, function)
        .and_then(|properties| properties.get(argument)?.get("type").cloned())
        .is_some_and(|kind| kind == "string")
}

/// A value read by its declared types, the narrowest that fits: MiniMax and MiniCPM. "null" is null under every type.
pub(super) fn converted(text: &str, properties: Option<&Map<String, Value>>, argument: &str) -> Value {
    let lower = text.to_lowercase();
    if lower == "null" {
        return Value::Null;
    }
    let kinds = match properties.and_then(|properties| properties.get(argument)) {
        Some(schema) => declared(schema),
        None => vec!["string".to_owned()],
    };
    let has = |names: &[&str]| kinds.iter().any(|kind| names.contains(&kind.as_str()));
    if has(&["null"]) && ["none", "nil"].contains(&lower.as_str()) {
        return Value::Null;
    }
    if has(&["integer", "int"])
        && let Some(number) = value::integer(text)
    {
        return Value::Number(number);
    }
    if has(&["number", "float"])
        && let Some(number) = value::number(text)
    {
        return Value::Number(number);
    }
    if has(&["boolean", "bool"]) {
        match lower.trim() {
            "true" | "1" | "yes" | "on" => return Value::Bool(true),
            "false" | "0" | "no" | "off" => return Value::Bool(false),
            _ => {}
        }
    }
    if has(&["object", "array"])
        && let Some(value) = loose_json(text).ok().or_else(|| literal::literal(text))
    {
        return value;
    }
    if has(&["string", "str", "text"]) {
        return Value::String(text.to_owned());
    }
    json(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// Every type that the schema allows, in lower case: its own, those of its enum's values, and those of alternatives.
fn declared(schema: &Value) -> Vec<String> {
    let mut kinds = Vec::new();
    if let Some(schema) = schema.as_object() {
        match schema.get("type") {
            Some(Value::String(kind)) => kinds.push(kind.to_lowercase()),
            Some(Value::Array(list)) => {
                kinds.extend(list.iter().filter_map(Value::as_str).map(str::to_lowercase));
            }
            _ => {}
        }
        for value in schema.get("enum").and_then(Value::as_array).into_iter().flatten() {
            kinds.push(kind_of(value).to_owned());
        }
        for choice in ["anyOf", "oneOf", "allOf"] {
            for schema in schema.get(choice).and_then(Value::as_array).into_iter().flatten() {
                kinds.extend(declared(schema));
            }
        }
    }
    if kinds.is_empty() { vec!["string".to_owned()] } else { kinds }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn references_say_what_they_refer_to() {
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {
        "type": "object",
        "$defs": {
            "Count": {"type": "integer"},
            "Number": {"$ref": "#/$defs/Count"},
            "a/b": {"type": "boolean"},
            "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Loop"}]},
        },
        "properties": {
            "count": {"$ref": "#/$defs/Number", "description": "how many"},
            "maybe": {"anyOf": [{"$ref": "#/$defs/Count"}, {"type": "null"}]},
            "flag": {"$ref": "#/$defs/a~1b"},
            "text": {"$ref": "#/$defs/Number", "type": "string"},
            "lost": {"$ref": "#/$defs/Nothing"},
            "elsewhere": {"$ref": "https://example.com/schema"},
            "loop": {"$ref": "#/$defs/Loop"},
        }}}})];
        let properties = properties(&tools, "f").unwrap();
        for (name, text, expected) in [
            ("count", "5", json!(5)),
            ("maybe", "5", json!(5)),
            ("maybe", "none", json!(null)),
            ("flag", "true", json!(true)),
            ("text", "5", json!("5")),
            ("lost", "5", json!("5")),
            ("elsewhere", "5", json!("5")),
            ("loop", "5", json!("5")),
            ("nobody", "5", json!("5")),
        ] {
            assert_eq!(converted(text, Some(&properties), name), expected, "{name}");
        }
        assert!(is_string(&tools, "f", "text") && !is_string(&tools, "f", "count"));
        let whole = [json!({"function": {"name": "g", "parameters": {
            "$ref": "#/$defs/Arguments",
            "$defs": {"Arguments": {"properties": {"x": {"type": "number"}}}}}}})];
        assert_eq!(converted("2.5", super::properties(&whole, "g").as_ref(), "x"), json!(2.5));
    }
}
