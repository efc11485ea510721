//! What a training run is asked to do: mlx-lm's YAML keys and flags with their defaults, and a few keys of our own.
//!
//! A flag wins over the file, the file over the default ([`TrainingConfig::resolve`]). Whoever runs a command reads files and flags
//! into [`Settings`]; what comes out is typed and valid, and everything that cannot be is an error with file, line and key.
//!
//! - `yaml`: a file's words as mlx-lm understands them
//! - [`Settings`]: loose values and where they came from
//! - [`OptimizerConfig`], [`HubDataset`]: keys that have keys of their own
//! - [`AdapterConfig`]: adapter_config.json, written and read

mod adapter_file;
mod error;
mod hub_dataset;
mod optimizer;
mod settings;
mod yaml;

pub use adapter_file::AdapterConfig;
pub use error::ConfigError;
pub use hub_dataset::{Features, HubDataset, Split};
pub use optimizer::OptimizerConfig;
pub use settings::Settings;

use crate::schedule::{Schedule, Shape};
use mlxnode_checkpoint::{TrainedPart, TrainingDemand};
use serde_json::{Map, Value, json};
use settings::Section;
use std::path::PathBuf;

/// Ranks beyond this are no low ranks any more.
const LARGEST_RANK: i64 = 4096;
/// Rows at once, or tokens in a row: what is above is a slip of the finger.
const MOST_ROWS: i64 = 1 << 20;

/// mlx-lm's keys, all of them with a default there.
const KEYS: [&str; 31] = [
    "model",
    "train",
    "fine_tune_type",
    "optimizer",
    "optimizer_config",
    "data",
    "seed",
    "num_layers",
    "batch_size",
    "iters",
    "val_batches",
    "learning_rate",
    "steps_per_report",
    "steps_per_eval",
    "resume_adapter_file",
    "adapter_path",
    "save_every",
    "test",
    "test_batches",
    "max_seq_length",
    "config",
    "grad_checkpoint",
    "grad_accumulation_steps",
    "clear_cache_threshold",
    "lr_schedule",
    "lora_parameters",
    "mask_prompt",
    "report_to",
    "project_name",
    "trust_remote_code",
    "hf_dataset",
];

/// Ours.
const OUR_KEYS: [&str; 10] = [
    "parity",
    "packing",
    "clip_grad_norm",
    "mask_turns",
    "thinking",
    "preference",
    "checkpoint_steps",
    "checkpoint_minutes",
    "keep_checkpoints",
    "beta",
];

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FineTuneType {
    /// Low-rank changes (Hu et al. 2021).
    Lora,
    /// Low-rank changes of directions, and lengths (Liu et al. 2024).
    Dora,
    /// The weights themselves.
    Full,
}

/// Which blocks are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// All.
    All,
    /// So many at the end.
    Last(usize),
}

/// How many batches are measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// The whole set.
    All,
    /// At most so many.
    Of(u64),
}

/// Which tokens of a conversation count in the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    None,
    /// Those of the last answer: mlx-lm's `mask_prompt`.
    LastTurn,
    /// Those of every answer.
    EveryTurn,
}

/// Where a run's figures are written, beside the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// JSON lines.
    Jsonl,
    /// Comma-separated values.
    Csv,
    /// TensorBoard's event files.
    TensorBoard,
}

/// How answers are compared in preference training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preference {
    /// Which loss.
    pub loss: PreferenceLoss,
    /// How much a difference weighs: DPO's beta, ORPO's lambda.
    pub beta: f64,
}

/// Losses on pairs of a better and a worse answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreferenceLoss {
    /// Against the unchanged model (Rafailov et al. 2023).
    Dpo,
    /// By the ratio of odds, without another model (Hong et al. 2024).
    Orpo,
}

