//! The keys that there are, and mlx-lm's defaults of its own: what is read where nothing is given, and what is told of a run.

use super::ConfigError;
use super::hub_dataset::Features;
use super::settings::{Section, Settings};
use serde_json::{Map, Value, json};

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

/// mlx-lm's keys with what they are by themselves.
fn table() -> Map<String, Value> {
    let table = json!({
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
        "config": null,
        "grad_checkpoint": false,
        "grad_accumulation_steps": 1,
        "clear_cache_threshold": 0,
        "lr_schedule": null,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
        "mask_prompt": false,
        "report_to": null,
        "project_name": null,
        "trust_remote_code": false,
        "hf_dataset": null,
    });
    match table {
        Value::Object(table) => table,
        _ => Map::new(),
    }
}

/// Refuses keys that nobody knows.
pub(super) fn only_known(root: &Section<'_>) -> Result<(), ConfigError> {
    let table = table();
    let mut known: Vec<&str> = table.keys().map(String::as_str).collect();
    known.extend(OUR_KEYS);
    known.extend(Features::KEYS);
    root.only(&known)
}

/// The defaults, to be read as what is given is.
pub(super) fn settings() -> Settings {
    Settings::from_json(table(), "the defaults")
}

/// What mlx-lm would have as arguments: defaults, with what was given over them.
pub(super) fn arguments(settings: &Settings) -> Map<String, Value> {
    let mut arguments = table();
    arguments.remove("hf_dataset"); // mlx-lm has it only where it is given
    arguments.insert("config".to_owned(), settings.origin().into());
    for (key, value) in settings.values() {
        if !value.is_null() {
            arguments.insert(key.clone(), value.clone());
        }
    }
    arguments
}

/// Values as they were given, or else the defaults.
#[derive(Clone, Copy)]
pub(super) struct Values<'v> {
    pub(super) given: &'v Section<'v>,
    pub(super) usual: &'v Section<'v>,
}

impl<'v> Values<'v> {
    /// A value that the table has a default of.
    pub(super) fn get<T>(
        &self,
        key: &str,
        read: impl Fn(&'v Section<'v>, &str) -> Result<Option<T>, ConfigError>,
    ) -> Result<T, ConfigError> {
        match read(self.given, key)? {
            Some(value) => Ok(value),
            None => read(self.usual, key)?.ok_or_else(|| self.given.wrong(key, "is missing")),
        }
    }

    /// A count from 1 on.
    pub(super) fn count(&self, key: &str) -> Result<u64, ConfigError> {
        self.get(key, |section, key| section.count(key, 1))
    }

    /// True or false.
    pub(super) fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        self.get(key, Section::flag)
    }
}
