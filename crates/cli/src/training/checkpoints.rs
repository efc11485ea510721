//! Saved runs, beside the adapter: `checkpoints/NNNNNNN`, each whole or not there, the last ones kept.
//!
//! They are one run's: those of an earlier one, whose numbers may be higher, are set aside when another begins in the same folder.

use anyhow::{Context as _, Result};
use mlxnode_compute::Job as _;
use mlxnode_training::{FineTuning, TrainingConfig};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Without a word about it: after so many minutes.
const MINUTES: f64 = 1.0;
/// One by time waits for so many times as long as the last one took: that is 2% of the time.
const BETWEEN: u32 = 49;

/// Where the runs are saved, and when.
pub struct Checkpoints {
    folder: PathBuf,
    kept: usize,
    every: u64,
    minutes: Option<f64>,
    /// What saving took last.
    pause: Duration,
    last: Instant,
    /// The iteration that was saved last, or gone on from.
    saved: Option<u64>,
}

impl Checkpoints {
    pub fn new(config: &TrainingConfig) -> Self {
        let minutes = match (config.checkpoint_steps, config.checkpoint_minutes) {
            (None, None) => Some(MINUTES),
            (_, minutes) => minutes,
        };
        Self {
            folder: config.adapter_path.join("checkpoints"),
            kept: config.keep_checkpoints,
            // Minutes alone decide where they are given alone.
            every: config.checkpoint_every().unwrap_or(u64::MAX),
            minutes,
            pause: Duration::ZERO,
            last: Instant::now(),
            saved: None,
        }
    }

    /// The last whole one.
    pub fn newest(&self) -> Result<Option<PathBuf>> {
        Ok(self.all()?.pop())
    }

    /// Sets those of an earlier run aside, as another one begins: where they are then, if there were any.
    pub fn set_aside(&self) -> Result<Option<PathBuf>> {
        if self.all()?.is_empty() {
            return Ok(None);
        }
        let free = (1_u32..).map(|number| self.folder.with_file_name(format!("checkpoints-before-{number}")));
        for place in free {
            if !place.exists() {
                std::fs::rename(&self.folder, &place).with_context(|| {
                    let folder = self.folder.display();
                    format!("cannot set the checkpoints of an earlier run in {folder} aside")
                })?;
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    /// The run goes on from one, so that of this iteration is there.
    pub fn goes_on(&mut self, iteration: u64) {
        self.saved = Some(iteration);
    }

    /// Is it time for one, after so many iterations?
    pub fn is_due(&self, iteration: u64) -> bool {
        let by_steps = iteration / self.every > self.saved.unwrap_or(0) / self.every;
        let passed = |minutes: &f64| {
            self.last.elapsed() >= Duration::from_secs_f64(minutes * 60.0).max(self.pause * BETWEEN)
        };
        by_steps || self.minutes.as_ref().is_some_and(passed)
    }

    /// The one after so many iterations, if it is there: to write it again would leave none for a moment.
    pub fn saved(&self, iteration: u64) -> Option<PathBuf> {
        (self.saved == Some(iteration)).then(|| self.place(iteration))
    }

    /// What saving took last.
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// Saves the run as it is, and lets go of the oldest ones. A run that goes down meanwhile leaves those before.
    pub fn save(&mut self, job: &mut FineTuning) -> Result<PathBuf> {
        let started = Instant::now();
        let place = self.place(job.iteration());
        let begun = self.folder.join("begun");
        let saved = || format!("cannot save the run in {}", place.display());
        match std::fs::remove_dir_all(&begun) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(saved);
            }
            _ => std::fs::create_dir_all(&begun).with_context(saved)?,
        }
        job.save(&begun).with_context(saved)?;
        for file in std::fs::read_dir(&begun).with_context(saved)? {
            File::open(file.with_context(saved)?.path())
                .and_then(|file| file.sync_all())
                .with_context(saved)?;
        }
        if place.exists() {
            std::fs::remove_dir_all(&place).with_context(saved)?;
        }
        std::fs::rename(&begun, &place).with_context(saved)?;
        File::open(&self.folder).and_then(|folder| folder.sync_all()).with_context(saved)?;
        (self.last, self.saved) = (Instant::now(), Some(job.iteration()));
        let others: Vec<PathBuf> = self.all()?.into_iter().filter(|other| *other != place).collect();
        for old in others.iter().rev().skip(self.kept.max(1) - 1) {
            std::fs::remove_dir_all(old)
                .with_context(|| format!("cannot remove the old checkpoint {}", old.display()))?;
        }
        self.pause = started.elapsed();
        Ok(place)
    }

    fn place(&self, iteration: u64) -> PathBuf {
        self.folder.join(format!("{iteration:07}"))
    }

    /// All of them, the oldest first.
    fn all(&self) -> Result<Vec<PathBuf>> {
        let entries = match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("cannot read {}", self.folder.display()))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot read {}", self.folder.display()))?.path();
            if let Some(iteration) = iteration(&path) {
                found.push((iteration, path));
            }
        }
        found.sort();
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }
}

/// The iteration that a checkpoint's folder is named by.
fn iteration(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_due_at_their_steps_and_a_run_that_goes_on_has_the_one_it_came_from() {
        let of = |yaml: &str| {
            let config = TrainingConfig::from_yaml(&format!("train: true\n{yaml}"), "a").unwrap();
            Checkpoints::new(&config)
        };
        let mut every_ten = of("save_every: 10\n");
        assert_eq!(every_ten.saved(0), None, "nothing was saved");
        assert!(!every_ten.is_due(9) && every_ten.is_due(10) && every_ten.is_due(12));
        // An interruption saves anywhere.
        every_ten.goes_on(27);
        assert_eq!(every_ten.saved(27), Some(Path::new("adapters/checkpoints/0000027").to_owned()));
        assert_eq!(every_ten.saved(28), None);
        assert!(!every_ten.is_due(28) && !every_ten.is_due(29) && every_ten.is_due(30));
        let updates = of("checkpoint_steps: 3\ngrad_accumulation_steps: 4\n");
        assert!(!updates.is_due(11) && updates.is_due(12));
        let minutes = of("checkpoint_minutes: 5\n");
        assert!(!minutes.is_due(1_000_000), "minutes alone decide where they are given alone");
    }
}