/// What LoRA and DoRA add to which modules.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraParameters {
    /// The rank.
    pub rank: usize,
    /// Share of the inputs that is dropped in training.
    pub dropout: f64,
    /// Factor on every change.
    pub scale: f64,
    /// Paths of modules within a block, or of the whole model; None: every linear map and embedding of the chosen blocks.
    pub keys: Option<Vec<String>>,
}

/// All that a run needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingConfig {
    /// The base: a folder or a repository of the hub.
    pub model: String,
    /// Train.
    pub train: bool,
    /// Measure on the test set at the end.
    pub test: bool,
    /// What is trained.
    pub fine_tune_type: FineTuneType,
    /// With what.
    pub optimizer: OptimizerConfig,
    /// At which rate.
    pub schedule: Schedule,
    /// A folder, a file, or a data set of the hub.
    pub data: String,
    /// Data sets of the hub instead of `data`.
    pub hf_dataset: Vec<HubDataset>,
    /// Names of the features in `data`.
    pub features: Features,
    /// Of all randomness.
    pub seed: u32,
    /// Which blocks.
    pub layers: Layers,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of the whole run.
    pub iters: u64,
    /// Batches of a validation.
    pub val_batches: Count,
    /// Batches of the test.
    pub test_batches: Count,
    /// Micro-batches between two reports.
    pub steps_per_report: u64,
    /// Micro-batches between two validations.
    pub steps_per_eval: u64,
    /// Micro-batches between two saved adapters.
    pub save_every: u64,
    /// Micro-batches of an update.
    pub grad_accumulation_steps: u64,
    /// Compute activations again instead of keeping them.
    pub grad_checkpoint: bool,
    /// Free the allocator's cache between steps when it is larger, in bytes; 0: MLX's own rule.
    pub clear_cache_threshold: u64,
    /// Tensors to begin with.
    pub resume_adapter_file: Option<PathBuf>,
    /// Where the adapter goes, or is.
    pub adapter_path: PathBuf,
    /// Longer rows are cut, in tokens.
    pub max_seq_length: usize,
    /// Of LoRA and DoRA.
    pub lora: LoraParameters,
    /// Which tokens count.
    pub mask: Mask,
    /// Figures beside the adapter.
    pub report_to: Vec<Report>,
    /// A name for the run.
    pub project_name: Option<String>,
    /// Do as mlx-lm does, its order of rows and its listed defects included.
    pub parity: bool,
    /// Put short rows together, apart in attention.
    pub packing: bool,
    /// The most that the gradient's length may be.
    pub clip_grad_norm: Option<f64>,
    /// Whether templates let the model think; None: if it can.
    pub thinking: Option<bool>,
    /// Train on pairs of answers.
    pub preference: Option<Preference>,
    /// Updates between two checkpoints that a job goes on from; None: `save_every`.
    pub checkpoint_steps: Option<u64>,
    /// Minutes between two such checkpoints.
    pub checkpoint_minutes: Option<f64>,
    /// So many of them are kept.
    pub keep_checkpoints: usize,
    arguments: Map<String, Value>,
}

impl LoraParameters {
    fn read(section: &Section<'_>) -> Result<Self, ConfigError> {
        if section.has("alpha") && !section.has("scale") {
            let problem =
                "is not known: the factor on the change is \"scale\" (in other tools' words alpha / rank)";
            return Err(section.wrong("alpha", problem));
        }
        section.only(&["rank", "dropout", "scale", "keys"])?;
        let scale = section.number("scale", "a finite number", |_| true)?;
        let keys = match section.list("keys")? {
            None => None,
            Some(list) => {
                let keys: Option<Vec<String>> =
                    list.iter().map(|key| key.as_str().map(str::to_owned)).collect();
                let problem = "must be a list of paths, such as self_attn.q_proj";
                Some(keys.filter(|keys| !keys.is_empty()).ok_or_else(|| section.wrong("keys", problem))?)
            }
        };
        Ok(Self {
            rank: section.whole("rank", 1, LARGEST_RANK)?.unwrap_or(8) as usize,
            dropout: section
                .number("dropout", "in [0, 1)", |share| (0.0..1.0).contains(&share))?
                .unwrap_or(0.0),
            scale: scale.ok_or_else(|| section.wrong("scale", "is missing: the factor on the change"))?,
            keys,
        })
    }
}

