//! The arguments of a call in the notations that write them one by one, each by its declared type.
//!
//! Strings are written as they are, without quotes, up to a mark; everything else as JSON. Only declared arguments may come, in the
//! order of their declaration; those that are not required may be left out.

use super::rules::{Rules, quoted};
use serde_json::{Map, Value};

/// How deep references lead and values nest before they count as anything.
const MAX_DEPTH: usize = 8;

/// One argument.
#[derive(Clone, Debug)]
pub(super) struct Argument<'a> {
    pub(super) name: &'a str,
    pub(super) is_required: bool,
    pub(super) kind: Kind,
}

/// What is written for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// Any text.
    Text,
    /// One of these texts.
    Words(Vec<String>),
    /// JSON by this schema, which stands for itself.
    Json(Value),
}

/// The declared arguments of a function with this schema.
pub(super) fn arguments(schema: Option<&Value>) -> Vec<Argument<'_>> {
    let Some(schema) = schema else { return Vec::new() };
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else { return Vec::new() };
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    properties
        .iter()
        .map(|(name, declared)| Argument {
            name,
            is_required: required.contains(&name.as_str()),
            kind: kind(resolved(declared, schema), schema),
        })
        .collect()
}

/// The value for an argument and what ends it, as an expression.
pub(super) fn value_until(rules: &mut Rules<'_>, kind: &Kind, end: &str) -> String {
    match kind {
        Kind::Text => rules.until(end),
        Kind::Words(words) => {
            let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
            format!("({}) {}", words.join(" | "), rules.mark(end))
        }
        Kind::Json(schema) => format!("{} {}", rules.json(schema), rules.mark(end)),
    }
}

impl Kind {
    /// Is it written as text, without quotes?
    pub(super) fn is_text(&self) -> bool {
        !matches!(self, Self::Json(_))
    }

    /// As JSON, strings in quotes.
    pub(super) fn schema(&self) -> Value {
        match self {
            Self::Text => serde_json::json!({"type": "string"}),
            Self::Words(words) => serde_json::json!({"enum": words}),
            Self::Json(schema) => schema.clone(),
        }
    }
}

fn kind(declared: &Value, root: &Value) -> Kind {
    let is_string = |kind: &Value| kind == "string";
    let words: Option<Vec<String>> = declared
        .get("enum")
        .and_then(Value::as_array)
        .filter(|words| !words.is_empty())
        .and_then(|words| words.iter().map(|word| word.as_str().map(str::to_owned)).collect());
    // What the schema does not say is read as text by most notations.
    let says_nothing = ["type", "enum", "const", "anyOf", "oneOf", "allOf", "properties", "items"]
        .iter()
        .all(|word| declared.get(word).is_none());
    match declared.get("type") {
        _ if words.is_some() => Kind::Words(words.unwrap_or_default()),
        Some(kind) if is_string(kind) => Kind::Text,
        Some(Value::Array(kinds)) if kinds.iter().any(is_string) => Kind::Text,
        None if says_nothing => Kind::Text,
        _ => Kind::Json(standing_alone(declared, root)),
    }
}

/// Follows references inside of the schema.
pub(super) fn resolved<'a>(declared: &'a Value, root: &'a Value) -> &'a Value {
    let mut found = declared;
    for _ in 0..MAX_DEPTH {
        let Some(path) = found.get("$ref").and_then(Value::as_str) else { break };
        match path.strip_prefix('#').and_then(|path| root.pointer(path)) {
            Some(target) => found = target,
            None => break,
        }
    }
    found
}

/// With the definitions that its references may lead to.
fn standing_alone(declared: &Value, root: &Value) -> Value {
    let mut schema = declared.as_object().cloned().unwrap_or_else(Map::new);
    for name in ["$defs", "definitions"] {
        if let (Some(definitions), None) = (root.get(name), schema.get(name)) {
            schema.insert(name.to_owned(), definitions.clone());
        }
    }
    Value::Object(schema)
}

/// A value in the notation of Gemma 4 and FunctionGemma: strings between `delimiter`, names without quotes, everything else as JSON.
pub(super) fn gemma_value(
    rules: &mut Rules<'_>,
    declared: &Value,
    root: &Value,
    delimiter: &str,
    depth: usize,
) -> String {
    let declared = resolved(declared, root);
    let kinds: Vec<&str> = match declared.get("type") {
        Some(Value::String(kind)) => vec![kind],
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let mark = rules.mark(delimiter);
    if let Some(words) = declared.get("enum").and_then(Value::as_array).filter(|words| !words.is_empty()) {
        let words = words.iter().map(|word| match word {
            Value::String(text) => format!("{mark} {} {mark}", quoted(text)),
            other => quoted(&other.to_string()),
        });
        return format!("({})", words.collect::<Vec<_>>().join(" | "));
    }
    if kinds.contains(&"object") && depth < MAX_DEPTH {
        return gemma_object(rules, declared, root, delimiter, depth + 1);
    }
    if kinds.contains(&"array") && depth < MAX_DEPTH {
        let items = declared.get("items").cloned().unwrap_or_default();
        let item = gemma_value(rules, &items, root, delimiter, depth + 1);
        let item = rules.named(&item);
        return format!("\"[\" ({item} (\",\" {item})*)? \"]\"");
    }
    let scalars: Vec<&str> =
        kinds.into_iter().filter(|kind| ["integer", "number", "boolean", "null"].contains(kind)).collect();
    if scalars.is_empty() {
        return format!("{mark} {}", rules.until(delimiter));
    }
    // Of several types the simple ones: the bounds belong to all.
    let mut simple = standing_alone(declared, root);
    simple["type"] = scalars.into();
    rules.json(&simple)
}

/// `{key:value,…}` in that notation.
pub(super) fn gemma_object(
    rules: &mut Rules<'_>,
    declared: &Value,
    root: &Value,
    delimiter: &str,
    depth: usize,
) -> String {
    let properties = declared.get("properties").and_then(Value::as_object);
    let required: Vec<&str> = declared
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut entries = Vec::new();
    for (name, property) in properties.into_iter().flatten() {
        let value = gemma_value(rules, property, root, delimiter, depth);
        let entry = rules.named(&format!("{} {value}", quoted(&format!("{name}:"))));
        entries.push((entry, required.contains(&name.as_str())));
    }
    // The rest of the entries after one that came, and with none before.
    let mut more = String::new();
    let mut whole = String::new();
    for (entry, is_required) in entries.into_iter().rev() {
        let first = format!("{entry} {more}");
        whole = match (is_required, whole.is_empty()) {
            (true, _) => first.clone(),
            (false, true) => format!("({first})?"),
            (false, false) => format!("({first} | {whole})"),
        };
        let next = format!("\",\" {first}");
        let next = match (is_required, more.is_empty()) {
            (true, _) => next,
            (false, true) => format!("({next})?"),
            (false, false) => format!("({next} | {more})"),
        };
        // A rule of its own, so that the text does not double with every entry.
        more = rules.named(&next);
        whole = rules.named(&whole);
    }
    format!("\"{{\" {whole} \"}}\"")
}
