//! What a person sees of a run: mlx-lm's figures on stderr, or a line of JSON for each on stdout; and the files that were asked for.

use crate::arguments::Global;
use crate::training::Files;
use crate::{output, warnings};
use anyhow::{Context as _, Result};
use mlxnode_compute::{Advance, StepReport};
use mlxnode_training::{ChartError, Curve, FineTuning, Recorder, Report, Trained, TrainingConfig, Validated};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Counts since the last report.
pub struct Figures {
    json: bool,
    quiet: bool,
    parity: bool,
    every: u64,
    /// Micro-batches of an update.
    group: u64,
    since: Since,
    /// Where files of figures go, and which.
    folder: PathBuf,
    reports: Vec<Report>,
    recorder: Recorder,
    curve: Curve,
}

#[derive(Default)]
struct Since {
    steps: u64,
    /// Of the losses, each by its weight.
    loss: f64,
    weight: f64,
    tokens: u64,
    seconds: f64,
}

/// A line of `--json`. The names are a contract: scripts rely on them.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line<'a> {
    Started {
        trained_parameters: u64,
        parameters: u64,
        iterations: u64,
    },
    Resumed {
        iteration: u64,
    },
    Train {
        iteration: u64,
        iterations: u64,
        loss: f64,
        learning_rate: f64,
        gradient_norm: Option<f64>,
        iterations_per_second: f64,
        tokens_per_second: f64,
        trained_tokens: u64,
        peak_memory_bytes: u64,
    },
    Validation {
        iteration: u64,
        loss: f64,
        seconds: f64,
    },
    Test {
        loss: f64,
        perplexity: f64,
    },
    Saved {
        path: &'a Path,
    },
    Checkpoint {
        iteration: u64,
        path: &'a Path,
        seconds: f64,
    },
    Interrupted {
        iteration: u64,
        checkpoint: &'a Path,
    },
    Finished {
        adapter: &'a Path,
    },
}

impl Figures {
    pub fn new(config: &TrainingConfig, global: &Global) -> Self {
        Self {
            json: global.json,
            quiet: global.quiet,
            parity: config.parity,
            every: config.steps_per_report,
            group: config.grad_accumulation_steps.max(1),
            since: Since::default(),
            folder: config.adapter_path.clone(),
            reports: if config.train { config.report_to.clone() } else { Vec::new() },
            recorder: Recorder::default(),
            curve: Curve::default(),
        }
    }

    /// `parameters` are the numbers of the whole model.
    pub fn begins(&mut self, job: &FineTuning, parameters: u64) -> Result<()> {
        let tuner = job.trainer().tuner();
        let trained: u64 = tuner
            .trained()
            .iter()
            .map(|trained| trained.shape.iter().map(|size| *size as u64).product::<u64>())
            .sum();
        let share = trained as f64 / parameters.max(1) as f64 * 100.0;
        let (few, all) = (trained as f64 / 1e6, parameters as f64 / 1e6);
        let iterations = job.config().iters;
        self.tell(
            &Line::Started { trained_parameters: trained, parameters, iterations },
            &format!("Trainable parameters: {share:.3}% ({few:.3}M/{all:.3}M)"),
        )
    }

    /// Opens the files that were asked for. What they have of later iterations than the run's is taken back.
    pub fn record(&mut self, job: &FineTuning) -> Result<()> {
        self.recorder = Recorder::open(&self.folder, &self.reports, job.iteration())?;
        self.curve = self.recorder.curve()?;
        Ok(())
    }

    pub fn resumed(&self, job: &FineTuning) -> Result<()> {
        let iteration = job.iteration();
        self.tell(&Line::Resumed { iteration }, &format!("Going on after iteration {iteration}"))
    }

    pub fn advanced(&mut self, job: &FineTuning, advance: &Advance) -> Result<()> {
        match advance {
            Advance::Step(report) => self.step(job, report),
            Advance::Validated { step, loss, seconds } => {
                self.curve.valid.push((*step, *loss));
                self.recorder.valid(&Validated { step: *step, loss: *loss, seconds: *seconds })?;
                self.tell(
                    &Line::Validation { iteration: *step, loss: *loss, seconds: *seconds },
                    &format!("Iter {}: Val loss {loss:.3}, Val took {seconds:.3}s", step + 1),
                )
            }
            Advance::Tested { loss } => {
                let perplexity = loss.exp();
                self.tell(
                    &Line::Test { loss: *loss, perplexity },
                    &format!("Test loss {loss:.3}, Test ppl {perplexity:.3}."),
                )
            }
            Advance::Prepared(words) => {
                if !self.quiet && !self.json {
                    warnings::text(&format!("{words}\n"));
                }
                Ok(())
            }
            Advance::Finished => Ok(()),
        }
    }

