//! The fields of a JSON object, taken out one by one: what is left at the end is unknown, and that is an error too.
//!
//! `null` is the same as leaving a field out, as OpenAI's clients have it. Every error names the field by its path.

use crate::error::{ApiError, ErrorKind};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// An object that is being read.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Of the object itself; empty at the top.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(crate) fn new(path: impl Into<String>, map: Map<String, Value>) -> Self {
        Self { path: path.into(), map }
    }

    /// A value that has to be an object.
    pub(crate) fn of(path: impl Into<String>, value: Value) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other => Err(wrong(&path, &other, "an object")),
        }
    }

    /// The path of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Any value.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(name), &other, "a text")),
        }
    }

    /// A text that must be there.
    pub(crate) fn needed_string(&mut self, name: &str) -> Result<String, ApiError> {
        self.string(name)?.ok_or_else(|| self.missing(name))
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(&self.path(name), &other, "true or false")),
        }
    }

    /// A whole number; `7.0` is one too.
    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let number = value.as_i64().or_else(|| {
            let float = value.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9.0e15)?;
            Some(float as i64)
        });
        let Some(number) = number else {
            return Err(match value.is_number() {
                true => out_of_range(&self.path(name), &value, &range.start(), &range.end()),
                false => wrong(&self.path(name), &value, "a whole number"),
            });
        };
        match range.contains(&number) {
            true => Ok(Some(number)),
            false => Err(out_of_range(&self.path(name), &number, range.start(), range.end())),
        }
    }

    /// A whole number of 32 bits from 0.
    pub(crate) fn count(&mut self, name: &str) -> Result<Option<u32>, ApiError> {
        let number = self.integer(name, 0..=i64::from(u32::MAX))?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let Some(number) = value.as_f64() else { return Err(wrong(&self.path(name), &value, "a number")) };
        let narrow = number as f32;
        match range.contains(&narrow) {
            true => Ok(Some(narrow)),
            false => Err(out_of_range(&self.path(name), &value, range.start(), range.end())),
        }
    }

    pub(crate) fn list(&mut self, name: &str, most: usize) -> Result<Option<Vec<Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() > most => {
                let path = self.path(name);
                let message = format!("{path} has {} entries, but at most {most} are allowed", list.len());
                Err(ApiError::field(path, message))
            }
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(wrong(&self.path(name), &other, "a list")),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Self>, ApiError> {
        let path = self.path(name);
        self.value(name).map(|value| Self::of(path, value)).transpose()
    }

    /// An object whose fields have names that the client chose.
    pub(crate) fn map(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        Ok(self.object(name)?.map(|fields| fields.map))
    }

    /// A text or a list of texts.
    pub(crate) fn strings(&mut self, name: &str, most: usize) -> Result<Vec<String>, ApiError> {
        if let Some(Value::String(text)) = self.map.get(name) {
            let text = text.clone();
            self.map.remove(name);
            return Ok(vec![text]);
        }
        if let Some(other) = self.map.get(name)
            && !other.is_array()
            && !other.is_null()
        {
            return Err(wrong(&self.path(name), other, "a text or a list of texts"));
        }
        self.texts(name, most)
    }

    /// A list of texts.
    pub(crate) fn texts(&mut self, name: &str, most: usize) -> Result<Vec<String>, ApiError> {
        let path = self.path(name);
        let list = self.list(name, most)?.unwrap_or_default();
        let texts = list.into_iter().enumerate().map(|(index, value)| match value {
            Value::String(text) => Ok(text),
            other => Err(wrong(&format!("{path}[{index}]"), &other, "a text")),
        });
        texts.collect()
    }

    /// One of some words.
    pub(crate) fn one_of(
        &mut self,
        name: &str,
        words: &[&'static str],
    ) -> Result<Option<&'static str>, ApiError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        match words.iter().find(|word| **word == text) {
            Some(word) => Ok(Some(word)),
            None => {
                let path = self.path(name);
                let message =
                    format!("{path} is {:?}, but must be one of {}", shortened(&text), words.join(", "));
                Err(ApiError::field(path, message))
            }
        }
    }

    /// A field that is understood but changes nothing here; docs/http.md lists these.
    pub(crate) fn without_effect(&mut self, name: &str) {
        self.map.remove(name);
    }

    /// A field that is served with this value only.
    pub(crate) fn only(&mut self, name: &str, served: &[Value], why: &str) -> Result<(), ApiError> {
        match self.value(name) {
            Some(value) if !served.contains(&value) => {
                let path = self.path(name);
                Err(ApiError::field(path.clone(), format!("{path} is not supported: {why}")))
            }
            _ => Ok(()),
        }
    }

    /// A field that other servers have and this one has not.
    pub(crate) fn refuse(&mut self, name: &str, why: &str) -> Result<(), ApiError> {
        self.only(name, &[], why)
    }

    /// What to say when a field is not there.
    pub(crate) fn missing(&self, name: &str) -> ApiError {
        let path = self.path(name);
        ApiError::field(path.clone(), format!("{path} is missing"))
    }

    /// Nothing may be left.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()).map(|(name, _)| name) {
            None => Ok(()),
            Some(name) => {
                let path = self.path(&shortened(name));
                let message =
                    format!("{path} is not a field that is served here; docs/http.md lists those that are");
                Err(ApiError::field(path, message))
            }
        }
    }
}

