//! A job that keeps the figures of its run: they travel with its checkpoints from node to node, and lie beside what it makes.

use super::averages::{Cadence, Sums};
use super::{ChartError, Curve, PictureError, RecordError, Recorder, Trained, Validated};
use crate::TrainingConfig;
use crate::config::Report;
use mlxnode_compute::{Advance, Job, JobError, StepReport};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, ErrorKind, Write as _};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The figures in a saved job, as JSON lines: what is not yet reported, then the reports.
const STATE: &str = "figures.jsonl";

/// Which figures a job keeps.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordOptions {
    reports: Vec<Report>,
    cadence: Cadence,
    title: String,
}

/// A job, and the figures of its run.
pub struct RecordedJob {
    job: Box<dyn Job>,
    options: RecordOptions,
    open: Open,
    entries: Vec<Entry>,
}

/// Since the last report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Open {
    since: Sums,
    /// Of the run.
    trained_tokens: u64,
}

/// A report, and when it was made, in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    at: f64,
    figures: Figures,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Figures {
    Trained(Trained),
    Validated(Validated),
}

impl RecordedJob {
    /// What the configuration asks for; None: nothing.
    pub fn options(config: &TrainingConfig) -> Option<RecordOptions> {
        let (reports, cadence, title) = (config.report_to.clone(), Cadence::from(config), config.title());
        (!reports.is_empty()).then_some(RecordOptions { reports, cadence, title })
    }

    /// Around a job, which goes on from what it saved in `resume`. A checkpoint of a job that kept no figures has none.
    ///
    /// # Errors
    /// When the figures are there and cannot be read.
    pub fn new(
        job: Box<dyn Job>,
        options: RecordOptions,
        resume: Option<&Path>,
    ) -> Result<Self, RecordError> {
        let mut recorded = Self { job, options, open: Open::default(), entries: Vec::new() };
        if let Some(folder) = resume {
            let path = folder.join(STATE);
            match recorded.read(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                read => read.map_err(|source| RecordError { path, source })?,
            }
        }
        Ok(recorded)
    }

    fn read(&mut self, path: &Path) -> io::Result<()> {
        let mut lines = BufReader::new(File::open(path)?).lines();
        if let Some(open) = lines.next().transpose()? {
            self.open = serde_json::from_str(&open)?;
        }
        for line in lines {
            // A loss that is no number cannot be written as one: that report is left out.
            self.entries.extend(serde_json::from_str::<Entry>(&line?));
        }
        Ok(())
    }

    fn write_state(&self, folder: &Path) -> io::Result<()> {
        let mut file = BufWriter::new(File::create(folder.join(STATE))?);
        writeln!(file, "{}", serde_json::to_string(&self.open)?)?;
        for entry in &self.entries {
            writeln!(file, "{}", serde_json::to_string(entry)?)?;
        }
        file.flush()
    }

    /// What the configuration asks for, all in this folder: a job's result is one folder deep.
    fn write_figures(&self, folder: &Path) -> Result<(), JobError> {
        let mut recorder = Recorder::open(folder, &self.options.reports, 0).map_err(unwritten)?;
        let mut curve = Curve::default();
        for Entry { at, figures } in &self.entries {
            recorder.set_time(*at);
            match figures {
                Figures::Trained(trained) => {
                    curve.train.push((trained.step, trained.loss));
                    recorder.train(trained).map_err(unwritten)?;
                }
                Figures::Validated(validated) => {
                    curve.valid.push((validated.step, validated.loss));
                    recorder.valid(validated).map_err(unwritten)?;
                }
            }
        }
        recorder.flatten().map_err(unwritten)?;
        match curve.write(folder, &self.options.title) {
            Ok(()) | Err(PictureError::Chart(ChartError::Empty)) => Ok(()),
            Err(PictureError::Write(error)) => Err(unwritten(error)),
            Err(error @ PictureError::Chart(_)) => Err(JobError::Failed(error.to_string())),
        }
    }

    fn step(&mut self, report: &StepReport) {
        self.open.trained_tokens += report.tokens;
        if let Some(averages) = self.open.since.add(report, self.options.cadence) {
            self.entry(Figures::Trained(Trained {
                step: report.step,
                loss: averages.loss,
                learning_rate: report.learning_rate,
                tokens_per_second: averages.tokens_per_second,
                trained_tokens: self.open.trained_tokens,
                gradient_norm: report.gradient_norm,
                peak_memory: report.peak_memory,
                seconds: averages.seconds,
            }));
        }
    }

    fn entry(&mut self, figures: Figures) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        self.entries.push(Entry { at, figures });
    }
}

