//! Entries of `hf_dataset`: data sets of the hub, the features that hold their text, and which part of them is for what.

use super::ConfigError;
use super::settings::Section;
use std::fmt;

/// A data set of the hub and how its rows are read.
#[derive(Clone, Debug, PartialEq)]
pub struct HubDataset {
    /// Its name there: "OWNER/NAME".
    pub path: String,
    /// The configuration (subset) of it, `config.name`.
    pub subset: Option<String>,
    /// Branch, tag or commit, `config.revision`.
    pub revision: Option<String>,
    /// What is learned from.
    pub train_split: Split,
    /// What is measured on while training.
    pub valid_split: Split,
    /// What is measured on at the end, if anything is.
    pub test_split: Option<Split>,
    /// The names of the features.
    pub features: Features,
}

/// Which features of a row hold what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// A question: with `completion` a pair.
    pub prompt: String,
    /// Its answer.
    pub completion: String,
    /// A conversation: a list of messages.
    pub chat: String,
    /// A plain text.
    pub text: String,
}

/// A part of a data set in the notation of Hugging Face's datasets: `train`, `train[:80%]`, `train[-100:]`, `train+test[10%:20%]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    parts: Vec<Part>,
}

/// A slice of one named split.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    name: String,
    from: Option<i64>,
    to: Option<i64>,
    is_percent: bool,
}

impl Features {
    pub(super) const KEYS: [&'static str; 4] =
        ["prompt_feature", "completion_feature", "chat_feature", "text_feature"];

    /// mlx-lm's names where nothing else is said.
    pub(super) fn read(section: &Section<'_>) -> Result<Self, ConfigError> {
        let name = |key: &str, default: &str| -> Result<String, ConfigError> {
            Ok(section.text(key)?.unwrap_or(default).to_owned())
        };
        Ok(Self {
            prompt: name("prompt_feature", "prompt")?,
            completion: name("completion_feature", "completion")?,
            chat: name("chat_feature", "messages")?,
            text: name("text_feature", "text")?,
        })
    }
}

impl Default for Features {
    fn default() -> Self {
        let [prompt, completion, chat, text] =
            ["prompt", "completion", "messages", "text"].map(str::to_owned);
        Self { prompt, completion, chat, text }
    }
}

impl HubDataset {
    pub(super) fn read(section: &Section<'_>) -> Result<Self, ConfigError> {
        let mut known = vec!["path", "config", "train_split", "valid_split", "test_split", "mask_prompt"];
        known.extend(Features::KEYS);
        section.only(&known)?;
        let Some(path) = section.text("path")? else {
            return Err(section.wrong("path", "is missing: it names the data set, as in \"OWNER/NAME\""));
        };
        let config = section.section("config")?;
        if let Some(config) = &config {
            config.only(&["name", "revision"])?;
        }
        let of_config = |key: &str| -> Result<Option<String>, ConfigError> {
            let Some(config) = &config else { return Ok(None) };
            Ok(config.text(key)?.map(str::to_owned))
        };
        let split = |key: &str| -> Result<Option<Split>, ConfigError> {
            let Some(text) = section.text(key)? else { return Ok(None) };
            Split::parse(text).map(Some).map_err(|problem| section.wrong(key, problem))
        };
        let training = |from, to| Split::of(Part { name: "train".to_owned(), from, to, is_percent: true });
        Ok(Self {
            path: path.to_owned(),
            subset: of_config("name")?,
            revision: of_config("revision")?,
            train_split: split("train_split")?.unwrap_or_else(|| training(None, Some(80))),
            valid_split: split("valid_split")?.unwrap_or_else(|| training(Some(-10), None)),
            test_split: split("test_split")?,
            features: Features::read(section)?,
        })
    }
}

impl Split {
    fn of(part: Part) -> Self {
        Self { parts: vec![part] }
    }

    /// All of a split.
    pub fn whole(name: &str) -> Self {
        Self::of(Part { name: name.to_owned(), from: None, to: None, is_percent: false })
    }

