//! What a client asks for, and the configuration of the trainer that follows from it.
//!
//! OpenAI's hyperparameters and mlx-lm's keys (`configuration`) say the same things in two ways. Each may be said once: what stands in both is
//! an error, and what stands in neither is as here.

use crate::fields::{Fields, kind, shortened};
use crate::http::ApiError;
use crate::jobs::Examined;
use mlxnode_coordinator::jobs::{MAX_STAGES, MAX_WORKERS};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What OpenAI calls "auto".
const AUTO_EPOCHS: u64 = 3;
const AUTO_BATCH: u64 = 4;
/// What the multiplier multiplies: mlx-lm's learning rate.
const LEARNING_RATE: f64 = 1e-5;
/// Bounds of hyperparameters.
const MAX_EPOCHS: u64 = 1000;
const MAX_BATCH: u64 = 1024;
/// As OpenAI bounds them.
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_TEXT: usize = 512;
const MAX_SUFFIX: usize = 64;
/// Longest model, in bytes: a folder's path.
const MAX_MODEL: usize = 4096;

/// How it learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Method {
    /// From answers.
    #[default]
    Supervised,
    /// From pairs of a better and a worse answer.
    Dpo,
}

impl Method {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Supervised => "supervised",
            Self::Dpo => "dpo",
        }
    }

    pub(super) fn named(name: &str) -> Self {
        if name == "dpo" { Self::Dpo } else { Self::Supervised }
    }
}

/// Hyperparameters; none: "auto".
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Chosen {
    epochs: Option<u64>,
    batch: Option<u64>,
    multiplier: Option<f64>,
    beta: Option<f64>,
}

/// A request for a job.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) model: String,
    pub(super) training_file: String,
    pub(super) validation_file: Option<String>,
    pub(super) suffix: Option<String>,
    pub(super) workers: u32,
    pub(super) share_percent: u32,
    /// Nodes among which the layers are divided; 0: as many as it takes.
    pub(super) stages: u32,
    method: Method,
    chosen: Chosen,
    seed: Option<i64>,
    metadata: BTreeMap<String, String>,
    /// YAML with mlx-lm's keys; each line of it ends.
    own: String,
}

/// Names of labels. The client's own metadata stand behind the last one.
pub(super) mod label {
    pub(in super::super) const TRAINING_FILE: &str = "openai.training_file";
    pub(in super::super) const VALIDATION_FILE: &str = "openai.validation_file";
    pub(in super::super) const METHOD: &str = "openai.method";
    pub(in super::super) const EPOCHS: &str = "openai.n_epochs";
    pub(in super::super) const BATCH: &str = "openai.batch_size";
    pub(in super::super) const MULTIPLIER: &str = "openai.learning_rate_multiplier";
    pub(in super::super) const BETA: &str = "openai.beta";
    pub(in super::super) const SEED: &str = "openai.seed";
    pub(in super::super) const SUFFIX: &str = "openai.suffix";
    pub(in super::super) const METADATA: &str = "metadata.";
}

