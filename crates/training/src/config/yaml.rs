//! YAML as mlx-lm reads it: PyYAML's safe loader (YAML 1.1) with one more rule, that `1e-5` is a number.
//!
//! The parser is saphyr's; what a plain word means is decided here, because YAML 1.2 decides otherwise (`yes`, `010`) and because the
//! line of every key is kept for messages.

use super::ConfigError;
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};
use std::collections::{BTreeMap, HashMap};

/// No configuration is near: what is larger is another file.
const MAX_BYTES: usize = 1 << 20;
/// Values, those that aliases repeat counted each time.
const MAX_VALUES: usize = 100_000;
const MAX_DEPTH: usize = 32;

/// A file's keys and values, and the line of each key by its path ("lora_parameters.rank").
#[derive(Debug)]
pub(super) struct Document {
    pub(super) values: Map<String, Value>,
    pub(super) lines: BTreeMap<String, usize>,
}

struct Reader<'a> {
    origin: &'a str,
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    anchors: HashMap<usize, Value>,
    lines: BTreeMap<String, usize>,
    values: usize,
}

/// Reads a mapping; an empty file is an empty one.
pub(super) fn read(text: &str, origin: &str) -> Result<Document, ConfigError> {
    if text.len() > MAX_BYTES {
        let reason = format!("the file has {} bytes, more than a configuration's {MAX_BYTES}", text.len());
        return Err(ConfigError::Syntax { origin: origin.to_owned(), line: 1, reason });
    }
    let mut reader = Reader {
        origin,
        parser: Parser::new_from_str(text),
        anchors: HashMap::new(),
        lines: BTreeMap::new(),
        values: 0,
    };
    let mut document = None;
    while let Some((event, line)) = reader.next()? {
        match event {
            Event::Nothing | Event::StreamStart | Event::DocumentEnd => {}
            Event::StreamEnd => break,
            Event::DocumentStart(_) if document.is_some() => {
                return Err(reader.error(line, "a second document begins here; only one is read"));
            }
            Event::DocumentStart(_) => {
                let Some((event, line)) = reader.next()? else { break };
                let value = reader.value(event, line, "", 0)?;
                document = Some(match value {
                    Value::Object(values) => values,
                    Value::Null => Map::new(),
                    _ => return Err(reader.error(line, "it is no mapping of keys to values")),
                });
            }
            _ => return Err(reader.error(line, "it is no mapping of keys to values")),
        }
    }
    Ok(Document { values: document.unwrap_or_default(), lines: reader.lines })
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Option<(Event<'a>, usize)>, ConfigError> {
        match self.parser.next_event() {
            None => Ok(None),
            Some(Ok((event, span))) => Ok(Some((event, span.start.line().max(1)))),
            Some(Err(error)) => Err(self.error(error.marker().line().max(1), error.info())),
        }
    }

    fn following(&mut self, line: usize) -> Result<(Event<'a>, usize), ConfigError> {
        self.next()?.ok_or_else(|| self.error(line, "the file ends too early"))
    }

    fn error(&self, line: usize, reason: &str) -> ConfigError {
        ConfigError::Syntax { origin: self.origin.to_owned(), line, reason: reason.to_owned() }
    }

    fn value(
        &mut self,
        event: Event<'a>,
        line: usize,
        path: &str,
        depth: usize,
    ) -> Result<Value, ConfigError> {
        self.values += 1;
        if depth > MAX_DEPTH || self.values > MAX_VALUES {
            return Err(self.error(line, "too many values, or too deep"));
        }
        let (value, anchor) = match event {
            Event::Scalar(.., Some(_))
            | Event::SequenceStart(_, Some(_))
            | Event::MappingStart(_, Some(_)) => {
                return Err(self.error(line, "tags (\"!\") are not read; write the value without"));
            }
            Event::Scalar(text, style, anchor, None) => {
                let value = match style {
                    ScalarStyle::Plain => plain(&text),
                    _ => Value::String(text.into_owned()),
                };
                (value, anchor)
            }
            Event::SequenceStart(anchor, None) => {
                let mut list = Vec::new();
                loop {
                    let (event, line) = self.following(line)?;
                    if event == Event::SequenceEnd {
                        break;
                    }
                    let inner = format!("{path}[{}]", list.len());
                    self.lines.insert(inner.clone(), line);
                    list.push(self.value(event, line, &inner, depth + 1)?);
                }
                (Value::Array(list), anchor)
            }
            Event::MappingStart(anchor, None) => (Value::Object(self.mapping(line, path, depth)?), anchor),
            Event::Alias(anchor) => {
                let value = self.anchors.get(&anchor).cloned();
                let value =
                    value.ok_or_else(|| self.error(line, "an alias of something that is not there"))?;
                self.values += size(&value);
                (value, 0)
            }
            _ => return Err(self.error(line, "a value is missing")),
        };
        if anchor > 0 {
            self.anchors.insert(anchor, value.clone());
        }
        Ok(value)
    }

    fn mapping(&mut self, line: usize, path: &str, depth: usize) -> Result<Map<String, Value>, ConfigError> {
        let mut map = Map::new();
        loop {
            let (event, line) = self.following(line)?;
            let key = match event {
                Event::MappingEnd => return Ok(map),
                Event::Scalar(key, _, _, None) => key.into_owned(),
                _ => return Err(self.error(line, "a key must be a word")),
            };
            let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            self.lines.insert(inner.clone(), line);
            let (event, value_line) = self.following(line)?;
            let value = self.value(event, value_line, &inner, depth + 1)?;
            if map.insert(key.clone(), value).is_some() {
                return Err(self.error(line, &format!("the key {key:?} is here twice")));
            }
        }
    }
}

