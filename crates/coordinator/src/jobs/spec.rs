//! What a job is asked to be, and what of that makes no sense.

use super::ContentHash;
use super::plan::MAX_STAGES;
use crate::Error;
use crate::deployments::{check_adapter_name, check_name};
use mlxnode_checkpoint::TrainingDemand;
use mlxnode_compute::ByteCount;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest id.
const MAX_ID_BYTES: usize = 64;
/// Longest configuration: a record of the control log has to hold it with the rest.
pub const MAX_CONFIGURATION_BYTES: usize = 32 << 10;
/// Most files of a job.
pub const MAX_INPUTS: usize = 32;
/// Largest file of a job.
pub const MAX_INPUT_BYTES: u64 = 64 << 30;
/// Longest name of a file.
const MAX_FILE_NAME_BYTES: usize = 128;
/// Most nodes that compute a job together.
pub const MAX_WORKERS: u32 = mlxnode_collective::MOST_MEMBERS as u32;
/// Most labels of a job, and how long they are all together.
const MAX_LABELS: usize = 32;
const MAX_LABEL_BYTES: usize = 16 << 10;
/// Most checkpoints that a job may keep.
const MAX_KEPT: u32 = 32;

/// What a job computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Trains an adapter (or the whole model) on rows of text.
    #[default]
    FineTuning,
    /// Learns nothing: reads its files again and again and calls a number about them a loss. Shows that a cluster runs, saves,
    /// moves and resumes jobs, without a model.
    Rehearsal,
}

impl JobKind {
    /// As people and the API write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FineTuning => "fine-tuning",
            Self::Rehearsal => "rehearsal",
        }
    }

    /// The kind of this name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other.
    pub fn named(name: &str) -> Result<Self, Error> {
        match name {
            "" | "fine-tuning" => Ok(Self::FineTuning),
            "rehearsal" => Ok(Self::Rehearsal),
            other => {
                let shown: String = other.chars().take(MAX_ID_BYTES).collect();
                Err(Error::Invalid(format!(
                    "kind is {shown:?}, but there are \"fine-tuning\" and \"rehearsal\""
                )))
            }
        }
    }
}

/// A file that the job reads, by what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// What the job finds it as: "train.jsonl".
    pub name: String,
    /// What it holds.
    pub hash: ContentHash,
    /// How much.
    pub bytes: u64,
}

/// Where what the job made shall be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishWish {
    /// Of which running deployment it becomes an adapter.
    pub deployment: String,
    /// What requests call it: `DEPLOYMENT:ADAPTER`.
    pub adapter: String,
}

/// When a job saves, and how much of that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavePolicy {
    /// After so many steps; 0: not by steps.
    pub every_steps: u64,
    /// After so many seconds; 0: not by time.
    pub every_seconds: u64,
    /// So many of the newest checkpoints stay.
    pub keep: u32,
}

impl Default for SavePolicy {
    /// The time by Young's and Daly's rule for a second's pause and a failure in half an hour: √(2 · 1 s · 1800 s) = 60 s. Steps take
    /// milliseconds or minutes: their number says nothing about the time.
    fn default() -> Self {
        Self { every_steps: 0, every_seconds: 60, keep: 3 }
    }
}

/// A job that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Made by whoever submits it: the same id twice is the same job.
    pub id: String,
    /// What it computes.
    pub kind: JobKind,
    /// The model that it begins from: a folder, a Hugging Face id, or "demo". Empty for a rehearsal.
    pub model: String,
    /// How: YAML with mlx-lm's keys.
    pub configuration: String,
    /// What it reads.
    pub inputs: Vec<InputFile>,
    /// What it takes of a node's memory, when the submitter knows better than an estimate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteCount>,
    /// Percent of the time that it may take of a node while that answers requests; 1 to 100.
    pub share: u32,
    /// Nodes that compute it together, as far as there are so many: each with the whole model, or lines of [`Self::stages`] nodes.
    #[serde(default = "one")]
    pub workers: u32,
    /// Nodes among which the model's layers are divided; 0: as many as it takes.
    #[serde(default = "one")]
    pub stages: u32,
    /// What a run takes of memory, for how the layers are divided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub demand: Option<TrainingDemand>,
    /// When it saves.
    pub saves: SavePolicy,
    /// Where its result is served when it is finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<PublishWish>,
    /// Who submitted it: the name of a key; empty: this cluster's own people.
    #[serde(default)]
    pub owner: String,
    /// What the submitter notes about it; kept and told again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

