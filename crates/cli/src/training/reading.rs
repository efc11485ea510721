//! What a fine-tuning would read, looked through by the node that it is submitted to.

use super::job::configuration;
use mlxnode_api::jobs::{Examined, Unfit};
use mlxnode_node::JobReader;
use mlxnode_training::{DataError, Settings, TrainingConfig, examine};
use std::path::Path;

/// Reads as the trainer does.
#[derive(Debug)]
pub struct TrainingReader;

impl JobReader for TrainingReader {
    fn examine(&self, text: &str, model: &str, folder: &Path) -> Result<Examined, Unfit> {
        let config = configuration(text, model).map_err(Unfit::Configuration)?;
        let given = Settings::from_yaml(text, "the configuration");
        let given = given.map_err(|error| Unfit::Configuration(error.to_string()))?;
        let rows = examine(&config, folder).map_err(|error| Unfit::Rows { text: told(&error, folder) })?;
        Ok(Examined {
            rows: rows.training,
            keys: given.keys().map(str::to_owned).collect(),
            batch_size: config.batch_size as u64,
            demand: config.demand(),
            packing: config.packing,
            save_steps: config.checkpoint_every().map(narrow),
            save_seconds: seconds_of_saves(&config),
            keep_checkpoints: config.keep_checkpoints.min(32) as u32,
        })
    }
}

/// A checkpoint after so many seconds, when the configuration says so.
pub fn seconds_of_saves(config: &TrainingConfig) -> Option<u32> {
    config.checkpoint_minutes.map(|minutes| (minutes * 60.0).ceil() as u32)
}

/// A count as messages have it.
pub fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The error and its causes, without where on this machine the files lie.
fn told(error: &DataError, folder: &Path) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text.push_str(&format!(": {next}"));
        cause = next.source();
    }
    text.replace(&format!("{}/", folder.display()), "").replace(&folder.display().to_string(), "the data set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_looked_through_and_no_folder_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display().to_string();
        let read = |text: &str| TrainingReader.examine(text, "demo", folder.path());
        let empty = read("iters: 3").unwrap_err();
        assert!(
            matches!(&empty, Unfit::Rows { text } if !text.contains(&path) && text.contains("no data")),
            "{empty}"
        );
        std::fs::write(folder.path().join("train.jsonl"), "{\"text\": \"a\"}\n{\"text\": 7}\n").unwrap();
        let wrong = read("iters: 3").unwrap_err();
        assert_eq!(wrong, Unfit::Rows { text: "train.jsonl line 2: \"text\" is not a text".into() });
        std::fs::write(folder.path().join("train.jsonl"), "{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
        let read_well = read("iters: 3\nbatch_size: 2\ncheckpoint_minutes: 0.5\n").unwrap();
        assert_eq!((read_well.rows, read_well.batch_size, read_well.save_seconds), (2, 2, Some(30)));
        assert!(read_well.keys.contains("iters") && !read_well.keys.contains("model"));
        assert!(matches!(read("itres: 3"), Err(Unfit::Configuration(text)) if text.contains("itres")));
    }
}
