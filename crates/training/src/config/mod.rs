//! What a training run is asked to do: mlx-lm's YAML keys and flags with their defaults, and a few keys of our own.
//!
//! A flag wins over the file, the file over the default ([`TrainingConfig::resolve`]). Whoever runs a command reads files and flags
//! into [`Settings`]; what comes out is typed and valid, and everything that cannot be is an error with file, line and key.
//!
//! - `yaml`: a file's words as mlx-lm understands them
//! - `defaults`: the keys, and what they are where nothing is given
//! - `words`, `learning_rate`: what the words of single keys mean
//! - [`Settings`]: loose values and where they came from
//! - [`OptimizerConfig`], [`HubDataset`]: keys that have keys of their own
//! - [`AdapterConfig`]: adapter_config.json, written and read

mod adapter_file;
mod defaults;
mod error;
mod hub_dataset;
mod learning_rate;
mod optimizer;
mod settings;
mod words;
mod yaml;

pub use adapter_file::AdapterConfig;
pub use error::ConfigError;
pub use hub_dataset::{Features, HubDataset, Split};
pub use optimizer::OptimizerConfig;
pub use settings::Settings;

use crate::schedule::Schedule;
use defaults::Values;
use mlxnode_checkpoint::{TrainedPart, TrainingDemand};
use mlxnode_compute::MOST_MICRO_BATCHES;
use serde_json::{Map, Value};
use settings::Section;
use std::path::PathBuf;

/// Rows at once, or tokens in a row: what is above is a slip of the finger.
const MOST_ROWS: i64 = 1 << 20;

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

impl TrainingConfig {
    /// What flags, or else a file, or else the defaults say.
    ///
    /// # Errors
    /// [`ConfigError`]
    pub fn resolve(flags: Settings, file: Settings) -> Result<Self, ConfigError> {
        let settings = flags.over(file);
        let root = settings.root();
        defaults::only_known(&root)?;
        let usual = defaults::settings();
        let config = Self::read(Values { given: &root, usual: &usual.root() })?;
        Ok(Self { arguments: defaults::arguments(&settings), ..config })
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

    /// What the run is called in pictures: `project_name`, or else the adapter's folder.
    pub fn title(&self) -> String {
        let folder = || self.adapter_path.file_name().map(|name| name.to_string_lossy().into_owned());
        self.project_name.clone().or_else(folder).unwrap_or_else(|| "run".to_owned())
    }

    /// Micro-batches between two checkpoints that a run goes on from; None: minutes alone decide.
    pub fn checkpoint_every(&self) -> Option<u64> {
        match (self.checkpoint_steps, self.checkpoint_minutes) {
            (Some(updates), _) => Some(updates.saturating_mul(self.grad_accumulation_steps.max(1))),
            (None, Some(_)) => None,
            (None, None) => Some(self.save_every),
        }
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
            exchanging: false,
        }
    }

    fn read(values: Values<'_>) -> Result<Self, ConfigError> {
        let root = values.given;
        let parity = match root.get("parity") {
            Some(Value::Bool(parity)) => *parity,
            _ => root.choice("parity", &[("mlx-lm", true)])?.unwrap_or(false),
        };
        let (train, test) = (values.flag("train")?, values.flag("test")?);
        if !train && !test {
            return Err(root.wrong("train", "is not set, and neither is test: set one of them to true"));
        }
        let optimizer = values.get("optimizer", |section, key| section.choice(key, &optimizer::NAMES))?;
        let config = Self {
            model: values.get("model", Section::text)?.to_owned(),
            train,
            test,
            fine_tune_type: values.get("fine_tune_type", words::fine_tune_type)?,
            optimizer: OptimizerConfig::read(root, optimizer)?,
            schedule: learning_rate::schedule(values)?,
            data: values.get("data", Section::text)?.to_owned(),
            hf_dataset: root
                .sections("hf_dataset")?
                .iter()
                .map(HubDataset::read)
                .collect::<Result<_, _>>()?,
            features: Features::read(root)?,
            seed: values.get("seed", |section, key| section.whole(key, 0, i64::from(u32::MAX)))? as u32,
            layers: words::layers(values, parity)?,
            batch_size: values.get("batch_size", |section, key| section.whole(key, 1, MOST_ROWS))? as usize,
            iters: values.count("iters")?,
            val_batches: words::batches(values, "val_batches")?,
            test_batches: words::batches(values, "test_batches")?,
            steps_per_report: values.count("steps_per_report")?,
            steps_per_eval: values.count("steps_per_eval")?,
            save_every: values.count("save_every")?,
            grad_accumulation_steps: values
                .get("grad_accumulation_steps", |section, key| {
                    section.whole(key, 1, i64::from(MOST_MICRO_BATCHES))
                })?
                .unsigned_abs(),
            grad_checkpoint: values.flag("grad_checkpoint")?,
            clear_cache_threshold: values.get("clear_cache_threshold", words::bytes)?,
            resume_adapter_file: root.text("resume_adapter_file")?.map(PathBuf::from),
            adapter_path: PathBuf::from(values.get("adapter_path", Section::text)?),
            max_seq_length: values.get("max_seq_length", |section, key| section.whole(key, 2, MOST_ROWS))?
                as usize,
            lora: values.get("lora_parameters", |section, key| {
                section.section(key)?.map(|section| LoraParameters::read(&section)).transpose()
            })?,
            mask: words::mask(root)?,
            report_to: words::reports(root)?,
            project_name: root.text("project_name")?.map(str::to_owned),
            parity,
            packing: root.flag("packing")?.unwrap_or(false),
            clip_grad_norm: root.number("clip_grad_norm", "above 0", |norm| norm > 0.0)?,
            thinking: root.flag("thinking")?,
            preference: words::preference(root)?,
            checkpoint_steps: root.count("checkpoint_steps", 1)?,
            checkpoint_minutes: root.number("checkpoint_minutes", "above 0", |minutes| minutes > 0.0)?,
            keep_checkpoints: root.whole("keep_checkpoints", 1, 10_000)?.unwrap_or(3) as usize,
            arguments: Map::new(),
        };
        for section in root.sections("hf_dataset")? {
            // mlx-lm puts the run's own there, whatever it says.
            let masks = config.mask != Mask::None;
            if let Some(other) = section.flag("mask_prompt")?.filter(|other| *other != masks) {
                let problem = format!(
                    "is {other}, but mask_prompt holds for the whole run, where it is {masks}: set it there, beside hf_dataset"
                );
                return Err(section.wrong("mask_prompt", problem));
            }
        }
        root.text("config")?;
        values.flag("trust_remote_code")?; // nothing here runs a model's Python, so it changes nothing
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
                "train: true\nhf_dataset:\n- path: a/b\n  mask_prompt: true\n",
                "lora.yaml line 4: hf_dataset[0].mask_prompt is true, but mask_prompt holds for the whole run, where it is false: set it there, beside hf_dataset",
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
