//! Writes the figures of a run as they come.
//!
//! A run that goes on from a checkpoint takes back what was written of later steps: files say what the finished run did, once.

use super::Curve;
use super::tensorboard::EventFile;
use crate::config::Report;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};

/// The files' names in the run's folder; TensorBoard looks for its own below the folder it is given.
const JSONL: &str = "training.jsonl";
const CSV: &str = "training.csv";
const EVENTS: &str = "tensorboard";
const COLUMNS: &str = "step,train_loss,valid_loss,learning_rate,tokens_per_second,trained_tokens,gradient_norm,peak_memory,seconds";

/// Figures of the steps since the last report.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// Iterations done.
    pub step: u64,
    /// Mean loss over them, in nats.
    pub loss: f64,
    /// Of the last update.
    pub learning_rate: f64,
    /// Tokens that counted, in a second.
    pub tokens_per_second: f64,
    /// Tokens that counted, of the run.
    pub trained_tokens: u64,
    /// Length of the gradient, where it was measured.
    pub gradient_norm: Option<f64>,
    /// The most memory that was in use, in bytes.
    pub peak_memory: u64,
    /// How long they took.
    pub seconds: f64,
}

/// A measurement on the validation set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validated {
    /// Iterations done before it.
    pub step: u64,
    /// Mean loss over the tokens, in nats.
    pub loss: f64,
    /// How long it took.
    pub seconds: f64,
}

/// A file of figures cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the run's figures to {}", path.display())]
pub struct RecordError {
    /// Which.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Open files of a run's figures.
#[derive(Debug, Default)]
pub struct Recorder {
    jsonl: Option<(PathBuf, File)>,
    csv: Option<(PathBuf, File)>,
    events: Option<(PathBuf, EventFile)>,
    /// When what is written happened, in seconds since 1970; None: now.
    time: Option<f64>,
}

impl Recorder {
    /// Opens what is asked for in `folder`, which is made if need be. `done` iterations were done before: figures of later ones are
    /// taken back. 0 begins anew.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn open(folder: &Path, reports: &[Report], done: u64) -> Result<Self, RecordError> {
        let mut recorder = Self::default();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RecordError { path, source }
        };
        if !reports.is_empty() {
            fs::create_dir_all(folder).map_err(failed(folder))?;
        }
        for report in reports {
            match report {
                Report::Jsonl => {
                    let path = folder.join(JSONL);
                    let file = kept(&path, None, |line| step_of_json(line).is_some_and(|step| step <= done));
                    recorder.jsonl = Some((path.clone(), file.map_err(failed(&path))?));
                }
                Report::Csv => {
                    let path = folder.join(CSV);
                    let step = |line: &str| line.split(',').next()?.parse::<u64>().ok();
                    let file = kept(&path, Some(COLUMNS), |line| step(line).is_some_and(|step| step <= done));
                    recorder.csv = Some((path.clone(), file.map_err(failed(&path))?));
                }
                Report::TensorBoard => {
                    let path = folder.join(EVENTS);
                    if done == 0 && path.is_dir() {
                        fs::remove_dir_all(&path).map_err(failed(&path))?;
                    }
                    let file = EventFile::create(&path, done).map_err(failed(&path))?;
                    recorder.events = Some((path, file));
                }
            }
        }
        Ok(recorder)
    }

    /// The losses that the JSON lines have so far: those of a run that is gone on from. Empty without such a file.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn curve(&self) -> Result<Curve, RecordError> {
        let Some((path, _)) = &self.jsonl else { return Ok(Curve::default()) };
        Curve::read(path).map_err(|source| RecordError { path: path.clone(), source })
    }

    /// Writes a report of training.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn train(&mut self, trained: &Trained) -> Result<(), RecordError> {
        let Trained { step, loss, learning_rate, tokens_per_second, trained_tokens, gradient_norm, .. } =
            *trained;
        let (peak_memory, seconds) = (trained.peak_memory, trained.seconds);
        self.json(json!({
            "step": step, "train_loss": loss, "learning_rate": learning_rate, "tokens_per_second": tokens_per_second,
            "trained_tokens": trained_tokens, "gradient_norm": gradient_norm, "peak_memory": peak_memory, "seconds": seconds,
        }))?;
        let norm = gradient_norm.map_or_else(String::new, |norm| norm.to_string());
        self.row(&format!(
            "{step},{loss},,{learning_rate},{tokens_per_second},{trained_tokens},{norm},{peak_memory},{seconds}"
        ))?;
        let mut values = vec![
            ("loss/train", loss),
            ("learning_rate", learning_rate),
            ("tokens_per_second", tokens_per_second),
            ("peak_memory_gb", peak_memory as f64 / 1e9),
        ];
        values.extend(gradient_norm.map(|norm| ("gradient_norm", norm)));
        self.event(step, &values)
    }

    /// Writes a measurement.
    ///
    /// # Errors
    /// [`RecordError`]
    pub fn valid(&mut self, validated: &Validated) -> Result<(), RecordError> {
        let Validated { step, loss, seconds } = *validated;
        self.json(json!({"step": step, "valid_loss": loss, "seconds": seconds}))?;
        self.row(&format!("{step},,{loss},,,,,,{seconds}"))?;
        self.event(step, &[("loss/valid", loss)])
    }

    fn json(&mut self, value: Value) -> Result<(), RecordError> {
        let Some((path, file)) = &mut self.jsonl else { return Ok(()) };
        let written = file.write_all(format!("{value}\n").as_bytes());
        written.map_err(|source| RecordError { path: path.clone(), source })
    }

    fn row(&mut self, row: &str) -> Result<(), RecordError> {
        let Some((path, file)) = &mut self.csv else { return Ok(()) };
        let written = file.write_all(format!("{row}\n").as_bytes());
        written.map_err(|source| RecordError { path: path.clone(), source })
    }

    fn event(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), RecordError> {
        let Some((path, file)) = &mut self.events else { return Ok(()) };
        file.add(step, values, self.time).map_err(|source| RecordError { path: path.clone(), source })
    }

    /// What is written from here on happened then, in seconds since 1970.
    pub(super) fn set_time(&mut self, time: f64) {
        self.time = Some(time);
    }

    /// Ends the files, and puts TensorBoard's, which have a folder of their own, beside the others.
    pub(super) fn flatten(self) -> Result<(), RecordError> {
        let Some((path, file)) = self.events else { return Ok(()) };
        drop(file);
        let flat = || -> io::Result<()> {
            for entry in fs::read_dir(&path)? {
                let entry = entry?;
                fs::rename(entry.path(), path.with_file_name(entry.file_name()))?;
            }
            fs::remove_dir(&path)
        };
        flat().map_err(|source| RecordError { path: path.clone(), source })
    }
}

