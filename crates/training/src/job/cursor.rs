//! How far a saved job is, and of what it is a state.

use super::progress::Progress;
use super::{CURSOR_FILE, STATE_FILE};
use crate::{Row, Sequence, Sets, TrainingConfig};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Goes up when a saved job means something else.
const FORMAT: u32 = 1;
/// Larger files are no cursors.
const MOST_BYTES: u64 = 1 << 20;

/// What a job works on: digests of the model, of the data set and of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fingerprint {
    /// Of the base model.
    model: String,
    /// Of the data set's rows.
    data: String,
    /// Of all arguments that change what is computed.
    config: String,
}

/// A place in a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cursor {
    format: u32,
    /// Micro-batches done.
    pub(super) iteration: u64,
    /// Updates made.
    pub(super) updates: u64,
    /// The last iteration before which was measured.
    pub(super) validated: u64,
    /// Tokens that counted.
    pub(super) trained_tokens: u64,
    /// Is the measurement at the end done?
    pub(super) tested: bool,
    of: Fingerprint,
    /// Digest of the file with the state.
    state: String,
}

/// A saved job that cannot be taken up.
#[derive(Debug, thiserror::Error)]
pub enum CursorError {
    /// A file cannot be read.
    #[error("{file} cannot be read")]
    Read {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is damaged, or was written by another version.
    #[error("{file} is not whole ({problem}); take an earlier checkpoint")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// It is of another job.
    #[error("the checkpoint was made with another {what}; begin anew, or give the same as then")]
    Other {
        /// What differs.
        what: &'static str,
    },
}

impl Fingerprint {
    /// Of the model with this digest and these rows.
    pub(super) fn of(model: [u8; 32], sets: &Sets) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut digest = |sequence: &Sequence| {
            hasher.update(&(sequence.tokens.len() as u64).to_le_bytes());
            for token in &sequence.tokens {
                hasher.update(&token.to_le_bytes());
            }
            for range in &sequence.counted {
                hasher.update(&range.start.to_le_bytes());
                hasher.update(&range.end.to_le_bytes());
            }
        };
        for set in [&sets.train, &sets.valid, &sets.test] {
            let rows = (0..u32::try_from(set.len()).unwrap_or(u32::MAX)).filter_map(|row| set.row(row));
            for row in rows {
                digest(row.sequence());
                if let Row::Pair { rejected, .. } = row {
                    digest(rejected);
                }
            }
        }
        let data = hasher.finalize().to_hex().to_string();
        Self { model: blake3::Hash::from(model).to_hex().to_string(), data, config: String::new() }
    }

    /// One digest of all, the same for processes of one job.
    pub(super) fn digest(&self) -> [u8; 32] {
        *blake3::hash(serde_json::json!(self).to_string().as_bytes()).as_bytes()
    }

    /// With all arguments that decide what is computed.
    pub(super) fn with(mut self, config: &TrainingConfig) -> Self {
        /// Where things lie and what is told on the way changes nothing.
        const OUTSIDE: [&str; 12] = [
            "model",
            "data",
            "config",
            "adapter_path",
            "resume_adapter_file",
            "save_every",
            "steps_per_report",
            "report_to",
            "project_name",
            "checkpoint_steps",
            "checkpoint_minutes",
            "keep_checkpoints",
        ];
        let mut hasher = blake3::Hasher::new();
        for (key, value) in config.arguments() {
            if !OUTSIDE.contains(&key.as_str()) {
                hasher.update(format!("{key}={value}\n").as_bytes());
            }
        }
        self.config = hasher.finalize().to_hex().to_string();
        self
    }
}

impl Cursor {
    /// Writes how far the job is beside the state that lies in `directory`.
    pub(super) fn write(
        directory: &Path,
        progress: &Progress,
        updates: u64,
        trained_tokens: u64,
        of: &Fingerprint,
    ) -> std::io::Result<()> {
        let (iteration, validated, tested) = progress.place();
        let (of, state) = (of.clone(), digest(&directory.join(STATE_FILE))?);
        let cursor =
            Self { format: FORMAT, iteration, updates, validated, trained_tokens, tested, of, state };
        std::fs::write(directory.join(CURSOR_FILE), serde_json::json!(cursor).to_string())
    }

    pub(super) fn read(file: &Path) -> Result<Self, CursorError> {
        let name = || file.display().to_string();
        let read = |source| CursorError::Read { file: name(), source };
        let damaged = |problem: String| CursorError::Damaged { file: name(), problem };
        if std::fs::metadata(file).map_err(read)?.len() > MOST_BYTES {
            return Err(damaged("it is too long".to_owned()));
        }
        let text = std::fs::read_to_string(file).map_err(read)?;
        let cursor: Self = serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        match cursor.format {
            FORMAT => Ok(cursor),
            other => Err(damaged(format!("its format is {other}, not {FORMAT}"))),
        }
    }

    /// Is this the state of a job on these things, in this file?
    pub(super) fn check(&self, of: &Fingerprint, state: &Path) -> Result<(), CursorError> {
        for (what, same) in [
            ("model", self.of.model == of.model),
            ("data set", self.of.data == of.data),
            ("configuration", self.of.config == of.config),
        ] {
            if !same {
                return Err(CursorError::Other { what });
            }
        }
        let file = state.display().to_string();
        let found = digest(state).map_err(|source| CursorError::Read { file: file.clone(), source })?;
        if found != self.state {
            return Err(CursorError::Damaged { file, problem: "its digest is another".to_owned() });
        }
        Ok(())
    }
}

fn digest(file: &Path) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut std::fs::File::open(file)?, &mut hasher)?;
    Ok(hasher.finalize().to_hex().to_string())
}