impl Asked {
    pub(super) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.needed_string("model")?;
        if model.trim().is_empty() {
            return Err(ApiError::field("model", "model is empty; name a loaded model, OWNER/NAME or demo"));
        }
        if model.len() > MAX_MODEL {
            return Err(ApiError::field("model", format!("model is longer than {MAX_MODEL} bytes")));
        }
        let training_file = fields.needed_string("training_file")?;
        let validation_file = fields.string("validation_file")?;
        let suffix = fields.string("suffix")?;
        if suffix.as_ref().is_some_and(|suffix| !(1..=MAX_SUFFIX).contains(&suffix.chars().count())) {
            return Err(ApiError::field("suffix", format!("suffix must have 1 to {MAX_SUFFIX} characters")));
        }
        let seed = fields.integer("seed", 0..=i64::from(u32::MAX))?;
        let metadata = metadata(&mut fields)?;
        fields.only("integrations", &[json!([])], "figures are events of the job, and on the web page")?;
        let flat = fields.object("hyperparameters")?;
        let has_flat = flat.is_some();
        let (method, nested) = method(&mut fields)?;
        if has_flat && nested.is_some() {
            return Err(ApiError::field(
                "hyperparameters",
                "hyperparameters stand in method and beside it; say them once",
            ));
        }
        let chosen = match nested.or(flat) {
            Some(fields) => Chosen::read(fields, method)?,
            None => Chosen::default(),
        };
        let workers = fields.integer("workers", 1..=i64::from(MAX_WORKERS))?.unwrap_or(1);
        let stages = stages(&mut fields)?;
        if stages > 1 && workers > 1 && workers % i64::from(stages) != 0 {
            let text = format!(
                "workers is {workers} and stages is {stages}: each {stages} nodes have the whole model together, so workers must be a multiple of it"
            );
            return Err(ApiError::field("stages", text));
        }
        let share = fields.integer("share_percent", 1..=100)?.unwrap_or(0);
        let own = own(&mut fields)?;
        fields.finish()?;
        Ok(Self {
            model,
            training_file,
            validation_file,
            suffix,
            workers: workers as u32,
            share_percent: share as u32,
            stages,
            method,
            chosen,
            seed,
            metadata,
            own,
        })
    }

    /// As far as it decides how files are read: the rows decide the rest.
    pub(super) fn first_configuration(&self) -> String {
        self.preference() + &self.own
    }

    fn preference(&self) -> String {
        match self.method {
            Method::Supervised => String::new(),
            Method::Dpo => "preference: dpo\n".to_owned(),
        }
    }

    /// YAML for the trainer, and what is told again with the job.
    pub(super) fn configuration(
        &self,
        examined: &Examined,
    ) -> Result<(String, BTreeMap<String, String>), ApiError> {
        let has = |key: &str| examined.keys.contains(key);
        let twice = |field: &str, key: &str| {
            let text = format!("{field} and the configuration's {key} say the same; give one of them");
            ApiError::field(field, text)
        };
        let Chosen { epochs, batch, multiplier, beta } = self.chosen;
        for (field, is_given, keys) in [
            ("n_epochs", epochs.is_some(), &["iters"][..]),
            ("batch_size", batch.is_some(), &["batch_size"]),
            ("learning_rate_multiplier", multiplier.is_some(), &["learning_rate", "lr_schedule"]),
            ("beta", beta.is_some(), &["beta"]),
            ("seed", self.seed.is_some(), &["seed"]),
        ] {
            if let Some(key) = keys.iter().find(|key| is_given && has(key)) {
                return Err(twice(field, key));
            }
        }
        let mut lines = self.preference();
        let mut labels: BTreeMap<String, String> = self
            .metadata
            .iter()
            .map(|(name, text)| (format!("{}{name}", label::METADATA), text.clone()))
            .collect();
        let mut note = |name: &str, text: String| drop(labels.insert(name.to_owned(), text));
        let mut key = |name: &str, value: Value| lines.push_str(&format!("{name}: {value}\n"));
        let batch = match has("batch_size") {
            true => examined.batch_size,
            false => {
                let size = batch.unwrap_or(AUTO_BATCH.min(examined.rows));
                key("batch_size", json!(size));
                size
            }
        };
        if batch > examined.rows {
            let text = format!("batch_size is {batch}, but there are {} rows", examined.rows);
            return Err(ApiError::field("batch_size", text));
        }
        if !has("iters") {
            if examined.packing {
                let text = "with packing the number of batches is not known before: give iters, not n_epochs";
                return Err(ApiError::field("configuration.iters", text));
            }
            let epochs = epochs.unwrap_or(AUTO_EPOCHS);
            key("iters", json!(epochs.saturating_mul(examined.rows.div_ceil(batch.max(1)))));
            note(label::EPOCHS, epochs.to_string());
        }
        if !has("learning_rate") && !has("lr_schedule") {
            let multiplier = multiplier.unwrap_or(1.0);
            key("learning_rate", json!(LEARNING_RATE * multiplier));
            note(label::MULTIPLIER, multiplier.to_string());
        }
        if let Some(seed) = self.seed {
            key("seed", json!(seed));
            note(label::SEED, seed.to_string());
        }
        if let Some(beta) = beta {
            key("beta", json!(beta));
            note(label::BETA, beta.to_string());
        }
        note(label::BATCH, batch.to_string());
        note(label::METHOD, self.method.name().to_owned());
        note(label::TRAINING_FILE, self.training_file.clone());
        if let Some(file) = &self.validation_file {
            note(label::VALIDATION_FILE, file.clone());
        }
        if let Some(suffix) = &self.suffix {
            note(label::SUFFIX, suffix.clone());
        }
        Ok((lines + &self.own, labels))
    }
}

fn metadata(fields: &mut Fields) -> Result<BTreeMap<String, String>, ApiError> {
    let wrong = |text: String| Err(ApiError::field("metadata", text));
    let map = fields.map("metadata")?.unwrap_or_default();
    if map.len() > MAX_METADATA {
        return wrong(format!("metadata has {} entries, but may have {MAX_METADATA}", map.len()));
    }
    let mut metadata = BTreeMap::new();
    for (name, value) in map {
        let shown = shortened(&name);
        let Value::String(text) = value else {
            return wrong(format!("metadata.{shown} is {}, but must be a text", kind(&value)));
        };
        if name.chars().count() > MAX_METADATA_KEY || text.chars().count() > MAX_METADATA_TEXT {
            return wrong(format!(
                "metadata.{shown} is too long: names have at most {MAX_METADATA_KEY} characters, texts {MAX_METADATA_TEXT}"
            ));
        }
        metadata.insert(name, text);
    }
    Ok(metadata)
}