fn size(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(size).sum::<usize>(),
        Value::Object(map) => 1 + map.values().map(size).sum::<usize>(),
        _ => 1,
    }
}

/// What a word without quotes means in YAML 1.1.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Value::Bool(true),
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Value::Bool(false);
        }
        _ => {}
    }
    if let Some(whole) = whole(text) {
        return Value::Number(whole.into());
    }
    number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn whole(text: &str) -> Option<i64> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !unsigned.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let plain: String = unsigned.chars().filter(|letter| *letter != '_').collect();
    let magnitude = if let Some(digits) = plain.strip_prefix("0b") {
        i64::from_str_radix(digits, 2)
    } else if let Some(digits) = plain.strip_prefix("0x") {
        i64::from_str_radix(digits, 16)
    } else if plain.len() > 1 && plain.starts_with('0') {
        i64::from_str_radix(&plain[1..], 8)
    } else {
        plain.parse()
    };
    let magnitude = magnitude.ok()?;
    Some(if text.starts_with('-') { -magnitude } else { magnitude })
}

/// Digits with a dot, an exponent or both; without a digit before the dot, an exponent needs its sign (PyYAML's rule and mlx-lm's).
fn number(text: &str) -> Option<Number> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_');
    let begins_with_digit = mantissa.starts_with(|first: char| first.is_ascii_digit());
    let mantissa_fits = match mantissa.split_once('.') {
        Some((before, behind)) if begins_with_digit => is_digits(before) && is_digits(behind),
        Some((before, behind)) => {
            let is_signed = exponent.is_none_or(|exponent| exponent.starts_with(['-', '+']));
            before.is_empty()
                && unsigned.len() == text.len()
                && is_digits(behind)
                && !behind.is_empty()
                && is_signed
        }
        None => begins_with_digit && is_digits(mantissa) && exponent.is_some(),
    };
    let exponent_fits = exponent.is_none_or(|exponent| {
        let digits = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    });
    if !mantissa_fits || !exponent_fits {
        return None;
    }
    let plain: String = text.chars().filter(|letter| *letter != '_').collect();
    Number::from_f64(plain.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_mean_what_they_mean_to_mlx_lm() {
        for (text, value) in [
            ("1e-5", json!(1e-5)),
            ("1E+3", json!(1e3)),
            ("2e4", json!(2e4)),
            ("1.", json!(1.0)),
            ("-.5", json!("-.5")),
            (".5", json!(0.5)),
            (".5e3", json!(".5e3")),
            (".5e-3", json!(0.5e-3)),
            ("1_000", json!(1000)),
            ("010", json!(8)),
            ("0x1F", json!(31)),
            ("-7", json!(-7)),
            ("yes", json!(true)),
            ("Off", json!(false)),
            ("~", json!(null)),
            ("e5", json!("e5")),
            ("1e", json!("1e")),
            (".inf", json!(".inf")),
            ("y", json!("y")),
            ("1.2.3", json!("1.2.3")),
            ("99999999999999999999", json!("99999999999999999999")),
        ] {
            assert_eq!(plain(text), value, "{text}");
        }
    }

    #[test]
    fn keys_have_their_lines_and_quotes_make_text() {
        let text =
            "# c\nmodel: \"yes\"\nlora_parameters:\n  keys: ['a', b]\n  rank: 8\nlist:\n- x: 1\n- *a\n";
        let error = read(text, "a.yaml").unwrap_err();
        assert!(matches!(&error, ConfigError::Syntax { line: 8, .. }), "{error}");
        let document = read(&text.replace("- *a\n", ""), "a.yaml").unwrap();
        let expected =
            json!({"model": "yes", "lora_parameters": {"keys": ["a", "b"], "rank": 8}, "list": [{"x": 1}]});
        assert_eq!(Value::Object(document.values), expected);
        assert_eq!(document.lines["lora_parameters.rank"], 5);
        assert_eq!(document.lines["list[0].x"], 7);
        assert!(read("", "a").unwrap().values.is_empty());
        let anchored = read("a: &x {b: 1}\nc: *x\n", "a").unwrap();
        assert_eq!(Value::Object(anchored.values), json!({"a": {"b": 1}, "c": {"b": 1}}));
    }

    #[test]
    fn what_is_no_configuration_is_named_by_its_line() {
        let mut billion = "a: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for (next, last) in ["b", "c", "d", "e", "f", "g"].iter().zip(["a", "b", "c", "d", "e", "f"]) {
            let repeated = vec![format!("*{last}"); 10].join(",");
            billion.push_str(&format!("{next}: &{next} [{repeated}]\n"));
        }
        let deep = "[".repeat(60);
        for (text, line) in [
            ("a: 1\nb: [", 3),
            ("a: 1\na: 2\n", 2),
            ("- 1\n", 1),
            ("a: !!python/object x\n", 1),
            ("a: 1\n---\nb: 1\n", 2),
            (&billion, 5),
            (&deep, 1),
            ("a: \"\n", 1),
        ] {
            match read(text, "f.yaml") {
                Err(ConfigError::Syntax { line: found, origin, .. }) => {
                    assert_eq!((found, origin.as_str()), (line, "f.yaml"), "{text:?}");
                }
                other => panic!("{text:?}: {other:?}"),
            }
        }
    }
}