impl TrainingConfig {
    /// What flags, or else a file, or else the defaults say.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn resolve(flags: Settings, file: Settings) -> Result<Self, ConfigError> {
        let settings = flags.over(file);
        let root = settings.root();
        let mut known = KEYS.to_vec();
        known.extend(OUR_KEYS);
        known.extend(Features::KEYS);
        root.only(&known)?;
        let config = Self::read(&root)?;
        Ok(Self { arguments: arguments(&settings), ..config })
    }

    /// What a file says, and the defaults.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn from_yaml(text: &str, origin: &str) -> Result<Self, ConfigError> {
        Self::resolve(Settings::new(), Settings::from_yaml(text, origin)?)
    }

    /// All arguments by their keys: mlx-lm's with defaults, ours where they were given.
    pub fn arguments(&self) -> &Map<String, Value> {
        &self.arguments
    }

    /// What it takes of memory, for a plan over a model's numbers.
    pub fn demand(&self) -> TrainingDemand {
        let named =
            |path: &str| self.lora.keys.as_ref().is_some_and(|keys| keys.iter().any(|key| key == path));
        let part = match self.fine_tune_type {
            FineTuneType::Full => TrainedPart::Full,
            kind => TrainedPart::LowRank {
                rank: self.lora.rank as u64,
                magnitudes: kind == FineTuneType::Dora,
                tables: named("model.embed_tokens") || named("lm_head"),
            },
        };
        TrainingDemand {
            part,
            last_layers: match self.layers {
                Layers::All => None,
                Layers::Last(count) => Some(count),
            },
            rows: self.batch_size * if self.preference.is_some() { 2 } else { 1 },
            row_tokens: self.max_seq_length,
            micro_batches: self.grad_accumulation_steps.max(1),
            memories: match self.optimizer {
                OptimizerConfig::Adam { .. } | OptimizerConfig::AdamW { .. } => 2,
                // Adafactor's rows and columns are next to nothing; its first moment is as large as the parameter.
                OptimizerConfig::Adafactor { beta_1, .. } => u64::from(beta_1.is_some()),
                OptimizerConfig::Sgd { .. } | OptimizerConfig::Muon { .. } => 1,
            },
            checkpointing: self.grad_checkpoint,
            reference: self.preference.is_some_and(|preference| preference.loss == PreferenceLoss::Dpo),
        }
    }

    fn read(root: &Section<'_>) -> Result<Self, ConfigError> {
        let parity = match root.get("parity") {
            Some(Value::Bool(parity)) => *parity,
            _ => root.choice("parity", &[("mlx-lm", true)])?.unwrap_or(false),
        };
        let fine_tune_type = fine_tune_type(root)?;
        let chosen = root.choice("optimizer", &optimizer::NAMES)?.unwrap_or(optimizer::Name::Adam);
        let lora = match root.section("lora_parameters")? {
            Some(section) => LoraParameters::read(&section)?,
            None => LoraParameters { rank: 8, dropout: 0.0, scale: 20.0, keys: None },
        };
        let count = |key: &str, default: u64| -> Result<u64, ConfigError> {
            Ok(root.count(key, 1)?.unwrap_or(default))
        };
        let flag = |key: &str| -> Result<bool, ConfigError> { Ok(root.flag(key)?.unwrap_or(false)) };
        let (train, test) = (flag("train")?, flag("test")?);
        if !train && !test {
            return Err(root.wrong("train", "is not set, and neither is test: set one of them to true"));
        }
        let config = Self {
            model: root.text("model")?.unwrap_or("Qwen/Qwen3-0.6b").to_owned(),
            train,
            test,
            fine_tune_type,
            optimizer: OptimizerConfig::read(root, chosen)?,
            schedule: schedule(root)?,
            data: root.text("data")?.unwrap_or("mlx-community/WikiSQL").to_owned(),
            hf_dataset: root
                .sections("hf_dataset")?
                .iter()
                .map(HubDataset::read)
                .collect::<Result<_, _>>()?,
            features: Features::read(root)?,
            seed: root.whole("seed", 0, i64::from(u32::MAX))?.unwrap_or(0) as u32,
            layers: layers(root, parity)?,
            batch_size: root.whole("batch_size", 1, MOST_ROWS)?.unwrap_or(4) as usize,
            iters: count("iters", 1000)?,
            val_batches: batches(root, "val_batches", 25)?,
            test_batches: batches(root, "test_batches", 500)?,
            steps_per_report: count("steps_per_report", 10)?,
            steps_per_eval: count("steps_per_eval", 200)?,
            save_every: count("save_every", 100)?,
            grad_accumulation_steps: count("grad_accumulation_steps", 1)?,
            grad_checkpoint: flag("grad_checkpoint")?,
            clear_cache_threshold: bytes(root, "clear_cache_threshold")?,
            resume_adapter_file: root.text("resume_adapter_file")?.map(PathBuf::from),
            adapter_path: PathBuf::from(root.text("adapter_path")?.unwrap_or("adapters")),
            max_seq_length: root.whole("max_seq_length", 2, MOST_ROWS)?.unwrap_or(2048) as usize,
            lora,
            mask: mask(root)?,
            report_to: reports(root)?,
            project_name: root.text("project_name")?.map(str::to_owned),
            parity,
            packing: flag("packing")?,
            clip_grad_norm: root.number("clip_grad_norm", "above 0", |norm| norm > 0.0)?,
            thinking: root.flag("thinking")?,
            preference: preference(root)?,
            checkpoint_steps: root.count("checkpoint_steps", 1)?,
            checkpoint_minutes: root.number("checkpoint_minutes", "above 0", |minutes| minutes > 0.0)?,
            keep_checkpoints: root.whole("keep_checkpoints", 1, 10_000)?.unwrap_or(3) as usize,
            arguments: Map::new(),
        };
        root.text("config")?;
        flag("trust_remote_code")?; // nothing here runs a model's Python, so it changes nothing
        config.check_together(root)?;
        Ok(config)
    }

    /// What each key may be by itself, but not beside another.
    fn check_together(&self, root: &Section<'_>) -> Result<(), ConfigError> {
        if self.parity {
            for (key, is_on) in [
                ("packing", self.packing),
                ("preference", self.preference.is_some()),
                ("mask_turns", self.mask == Mask::EveryTurn),
            ] {
                if is_on {
                    return Err(root.wrong(key, "is not what mlx-lm does: take it or parity out"));
                }
            }
        }
        if self.packing && self.preference.is_some() {
            return Err(root.wrong("packing", "cannot be combined with preference: pairs stay together"));
        }
        if self.preference.is_some_and(|preference| preference.loss == PreferenceLoss::Dpo)
            && self.fine_tune_type == FineTuneType::Full
        {
            let problem = "dpo compares with the unchanged model, which fine_tune_type full changes; use lora, dora or orpo";
            return Err(root.wrong("preference", problem));
        }
        if root.has("beta") && self.preference.is_none() {
            return Err(root.wrong("beta", "has no use without preference"));
        }
        Ok(())
    }
}