impl Job for RecordedJob {
    fn advance(&mut self) -> Result<Advance, JobError> {
        let advance = self.job.advance()?;
        match advance {
            Advance::Step(report) => self.step(&report),
            Advance::Validated { step, loss, seconds } => {
                self.entry(Figures::Validated(Validated { step, loss, seconds }));
            }
            _ => {}
        }
        Ok(advance)
    }

    fn save(&mut self, directory: &Path) -> Result<(), JobError> {
        self.job.save(directory)?;
        self.write_state(directory).map_err(|source| of_io(&source))
    }

    fn publish(&mut self, directory: &Path) -> Result<(), JobError> {
        self.job.publish(directory)?;
        self.write_figures(directory)
    }
}

fn unwritten(error: RecordError) -> JobError {
    of_io(&error.source)
}

/// Without the path, which is one of this machine.
fn of_io(error: &io::Error) -> JobError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => JobError::NoRoom(error.to_string()),
        _ => JobError::Failed(format!("the run's figures cannot be written: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Five steps with a measurement before the first; saved as how many were done.
    struct Steps(u64, bool);

    impl Job for Steps {
        fn advance(&mut self) -> Result<Advance, JobError> {
            if !std::mem::replace(&mut self.1, true) {
                return Ok(Advance::Validated { step: 0, loss: 9.0, seconds: 0.5 });
            }
            if self.0 == 5 {
                return Ok(Advance::Finished);
            }
            self.0 += 1;
            let loss = if self.0 == 2 { f64::NAN } else { self.0 as f64 };
            Ok(Advance::Step(StepReport {
                step: self.0,
                steps: 5,
                loss,
                tokens: 10,
                learning_rate: 1e-3,
                gradient_norm: Some(0.5),
                seconds: 0.25,
                peak_memory: 7,
            }))
        }

        fn save(&mut self, directory: &Path) -> Result<(), JobError> {
            fs::write(directory.join("steps"), self.0.to_string()).map_err(|error| of_io(&error))
        }

        fn publish(&mut self, directory: &Path) -> Result<(), JobError> {
            self.save(directory)
        }
    }

    fn options(yaml: &str) -> Option<RecordOptions> {
        let text = format!("train: true\n{yaml}");
        RecordedJob::options(&TrainingConfig::from_yaml(&text, "a").unwrap())
    }

    #[test]
    fn figures_go_along_with_checkpoints_and_lie_beside_the_result() {
        let all = "steps_per_report: 1\nreport_to: [jsonl, csv, tensorboard]\n";
        let options = options(all).unwrap();
        let (state, result) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut first = RecordedJob::new(Box::new(Steps(0, false)), options.clone(), None).unwrap();
        for _ in 0..4 {
            first.advance().unwrap();
        }
        first.save(state.path()).unwrap();
        // Steps after the checkpoint are lost with their process, and come again.
        first.advance().unwrap();
        drop(first);
        let mut second = RecordedJob::new(Box::new(Steps(3, true)), options, Some(state.path())).unwrap();
        while second.advance().unwrap() != Advance::Finished {}
        second.publish(result.path()).unwrap();

        let mut names: Vec<String> = Vec::new();
        for entry in fs::read_dir(result.path()).unwrap() {
            let entry = entry.unwrap();
            assert!(entry.file_type().unwrap().is_file(), "{:?}", entry.path());
            names.push(entry.file_name().into_string().unwrap());
        }
        names.sort();
        assert!(names[0].starts_with("events.out.tfevents."), "{names:?}");
        assert_eq!(names[1..], ["loss.png", "loss.svg", "steps", "training.csv", "training.jsonl"]);
        let curve = Curve::read(&result.path().join("training.jsonl")).unwrap();
        // What was no number is not among them.
        assert_eq!(curve.train, [(1, 1.0), (3, 3.0), (4, 4.0), (5, 5.0)]);
        assert_eq!(curve.valid, [(0, 9.0)]);
        let last = fs::read_to_string(result.path().join("training.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
        assert_eq!((last["trained_tokens"].as_u64(), last["step"].as_u64()), (Some(50), Some(5)));
    }

    #[test]
    fn nothing_is_kept_that_was_not_asked_for_and_older_checkpoints_have_none() {
        assert_eq!(options("project_name: x\n"), None);
        let options = options("report_to: csv\nproject_name: x\n").unwrap();
        assert_eq!(options.title, "x");
        let empty = tempfile::tempdir().unwrap();
        let job = RecordedJob::new(Box::new(Steps(5, true)), options.clone(), Some(empty.path())).unwrap();
        assert_eq!(job.entries, []);
        fs::write(empty.path().join(STATE), "no JSON\n").unwrap();
        assert!(RecordedJob::new(Box::new(Steps(5, true)), options, Some(empty.path())).is_err());
    }
}
