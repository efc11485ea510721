//! How a model's authors want it sampled: generation_config.json, as far as a request leaves it open.

use mlxnode_text::{TextError, TextFiles};
use serde_json::Value;

/// The values that the file has; none for those it leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// 0 when the file says `"do_sample": false`.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most candidates.
    pub top_k: Option<u32>,
    /// Relative floor.
    pub min_p: Option<f32>,
    /// Multiplicative penalty.
    pub repetition_penalty: Option<f32>,
}

const FILE: &str = "generation_config.json";

impl SamplingDefaults {
    /// Reads generation_config.json; a model without one has no defaults of its own.
    ///
    /// # Errors
    /// When it is not JSON, or a value is none that could be sampled with.
    pub fn from_files(files: &TextFiles) -> Result<Self, TextError> {
        let invalid = |reason: String| TextError::InvalidFile { file: FILE.to_owned(), reason };
        let config: Value = match files.get(FILE) {
            None => Value::Null,
            Some(bytes) => serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?,
        };
        let number = |name: &str, most: f64| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if (0.0..=most).contains(&number) => Ok(Some(number as f32)),
                _ => Err(invalid(format!("{name} is {value}, but must be a number between 0 and {most}"))),
            },
        };
        let is_greedy = config.get("do_sample") == Some(&Value::Bool(false));
        let temperature = number("temperature", 100.0)?;
        // "Most" of a top_k beyond every vocabulary means that it is off, which 0 says.
        let top_k = number("top_k", f64::from(u32::MAX))?.map(|top_k| top_k as u32);
        Ok(Self {
            temperature: if is_greedy { Some(0.0) } else { temperature },
            top_p: number("top_p", 1.0)?,
            top_k,
            min_p: number("min_p", 1.0)?,
            repetition_penalty: number("repetition_penalty", 100.0)?,
        })
    }

    /// These defaults for a vocabulary: a `top_k` that would keep all of it is off.
    #[must_use]
    pub fn within(self, vocabulary: usize) -> Self {
        Self { top_k: self.top_k.filter(|top_k| (*top_k as usize) < vocabulary), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn read(json: &str) -> Result<SamplingDefaults, TextError> {
        let files = BTreeMap::from([(FILE.to_owned(), json.as_bytes().to_vec())]);
        SamplingDefaults::from_files(&TextFiles::from_map(files)?)
    }

    #[test]
    fn the_authors_values_are_taken_and_their_mistakes_named() {
        let qwen = read(r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95}"#).unwrap();
        assert_eq!(
            (qwen.temperature, qwen.top_k, qwen.top_p, qwen.min_p),
            (Some(0.6), Some(20), Some(0.95), None)
        );
        assert_eq!(qwen.within(20).top_k, None);
        assert_eq!(read(r#"{"do_sample": false}"#).unwrap().temperature, Some(0.0));
        assert_eq!(read(r#"{"do_sample": false, "temperature": 0.7}"#).unwrap().temperature, Some(0.0));
        assert_eq!(read("{}").unwrap(), SamplingDefaults::default());
        let error = read(r#"{"top_p": 1.5}"#).unwrap_err().to_string();
        assert!(error.contains("generation_config.json") && error.contains("top_p is 1.5"), "{error}");
    }
}