fn fine_tune_type(root: &Section<'_>) -> Result<FineTuneType, ConfigError> {
    let types = [("lora", FineTuneType::Lora), ("dora", FineTuneType::Dora), ("full", FineTuneType::Full)];
    Ok(root.choice("fine_tune_type", &types)?.unwrap_or(FineTuneType::Lora))
}

/// -1 is all; 0 is, too, in mlx-lm (a slip: `[-0:]` is everything), and here only where its slips are wanted.
fn layers(root: &Section<'_>, parity: bool) -> Result<Layers, ConfigError> {
    match root.whole("num_layers", -1, 1 << 20)?.unwrap_or(16) {
        -1 => Ok(Layers::All),
        0 if parity => Ok(Layers::All),
        0 => Err(root.wrong("num_layers", "is 0, but must be 1 or more, or -1 for all blocks")),
        number => Ok(Layers::Last(number as usize)),
    }
}

fn batches(root: &Section<'_>, key: &str, default: i64) -> Result<Count, ConfigError> {
    Ok(match root.whole(key, -1, 1 << 45)?.unwrap_or(default) {
        -1 => Count::All,
        number => Count::Of(number.unsigned_abs()),
    })
}

/// Bytes, or a text such as "2GB": units are decimal, as in mlx-lm.
fn bytes(root: &Section<'_>, key: &str) -> Result<u64, ConfigError> {
    let Some(Value::String(text)) = root.get(key) else { return Ok(root.count(key, 0)?.unwrap_or(0)) };
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let unit = match text[end..].trim().to_uppercase().as_str() {
        "" => Some(1.0),
        "M" | "MB" => Some(1e6),
        "G" | "GB" => Some(1e9),
        _ => None,
    };
    let size = unit.and_then(|unit| Some(text[..end].parse::<f64>().ok()? * unit));
    let size = size.filter(|size| (0.0..1e15).contains(size));
    size.map(|size| size as u64)
        .ok_or_else(|| root.wrong(key, format!("is {text:?}, but must be a size such as 500MB or 2GB")))
}

