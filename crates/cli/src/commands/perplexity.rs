//! `mlxnode perplexity`: how well a model predicts a text.

use crate::adapter::AdapterFlag;
use crate::arguments::{Global, within};
use crate::corpus::Corpus;
use crate::familiar::FamiliarFlags;
use crate::loading::{self, Loaded};
use crate::{hub, output, progress, warnings};
use anyhow::{Context as _, Result, bail};
use clap::Args;
use mlxnode_compute::LayerRange;
use mlxnode_training::Numpy;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// Measure how well a model predicts a text.
///
/// Perplexity is e to the mean of -log(probability) over the tokens of the text, each after the ones before it in its row; lower is
/// better. The rows, the number and its standard error are those of mlx-lm. Runs in this process.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  mlxnode perplexity --model mlx-community/Qwen3-0.6B-4bit --data-path wiki.test.txt
  mlxnode perplexity --model ~/models/mine --data-path train.jsonl --num-samples -1 --json")]
pub struct Perplexity {
    /// A folder, a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION), or demo.
    #[arg(long, value_name = "MODEL", default_value = "demo")]
    model: String,
    /// What to predict: a text file, a .jsonl file whose records have "text", "messages", or "prompt" and "completion", or a folder
    /// with a train.jsonl.
    #[arg(long, value_name = "FILE")]
    data_path: PathBuf,
    /// Tokens of a row.
    #[arg(
        long,
        value_name = "N",
        default_value = "512",
        value_parser = within(2..=1 << 20),
        allow_negative_numbers = true
    )]
    sequence_length: u32,
    /// Most rows. -1: all.
    #[arg(
        long,
        value_name = "N",
        default_value = "256",
        value_parser = samples,
        allow_negative_numbers = true
    )]
    num_samples: Samples,
    /// Rows that go through the model together. Fewer take less memory.
    #[arg(
        long,
        value_name = "N",
        default_value = "8",
        value_parser = within(1..=1024),
        allow_negative_numbers = true
    )]
    batch_size: u32,
    /// Which records come first.
    #[arg(long, value_name = "N", default_value_t = 123, allow_negative_numbers = true)]
    seed: u32,
    #[command(flatten)]
    adapter: AdapterFlag,
    #[command(flatten)]
    familiar: FamiliarFlags,
}

/// How many rows at most; none is all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Samples(Option<usize>);

/// What `--json` prints. The names are a contract: scripts rely on them.
#[derive(Serialize)]
struct Report {
    model: String,
    parameters: u64,
    perplexity: f64,
    standard_error: f64,
    samples: usize,
    sequence_length: usize,
    /// Tokens that were predicted.
    tokens: usize,
    seconds: f64,
    tokens_per_second: f64,
    peak_memory_bytes: u64,
}

impl Perplexity {
    pub fn run(self, global: &Global) -> Result<()> {
        self.familiar.check(global)?;
        // The text first: what is wrong with it shows before gigabytes are read.
        let corpus = Corpus::read(&self.data_path)?;
        let folder = hub::folder(&self.model, global.quiet)?;
        let loaded = loading::load(&folder, &self.adapter, global.quiet)?;
        let rows = self.rows(&corpus, &loaded, global)?;
        let model = loaded.model;

        let bar = progress::Bar::counting("rows", global.quiet);
        let started = Instant::now();
        let (length, batch) = (self.sequence_length as usize, self.batch_size as usize);
        let samples = rows.len() / length;
        let mut losses = Losses::default();
        for (done, rows) in rows.chunks(length * batch).enumerate() {
            let rows: Vec<&[u32]> = rows.chunks(length).collect();
            for logprob in model.token_logprobs(&rows)?.into_iter().flatten() {
                losses.add(-f64::from(logprob));
            }
            bar.show((done * batch + rows.len()) as u64, samples as u64);
        }
        drop(bar);
        let seconds = started.elapsed().as_secs_f64();
        let layers = LayerRange::new(0, model.spec().layer_count());
        let mut parameters = 0;
        for module in model.spec().modules(layers) {
            for tensor in module.tensors(None).unwrap_or_default() {
                parameters += tensor.shape.iter().map(|size| *size as u64).product::<u64>();
            }
        }
        let (perplexity, standard_error) = losses.perplexity();
        let report = Report {
            model: self.model,
            parameters,
            perplexity,
            standard_error,
            samples,
            sequence_length: length,
            tokens: losses.count,
            seconds,
            tokens_per_second: losses.count as f64 / seconds.max(f64::MIN_POSITIVE),
            peak_memory_bytes: model.device().memory().context("cannot read the memory's size")?.peak as u64,
        };
        if global.json { output::json(&report) } else { report.print() }
    }