/// What a value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value of the wrong kind.
pub(crate) fn wrong(path: &str, value: &Value, wanted: &str) -> ApiError {
    ApiError::field(path, format!("{path} is {}, but must be {wanted}", kind(value)))
}

fn out_of_range(
    path: &str,
    value: &dyn std::fmt::Display,
    low: &dyn std::fmt::Display,
    high: &dyn std::fmt::Display,
) -> ApiError {
    ApiError::field(path, format!("{path} is {value}, but must be between {low} and {high}"))
}

/// A client's text in a message: its beginning.
pub(crate) fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

impl From<serde_json::Error> for ApiError {
    fn from(error: serde_json::Error) -> Self {
        Self::new(ErrorKind::Internal, format!("an answer could not be written: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::of("a", value).unwrap()
    }

    #[test]
    fn errors_name_the_field_by_its_path() {
        let check = |result: Result<(), ApiError>, text: &str| assert_eq!(result.unwrap_err().message, text);
        check(
            fields(json!({"n": "x"})).integer("n", 1..=5).map(drop),
            "a.n is a text, but must be a whole number",
        );
        check(fields(json!({"n": 9})).integer("n", 1..=5).map(drop), "a.n is 9, but must be between 1 and 5");
        check(
            fields(json!({"n": 1.5})).integer("n", 1..=5).map(drop),
            "a.n is 1.5, but must be between 1 and 5",
        );
        check(
            fields(json!({"n": 1e300})).number("n", 0.0..=1.0).map(drop),
            "a.n is 1e+300, but must be between 0 and 1",
        );
        check(fields(json!({"n": [1]})).strings("n", 4).map(drop), "a.n[0] is a number, but must be a text");
        check(
            fields(json!({"n": 1})).strings("n", 4).map(drop),
            "a.n is a number, but must be a text or a list of texts",
        );
        check(
            fields(json!({"n": "z"})).one_of("n", &["x", "y"]).map(drop),
            "a.n is \"z\", but must be one of x, y",
        );
        check(
            fields(json!({"n": [1, 2]})).list("n", 1).map(drop),
            "a.n has 2 entries, but at most 1 are allowed",
        );
        check(fields(json!({"n": 1})).refuse("n", "why"), "a.n is not supported: why");
        check(
            fields(json!({"typo": 1})).finish(),
            "a.typo is not a field that is served here; docs/http.md lists those that are",
        );
    }

    #[test]
    fn null_is_nothing() {
        let mut fields = fields(json!({"a": null, "b": null, "c": null, "d": 7.0}));
        assert_eq!(fields.boolean("a"), Ok(None));
        assert_eq!(fields.strings("b", 1), Ok(vec![]));
        assert_eq!(fields.integer("d", 0..=9), Ok(Some(7)));
        assert_eq!(fields.finish(), Ok(()));
    }
}