impl JobSpec {
    /// The share where nobody says another.
    pub const DEFAULT_SHARE: u32 = 25;

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// [`Error::Invalid`], which names the field.
    pub fn check(&self) -> Result<(), Error> {
        let invalid = |text: String| Err(Error::Invalid(text));
        check_id(&self.id)?;
        if self.configuration.len() > MAX_CONFIGURATION_BYTES {
            let bytes = self.configuration.len();
            return invalid(format!(
                "configuration has {bytes} bytes, but may have {MAX_CONFIGURATION_BYTES}"
            ));
        }
        if self.kind != JobKind::Rehearsal && self.model.trim().is_empty() {
            return invalid(
                "model is empty; name a folder, a Hugging Face id (OWNER/NAME), or \"demo\"".into(),
            );
        }
        if self.model.len() > 4096 || self.model.chars().any(char::is_control) {
            return invalid("model is a folder, a Hugging Face id (OWNER/NAME), or \"demo\"".into());
        }
        if self.inputs.len() > MAX_INPUTS {
            return invalid(format!("inputs has {} files, but may have {MAX_INPUTS}", self.inputs.len()));
        }
        for (place, input) in self.inputs.iter().enumerate() {
            check_file_name(&input.name)?;
            if input.bytes > MAX_INPUT_BYTES {
                let most = ByteCount(MAX_INPUT_BYTES);
                return invalid(format!("inputs[{place}] ({}) is larger than {most}", input.name));
            }
            if self.inputs[..place].iter().any(|other| other.name == input.name) {
                return invalid(format!("inputs has two files named {:?}", input.name));
            }
        }
        if !(1..=100).contains(&self.share) {
            return invalid(format!("share is {}, but must be 1 to 100 percent", self.share));
        }
        if !(1..=MAX_WORKERS).contains(&self.workers) {
            return invalid(format!("workers is {}, but must be 1 to {MAX_WORKERS}", self.workers));
        }
        if self.workers > 1 && self.kind == JobKind::Rehearsal {
            return invalid("a rehearsal has one worker".into());
        }
        if self.stages > MAX_STAGES {
            return invalid(format!(
                "stages is {}, but must be 1 to {MAX_STAGES}, or 0 for as many as it takes",
                self.stages
            ));
        }
        if self.stages > 1 && self.workers > 1 && !self.workers.is_multiple_of(self.stages) {
            return invalid(format!(
                "workers is {} and stages is {}: each {} nodes have the whole model together, so workers must be a multiple of it",
                self.workers, self.stages, self.stages
            ));
        }
        if !(1..=MAX_KEPT).contains(&self.saves.keep) {
            return invalid(format!("saves.keep is {}, but must be 1 to {MAX_KEPT}", self.saves.keep));
        }
        if self.owner.len() > MAX_FILE_NAME_BYTES {
            return invalid(format!("owner is longer than {MAX_FILE_NAME_BYTES} bytes"));
        }
        if self.labels.len() > MAX_LABELS {
            return invalid(format!("labels has {} entries, but may have {MAX_LABELS}", self.labels.len()));
        }
        let bytes: usize = self.labels.iter().map(|(name, text)| name.len() + text.len()).sum();
        if bytes > MAX_LABEL_BYTES {
            return invalid(format!("labels have {bytes} bytes together, but may have {MAX_LABEL_BYTES}"));
        }
        if let Some(publish) = &self.publish {
            check_name(&publish.deployment)?;
            check_adapter_name(&publish.adapter)?;
        }
        Ok(())
    }
}

