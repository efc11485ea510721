//! Which tensors the fused model has and what each is made from, before anything is computed.

use super::FuseError;
use crate::config::{AdapterConfig, FineTuneType};
use mlxnode_checkpoint::{
    Adapter, AdapterError, Change, Checkpoint, Expression, QuantSetting, TensorEntry, TensorFileHeader,
};
use mlxnode_compute::LayerRange;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What is done, in the order of the model's names.
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// The file with the adapter's tensors, and the factor on its changes.
    pub(super) file: PathBuf,
    pub(super) scale: f32,
}

/// Tensors of the fused model.
pub(super) enum Step {
    /// A tensor as it is.
    Copy(TensorEntry),
    /// A tensor of a full fine-tune.
    Replace { name: String },
    /// The matrix of a module: unpacked if it is packed, changed, and packed again.
    Matrix(Box<Matrix>),
}

/// A matrix that is not copied.
pub(super) struct Matrix {
    /// Its path in the files.
    pub(super) path: String,
    pub(super) weight: Source,
    pub(super) packed: Option<Packed>,
    pub(super) change: Option<Change>,
}

/// A packed matrix's other tensors.
pub(super) struct Packed {
    pub(super) scales: Source,
    pub(super) biases: Option<Source>,
    pub(super) setting: QuantSetting,
}

/// Where a tensor is.
#[derive(Clone)]
pub(super) enum Source {
    Base(TensorEntry),
    /// In the file of a full fine-tune.
    Adapter(String),
}

/// Reads what the adapter is and checks it against the model.
pub(super) fn plan(checkpoint: &Checkpoint, adapter: &Path, dequantize: bool) -> Result<Plan, FuseError> {
    let config = adapter.join("adapter_config.json");
    let is_peft = !adapter.join("adapters.safetensors").is_file();
    if !is_peft && config.is_file() {
        let text = std::fs::read_to_string(&config).map_err(super::error::disk(&config))?;
        let read = AdapterConfig::from_json(&text, &config.display().to_string())?;
        if read.fine_tune_type == FineTuneType::Full {
            return full(checkpoint, adapter.join("adapters.safetensors"), dequantize);
        }
    }
    let adapter = Adapter::open(adapter, checkpoint)?;
    let steps = steps(checkpoint, adapter.changes, &BTreeSet::new(), dequantize)?;
    Ok(Plan { steps, file: adapter.file, scale: adapter.scale })
}

/// The weights of a full fine-tune in the place of the model's.
fn full(checkpoint: &Checkpoint, file: PathBuf, dequantize: bool) -> Result<Plan, FuseError> {
    let header = TensorFileHeader::read(&file).map_err(AdapterError::from)?;
    let by_name: BTreeMap<&str, &TensorEntry> =
        checkpoint.tensors().map(|(_, entry)| (entry.stored_name.as_str(), entry)).collect();
    let mut problems = Vec::new();
    for (name, (_, shape)) in &header.tensors {
        match by_name.get(name.as_str()) {
            None => problems.push(format!("the model has no {name}")),
            Some(entry) if entry.shape != *shape => {
                problems.push(format!("{name} has shape {shape:?}, but the model's has {:?}", entry.shape));
            }
            Some(_) => {}
        }
    }
    if header.tensors.is_empty() {
        problems.push("there are none".to_owned());
    }
    if !problems.is_empty() {
        problems.truncate(8);
        return Err(FuseError::Unfit { path: file, problems });
    }
    let replaced = header.tensors.keys().cloned().collect();
    let steps = steps(checkpoint, BTreeMap::new(), &replaced, dequantize)?;
    Ok(Plan { steps, file, scale: 1.0 })
}

fn steps(
    checkpoint: &Checkpoint,
    mut changes: BTreeMap<String, Change>,
    replaced: &BTreeSet<String>,
    dequantize: bool,
) -> Result<Vec<Step>, FuseError> {
    let shard = checkpoint.shard_tensors(LayerRange::new(0, checkpoint.spec().layer_count()))?;
    let source = |entry: &TensorEntry| match replaced.contains(&entry.stored_name) {
        true => Source::Adapter(entry.stored_name.clone()),
        false => Source::Base(entry.clone()),
    };
    // Tensors that go into matrices, by their names in the files.
    let (mut used, mut matrices, mut seen) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
    for module in &shard.modules {
        let path = &module.module.path;
        if !seen.insert(path.clone()) {
            continue; // a tied embedding is there twice
        }
        let change = changes.remove(path);
        if change.is_none() && !(dequantize && module.quantization.is_some()) {
            continue;
        }
        let layout = || FuseError::Layout { module: path.clone(), folder: checkpoint.folder().into() };
        let as_stored = |part: &str| match checkpoint.weights().get(&format!("{path}.{part}"))?.expression() {
            Expression::Stored(entry) => Some(entry.clone()),
            _ => None,
        };
        let weight = as_stored("weight").filter(|_| module.turned.is_none()).ok_or_else(layout)?;
        let stored_path = weight.stored_name.strip_suffix(".weight").ok_or_else(layout)?.to_owned();
        used.insert(weight.stored_name.clone());
        let packed = match module.quantization {
            None => None,
            Some(setting) => {
                let scales = as_stored("scales").ok_or_else(layout)?;
                let biases = as_stored("biases");
                used.insert(scales.stored_name.clone());
                used.extend(biases.as_ref().map(|biases| biases.stored_name.clone()));
                let biases = biases.as_ref().map(source);
                Some(Packed { scales: source(&scales), biases, setting })
            }
        };
        let first = weight.stored_name.clone();
        matrices.insert(first, Matrix { path: stored_path, weight: source(&weight), packed, change });
    }
    if let Some(path) = changes.into_keys().next() {
        return Err(FuseError::Layout { module: path, folder: checkpoint.folder().into() });
    }
    let mut steps = Vec::new();
    for (_, entry) in checkpoint.tensors() {
        let name = &entry.stored_name;
        if let Some(matrix) = matrices.remove(name) {
            steps.push(Step::Matrix(Box::new(matrix)));
        } else if !used.contains(name) {
            steps.push(match replaced.contains(name) {
                true => Step::Replace { name: name.clone() },
                false => Step::Copy(entry.clone()),
            });
        }
    }
    Ok(steps)
}
