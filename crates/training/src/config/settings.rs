//! Keys and values before they are checked, with where each came from, and how to read them.

use super::{ConfigError, yaml};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Keys with loose values: a file's, or a command line's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    values: Map<String, Value>,
    /// Lines of a file's keys.
    lines: BTreeMap<String, usize>,
    origin: Option<String>,
    /// Keys that flags gave, over what the file says.
    flags: Vec<String>,
}

impl Settings {
    /// Without any.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file's; `origin` names it in messages. Keys are checked where they are used.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`]
    pub fn from_yaml(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let document = yaml::read(text, origin)?;
        let origin = Some(origin.to_owned());
        Ok(Self { values: document.values, lines: document.lines, origin, flags: Vec::new() })
    }

    /// The same from a JSON object.
    pub(super) fn from_json(values: Map<String, Value>, origin: &str) -> Self {
        Self { values, origin: Some(origin.to_owned()), ..Self::default() }
    }

    /// Sets a key, as a flag does. Null is as good as nothing.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        if !value.is_null() {
            self.values.insert(key.to_owned(), value);
            self.flags.push(key.to_owned());
        }
    }

    /// The keys that are given.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A key's value.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// These settings, and `below`'s where these say nothing.
    pub(super) fn over(self, mut below: Self) -> Self {
        for (key, value) in self.values {
            below.values.insert(key.clone(), value);
            below.flags.push(key);
        }
        below.origin = below.origin.or(self.origin);
        below
    }

    pub(super) fn origin(&self) -> Option<&str> {
        self.origin.as_deref()
    }

    pub(super) fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// All of it, to be read.
    pub(super) fn root(&self) -> Section<'_> {
        Section { settings: self, values: &self.values, path: String::new() }
    }

    fn place(&self, path: &str) -> String {
        let key = path.split(['.', '[']).next().unwrap_or(path);
        if self.flags.iter().any(|flag| flag == key) {
            return format!("--{}", key.replace('_', "-"));
        }
        let file = self.origin.as_deref().unwrap_or("the configuration");
        let mut known = path;
        loop {
            if let Some(line) = self.lines.get(known) {
                return format!("{file} line {line}");
            }
            match known.rfind(['.', '[']) {
                Some(end) => known = &known[..end],
                None => return file.to_owned(),
            }
        }
    }
}

/// A mapping within the settings.
#[derive(Clone)]
pub(super) struct Section<'a> {
    settings: &'a Settings,
    values: &'a Map<String, Value>,
    path: String,
}

impl<'a> Section<'a> {
    fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The error that says what is wrong with a key's value.
    pub(super) fn wrong(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        let key = self.path(key);
        ConfigError::Value { place: self.settings.place(&key), key, problem: problem.into() }
    }

    /// Only these keys may be there.
    pub(super) fn only(&self, known: &[&str]) -> Result<(), ConfigError> {
        let Some(key) = self.values.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
        let path = self.path(key);
        Err(ConfigError::Unknown { place: self.settings.place(&path), key: path, near: nearest(key, known) })
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Null is as good as nothing, as in mlx-lm.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a text", Value::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A whole number of this range.
    pub(super) fn whole(&self, key: &str, least: i64, most: i64) -> Result<Option<i64>, ConfigError> {
        let Some(number) = self.typed(key, "a whole number", Value::as_i64)? else { return Ok(None) };
        match number {
            number if number < least => {
                Err(self.wrong(key, format!("is {number}, but must be {least} or more")))
            }
            number if number > most => {
                Err(self.wrong(key, format!("is {number}, but must be {most} or less")))
            }
            number => Ok(Some(number)),
        }
    }

    /// A count from `least` on.
    pub(super) fn count(&self, key: &str, least: i64) -> Result<Option<u64>, ConfigError> {
        // More than a year of microseconds: nothing that is counted here comes near.
        Ok(self.whole(key, least, 1 << 45)?.map(i64::unsigned_abs))
    }

    /// A number that `fits`; `range` says in words which do.
    pub(super) fn number(
        &self,
        key: &str,
        range: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(number) = self.typed(key, "a number", Value::as_f64)? else { return Ok(None) };
        match number.is_finite() && fits(number) {
            true => Ok(Some(number)),
            false => Err(self.wrong(key, format!("is {number}, but must be {range}"))),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, ConfigError> {
        self.typed(key, "a list", Value::as_array)
    }

    pub(super) fn section(&self, key: &str) -> Result<Option<Section<'a>>, ConfigError> {
        let values = self.typed(key, "a mapping of keys to values", Value::as_object)?;
        Ok(values.map(|values| Section { settings: self.settings, values, path: self.path(key) }))
    }

    /// A mapping, or a list of them.
    pub(super) fn sections(&self, key: &str) -> Result<Vec<Section<'a>>, ConfigError> {
        let Some(Value::Array(list)) = self.get(key) else {
            return Ok(self.section(key)?.into_iter().collect());
        };
        let mut sections = Vec::new();
        for (index, value) in list.iter().enumerate() {
            let place = format!("{key}[{index}]");
            let Some(values) = value.as_object() else {
                return Err(self.wrong(&place, "must be a mapping of keys to values"));
            };
            sections.push(Section { settings: self.settings, values, path: self.path(&place) });
        }
        Ok(sections)
    }

    /// One of these words.
    pub(super) fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>, ConfigError> {
        let Some(word) = self.text(key)? else { return Ok(None) };
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == word.to_lowercase()) {
            return Ok(Some(*choice));
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let near = nearest(word, &names).map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
        Err(self.wrong(key, format!("is {word:?}, but must be one of {}{near}", names.join(", "))))
    }

    fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        of: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = match value {
            Value::String(text) => format!("the text {:?}", text.chars().take(60).collect::<String>()),
            Value::Array(_) => "a list".to_owned(),
            Value::Object(_) => "a mapping".to_owned(),
            other => other.to_string(),
        };
        of(value).map(Some).ok_or_else(|| self.wrong(key, format!("is {found}, but must be {kind}")))
    }
}

/// The known word that is most like this one, unless none is.
pub(super) fn nearest(word: &str, known: &[&str]) -> Option<String> {
    let word = word.to_lowercase().replace('-', "_");
    let scored = known.iter().map(|known| (strsim::jaro_winkler(&word, known), *known));
    let best = scored.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (best.0 > 0.8).then(|| best.1.to_owned())
}