pub(super) fn step_of_json(line: &str) -> Option<u64> {
    let record: Map<String, Value> = serde_json::from_str(line).ok()?;
    record.get("step")?.as_u64()
}

/// The file with only those lines (and its head), open at its end. Half a line, of a process that was killed, is none.
fn kept(path: &Path, head: Option<&str>, keeps: impl Fn(&str) -> bool) -> io::Result<File> {
    let mut lines: Vec<String> = head.iter().map(|head| (*head).to_owned()).collect();
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(file) => {
            for line in BufReader::new(file).lines() {
                let line = line?;
                if keeps(&line) {
                    lines.push(line);
                }
            }
        }
    }
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, lines.iter().map(|line| format!("{line}\n")).collect::<String>())?;
    fs::rename(&fresh, path)?;
    OpenOptions::new().append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trained(step: u64) -> Trained {
        Trained {
            step,
            loss: 10.0 / step as f64,
            learning_rate: 1e-5,
            tokens_per_second: 100.0,
            trained_tokens: 50 * step,
            gradient_norm: (step > 1).then_some(0.5),
            peak_memory: 1 << 30,
            seconds: 0.25,
        }
    }

    #[test]
    fn a_resumed_run_takes_back_what_comes_again() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("adapters");
        let reports = [Report::Jsonl, Report::Csv];
        let mut recorder = Recorder::open(&run, &reports, 0).unwrap();
        recorder.valid(&Validated { step: 0, loss: 9.0, seconds: 1.0 }).unwrap();
        for step in 1..=4 {
            recorder.train(&trained(step)).unwrap();
        }
        drop(recorder);
        // The process was killed within a line.
        let torn = fs::read_to_string(run.join(JSONL)).unwrap() + "{\"step\": 5, \"tr";
        fs::write(run.join(JSONL), torn).unwrap();
        let mut recorder = Recorder::open(&run, &reports, 2).unwrap();
        assert_eq!(recorder.curve().unwrap().train, [(1, 10.0), (2, 5.0)]);
        recorder.train(&trained(3)).unwrap();
        drop(recorder);
        let lines = fs::read_to_string(run.join(JSONL)).unwrap();
        let steps: Vec<_> = lines.lines().map(|line| step_of_json(line).unwrap()).collect();
        assert_eq!(steps, [0, 1, 2, 3]);
        let csv = fs::read_to_string(run.join(CSV)).unwrap();
        assert_eq!(csv.lines().next(), Some(COLUMNS));
        assert_eq!(csv.lines().nth(1), Some("0,,9,,,,,,1"));
        assert_eq!(csv.lines().nth(3), Some("2,5,,0.00001,100,100,0.5,1073741824,0.25"));
        assert!(csv.lines().all(|line| line.matches(',').count() == 8));
        assert_eq!(csv.lines().count(), 5);
        let curve = Curve::read(&run.join(JSONL)).unwrap();
        assert_eq!(curve.train, [(1, 10.0), (2, 5.0), (3, 10.0 / 3.0)]);
        assert_eq!(curve.valid, [(0, 9.0)]);
    }

    #[test]
    fn nothing_is_written_that_was_not_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("adapters");
        let mut recorder = Recorder::open(&run, &[], 0).unwrap();
        recorder.train(&trained(1)).unwrap();
        assert!(!run.exists());
        fs::write(&run, "a file").unwrap();
        let error = Recorder::open(&run, &[Report::Csv], 0).unwrap_err().to_string();
        assert!(error.starts_with("cannot write the run's figures to "), "{error}");
    }
}