fn mask(root: &Section<'_>) -> Result<Mask, ConfigError> {
    let mask_prompt = root.flag("mask_prompt")?;
    let turns = [("none", Mask::None), ("last", Mask::LastTurn), ("every", Mask::EveryTurn)];
    match (mask_prompt, root.choice("mask_turns", &turns)?) {
        (Some(true), Some(Mask::None)) => {
            Err(root.wrong("mask_turns", "is \"none\", but mask_prompt is true: take one of them out"))
        }
        (Some(false), Some(Mask::LastTurn | Mask::EveryTurn)) => {
            Err(root.wrong("mask_prompt", "is false, but mask_turns masks: take one of them out"))
        }
        (_, Some(turns)) => Ok(turns),
        (Some(true), None) => Ok(Mask::LastTurn),
        (_, None) => Ok(Mask::None),
    }
}

fn reports(root: &Section<'_>) -> Result<Vec<Report>, ConfigError> {
    let names: Vec<String> = match root.get("report_to") {
        Some(Value::Array(list)) => {
            let names: Option<Vec<String>> =
                list.iter().map(|name| name.as_str().map(str::to_owned)).collect();
            names.ok_or_else(|| root.wrong("report_to", "must be a list of words"))?
        }
        _ => {
            root.text("report_to")?.map_or_else(Vec::new, |text| text.split(',').map(str::to_owned).collect())
        }
    };
    let mut reports = Vec::new();
    for name in names {
        let report = match name.trim().to_lowercase().as_str() {
            "" => continue,
            "jsonl" => Report::Jsonl,
            "csv" => Report::Csv,
            "tensorboard" => Report::TensorBoard,
            "wandb" | "swanlab" => {
                let problem = format!(
                    "names {name}, a service that is not called from here; use tensorboard, whose files it takes over"
                );
                return Err(root.wrong("report_to", problem));
            }
            _ => {
                let problem = format!("names {name:?}, but must be of jsonl, csv and tensorboard");
                return Err(root.wrong("report_to", problem));
            }
        };
        if !reports.contains(&report) {
            reports.push(report);
        }
    }
    Ok(reports)
}

fn preference(root: &Section<'_>) -> Result<Option<Preference>, ConfigError> {
    let losses = [("dpo", PreferenceLoss::Dpo), ("orpo", PreferenceLoss::Orpo)];
    let beta = root.number("beta", "above 0", |beta| beta > 0.0)?.unwrap_or(0.1);
    Ok(root.choice("preference", &losses)?.map(|loss| Preference { loss, beta }))
}