/// As `mlxnode jobs submit --stages`: a number, or "auto" (0).
fn stages(fields: &mut Fields) -> Result<u32, ApiError> {
    let Some(value) = fields.value("stages").filter(|value| !is_auto(value)) else { return Ok(0) };
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number.filter(|number| (1..=MAX_STAGES).contains(number)).ok_or_else(|| {
        let shown = shortened(&value.to_string());
        ApiError::field("stages", format!("stages is {shown}, but must be \"auto\" or 1 to {MAX_STAGES}"))
    })
}

/// The method, and its hyperparameters.
fn method(fields: &mut Fields) -> Result<(Method, Option<Fields>), ApiError> {
    let Some(mut method) = fields.object("method")? else { return Ok((Method::default(), None)) };
    let named = method.one_of("type", &["supervised", "dpo"])?.ok_or_else(|| method.missing("type"))?;
    let mut hyperparameters = None;
    if let Some(mut inner) = method.object(named)? {
        hyperparameters = inner.object("hyperparameters")?;
        inner.finish()?;
    }
    method.finish()?;
    Ok((Method::named(named), hyperparameters))
}

/// mlx-lm's keys: an object, or YAML.
fn own(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.value("configuration") {
        None => Ok(String::new()),
        Some(Value::String(text)) if text.ends_with('\n') || text.is_empty() => Ok(text),
        Some(Value::String(text)) => Ok(text + "\n"),
        // JSON is YAML too.
        Some(Value::Object(keys)) => {
            Ok(keys.iter().map(|(key, value)| format!("{}: {value}\n", json!(key))).collect())
        }
        Some(other) => Err(ApiError::field(
            "configuration",
            format!("configuration is {}, but must be an object with mlx-lm's keys, or YAML", kind(&other)),
        )),
    }
}

impl Chosen {
    /// Numbers, or "auto".
    fn read(mut fields: Fields, method: Method) -> Result<Self, ApiError> {
        let epochs = whole(&mut fields, "n_epochs", MAX_EPOCHS)?;
        let batch = whole(&mut fields, "batch_size", MAX_BATCH)?;
        let multiplier = positive(&mut fields, "learning_rate_multiplier")?;
        let beta = match method {
            Method::Dpo => positive(&mut fields, "beta")?,
            Method::Supervised => None,
        };
        fields.finish()?;
        Ok(Self { epochs, batch, multiplier, beta })
    }
}

fn is_auto(value: &Value) -> bool {
    value.as_str() == Some("auto")
}

fn whole(fields: &mut Fields, name: &str, most: u64) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.value(name).filter(|value| !is_auto(value)) else { return Ok(None) };
    let number = value.as_u64().filter(|number| (1..=most).contains(number));
    let path = fields.path(name);
    number.map(Some).ok_or_else(|| {
        let text =
            format!("{path} is {}, but must be \"auto\" or 1 to {most}", shortened(&value.to_string()));
        ApiError::field(path, text)
    })
}

