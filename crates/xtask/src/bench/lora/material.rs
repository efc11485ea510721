//! What is trained: a model of the cache with an end of text, and rows of words of many lengths.

use crate::bench::models::Model;
use anyhow::{Context as _, Result};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// Rows of a batch.
pub(super) const BATCH: usize = 4;
/// The word that ends a text.
const END: &str = "w255";
/// Words of the shortest and of the longest row.
const SHORTEST: f64 = 16.0;
const LONGEST: f64 = 256.0;

/// A model and its rows on the disk.
pub(super) struct Material {
    pub(super) model: PathBuf,
    pub(super) data: PathBuf,
    /// Targets of all rows together: a row's words, each of which and the end of the text follows from those before.
    pub(super) tokens: u64,
}

impl Material {
    /// Makes both in `folder`: `blocks` batches of rows, whose lengths spread evenly over their logarithms.
    pub(super) fn make(folder: &Path, model: &Model, blocks: usize) -> Result<Self> {
        let lengths: Vec<usize> = (0..blocks * BATCH).map(length).collect();
        Self::of(folder, model, &lengths)
    }

    /// The same with rows of so many words.
    pub(super) fn of(folder: &Path, model: &Model, lengths: &[usize]) -> Result<Self> {
        let (own, data) = (folder.join(model.name()), folder.join("rows"));
        fs::create_dir_all(&own)?;
        fs::create_dir_all(&data)?;
        for entry in fs::read_dir(&model.folder)? {
            let entry = entry?;
            if entry.file_name() != "tokenizer_config.json" {
                link(&entry.path(), &own.join(entry.file_name()))?;
            }
        }
        // The models of the cache have no end of a text, without which mlx-lm does not train. No other word begins with it: it would
        // be found there.
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false, "eos_token": END});
        fs::write(own.join("tokenizer_config.json"), settings.to_string())?;
        let rows = lengths.iter().enumerate().map(|(row, length)| {
            let words = (0..*length).map(|place| format!("w{}", mixed(row * 4096 + place) % 255));
            json!({"text": words.collect::<Vec<_>>().join(" ")}).to_string() + "\n"
        });
        fs::write(data.join("train.jsonl"), rows.collect::<String>())?;
        let tokens = lengths.iter().map(|length| *length as u64).sum();
        Ok(Self { model: own, data, tokens })
    }
}

fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::remove_file(to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    std::os::unix::fs::symlink(from, to).with_context(|| format!("cannot link {}", to.display()))
}

/// Of a row, in words.
fn length(row: usize) -> usize {
    let place = (mixed(row) % 1000) as f64 / 1000.0;
    (SHORTEST * (LONGEST / SHORTEST).powf(place)).round() as usize
}

/// A number that looks like chance (the last step of SplitMix64).
fn mixed(number: usize) -> usize {
    let number = (number as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (number ^ (number >> 31)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_of_many_lengths() {
        let lengths: Vec<usize> = (0..64).map(length).collect();
        assert!(lengths.iter().all(|length| (16..=256).contains(length)), "{lengths:?}");
        let short = lengths.iter().filter(|length| **length < 64).count();
        assert!(
            (24..=40).contains(&short),
            "half of them are shorter than a quarter of the longest: {short}"
        );
    }
}