fn schedule(root: &Section<'_>) -> Result<Schedule, ConfigError> {
    let rate = root.number("learning_rate", "0 or more", |rate| rate >= 0.0)?.unwrap_or(1e-5);
    let Some(section) = root.section("lr_schedule")? else { return Ok(Schedule::constant(rate)) };
    section.only(&["name", "arguments", "warmup", "warmup_init"])?;
    let Some(name) = section.text("name")? else {
        return Err(section
            .wrong("name", "is missing: exponential_decay, step_decay, cosine_decay or linear_schedule"));
    };
    let arguments: Option<Vec<f64>> = match section.list("arguments")? {
        None => {
            return Err(
                section.wrong("arguments", "is missing: a list that begins with the first learning rate")
            );
        }
        Some(list) => list.iter().map(Value::as_f64).collect(),
    };
    let arguments = arguments.ok_or_else(|| section.wrong("arguments", "must be a list of numbers"))?;
    let whole = |number: f64| {
        let is_count = number >= 1.0 && number.fract() == 0.0 && number < 1e12;
        let wrong = || {
            section.wrong("arguments", format!("has {number}, but a number of steps is whole and 1 or more"))
        };
        if is_count { Ok(number as u64) } else { Err(wrong()) }
    };
    let shape = match (name, arguments[..].as_ref()) {
        ("exponential_decay", &[init, decay_rate]) => Shape::ExponentialDecay { init, decay_rate },
        ("step_decay", &[init, decay_rate, step_size]) => {
            Shape::StepDecay { init, decay_rate, step_size: whole(step_size)? }
        }
        ("cosine_decay", &[init, steps]) => Shape::CosineDecay { init, decay_steps: whole(steps)?, end: 0.0 },
        ("cosine_decay", &[init, steps, end]) => Shape::CosineDecay { init, decay_steps: whole(steps)?, end },
        ("linear_schedule", &[init, end, steps]) => Shape::Linear { init, end, steps: whole(steps)? },
        (known @ ("exponential_decay" | "step_decay" | "cosine_decay" | "linear_schedule"), given) => {
            let needed = match known {
                "exponential_decay" => "init, decay_rate",
                "step_decay" => "init, decay_rate, step_size",
                "cosine_decay" => "init, decay_steps and perhaps end",
                _ => "init, end, steps",
            };
            let problem = format!("has {} numbers, but {known} takes {needed}", given.len());
            return Err(section.wrong("arguments", problem));
        }
        (other, _) => {
            let names = ["exponential_decay", "step_decay", "cosine_decay", "linear_schedule"];
            let near = settings::nearest(other, &names);
            let near = near.map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
            let problem = format!("is {other:?}, but must be one of {}{near}", names.join(", "));
            return Err(section.wrong("name", problem));
        }
    };
    let warmup = section.count("warmup", 0)?.unwrap_or(0);
    let init = section.number("warmup_init", "0 or more", |init| init >= 0.0)?.unwrap_or(0.0);
    Ok(Schedule::new(shape, warmup, init))
}