fn positive(fields: &mut Fields, name: &str) -> Result<Option<f64>, ApiError> {
    let Some(value) = fields.value(name).filter(|value| !is_auto(value)) else { return Ok(None) };
    let number = value.as_f64().filter(|number| *number > 0.0 && *number <= 1e6);
    let path = fields.path(name);
    number.map(Some).ok_or_else(|| {
        let shown = shortened(&value.to_string());
        ApiError::field(
            path.clone(),
            format!("{path} is {shown}, but must be \"auto\" or above 0, up to 1000000"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: Value) -> Result<Asked, ApiError> {
        let mut fields = json!({"model": "demo", "training_file": "file-1"});
        for (name, value) in more.as_object().unwrap() {
            fields[name] = value.clone();
        }
        Asked::read(Fields::of("", fields).unwrap())
    }

    fn examined(rows: u64, keys: &[&str]) -> Examined {
        let keys = keys.iter().map(|key| (*key).to_owned()).collect();
        Examined { rows, keys, batch_size: 2, ..Examined::default() }
    }

    #[test]
    fn epochs_become_iterations_by_the_rows() {
        let lines = |more: Value, examined: Examined| -> Vec<String> {
            let (text, _) = read(more).unwrap().configuration(&examined).unwrap();
            text.lines().map(str::to_owned).collect()
        };
        assert_eq!(
            lines(json!({}), examined(10, &[])),
            ["batch_size: 4", "iters: 9", "learning_rate: 0.00001"]
        );
        assert_eq!(
            lines(json!({}), examined(2, &[])),
            ["batch_size: 2", "iters: 3", "learning_rate: 0.00001"]
        );
        let chosen = json!({"n_epochs": 2, "batch_size": 5, "learning_rate_multiplier": 2});
        assert_eq!(
            lines(json!({"hyperparameters": chosen, "seed": 7}), examined(10, &[])),
            ["batch_size: 5", "iters: 4", "learning_rate: 0.00002", "seed: 7"]
        );
        let dpo = json!({"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "n_epochs": "auto"}}});
        assert_eq!(
            lines(json!({"method": dpo}), examined(4, &[])),
            ["preference: dpo", "batch_size: 4", "iters: 3", "learning_rate: 0.00001", "beta: 0.5"]
        );
        assert_eq!(
            lines(
                json!({"configuration": {"batch_size": 2, "num_layers": 2}}),
                examined(10, &["batch_size", "num_layers"])
            ),
            ["iters: 15", "learning_rate: 0.00001", "\"batch_size\": 2", "\"num_layers\": 2"]
        );
        assert_eq!(
            lines(
                json!({"configuration": "iters: 3"}),
                examined(10, &["iters", "batch_size", "learning_rate"])
            ),
            ["iters: 3"]
        );
    }

    #[test]
    fn what_was_asked_is_noted() {
        let asked =
            read(json!({"metadata": {"who": "ann"}, "suffix": "poet", "validation_file": "file-2"})).unwrap();
        let labels = asked.configuration(&examined(10, &["iters"])).unwrap().1;
        assert_eq!(labels["metadata.who"], "ann");
        assert_eq!(
            (labels[label::SUFFIX].as_str(), labels[label::VALIDATION_FILE].as_str()),
            ("poet", "file-2")
        );
        assert!(!labels.contains_key(label::EPOCHS), "iters were given");
    }

    #[test]
    fn stages_are_a_number_or_as_many_as_it_takes() {
        for (more, stages) in [
            (json!({}), 0),
            (json!({"stages": "auto"}), 0),
            (json!({"stages": 8}), 8),
            (json!({"stages": 1, "workers": 3}), 1),
            (json!({"stages": 2, "workers": 4}), 2),
        ] {
            assert_eq!(read(more).unwrap().stages, stages);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, param) in [
            (json!({"model": " "}), "model"),
            (json!({"training_file": 7}), "training_file"),
            (json!({"hyperparameters": {"n_epochs": 0}}), "hyperparameters.n_epochs"),
            (json!({"hyperparameters": {"n_epochs": 1.5}}), "hyperparameters.n_epochs"),
            (json!({"hyperparameters": {"batch_size": "many"}}), "hyperparameters.batch_size"),
            (
                json!({"hyperparameters": {"learning_rate_multiplier": -1}}),
                "hyperparameters.learning_rate_multiplier",
            ),
            (json!({"hyperparameters": {"beta": 1}}), "hyperparameters.beta"),
            (
                json!({"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}}),
                "hyperparameters",
            ),
            (json!({"method": {"type": "reinforcement"}}), "method.type"),
            (json!({"method": {}}), "method.type"),
            (json!({"method": {"type": "dpo", "supervised": {}}}), "method.supervised"),
            (json!({"integrations": [{"type": "wandb"}]}), "integrations"),
            (json!({"suffix": ""}), "suffix"),
            (json!({"seed": -1}), "seed"),
            (json!({"metadata": {"a": 1}}), "metadata"),
            (json!({"metadata": {"a": "x".repeat(513)}}), "metadata"),
            (json!({"workers": 9}), "workers"),
            (json!({"stages": 0}), "stages"),
            (json!({"stages": 9}), "stages"),
            (json!({"stages": 1.5}), "stages"),
            (json!({"stages": "two"}), "stages"),
            (json!({"stages": 2, "workers": 3}), "stages"),
            (json!({"model": "x".repeat(5000)}), "model"),
            (json!({"share_percent": 0}), "share_percent"),
            (json!({"configuration": [1]}), "configuration"),
            (json!({"typo": 1}), "typo"),
        ] {
            assert_eq!(read(more.clone()).err().unwrap().param.as_deref(), Some(param), "{more}");
        }
        for (more, examined, param) in [
            (json!({"hyperparameters": {"n_epochs": 1}}), examined(10, &["iters"]), "n_epochs"),
            (json!({"seed": 1}), examined(10, &["seed"]), "seed"),
            (
                json!({"hyperparameters": {"learning_rate_multiplier": 1}}),
                examined(10, &["lr_schedule"]),
                "learning_rate_multiplier",
            ),
            (json!({"hyperparameters": {"batch_size": 11}}), examined(10, &[]), "batch_size"),
            (json!({}), Examined { packing: true, ..examined(10, &[]) }, "configuration.iters"),
        ] {
            let error = read(more.clone()).unwrap().configuration(&examined).err().unwrap();
            assert_eq!(error.param.as_deref(), Some(param), "{more}");
        }
    }
}