/// An id is part of paths, URLs and tables: letters, digits, `-` and `_`.
pub fn check_id(id: &str) -> Result<(), Error> {
    let is_valid = (1..=MAX_ID_BYTES).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        && id.as_bytes()[0].is_ascii_alphanumeric();
    if is_valid {
        return Ok(());
    }
    let shown: String = id.chars().take(MAX_ID_BYTES).collect();
    Err(Error::Invalid(format!(
        "{shown:?} cannot be a job's id: use 1 to {MAX_ID_BYTES} letters, digits, - and _, the first no sign"
    )))
}

/// A file's name is not a path.
pub fn check_file_name(name: &str) -> Result<(), Error> {
    let is_valid = (1..=MAX_FILE_NAME_BYTES).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !name.starts_with('.');
    if is_valid {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_FILE_NAME_BYTES).collect();
    Err(Error::Invalid(format!(
        "{shown:?} cannot be the name of a job's file: use letters, digits and . _ -, no dot at the beginning"
    )))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn spec() -> JobSpec {
        JobSpec {
            id: "job-1".into(),
            kind: JobKind::FineTuning,
            model: "demo".into(),
            configuration: "iters: 3".into(),
            inputs: vec![InputFile { name: "train.jsonl".into(), hash: ContentHash::of(b""), bytes: 0 }],
            memory: None,
            share: 25,
            workers: 1,
            stages: 1,
            demand: None,
            saves: SavePolicy::default(),
            publish: None,
            owner: String::new(),
            labels: BTreeMap::new(),
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_field() {
        assert_eq!(spec().check(), Ok(()));
        for (stages, workers) in [(2, 1), (2, 2), (2, 4), (1, 3), (0, 5)] {
            assert_eq!(
                JobSpec { stages, workers, ..spec() }.check(),
                Ok(()),
                "{workers} nodes, {stages} stages"
            );
        }
        let again = spec().inputs[0].clone();
        type Change = Box<dyn Fn(&mut JobSpec)>;
        let cases: [(Change, &str); 14] = [
            (
                Box::new(|spec| spec.labels = (0..99).map(|it| (it.to_string(), String::new())).collect()),
                "labels",
            ),
            (Box::new(|spec| spec.labels = BTreeMap::from([("a".into(), "x".repeat(99_999))])), "labels"),
            (Box::new(|spec| spec.id = "../x".into()), "id"),
            (Box::new(|spec| spec.id = "-x".into()), "id"),
            (Box::new(|spec| spec.model = " ".into()), "model"),
            (Box::new(|spec| spec.configuration = "x".repeat(1 << 20)), "configuration"),
            (Box::new(|spec| spec.inputs[0].name = "../../passwd".into()), "file"),
            (Box::new(move |spec| spec.inputs.push(again.clone())), "two files"),
            (Box::new(|spec| spec.share = 0), "share"),
            (Box::new(|spec| spec.stages = 9), "stages"),
            (Box::new(|spec| (spec.stages, spec.workers) = (2, 5)), "a multiple"),
            (Box::new(|spec| (spec.stages, spec.workers) = (4, 2)), "a multiple"),
            (Box::new(|spec| spec.saves.keep = 0), "keep"),
            (
                Box::new(|spec| {
                    spec.publish = Some(PublishWish { deployment: "demo".into(), adapter: "a:b".into() });
                }),
                "adapter",
            ),
        ];
        for (change, word) in cases {
            let mut spec = spec();
            change(&mut spec);
            let error = spec.check().unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn a_kind_is_one_of_two() {
        for kind in [JobKind::FineTuning, JobKind::Rehearsal] {
            assert_eq!(JobKind::named(kind.name()), Ok(kind));
        }
        assert!(JobKind::named("quantum").is_err());
    }
}
