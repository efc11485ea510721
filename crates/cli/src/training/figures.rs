//! What a person sees of a run: mlx-lm's figures on stderr, or a line of JSON for each on stdout; and the files that were asked for.

use crate::arguments::Global;
use crate::training::Files;
use crate::{output, warnings};
use anyhow::Result;
use mlxnode_compute::{Advance, StepReport};
use mlxnode_training::{
    Averages, Cadence, ChartError, Curve, FineTuning, PictureError, Recorder, Report, Sums, Trained,
    TrainingConfig, Validated,
};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Counts since the last report.
pub struct Figures {
    json: bool,
    quiet: bool,
    cadence: Cadence,
    since: Sums,
    /// Where files of figures go, and which.
    folder: PathBuf,
    /// What the run is called in its picture.
    title: String,
    reports: Vec<Report>,
    recorder: Recorder,
    curve: Curve,
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
            cadence: Cadence::from(config),
            since: Sums::default(),
            folder: config.adapter_path.clone(),
            title: config.title(),
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
        let Some(averages) = self.since.add(report, self.cadence) else { return Ok(()) };
        let Averages { loss, steps_per_second: pace, tokens_per_second: speed, seconds } = averages;
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
            seconds,
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
            // A run that was finished already has nothing new to show.
            match self.curve.write(&self.folder, &self.title) {
                Err(PictureError::Chart(ChartError::Empty)) => {}
                written => written?,
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