/// What mlx-lm would have as arguments: defaults, with what was given over them.
fn arguments(settings: &Settings) -> Map<String, Value> {
    let defaults = json!({
        "model": "Qwen/Qwen3-0.6b",
        "train": false,
        "fine_tune_type": "lora",
        "optimizer": "adam",
        "optimizer_config": {"adam": {}, "adamw": {}, "muon": {}, "sgd": {}, "adafactor": {}},
        "data": "mlx-community/WikiSQL",
        "seed": 0,
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "val_batches": 25,
        "learning_rate": 1e-5,
        "steps_per_report": 10,
        "steps_per_eval": 200,
        "resume_adapter_file": null,
        "adapter_path": "adapters",
        "save_every": 100,
        "test": false,
        "test_batches": 500,
        "max_seq_length": 2048,
        "config": settings.origin(),
        "grad_checkpoint": false,
        "grad_accumulation_steps": 1,
        "clear_cache_threshold": 0,
        "lr_schedule": null,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
        "mask_prompt": false,
        "report_to": null,
        "project_name": null,
        "trust_remote_code": false,
    });
    let mut arguments = match defaults {
        Value::Object(arguments) => arguments,
        _ => Map::new(),
    };
    for (key, value) in settings.values() {
        if !value.is_null() {
            arguments.insert(key.clone(), value.clone());
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        TrainingConfig::from_yaml(text, "lora.yaml").expect_err(text).to_string()
    }

    #[test]
    fn the_defaults_are_mlx_lms() {
        let config = TrainingConfig::from_yaml("train: true", "lora.yaml").unwrap();
        assert_eq!((config.batch_size, config.iters, config.max_seq_length), (4, 1000, 2048));
        assert_eq!((config.layers, config.mask, config.parity), (Layers::Last(16), Mask::None, false));
        assert_eq!((config.val_batches, config.test_batches), (Count::Of(25), Count::Of(500)));
        assert_eq!(config.lora, LoraParameters { rank: 8, dropout: 0.0, scale: 20.0, keys: None });
        assert!((config.schedule.at(7) - 1e-5).abs() < 1e-12);
        let adam = OptimizerConfig::Adam { betas: (0.9, 0.999), eps: 1e-8, bias_correction: false };
        assert_eq!(config.optimizer, adam);
    }

    #[test]
    fn a_flag_wins_over_the_file_and_null_says_nothing() {
        let mut flags = Settings::new();
        flags.set("batch_size", 2);
        flags.set("learning_rate", Value::Null);
        let file =
            Settings::from_yaml("train: true\nbatch_size: 8\nlearning_rate: 1e-3\niters: ~\n", "a").unwrap();
        let config = TrainingConfig::resolve(flags.clone(), file.clone()).unwrap();
        assert_eq!((config.batch_size, config.iters), (2, 1000));
        assert!((config.schedule.at(0) - 1e-3).abs() < 1e-9);
        flags.set("batch_size", 0);
        let error = TrainingConfig::resolve(flags, file).unwrap_err().to_string();
        assert_eq!(error, "--batch-size: batch_size is 0, but must be 1 or more");
    }

    #[test]
    fn what_cannot_be_is_named_with_line_and_key() {
        for (text, expected) in [
            ("train: 1", "lora.yaml line 1: train is 1, but must be true or false"),
            ("iters: 5", "lora.yaml: train is not set, and neither is test: set one of them to true"),
            (
                "train: true\nlearning_rat: 1",
                "lora.yaml line 2: there is no key \"learning_rat\"; did you mean \"learning_rate\"?",
            ),
            ("train: true\nzzz: 1", "lora.yaml line 2: there is no key \"zzz\""),
            (
                "train: true\nlora_parameters:\n  rank: 8\n  alpha: 16\n",
                "lora.yaml line 4: lora_parameters.alpha is not known: the factor on the change is \"scale\" (in other tools' words alpha / rank)",
            ),
            (
                "train: true\nlora_parameters: {rank: 8}\n",
                "lora.yaml line 2: lora_parameters.scale is missing: the factor on the change",
            ),
            (
                "train: true\nbatch_size: 4.5\n",
                "lora.yaml line 2: batch_size is 4.5, but must be a whole number",
            ),
            (
                "train: true\nlearning_rate: \"1e-5\"\n",
                "lora.yaml line 2: learning_rate is the text \"1e-5\", but must be a number",
            ),
            (
                "train: true\noptimizer: adamww\n",
                "lora.yaml line 2: optimizer is \"adamww\", but must be one of adam, adamw, muon, sgd, adafactor; did you mean \"adamw\"?",
            ),
            (
                "train: true\noptimizer_config:\n  adam:\n    beta: 1\n",
                "lora.yaml line 4: there is no key \"optimizer_config.adam.beta\"; did you mean \"betas\"?",
            ),
            (
                "train: true\nlr_schedule: {name: cosine_decay, arguments: [1e-5]}\n",
                "lora.yaml line 2: lr_schedule.arguments has 1 numbers, but cosine_decay takes init, decay_steps and perhaps end",
            ),
            (
                "train: true\nhf_dataset:\n- path: a/b\n  train_split: \"train[:x]\"\n",
                "lora.yaml line 4: hf_dataset[0].train_split is \"train[:x]\", but must be a split or a slice of one, such as train, train[:80%] or train[-100:]",
            ),
            (
                "train: true\nnum_layers: 0\n",
                "lora.yaml line 2: num_layers is 0, but must be 1 or more, or -1 for all blocks",
            ),
            (
                "train: true\nparity: mlx-lm\npacking: true\n",
                "lora.yaml line 3: packing is not what mlx-lm does: take it or parity out",
            ),
            (
                "train: true\nreport_to: wandb\n",
                "lora.yaml line 2: report_to names wandb, a service that is not called from here; use tensorboard, whose files it takes over",
            ),
        ] {
            assert_eq!(error(text), expected);
        }
    }

    #[test]
    fn our_own_keys_are_read_and_kept_in_the_adapters_config() {
        let text = "train: true\nparity: mlx-lm\nclip_grad_norm: 1.0\nclear_cache_threshold: 1.5GB\nnum_layers: 0\n\
                    mask_prompt: true\ncheckpoint_minutes: 2.5\nreport_to: jsonl, csv\n";
        let config = TrainingConfig::from_yaml(text, "a").unwrap();
        assert!(config.parity && config.clip_grad_norm == Some(1.0));
        assert_eq!((config.clear_cache_threshold, config.layers), (1_500_000_000, Layers::All));
        assert_eq!((config.mask, config.checkpoint_minutes), (Mask::LastTurn, Some(2.5)));
        assert_eq!(config.report_to, [Report::Jsonl, Report::Csv]);
        let written: Value = serde_json::from_str(&config.adapter_config()).unwrap();
        assert_eq!((&written["parity"], &written["config"]), (&json!("mlx-lm"), &json!("a")));
        assert!(written.get("packing").is_none());
        let read = AdapterConfig::from_json(&config.adapter_config(), "adapter_config.json").unwrap();
        assert_eq!((read.num_layers, read.lora), (Some(0), Some(config.lora)));
    }

    #[test]
    fn an_adapters_config_of_a_full_fine_tune_has_no_parameters() {
        let config = TrainingConfig::from_yaml("train: true\nfine_tune_type: full\n", "a").unwrap();
        let text = config.adapter_config();
        assert!(text.contains("    \"lora_parameters\": null,\n"), "{text}");
        let read = AdapterConfig::from_json(&text, "adapter_config.json").unwrap();
        assert_eq!((read.fine_tune_type, read.lora), (FineTuneType::Full, None));
        let error = AdapterConfig::from_json("{\"lora_parameters\": 3}", "f.json").unwrap_err().to_string();
        assert_eq!(error, "f.json: lora_parameters is 3, but must be a mapping of keys to values");
        assert!(AdapterConfig::from_json("[", "f.json").is_err());
    }

    #[test]
    fn preference_takes_a_loss_and_a_weight() {
        let config = TrainingConfig::from_yaml("train: true\npreference: orpo\nbeta: 0.2\n", "a").unwrap();
        assert_eq!(config.preference, Some(Preference { loss: PreferenceLoss::Orpo, beta: 0.2 }));
        assert!(error("train: true\npreference: dpo\nfine_tune_type: full\n").contains("unchanged model"));
        assert!(error("train: true\nbeta: 0.2\n").contains("no use without preference"));
    }
}
