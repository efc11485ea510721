//! Which parts of a model are trained, and what they begin with.

mod beginning;
mod order;
mod share;

pub(crate) use beginning::begin_part;
pub use beginning::{Beginning, begin, resume};
pub(crate) use share::{Held, Share, ShareError};

use crate::{FineTuneType, Layers, TrainingConfig};
use mlxnode_checkpoint::ModelSpec;
use mlxnode_checkpoint::layout::{Module, ModuleKind};
use mlxnode_engine::tuning::{LowRank, Plan, TuneError, Tuning};
use std::collections::BTreeSet;

/// A model of which not that can be trained what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ParameterError {
    /// More blocks than there are.
    #[error("num_layers is {asked}, but the model has {found} layers; take at most that, or -1 for all")]
    Layers {
        /// What was asked for.
        asked: usize,
        /// How many there are.
        found: usize,
    },
    /// Keys without modules.
    #[error("lora_parameters.keys: the chosen layers have no {}; they have {known}", keys.join(", "))]
    Keys {
        /// The keys that match nothing.
        keys: Vec<String>,
        /// What would match.
        known: String,
    },
    /// The file with an adapter to go on from does not fit.
    #[error("resume_adapter_file {file}: {problems}")]
    Resume {
        /// The file.
        file: String,
        /// What does not fit.
        problems: String,
    },
    /// The model cannot be trained so.
    #[error(transparent)]
    Tune(#[from] TuneError),
    /// MLX refused.
    #[error(transparent)]
    Device(#[from] mlxnode_mlx::Error),
}

/// What `config` trains of a model: mlx-lm's modules, in its order.
///
/// # Errors
///
/// When the model does not have what is asked for.
pub fn plan(tuning: &Tuning, config: &TrainingConfig) -> Result<Plan, ParameterError> {
    let modules: Vec<Module> = tuning.modules().iter().map(|shard| shard.module.clone()).collect();
    match config.fine_tune_type {
        FineTuneType::Full => {
            let weights: Vec<&str> = tuning.weights().collect();
            chosen(tuning.spec(), config, &modules, &BTreeSet::new(), &weights)
        }
        _ => chosen(tuning.spec(), config, &modules, &tuning.changeable()?, &[]),
    }
}

/// The same out of `modules`, of which those in `changeable` have a place for changes of low rank, and which have these `weights` as they are.
fn chosen(
    spec: &ModelSpec,
    config: &TrainingConfig,
    modules: &[Module],
    changeable: &BTreeSet<String>,
    weights: &[&str],
) -> Result<Plan, ParameterError> {
    let all = spec.layer_count();
    let first = match config.layers {
        Layers::All => 0,
        Layers::Last(count) if count > all => {
            return Err(ParameterError::Layers { asked: count, found: all });
        }
        Layers::Last(count) => all - count,
    };
    let keys = config.lora.keys.as_deref();
    let is_magnitude = match config.fine_tune_type {
        FineTuneType::Lora => false,
        FineTuneType::Dora => true,
        FineTuneType::Full => return Ok(chosen_weights(weights, first, keys)),
    };
    let paths = paths(modules, changeable, first, keys)?;
    let low_rank = |path| LowRank {
        path,
        rank: config.lora.rank,
        scale: config.lora.scale as f32,
        magnitudes: is_magnitude,
    };
    let modules = paths.into_iter().map(low_rank).collect();
    Ok(Plan::LowRank { modules, dropout: config.lora.dropout as f32 })
}

/// The tensors of the last blocks. `keys` are ours: tensors or modules of the whole model besides, by their beginnings.
fn chosen_weights(weights: &[&str], first: usize, keys: Option<&[String]>) -> Plan {
    let is_named = |name: &str| {
        keys.is_some_and(|keys| {
            let named = |key: &String| name.strip_prefix(key.as_str());
            keys.iter().filter_map(named).any(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    };
    let chosen = |name: &&str| place(name).is_some_and(|(layer, _)| layer >= first) || is_named(name);
    let mut names: Vec<String> = weights.iter().copied().filter(chosen).map(str::to_owned).collect();
    names.sort();
    Plan::Weights(names)
}

/// The layer of a path and its name there.
fn place(path: &str) -> Option<(usize, &str)> {
    let (layer, name) = path.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, name))
}

/// The modules, in mlx-lm's order: those of the layers, layer by layer, then those that are named by their whole path.
fn paths(
    modules: &[Module],
    changeable: &BTreeSet<String>,
    first: usize,
    keys: Option<&[String]>,
) -> Result<Vec<String>, ParameterError> {
    let has_matrix = |kind: &ModuleKind| {
        matches!(kind, ModuleKind::Linear { .. } | ModuleKind::Experts { .. } | ModuleKind::Embedding { .. })
    };
    let modules = modules.iter().filter(|module| has_matrix(&module.kind));
    let modules: Vec<&str> = modules.map(|module| module.path.as_str()).collect();
    let (mut in_layers, mut by_path, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
    let (mut known, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for (index, path) in modules.iter().enumerate() {
        if !seen.insert(*path) {
            continue; // a tied embedding is there twice
        }
        let named = |name: &str| keys.is_some_and(|keys| keys.iter().any(|key| key == name));
        if let Some((layer, name)) = place(path).filter(|(layer, _)| *layer >= first) {
            known.insert(name);
            let is_chosen = match keys {
                None => changeable.contains(*path),
                Some(_) => named(name),
            };
            if is_chosen {
                used.insert(name);
                in_layers.push((layer, order::rank(name, index), (*path).to_owned()));
                continue;
            }
        }
        if place(path).is_none() {
            known.insert(path);
        }
        if named(path) {
            used.insert(path);
            by_path.push((order::rank_by_path(path, index), (*path).to_owned()));
        }
    }
    let lost: Vec<String> =
        keys.unwrap_or_default().iter().filter(|key| !used.contains(key.as_str())).cloned().collect();
    if !lost.is_empty() {
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        return Err(ParameterError::Keys { keys: lost, known });
    }
    in_layers.sort();
    by_path.sort();
    let in_layers = in_layers.into_iter().map(|(.., path)| path);
    Ok(in_layers.chain(by_path.into_iter().map(|(_, path)| path)).collect())
}