    /// The tokens of all rows, one after the other.
    fn rows(&self, corpus: &Corpus, loaded: &Loaded, global: &Global) -> Result<Vec<u32>> {
        let length = self.sequence_length as usize;
        let wanted = self.num_samples.0.map_or(usize::MAX, |samples| samples.saturating_mul(length));
        let records =
            u32::try_from(corpus.len()).context("the data has more records than can be drawn from")?;
        let mut tokens = Vec::new();
        for number in Numpy::new(self.seed).permutation(records) {
            if tokens.len() >= wanted {
                break;
            }
            tokens.extend(corpus.tokens(number as usize, &loaded.tokenizer, loaded.template.as_ref())?);
        }
        let rows = (tokens.len() / length).min(wanted / length);
        if rows == 0 {
            bail!(
                "{} has {} tokens, less than one row of {length}; take a smaller --sequence-length",
                self.data_path.display(),
                tokens.len()
            );
        }
        if let Some(samples) = self.num_samples.0.filter(|samples| rows < *samples && !global.quiet) {
            warnings::text(&format!(
                "note: the data has {rows} rows of {length} tokens, less than {samples}\n"
            ));
        }
        tokens.truncate(rows * length);
        Ok(tokens)
    }
}

impl Report {
    fn print(&self) -> Result<()> {
        output::text(&format!(
            "Model: {} ({:.1}M parameters)\nPerplexity: {:.3} ± {:.3}\nEvaluation time: {:.2} seconds\nPeak memory: {:.2} GB\n\
             Tokens per second: {:.0}\nSamples: {} of {} tokens\n",
            self.model,
            self.parameters as f64 / 1e6,
            self.perplexity,
            self.standard_error,
            self.seconds,
            self.peak_memory_bytes as f64 / 1e9,
            self.tokens_per_second,
            self.samples,
            self.sequence_length,
        ))
    }
}

/// Mean and spread of numbers as they come (Welford 1962).
#[derive(Default)]
struct Losses {
    count: usize,
    mean: f64,
    squares: f64,
}

impl Losses {
    fn add(&mut self, loss: f64) {
        self.count += 1;
        let before = loss - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (loss - self.mean);
    }

    /// The perplexity and its standard error, by the delta method: the error of the mean times the slope of the exponential.
    fn perplexity(&self) -> (f64, f64) {
        let perplexity = self.mean.exp();
        let variance = self.squares / (self.count.saturating_sub(1)).max(1) as f64;
        (perplexity, perplexity * (variance / self.count.max(1) as f64).sqrt())
    }
}

/// -1 or a number from 1 on.
fn samples(text: &str) -> Result<Samples, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Samples(None)),
        Ok(number @ 1..) => Ok(Samples(usize::try_from(number).ok())),
        _ => Err("it must be 1 or more, or -1 for all".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_and_mean_are_the_textbooks() {
        let mut losses = Losses::default();
        [1.0, 2.0, 4.0].into_iter().for_each(|loss| losses.add(loss));
        let (perplexity, error) = losses.perplexity();
        let mean: f64 = 7.0 / 3.0;
        assert!((perplexity - mean.exp()).abs() < 1e-12);
        // The sample's variance is 7/3.
        assert!((error - mean.exp() * (7.0_f64 / 9.0).sqrt()).abs() < 1e-12);
        losses = Losses::default();
        losses.add(1.0);
        assert_eq!(losses.perplexity(), (1.0_f64.exp(), 0.0));
    }

    #[test]
    fn a_number_of_rows_is_positive_or_all() {
        assert_eq!(samples("-1"), Ok(Samples(None)));
        assert_eq!(samples("3"), Ok(Samples(Some(3))));
        for wrong in ["0", "-2", "x", ""] {
            assert!(samples(wrong).is_err(), "{wrong}");
        }
    }
}