    /// Reads the notation; the error is the end of a sentence.
    ///
    /// # Errors
    /// When it is not in the notation, or a percentage is beyond 100.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts: Option<Vec<Part>> = text.split('+').map(|part| Part::parse(part.trim())).collect();
        let Some(parts) = parts else {
            return Err(format!(
                "is {text:?}, but must be a split or a slice of one, such as train, train[:80%] or train[-100:]"
            ));
        };
        let is_beyond = |bound: Option<i64>| bound.is_some_and(|bound| bound.abs() > 100);
        if parts.iter().any(|part| part.is_percent && (is_beyond(part.from) || is_beyond(part.to))) {
            return Err(format!("is {text:?}, but percentages are from -100 to 100"));
        }
        Ok(Self { parts })
    }

    /// The names of the splits it takes from.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(|part| part.name.as_str())
    }

    /// The slices in order: each a split's name and the rows of it, of the `count(name)` that it has.
    pub fn ranges(&self, count: impl Fn(&str) -> usize) -> Vec<(&str, std::ops::Range<usize>)> {
        self.parts.iter().map(|part| (part.name.as_str(), part.range(count(&part.name)))).collect()
    }
}

impl Part {
    fn parse(text: &str) -> Option<Self> {
        let is_name = |name: &str| {
            !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
        };
        let Some((name, slice)) = text.split_once('[') else {
            return is_name(text).then(|| Self {
                name: text.to_owned(),
                from: None,
                to: None,
                is_percent: false,
            });
        };
        let (from, to) = slice.strip_suffix(']')?.split_once(':')?;
        let bound = |text: &str| -> Option<(Option<i64>, bool)> {
            if text.is_empty() {
                return Some((None, false));
            }
            let (digits, is_percent) = match text.strip_suffix('%') {
                Some(digits) => (digits, true),
                None => (text, false),
            };
            let is_whole = digits.trim_start_matches('-').bytes().all(|byte| byte.is_ascii_digit());
            let bound: i64 = digits.parse().ok().filter(|_| is_whole)?;
            Some((Some(bound), is_percent))
        };
        let ((from, one), (to, other)) = (bound(from)?, bound(to)?);
        is_name(name).then(|| Self { name: name.to_owned(), from, to, is_percent: one || other })
    }

    /// Its rows among `count`: the rule of Hugging Face's datasets, which rounds percentages to the nearest row (half to even).
    fn range(&self, count: usize) -> std::ops::Range<usize> {
        let rows = count as i64;
        let place = |bound: i64| {
            let place = match self.is_percent {
                true => (bound as f64 * count as f64 / 100.0).round_ties_even() as i64,
                false => bound,
            };
            let from_start = if place < 0 { (rows + place).max(0) } else { place };
            from_start.min(rows) as usize
        };
        let (start, end) = (self.from.map_or(0, place), self.to.map_or(count, place));
        start..end.max(start)
    }
}

impl fmt::Display for Split {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.parts.iter().enumerate() {
            let plus = if index > 0 { "+" } else { "" };
            write!(out, "{plus}{}", part.name)?;
            if part.from.is_some() || part.to.is_some() {
                let percent = if part.is_percent { "%" } else { "" };
                let bound =
                    |bound: Option<i64>| bound.map_or_else(String::new, |bound| format!("{bound}{percent}"));
                write!(out, "[{}:{}]", bound(part.from), bound(part.to))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_those_of_datasets() {
        for (text, count, expected) in [
            ("train", 10, "0..10"),
            ("train[:80%]", 10, "0..8"),
            ("train[-10%:]", 10, "9..10"),
            ("train[:80%]", 3, "0..2"),
            ("train[50%:]", 5, "2..5"),     // 2.5 is rounded to the even 2
            ("train[-10%:]", 15, "13..15"), // -1.5 to -2
            ("train[3:7]", 5, "3..5"),
            ("train[-2:]", 5, "3..5"),
            ("train[4:2]", 5, "4..4"),
            ("train[:-9]", 5, "0..0"),
            ("train[:2]+valid[1:]", 5, "0..2 1..5"),
        ] {
            let split = Split::parse(text).unwrap();
            let ranges = split.ranges(|_| count).into_iter().map(|(_, range)| format!("{range:?}"));
            assert_eq!(ranges.collect::<Vec<_>>().join(" "), expected, "{text}");
            assert_eq!(split.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        for text in ["", "train[", "train[1]", "train[a:]", "train[:101%]", "train[:--1]", "tr ain", "a++b"] {
            assert!(Split::parse(text).is_err(), "{text}");
        }
    }
}
