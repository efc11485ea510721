//! Rows looked through before anything is loaded: what a job would stumble over, told to who submits it.
//!
//! What only a model's tokenizer or chat template refuses shows when the job starts.

use super::encoder::{Content, Shape};
use super::{DataError, DataFolder, records};
use crate::config::TrainingConfig;
use std::path::Path;

/// How many rows there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Examination {
    /// To learn from.
    pub training: u64,
    /// To measure on.
    pub validation: u64,
}

/// Looks through all rows of a folder that this configuration trains and measures on: that each is a record of the shape that its file's
/// first one has. The files are read once, row by row.
///
/// # Errors
/// [`DataError`] for the first row that is wrong, with file and line; for no rows to learn from, or to test on where that is asked for.
pub fn examine(config: &TrainingConfig, folder: &Path) -> Result<Examination, DataError> {
    let folder = DataFolder::open(folder, None)?;
    let count = |name: &str| {
        let mut rows = 0;
        let mut shape = None;
        let files = folder.files(name).unwrap_or_default();
        records::each(files, None, &mut |records| {
            for record in &records {
                let shape = match shape {
                    Some(shape) => shape,
                    None => {
                        let is_preference = config.preference.is_some();
                        *shape.insert(Shape::of(record, &config.features, config.mask, is_preference)?)
                    }
                };
                Content::of(record, shape, &config.features)?;
            }
            rows += records.len() as u64;
            Ok(())
        })?;
        Ok::<u64, DataError>(rows)
    };
    let examination = Examination { training: count("train")?, validation: count("valid")? };
    if examination.training == 0 {
        return Err(DataError::Empty { set: "training" });
    }
    if config.test && count("test")? == 0 {
        return Err(DataError::Empty { set: "test" });
    }
    Ok(examination)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn examined(configuration: &str, files: &[(&str, &str)]) -> Result<Examination, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let config = TrainingConfig::from_yaml(&format!("train: true\n{configuration}"), "a").unwrap();
        let prefix = format!("{}/", folder.path().display());
        examine(&config, folder.path()).map_err(|error| error.to_string().replace(&prefix, ""))
    }

    #[test]
    fn rows_are_counted_or_named() {
        let pair = r#"{"prompt": "a", "completion": "b"}"#;
        let chat =
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
        let preferred = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
        let counted = |training, validation| Ok(Examination { training, validation });
        let twice = format!("{pair}\n{pair}\n");
        assert_eq!(examined("", &[("train.jsonl", &twice), ("valid.jsonl", chat)]), counted(2, 1));
        assert_eq!(examined("preference: dpo", &[("train.jsonl", preferred)]), counted(1, 0));
        let second = |row: &str| format!("{pair}\n{row}\n");
        for (configuration, row, words) in [
            ("", "{\"prompt\": \"a\"", "train.jsonl line 2: it is not JSON"),
            ("", "[1]", "train.jsonl line 2: it is not a JSON object"),
            ("", chat, "train.jsonl line 2: there is no \"prompt\""),
            ("", r#"{"prompt": "a", "completion": ""}"#, "train.jsonl line 2: \"completion\" is empty"),
            ("", &format!("\n{pair}"), "train.jsonl line 2: it is empty"),
            ("preference: dpo", pair, "train.jsonl line 1: preference training needs"),
        ] {
            let error = examined(configuration, &[("train.jsonl", &second(row))]).unwrap_err();
            assert!(error.starts_with(words), "{row}: {error}");
        }
        let error = examined("", &[("train.jsonl", pair), ("valid.jsonl", r#"{"messages": [{"role": 1}]}"#)]);
        assert!(error.unwrap_err().starts_with("valid.jsonl line 1: message 0"), "the other file too");
        assert!(examined("", &[("train.jsonl", "\n")]).unwrap_err().contains("nothing to learn from"));
        assert!(
            examined("mask_prompt: true", &[("train.jsonl", r#"{"text": "a"}"#)])
                .unwrap_err()
                .contains("masked")
        );
        let with_test = |row: &str| examined("test: true", &[("train.jsonl", pair), ("test.jsonl", row)]);
        assert_eq!(with_test(pair), counted(1, 0));
        assert!(
            with_test("[1]").unwrap_err().starts_with("test.jsonl line 1"),
            "it would end the job at its start"
        );
        assert!(examined("test: true", &[("train.jsonl", pair)]).unwrap_err().contains("test"));
        assert_eq!(
            examined("", &[("train.jsonl", pair), ("test.jsonl", "[1]")]),
            counted(1, 0),
            "not asked for"
        );
        assert!(examined("text_feature: words", &[("train.jsonl", r#"{"words": "a"}"#)]).is_ok());
    }
}