    fn step(&mut self, job: &FineTuning, report: &StepReport) -> Result<()> {
        let before = report.step - 1 - (report.step - 1) % self.group;
        let micro_batches = report.step - before;
        let weight = if self.parity { micro_batches as f64 } else { report.tokens as f64 };
        let since = &mut self.since;
        since.steps += micro_batches;
        since.loss += report.loss * weight;
        since.weight += weight;
        since.tokens += report.tokens;
        since.seconds += report.seconds;
        if report.step / self.every == before / self.every && report.step != report.steps {
            return Ok(());
        }
        let since = std::mem::take(&mut self.since);
        let seconds = since.seconds.max(f64::MIN_POSITIVE);
        let loss = since.loss / since.weight.max(1.0);
        let (pace, speed) = (since.steps as f64 / seconds, since.tokens as f64 / seconds);
        let trained = job.trained_tokens();
        self.curve.train.push((report.step, loss));
        self.recorder.train(&Trained {
            step: report.step,
            loss,
            learning_rate: report.learning_rate,
            tokens_per_second: speed,
            trained_tokens: trained,
            gradient_norm: report.gradient_norm,
            peak_memory: report.peak_memory,
            seconds: since.seconds,
        })?;
        self.tell(
            &Line::Train {
                iteration: report.step,
                iterations: report.steps,
                loss,
                learning_rate: report.learning_rate,
                gradient_norm: report.gradient_norm,
                iterations_per_second: pace,
                tokens_per_second: speed,
                trained_tokens: trained,
                peak_memory_bytes: report.peak_memory,
            },
            &format!(
                "Iter {}: Train loss {loss:.3}, Learning Rate {:.3e}, It/sec {pace:.3}, Tokens/sec {speed:.3}, \
                 Trained Tokens {trained}, Peak mem {:.3} GB",
                report.step,
                report.learning_rate,
                report.peak_memory as f64 / 1e9
            ),
        )
    }

    pub fn saved(&self, path: &Path) -> Result<()> {
        self.tell(&Line::Saved { path }, &format!("Saved adapter weights to {}.", path.display()))
    }

    /// A checkpoint is no figure for people: only `--json` says it.
    pub fn checkpointed(&self, job: &FineTuning, path: &Path, pause: Duration) -> Result<()> {
        let (iteration, seconds) = (job.iteration(), pause.as_secs_f64());
        match self.json {
            true => output::json(&Line::Checkpoint { iteration, path, seconds }),
            false => Ok(()),
        }
    }

    pub fn interrupted(&self, job: &FineTuning, checkpoint: &Path) -> Result<()> {
        let iteration = job.iteration();
        self.tell(
            &Line::Interrupted { iteration, checkpoint },
            &format!(
                "Interrupted after iteration {iteration}; saved in {}. The same command with --resume goes on from there.",
                checkpoint.display()
            ),
        )
    }

    pub fn finished(&self, files: &Files) -> Result<()> {
        let adapter = files.path();
        if !self.reports.is_empty() {
            let path = self.folder.join("loss.svg");
            let title = self.folder.file_name().map_or("loss".into(), std::ffi::OsStr::to_string_lossy);
            // A run that was finished already has nothing new to show.
            match self.curve.svg(&title) {
                Err(ChartError::Empty) => {}
                picture => std::fs::write(&path, picture?)
                    .with_context(|| format!("cannot write {}", path.display()))?,
            }
        }
        self.tell(
            &Line::Finished { adapter: &adapter },
            &format!("Saved final weights to {}.", adapter.display()),
        )
    }

    fn tell(&self, line: &Line<'_>, words: &str) -> Result<()> {
        if self.json {
            return output::json(line);
        }
        if !self.quiet {
            warnings::text(&format!("{words}\n"));
        }
        Ok(())
    }
}
